"""The verbs: each a short story, told in the order in which things happen."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch
from timm.utils.random import random_seed
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from fxsplit.capture.tracer import Leaf
from fxsplit.capture.tracing import Trace
from fxsplit.capture.tracing import trace as trace_model
from fxsplit.data import datasets
from fxsplit.data.images import Data
from fxsplit.data.loader import Loader
from fxsplit.errors import UsageError
from fxsplit.execute.executor import Executor
from fxsplit.execute.passes import Pass, names_of, passes_for
from fxsplit.measuring.environment import environment
from fxsplit.measuring.op_costs import measure as measure_ops
from fxsplit.measuring.phase_costs import update_seconds
from fxsplit.models import registry
from fxsplit.models.examples import Example, example, takes_images
from fxsplit.models.units import units_of
from fxsplit.plan.budget import fit
from fxsplit.plan.forecast import Forecast
from fxsplit.plan.forecast import forecast as forecast_graphs
from fxsplit.plan.partition import Partition, most_partitions
from fxsplit.plan.partition import partition as partition_graphs
from fxsplit.plan.planfile import PlanFile, read_file, write_file
from fxsplit.plan.schedule import Plan
from fxsplit.plan.schedule import schedule as make_plan
from fxsplit.proving.checking import check_model
from fxsplit.proving.first_batch import prove, prove_batch
from fxsplit.proving.forecasts import check_forecast
from fxsplit.proving.workers import call_each
from fxsplit.report import CheckRecord, EpochRecord, ForecastRecord, Inspection, Observer, RunReport
from fxsplit.spec import RunSpec
from fxsplit.training.batchnorm import check_batches
from fxsplit.training.cache import GIB, Cache
from fxsplit.training.exits import Exits
from fxsplit.training.optimizers import make_optimizer, make_scheduler, slots_of
from fxsplit.training.run_folder import RunFolder
from fxsplit.training.soft_targets import SoftTargets
from fxsplit.training.trainer import MakeCache, Trainer, logits_of

Moved = TypeVar("Moved", nn.Module, torch.Tensor)

DEFAULT_PARTS = 8
# Of the activations of standard training: what l2l keeps within where it can.
L2L_MEMORY = 0.6


def train(spec: RunSpec, observer: Observer | None = None) -> RunReport:
    """Train a model as `spec` says, standard or layer-to-layer, and leave a run folder behind.

    When it is interrupted, the folder gets the weights and the epochs so far before KeyboardInterrupt goes on.
    Raises a FxsplitError for anything that the user can mend.
    """
    observer = observer or Observer()
    began = perf_counter()
    device = choose_device(spec.device)
    with determinism(spec.seed, spec.deterministic):
        data = _load(spec, observer).to(device)
        model = _build(spec, data, device)
        if not takes_images(model):
            raise UsageError(
                f"train takes image classifiers, and {spec.model!r} takes no images; give it its own data in a loop of "
                "your own around fxsplit.Executor"
            )
        shape = (data.channels, data.img_size, data.img_size)
        trace = trace_model(model, (_in_layout(spec, torch.empty(2, *shape, device=device)),))
        passes = _passes(spec, device)
        if passes:
            observer.notice("1x1 convolutions run as matrix products: faster, and equal to the model within rounding")
        if spec.balance == "seconds" and spec.plan is None:
            images = _in_layout(spec, torch.rand(max(2, spec.batch_size), *shape, device=device))
            trace = measure_ops(trace, (images,), device=device, passes=passes)
        plan = _plan(spec, trace, observer)
        executor = Executor(trace, plan.partitions, passes=passes)
        if spec.settled_dtype != "same":
            executor.settled_dtype = getattr(torch, spec.settled_dtype)
        trainer = _trainer(spec, trace, executor, plan, data, observer)
        check_batches(trace, plan, trainer.loader, grad_accum_steps=spec.grad_accum_steps)
        surroundings = environment(device)
        folder = None if spec.dry_run else _folder(spec, plan, trace, surroundings)
        observer.run_started(
            folder=str(folder.path) if folder else "",
            device=str(device),
            plan=plan,
            train_images=len(data.train),
            test_images=len(data.test),
        )
        setup_seconds = perf_counter() - began
        prove_seconds = _prove_first_batch(spec, trace, trainer, observer) if spec.prove else 0.0
        if spec.torchcompile:
            # Compilers round as they like, so the proof comes first.
            executor.compile_stages(spec.torchcompile)
        records: list[EpochRecord] = []
        status = "failed"
        try:
            for record in islice(trainer.epochs(), 1 if spec.dry_run else None):
                records.append(record)
                if folder:
                    folder.add(record)
            status = "finished"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            report = RunReport(
                status=status,
                spec=spec.to_flat(),
                environment=surroundings,
                graph_digest=trace.train.digest(),
                plan=plan,
                passes=names_of(passes),
                epochs=tuple(records),
                setup_seconds=setup_seconds,
                prove_seconds=prove_seconds,
                total_seconds=perf_counter() - began,
                folder=str(folder.path) if folder else "",
            )
            if folder:
                folder.finish(report, _inspection(spec, trace, plan), model)
    return report


def inspect(
    spec: RunSpec, *, measured: bool = False, save_to: str | None = None, observer: Observer | None = None
) -> Inspection:
    """The partitions of a model, the phases of its schedule and a forecast of what they cost.

    Without weights, data or a device, unless ops are to be `measured` (or partitions balanced by seconds): then each
    is timed on the device of `spec`, in a model with random weights. With `save_to` the plan is also written there,
    as a file to edit and to train by.
    """
    classes, img_size = datasets.describe(spec.data, img_size=spec.img_size)
    measured = measured or spec.balance == "seconds"
    device = choose_device(spec.device) if measured else torch.device("meta")
    make = registry.build if measured else registry.sketch
    model = make(spec.model, num_classes=classes, img_size=img_size, stem=spec.stem, drop_path=spec.drop_path)
    given = _example(spec, model, img_size, device)
    trace = trace_model(_in_layout(spec, model.to(device)), given.args, given.kwargs)
    if measured:
        trace = measure_ops(trace, given.args, given.kwargs, device=device, passes=_passes(spec, device))
    plan = _plan(spec, trace, observer or Observer())
    if save_to is not None:
        write_file(_plan_file(plan, trace, spec.model), save_to)
    return _inspection(spec, trace, plan, _forecast(spec, plan, trace, measured=measured))


def _example(spec: RunSpec, model: nn.Module, img_size: int, device: torch.device) -> Example:
    """A batch of images as `train` would give them, or whatever else the model takes."""
    if not takes_images(model):
        return example(spec.model, model, batch_size=spec.batch_size, img_size=img_size, training=True, device=device)
    return Example(args=(_in_layout(spec, torch.rand(spec.batch_size, 3, img_size, img_size, device=device)),))


def _forecast(spec: RunSpec, plan: Plan, trace: Trace, *, measured: bool) -> Forecast:
    def optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
        return _optimizer(spec)(nn.ParameterList(parameters))

    return forecast(
        plan,
        trace,
        batch_size=spec.batch_size,
        optimizer_slots=slots_of(optimizer),
        update_seconds=update_seconds(trace.model.parameters(), make_optimizer=optimizer) if measured else None,
    )


def check(
    specs: Sequence[str],
    *,
    structure_only: bool = False,
    parts: int = 4,
    img_size: int | None = None,
    channels_last: bool = False,
    jobs: int = 1,
    observer: Observer | None = None,
) -> tuple[CheckRecord, ...]:
    """Prove that partitions compute what the models compute, bit for bit; one record a model, in the order of `specs`.

    `specs` may hold wildcards, such as `timm:resnet*`. Each model gets random weights and inputs of its own size
    (`img_size` otherwise). With `structure_only` it is captured and cut on the meta device, and nothing is computed.
    With `channels_last` all runs as in `train` with that option, and each matrix product is held to the convolution in
    its place. `jobs` models are checked at a time. Raises UsageError for a name that means no model; what is wrong with
    a model is in its record.
    """
    observer = observer or Observer()
    names = list(dict.fromkeys(name for spec in specs for name in registry.expand(spec)))
    call = partial(
        check_model, structure_only=structure_only, parts=parts, img_size=img_size, channels_last=channels_last
    )
    found: dict[str, CheckRecord] = {}
    for record in call_each(call, names, jobs=jobs, died=_died):
        found[record.model] = record
        observer.model_checked(record, len(names))
    return tuple(found[name] for name in names)


def check_forecasts(
    specs: Sequence[str],
    *,
    schedule: str = "settle",
    parts: int = DEFAULT_PARTS,
    img_size: int | None = None,
    batch_size: int = 32,
    device: str = "auto",
    channels_last: bool = False,
    observer: Observer | None = None,
) -> tuple[ForecastRecord, ...]:
    """Hold the forecast of every phase of `schedule` against a few steps of it; one record a model.

    `specs` may hold wildcards. Each model has random weights and is trained by AdamW; one runs at a time, so that
    none slows another down. With `channels_last` all runs as in `train` with that option. Raises UsageError for a name
    that means no model and for a device that is not there.
    """
    observer = observer or Observer()
    place = choose_device(device)
    names = list(dict.fromkeys(name for spec in specs for name in registry.expand(spec)))
    records = []
    for name in names:
        record = check_forecast(
            name,
            schedule=schedule,
            parts=parts,
            img_size=img_size,
            batch_size=batch_size,
            device=place,
            channels_last=channels_last,
        )
        records.append(record)
        observer.model_checked(record, len(names))
    return tuple(records)


def _died(spec: str) -> CheckRecord:
    return CheckRecord(model=spec, refusal="the process that checked it died, as it does when memory runs out")


def trace(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    leaves: Sequence[Leaf] = (),
    verify: bool = False,
) -> Trace:
    """Capture `model` as it would run on `args` and `kwargs`, in training and in evaluation.

    Only shapes and types are looked at, so tensors may be on the meta device and the model needs no weights; give at
    least two samples. `leaves` shall stay one op each: dotted paths or classes of modules, and functions. With `verify`
    the captured ops are run on `args`, which then need numbers, and held against the model as `prove` does.

    Raises TraceError when the model itself, and not just a module in it, branches on data or cannot run on `args`, and
    ProofError when it is captured wrong.
    """
    found = trace_model(model, args, kwargs, leaves=leaves)
    if verify:
        most = most_partitions(found.train, found.eval)
        prove(model, Executor(found, partition(found, count=min(DEFAULT_PARTS, most))), args, kwargs)
    return found


def partition(
    trace: Trace, *, count: int | None = None, at: Sequence[str] = (), balance: str = "macs", by: str = "op"
) -> tuple[Partition, ...]:
    """Divide a traced model into `count` partitions of equal weight, or before the modules named in `at`.

    See `fxsplit.plan.partition.partition`.
    """
    units = _units(trace, by)
    return partition_graphs(trace.train, trace.eval, count=count, at=at, balance=balance, by=by, units=units)


def forecast(
    plan: Plan, trace: Trace, *, batch_size: int, optimizer_slots: int = 2, update_seconds: float | None = None
) -> Forecast:
    """What each phase of a plan will cost: from shapes alone, or if `measure` made the trace from timed ops.

    See `fxsplit.plan.forecast.forecast`.
    """
    return forecast_graphs(
        plan,
        trace.train,
        trace.eval,
        batch_size=batch_size,
        optimizer_slots=optimizer_slots,
        update_seconds=update_seconds,
    )


def save_plan(plan: Plan, trace: Trace, path: str) -> None:
    """Write a plan of a traced model as a file that people can read and edit, and that `load_plan` reads."""
    write_file(_plan_file(plan, trace, type(trace.model).__name__), path)


def load_plan(path: str, trace: Trace, observer: Observer | None = None) -> Plan:
    """The plan in a file, for a traced model. It need not be the one for which the file was made, if its cuts fit.

    Raises UsageError when the file cannot be read or is no plan, PartitionError when it does not fit the model; both
    tell all that is wrong at once.
    """
    file = read_file(path, graphs=(trace.train, trace.eval))
    if observer and file.graph not in ("", trace.train.digest()):
        observer.notice(f"the plan {path!r} was made for another model, but fits this one")
    return file.plan(trace.train, trace.eval)


def _units(trace: Trace, by: str) -> dict[str, str]:
    return units_of(trace.model) if by == "block" else {}


def _load(spec: RunSpec, observer: Observer) -> Data:
    return datasets.load(
        spec.data,
        img_size=spec.img_size,
        data_dir=spec.data_dir,
        seed=spec.seed,
        train_limit=spec.train_limit,
        workers=spec.workers,
        notice=observer.notice,
    )


def _build(spec: RunSpec, data: Data, device: torch.device) -> nn.Module:
    model = registry.build(
        spec.model,
        num_classes=len(data.classes),
        img_size=data.img_size,
        pretrained=spec.pretrained,
        stem=spec.stem,
        drop_path=spec.drop_path,
    )
    return _in_layout(spec, model.to(device))


def _in_layout(spec: RunSpec, given: Moved) -> Moved:
    """A model or images, in the order in which the run keeps images."""
    return given.to(memory_format=torch.channels_last) if spec.channels_last else given


def _passes(spec: RunSpec, device: torch.device) -> tuple[Pass, ...]:
    return passes_for(device, channels_last=spec.channels_last)


def _plan(spec: RunSpec, trace: Trace, observer: Observer) -> Plan:
    plan = _given_plan(spec, trace, observer)
    budget = spec.memory_budget
    if budget is None and spec.schedule != "l2l":
        return plan
    return fit(
        plan,
        trace.train,
        trace.eval,
        budget=L2L_MEMORY if budget is None else budget,
        batch_size=spec.batch_size // spec.grad_accum_steps,
        optimizer_slots=slots_of(lambda parameters: _optimizer(spec)(nn.ParameterList(parameters))),
        strict=budget is not None,
    )


def _given_plan(spec: RunSpec, trace: Trace, observer: Observer) -> Plan:
    if spec.plan is not None:
        return load_plan(spec.plan, trace, observer)
    count = spec.parts
    if count is None and not spec.at:
        most = most_partitions(trace.train, trace.eval, by=spec.by, units=_units(trace, spec.by))
        count = min(DEFAULT_PARTS, most)
    partitions = partition(trace, count=count, at=spec.at, balance=spec.balance, by=spec.by)
    return make_plan(
        spec.schedule,
        partitions=partitions,
        epochs=spec.epochs,
        epochs_total=spec.epochs_total,
        start=spec.settle_from,
        stop=spec.settle_until,
        share=spec.settle_share,
    )


def _plan_file(plan: Plan, trace: Trace, model: str) -> PlanFile:
    return PlanFile.of(plan, model=model, graph=trace.train.digest(), torch=torch.__version__)


def _inspection(spec: RunSpec, trace: Trace, plan: Plan, ahead: Forecast | None = None) -> Inspection:
    return Inspection(
        model=spec.model,
        input_shape=trace.train.inputs[0].shape or (),
        graph=trace.train,
        eval_graph=trace.eval,
        classes={path: type(module).__name__ for path, module in trace.model.named_modules(remove_duplicate=False)},
        plan=plan,
        tied=trace.tied,
        opaque=trace.opaque,
        checkpoints=trace.checkpoints,
        forecast=ahead,
    )


def _trainer(spec: RunSpec, trace: Trace, executor: Executor, plan: Plan, data: Data, observer: Observer) -> Trainer:
    return Trainer(
        executor=executor,
        plan=plan,
        loader=Loader(
            train=data.train,
            test=data.test,
            batch_size=spec.batch_size,
            seed=spec.seed,
            augment=spec.augment,
            views=None if spec.augment == "none" else spec.cache_views,
            mean=spec.mean,
            std=spec.std,
            channels_last=spec.channels_last,
            limit=1 if spec.dry_run else spec.train_batches_per_epoch,
            test_limit=1 if spec.dry_run else None,
        ),
        make_optimizer=partial(_optimizer(spec), trace.model),
        make_scheduler=partial(
            make_scheduler,
            name=spec.sched,
            epochs=plan.epochs,
            warmup_epochs=spec.warmup_epochs,
            min_lr=spec.min_lr,
            decay_epochs=spec.decay_epochs,
            decay_milestones=spec.decay_milestones,
            decay_rate=spec.decay_rate,
        ),
        make_cache=_make_cache(spec),
        exits=_exits(spec, trace, plan, data),
        smoothing=spec.smoothing,
        soft_targets=(
            SoftTargets(
                len(data.train),
                weight=spec.soft_targets,
                temperature=spec.soft_temperature,
                of_mean=spec.soft_from == "mean",
            )
            if spec.soft_targets
            else None
        ),
        anneal=spec.anneal,
        average=spec.average,
        recalibrate=spec.recalibrate,
        veto=spec.veto,
        clip_grad=spec.clip_grad,
        amp_dtype=getattr(torch, spec.amp_dtype) if spec.amp else None,
        grad_accum_steps=spec.grad_accum_steps,
        log_interval=spec.log_interval,
        observer=observer,
    )


def _prove_first_batch(spec: RunSpec, trace: Trace, trainer: Trainer, observer: Observer) -> float:
    """Hold the executor against the model on the first batch, as the run takes it; the seconds that it took."""
    began = perf_counter()
    trainer.executor.train()
    batch = next(trainer.loader.training(0))
    proof = prove_batch(
        trace.model,
        trainer.executor,
        batch.images,
        batch.labels,
        parts=spec.grad_accum_steps * trainer.plan.phases[0].micro_batches,
        loss=lambda output, labels: cross_entropy(logits_of(output), labels, label_smoothing=spec.smoothing),
        autocast=trainer.autocast,
        notice=observer.notice,
    )
    if proof is not None and proof.varying:
        observer.notice(
            f"two runs of the plain model differ in {len(proof.varying)} of {proof.compared} values of the first "
            "batch; the partitions were held to these within what they vary by themselves"
        )
    return perf_counter() - began


def _exits(spec: RunSpec, trace: Trace, plan: Plan, data: Data) -> Exits | None:
    if not spec.exits:
        return None
    return Exits(
        trace.train,
        plan.partitions,
        count=spec.exits,
        num_classes=len(data.classes),
        weight=spec.exit_weight,
        seed=spec.seed,
        device=data.train.device,
    )


def _make_cache(spec: RunSpec) -> MakeCache | None:
    if spec.cache == "off" or spec.dry_run:
        return None
    return partial(
        Cache,
        place=spec.cache,
        limit_bytes=None if spec.cache_limit is None else int(spec.cache_limit * GIB),
        dtype=None if spec.cache_dtype == "exact" else getattr(torch, spec.cache_dtype),
        folder=str(Path(spec.output).expanduser()),
    )


def _optimizer(spec: RunSpec) -> partial[Optimizer]:
    return partial(make_optimizer, name=spec.opt, lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay)


def _folder(spec: RunSpec, plan: Plan, trace: Trace, surroundings: dict[str, Any]) -> RunFolder:
    folder = RunFolder(
        spec.output, model=spec.model, schedule=plan.schedule, seed=spec.seed, experiment=spec.experiment
    )
    plan_json = _plan_file(plan, trace, spec.model).to_json()
    folder.start(args_yaml=spec.to_yaml(), plan_json=plan_json, environment=surroundings)
    return folder


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is a GPU, else the CPU. Raises UsageError when there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"there is no device {name!r}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; "
            "use --device cpu, or auto"
        )
    return device


@contextmanager
def determinism(seed: int, deterministic: bool) -> Iterator[None]:
    """Seed every generator. With `deterministic` torch refuses kernels that are not; else cuDNN looks for fast ones."""
    random_seed(seed)
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        # cuBLAS reads this when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
