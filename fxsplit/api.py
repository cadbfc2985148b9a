"""The verbs: each a short story, told in the order in which things happen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from time import perf_counter
from typing import Any

import torch
from torch import nn

from fxsplit import assembly
from fxsplit.capture.tracer import Leaf
from fxsplit.capture.tracing import Trace
from fxsplit.capture.tracing import trace as trace_model
from fxsplit.data import datasets
from fxsplit.errors import NoModelError, UsageError
from fxsplit.execute.executor import Executor
from fxsplit.execute.passes import names_of
from fxsplit.measuring.environment import environment
from fxsplit.measuring.op_costs import measure as measure_ops
from fxsplit.models import registry
from fxsplit.models.examples import takes_images
from fxsplit.plan.partition import most_partitions, partition
from fxsplit.plan.planfile import write_file
from fxsplit.proving.checking import check_model
from fxsplit.proving.first_batch import prove
from fxsplit.proving.forecasts import check_forecast
from fxsplit.proving.workers import call_each
from fxsplit.report import CheckRecord, EpochRecord, ForecastRecord, Inspection, Observer, RunReport
from fxsplit.spec import RunSpec
from fxsplit.training.batchnorm import check_batches


def train(spec: RunSpec, observer: Observer | None = None) -> RunReport:
    """Train a model as `spec` says, standard or layer-to-layer, and leave a run folder behind.

    When it is interrupted, the folder gets the weights and the epochs so far before KeyboardInterrupt goes on.
    Raises a FxsplitError for anything that the user can mend.
    """
    observer = observer or Observer()
    began = perf_counter()
    device = assembly.choose_device(spec.device)
    with assembly.determinism(spec.seed, spec.deterministic):
        data = assembly.data(spec, observer).to(device)
        model = assembly.model(spec, data, device)
        if not takes_images(model):
            raise UsageError(
                f"train takes image classifiers, and {spec.model!r} takes no images; give it its own data in a loop of "
                "your own around fxsplit.Executor"
            )
        shape = (data.channels, data.img_size, data.img_size)
        trace = trace_model(model, (assembly.in_layout(spec, torch.empty(2, *shape, device=device)),))
        passes = assembly.passes(spec, device)
        if passes:
            observer.notice("1x1 convolutions run as matrix products: faster, and equal to the model within rounding")
        if spec.balance == "seconds" and spec.plan is None:
            images = assembly.in_layout(spec, torch.rand(max(2, spec.batch_size), *shape, device=device))
            trace = measure_ops(trace, (images,), device=device, passes=passes)
        plan = assembly.plan(spec, trace, observer)
        executor = assembly.executor(spec, trace, plan, passes)
        trainer = assembly.trainer(spec, trace, executor, plan, data, observer)
        check_batches(trace, plan, trainer.feed.train_loader, trainer.feed.test_loader)
        surroundings = environment(device)
        folder = None if spec.dry_run else assembly.run_folder(spec, plan, trace, surroundings)
        observer.run_started(
            folder=str(folder.path) if folder else "",
            device=str(device),
            plan=plan,
            train_images=len(data.train),
            test_images=len(data.test),
        )
        setup_seconds = perf_counter() - began
        prove_seconds = assembly.prove_first_batch(spec, trace, trainer, observer) if spec.prove else 0.0
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
                folder.finish(report, assembly.inspection(spec, trace, plan), model)
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
    device = assembly.choose_device(spec.device) if measured else torch.device("meta")
    make = registry.build if measured else registry.sketch
    model = make(spec.model, num_classes=classes, img_size=img_size, stem=spec.stem, drop_path=spec.drop_path)
    given = assembly.example_inputs(spec, model, img_size, device)
    trace = trace_model(assembly.in_layout(spec, model.to(device)), given.args, given.kwargs)
    if measured:
        trace = measure_ops(trace, given.args, given.kwargs, device=device, passes=assembly.passes(spec, device))
    plan = assembly.plan(spec, trace, observer or Observer())
    found = assembly.inspection(spec, trace, plan, assembly.forecast(spec, plan, trace, measured=measured))
    if save_to is not None:
        write_file(found.plan_file, save_to)
    return found


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
    its place. `jobs` models are checked at a time. What is wrong with a model is in its record, also that there is none
    of that name; raises UsageError when no name means a model.
    """
    observer = observer or Observer()
    names = _expanded(specs)
    call = partial(
        check_model, structure_only=structure_only, parts=parts, img_size=img_size, channels_last=channels_last
    )
    found: dict[str, CheckRecord] = {}
    for record in call_each(call, names, jobs=jobs, died=_died):
        found[record.model] = record
        observer.model_checked(record, len(names))
    records = tuple(found[name] for name in names)
    _refuse_unknown(records)
    return records


def check_forecasts(
    specs: Sequence[str],
    *,
    schedule: str = "settle",
    parts: int = assembly.DEFAULT_PARTS,
    img_size: int | None = None,
    batch_size: int = 32,
    device: str = "auto",
    channels_last: bool = False,
    observer: Observer | None = None,
) -> tuple[ForecastRecord, ...]:
    """Hold the forecast of every phase of `schedule` against a few steps of it; one record a model.

    `specs` may hold wildcards. Each model has random weights and is trained by AdamW; one runs at a time, so that
    none slows another down. With `channels_last` all runs as in `train` with that option. Raises UsageError when no
    name means a model and for a device that is not there.
    """
    observer = observer or Observer()
    place = assembly.choose_device(device)
    names = _expanded(specs)
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
    _refuse_unknown(records)
    return tuple(records)


def _expanded(specs: Sequence[str]) -> list[str]:
    """The names of models that specs mean, each once; a wildcard that means none stays, and is told of in its turn."""
    names: dict[str, None] = {}
    for spec in specs:
        try:
            names |= dict.fromkeys(registry.expand(spec))
        except NoModelError:
            names[spec] = None
    return list(names)


def _refuse_unknown(records: Sequence[CheckRecord | ForecastRecord]) -> None:
    """Raise UsageError when there is no model of any of the names."""
    if records and all(record.unknown for record in records):
        raise NoModelError("; ".join(str(record.refusal) for record in records))


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

    Raises TraceError when the model itself, and not just a module in it, branches on data before all else or cannot run
    on `args`, and
    ProofError when it is captured wrong.
    """
    found = trace_model(model, args, kwargs, leaves=leaves)
    if verify:
        count = min(assembly.DEFAULT_PARTS, most_partitions(found))
        prove(model, Executor(found, partition(found, count=count)), args, kwargs)
    return found
