"""Makes the parts of a run from its RunSpec: data, model, plan, executor, trainer. Nothing else reads its fields."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch
from timm.utils.random import random_seed
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

import fxsplit.plan.forecast
from fxsplit import planning, resuming
from fxsplit.caching.cache import CachePolicy
from fxsplit.caching.feed import Feed
from fxsplit.caching.media import GIB
from fxsplit.capture import tracing as capture
from fxsplit.capture.tracing import Trace
from fxsplit.cuda.recorder import CudaRecorder
from fxsplit.cuda.replay import Recordings
from fxsplit.cuda.trial import why_not_replayed
from fxsplit.data import datasets
from fxsplit.data.batch import Batch
from fxsplit.data.decoding import INTERPOLATIONS
from fxsplit.data.images import Data, MemoryImages
from fxsplit.data.loader import Loader
from fxsplit.errors import UsageError
from fxsplit.execute.executor import Executor
from fxsplit.execute.forward import Forward, logits_of
from fxsplit.execute.passes import Pass, names_of, passes_for
from fxsplit.measuring.environment import environment
from fxsplit.measuring.phase_costs import Loss, time_ratio, update_seconds
from fxsplit.models import registry
from fxsplit.models.examples import Example, example, takes_images
from fxsplit.models.weights import load_weights, read_weights
from fxsplit.options import key
from fxsplit.plan import planfile
from fxsplit.plan.budget import fit
from fxsplit.plan.forecast import Forecast
from fxsplit.plan.partition import most_partitions
from fxsplit.plan.planfile import PlanFile
from fxsplit.plan.schedule import Plan, schedule
from fxsplit.proving.first_batch import is_out_of_memory, prove_batch
from fxsplit.proving.replays import differing_replays
from fxsplit.report import Inspection, Observer
from fxsplit.saving.checkpoints import Checkpoints, Found, Place, find_checkpoint
from fxsplit.saving.recorder import Interval, Recorder
from fxsplit.saving.run_folder import RunFolder
from fxsplit.saving.run_state import RunState
from fxsplit.spec import RunSpec
from fxsplit.training.endings import Endings, named_parameters
from fxsplit.training.exits import Exits
from fxsplit.training.objective import Objective
from fxsplit.training.optimizers import make_optimizer, make_scheduler, slots_of
from fxsplit.training.phase_optimizer import MakeScheduler, PhaseOptimizer
from fxsplit.training.plasticity import QUIET_INTERVALS, Plasticity
from fxsplit.training.soft_targets import LastTargets, MeanTargets, SoftTargets
from fxsplit.training.step import Step
from fxsplit.training.trainer import Trainer

Moved = TypeVar("Moved", nn.Module, torch.Tensor)

DEFAULT_PARTS = 8

# Where TF32 is allowed for float32 numbers: products and convolutions on a GPU.
TF32: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
# What a run may take, relative to its time, for a memory aim that nobody insists on.
MOST_TIME = 1.03
# Fields that pretrained weights decide where the user does not, and how these look then.
PREPARED, NOT_GIVEN = ("img_size", "interpolation", "mean", "std"), (None, ())
# Of so many images, at least, the pixels tell one data set from another.
SAMPLED = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Says where a run begins: at its beginning, or where an earlier process of it ended.

    Args:
        spec: what the run is asked for now.
        folder: of the run that goes on; None for a new run.
        found: its checkpoint; None where there is none yet, and the run begins anew.
        plan: that of the checkpoint, for as many epochs as are asked for now.
    """

    spec: RunSpec
    folder: RunFolder | None = None
    found: Found | None = None
    plan: PlanFile | None = None

    @property
    def goes_on(self) -> bool:
        """Whether weights and plan come from a checkpoint."""
        return self.found is not None


def start(spec: RunSpec | None, resume: str | Path | None, observer: Observer) -> Start:
    """Complete what is asked for, find the checkpoint to go on from, and say what differs from what it was asked for.

    The folder is locked from here on. Raises UsageError when there is no such run, when another process goes on with
    it, or when something differs that cannot; DataError when there are checkpoints and none is whole; and what
    `with_preprocessing` raises.
    """
    if spec is not None:
        spec = with_preprocessing(spec, observer)
    if resume is None:
        if spec is None:
            raise UsageError("nothing says what to train: give a spec, or a run to resume")
        return Start(spec=spec)
    path = resuming.run_folder_of(resume)
    folder = RunFolder.reopened(path)
    given = Path(resume).expanduser()
    found = find_checkpoint(given if given.is_file() else path, notice=observer.notice)
    before = resuming.spec_of(path) if found is None else resuming.spec_from(found.data["spec"])
    now = replace(resuming.spec_of(path) if spec is None else spec, output=str(path.parent))
    for sentence in resuming.differing(before, now):
        observer.notice(sentence)
    if found is None:
        observer.notice(f"the run in {str(path)!r} has no checkpoint yet, and begins anew")
        return Start(spec=now, folder=folder)
    saved_plan = planfile.from_dict(found.data["plan"], origin=found.path.name)
    return Start(spec=now, folder=folder, found=found, plan=resuming.lengthened(saved_plan, before, now))


def check_data(start: Start, data: Data, observer: Observer) -> None:
    """Hold the data against those of the run that goes on. Raises UsageError when they are others."""
    if start.found is None:
        return
    before, now = start.found.data["identity"], identity(data)
    for name, noun in IDENTITY.items():
        if before[name] != now[name]:
            raise UsageError(
                f"the data are others than those of the run: {noun} were {before[name]} and are now {now[name]}; "
                "a run goes on with the data that it began with"
            )
    if before["pixels"] != now["pixels"]:
        observer.notice("some images have other pixels than when the run began, and it goes on with those of now")


# What the identity of data consists of, in words.
IDENTITY = {
    "train": "images to train on",
    "test": "images to test on",
    "classes": "classes",
    "img_size": "pixels of a side",
    "channels": "channels",
    "labels": "checksums of the labels",
}


def identity(data: Data) -> dict[str, Any]:
    """Describe data so that others are told from them: counts, checksums of labels and of some pixels in memory."""
    labels = hashlib.sha256()
    pixels = hashlib.sha256()
    for images in (data.train, data.test):
        labels.update(images.labels.cpu().numpy().tobytes())
        if isinstance(images, MemoryImages):
            pixels.update(images.pixels[:: max(1, len(images) // SAMPLED)].cpu().contiguous().numpy().tobytes())
    return {
        "train": len(data.train),
        "test": len(data.test),
        "classes": list(data.classes),
        "img_size": data.img_size,
        "channels": data.channels,
        "labels": labels.hexdigest(),
        "pixels": pixels.hexdigest(),
    }


def restore(run: Recorder, start: Start, observer: Observer) -> None:
    """Restore the state of the run that goes on, if one does. Raises UsageError when it is of another model."""
    if start.found is None:
        return
    place = Place(*start.found.data["place"])
    done = start.plan is not None and place.epoch >= start.plan.epochs
    observer.notice(f"all {place.epoch} epochs are done; more --epochs go on" if done else f"goes on after {place}")
    if later := run.later_than(start.found):
        observer.notice(f"later checkpoints are removed: {', '.join(later)}")
    run.go_on(start.found)


def data(spec: RunSpec, observer: Observer) -> Data:
    """Load the images and labels of a run, on the CPU. Raises UsageError and DataError as `datasets.load` does."""
    return datasets.load(
        spec.data,
        img_size=spec.img_size,
        interpolation=_interpolation(spec),
        data_dir=spec.data_dir,
        seed=spec.seed,
        train_limit=spec.train_limit,
        workers=spec.workers,
        notice=observer.notice,
    )


def _interpolation(spec: RunSpec) -> str:
    return spec.interpolation or INTERPOLATIONS[0]


def with_preprocessing(spec: RunSpec, observer: Observer) -> RunSpec:
    """Add to a spec how images were prepared for its pretrained weights, where it does not say that itself.

    Raises what `registry.preprocessing` raises.
    """
    if not spec.pretrained or all(getattr(spec, name) not in NOT_GIVEN for name in PREPARED):
        return spec
    known = registry.preprocessing(spec.model)
    if known is None:
        if not spec.mean:
            observer.notice(
                f"it is not known how images were prepared for the weights of {spec.model!r}; give --mean and --std"
            )
        return spec
    wanted = {name: getattr(known, name) for name in PREPARED if getattr(spec, name) in NOT_GIVEN}
    if wanted.get("interpolation") not in INTERPOLATIONS:
        wanted.pop("interpolation", None)
    values = ", ".join(
        f"{key(name)} {','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in wanted.items()
    )
    if values:
        observer.notice(f"as the pretrained weights of {spec.model!r} want it, images have {values}; options win")
    return replace(spec, **wanted)


def model(spec: RunSpec, device: torch.device, observer: Observer, *, goes_on: bool = False) -> nn.Module:
    """Build the model of a run, for the classes and sizes of its data, which are not loaded for that.

    It starts from the weights that the spec names, unless the run `goes_on` and has others.

    Raises UsageError when it takes something other than images, and what `registry.build`, `read_weights`,
    `load_weights` and `datasets.describe` raise.
    """
    weights = None if goes_on or spec.initial_checkpoint is None else read_weights(spec.initial_checkpoint)
    classes, img_size = datasets.describe(spec.data, img_size=spec.img_size)
    model = registry.build(
        spec.model,
        num_classes=classes,
        img_size=img_size,
        pretrained=spec.pretrained and not goes_on,
        stem=spec.stem,
        drop_path=spec.drop_path,
    )
    if not takes_images(model):
        raise UsageError(
            f"train takes image classifiers, and {spec.model!r} takes no images; give it its own data in a loop of "
            "your own around fxsplit.Executor"
        )
    if weights is not None:
        observer.notice(load_weights(model, weights, source=str(spec.initial_checkpoint), num_classes=classes))
    return in_layout(spec, model.to(device))


def trace(spec: RunSpec, model: nn.Module, data: Data) -> Trace:
    """Capture the model of a run, with images as it trains on.

    Raises TraceError as `fxsplit.trace` does, and UsageError when the model has fewer class scores than there are
    classes.
    """
    images = torch.empty(2, data.channels, data.img_size, data.img_size, device=data.train.device)
    found = capture.trace(model, (in_layout(spec, images),))
    values = found.train.values
    shape = next((values[name].shape for name in found.train.outputs), None)
    if shape is not None and len(shape) == 2 and shape[1] < len(data.classes):
        raise UsageError(
            f"{spec.model!r} gives {shape[1]} class scores, and {spec.data!r} has {len(data.classes)} classes; a "
            "factory that takes num_classes is told how many"
        )
    return found


def random_images(spec: RunSpec, data: Data) -> torch.Tensor:
    """Draw a batch of the size that the run trains on, to time its ops with; of two images at least."""
    shape = (max(2, spec.batch_size), data.channels, data.img_size, data.img_size)
    return in_layout(spec, torch.rand(shape, device=data.train.device))


def in_layout(spec: RunSpec, given: Moved) -> Moved:
    """Return a model or images in the memory format of the run: channels_last, where it is asked for."""
    return given.to(memory_format=torch.channels_last) if spec.channels_last else given


def passes(spec: RunSpec, device: torch.device) -> tuple[Pass, ...]:
    """Choose the graph passes that a run on this device asks for."""
    return passes_for(device, channels_last=spec.channels_last)


def example_inputs(spec: RunSpec, model: nn.Module, img_size: int, device: torch.device) -> Example:
    """Make a batch of images as `train` would give them, or of whatever else the model takes."""
    if not takes_images(model):
        return example(spec.model, model, batch_size=spec.batch_size, img_size=img_size, training=True, device=device)
    return Example(args=(in_layout(spec, torch.rand(spec.batch_size, 3, img_size, img_size, device=device)),))


def plan(spec: RunSpec, trace: Trace, observer: Observer, saved: PlanFile | None = None) -> Plan:
    """Cut the model, decide which partitions train when, and what is recomputed to keep within memory.

    The plan `saved` of a run that goes on is taken as it is.

    Raises UsageError when the spec or its plan file cannot be followed, and PartitionError when they do not fit the
    model.
    """
    if saved is not None:
        return planning.saved_plan(saved, trace, observer)
    plan = _given_plan(spec, trace, observer)
    phases = (replace(phase, micro_batches=max(phase.micro_batches, spec.grad_accum_steps)) for phase in plan.phases)
    plan = replace(plan, preset=spec.preset, phases=tuple(phases))
    budget = spec.memory_aim if spec.memory_budget is None else spec.memory_budget
    return plan if budget is None else _within(spec, plan, trace, budget)


def _within(spec: RunSpec, plan: Plan, trace: Trace, budget: float) -> Plan:
    return fit(
        plan,
        trace,
        budget=budget,
        batch_size=spec.batch_size,
        micro_batches=spec.grad_accum_steps,
        optimizer_slots=slots_of(partial(_optimizer_of, spec)),
        strict=spec.memory_budget is not None,
    )


def paying_plan(
    spec: RunSpec, trace: Trace, executor: Executor, plan: Plan, data: Data, device: torch.device, observer: Observer
) -> Plan:
    """On a GPU, come only as near to `spec.memory_aim` as some measured steps allow.

    Forecasts from multiply-adds know nothing of how long a GPU waits for its next kernel. On a CPU they are near
    enough, and measured times vary by more than what is asked here: the plan stays as it is, and so it does where the
    run must not depend on measured times. Of runs with CUDA graphs nothing is measured either: their phases recompute
    nothing, which could not be recorded.
    """
    wanted = spec.memory_aim
    phases = (replace(each, recompute=0, segmented=False, micro_batches=spec.grad_accum_steps) for each in plan.phases)
    bare = replace(plan, phases=tuple(phases))
    if device.type != "cuda" or spec.memory_budget is not None or wanted is None or plan == bare:
        return plan
    if spec.cuda_graphs == "on":
        pairs = zip(plan.phases, bare.phases, strict=True)
        return replace(plan, phases=tuple(other if phase.recompute else phase for phase, other in pairs))
    if spec.deterministic:
        return plan
    loss, make_optimizer = _first_batch_loss(spec, data), partial(_optimizer_of, spec)
    shares: dict[Plan, float] = {}
    for share in (wanted, *(each for each in (0.7, 0.8, 0.9) if wanted < each)):
        shares.setdefault(_within(spec, bare, trace, share), share)
    ratios: list[float] = []
    for found, share in shares.items():
        try:
            ratios.append(time_ratio(executor, found, bare, loss, make_optimizer=make_optimizer))
        except torch.OutOfMemoryError:
            return plan  # it is needed
        if ratios[-1] <= MOST_TIME:
            taken, instead = found, f"keeps within {share:g}"
            break
    else:
        taken, instead = bare, "does without"
    if taken != plan:
        observer.notice(
            f"a memory aim of {wanted:g} takes {ratios[0] - 1:.0%} more time on this device, measured, and the run "
            f"{instead}; --memory-budget {wanted:g} holds at any price"
        )
    return taken


def _first_batch_loss(spec: RunSpec, data: Data) -> Loss:
    """Make the loss of the run's first batch, of which each micro-batch is given its share."""
    loader, _ = loaders(spec, data)
    batch = next(loader.batches(0))

    def loss(net: nn.Module, index: int, count: int) -> torch.Tensor:
        part = list(batch.divided(count, batch_size=spec.batch_size))[index]
        with torch.autocast(loader.device.type, dtype=_amp_dtype(spec), enabled=spec.amp):
            mean = cross_entropy(logits_of(net(part.images)), part.labels, label_smoothing=spec.smoothing)
        return mean * (len(part) / len(batch))

    return loss


def _amp_dtype(spec: RunSpec) -> torch.dtype | None:
    return getattr(torch, spec.amp_dtype) if spec.amp else None


def _given_plan(spec: RunSpec, trace: Trace, observer: Observer) -> Plan:
    if spec.plan is not None:
        return planning.load_plan(spec.plan, trace, observer).lasting(spec.epochs)
    count = spec.parts
    if count is None and not spec.at:
        most = most_partitions(trace, by=spec.by, units=planning.units(trace, spec.by))
        count = min(DEFAULT_PARTS, most)
    partitions = planning.partition(trace, count=count, at=spec.at, balance=spec.balance, by=spec.by)
    return schedule(
        spec.schedule,
        partitions=partitions,
        epochs=spec.epochs,
        epochs_total=spec.epochs_total,
        start=spec.settle_from,
        stop=spec.settle_until,
        share=spec.settle_share,
    )


def forecast(spec: RunSpec, plan: Plan, trace: Trace, *, measured: bool) -> Forecast:
    """Forecast what the phases of a plan will cost in this run; in seconds too, if ops are `measured`."""
    optimizer = partial(_optimizer_of, spec)
    return fxsplit.plan.forecast.forecast(
        plan,
        trace,
        batch_size=spec.batch_size,
        optimizer_slots=slots_of(optimizer),
        update_seconds=update_seconds(trace.model.parameters(), make_optimizer=optimizer) if measured else None,
        micro_batches=spec.grad_accum_steps,
    )


def inspection(spec: RunSpec, trace: Trace, plan: Plan, ahead: Forecast | None = None) -> Inspection:
    """Collect what there is to show of a plan and its model, with the forecast `ahead` if there is one."""
    return Inspection(
        model=spec.model,
        input_shape=trace.train.inputs[0].shape or (),
        train=trace.train,
        eval=trace.eval,
        classes={path: type(module).__name__ for path, module in trace.model.named_modules(remove_duplicate=False)},
        plan=plan,
        tied=trace.tied,
        opaque=trace.opaque,
        torch=torch.__version__,
        checkpoints=trace.checkpoints,
        forecast=ahead,
    )


def executor(spec: RunSpec, trace: Trace, plan: Plan, passes: Sequence[Pass]) -> Executor:
    """Make the executor of a run, with its precision, its passes and its compiler."""
    return Executor(
        trace,
        plan.partitions,
        passes=passes,
        settled_dtype=None if spec.settled_dtype == "same" else getattr(torch, spec.settled_dtype),
        backend=spec.torchcompile or None,
    )


def loaders(spec: RunSpec, data: Data) -> tuple[Loader, Loader]:
    """Make the loaders of the images to train on and of those to test on."""
    train = Loader(
        data.train,
        batch_size=spec.batch_size,
        training=True,
        seed=spec.seed,
        augment=spec.augment,
        views=None if spec.augment == "none" else spec.cache_views,
        mean=spec.mean,
        std=spec.std,
        interpolation=_interpolation(spec),
        channels_last=spec.channels_last,
        limit=1 if spec.dry_run else spec.train_batches_per_epoch,
    )
    test = Loader(
        data.test,
        batch_size=spec.batch_size,
        mean=spec.mean,
        std=spec.std,
        interpolation=_interpolation(spec),
        channels_last=spec.channels_last,
        limit=1 if spec.dry_run else None,
    )
    return train, test


def recordings(spec: RunSpec, trace: Trace, device: torch.device, observer: Observer) -> Recordings | None:
    """Make what records the steps of a run and replays them; None where they run eagerly."""
    if spec.cuda_graphs != "on":
        return None
    if device.type != "cuda":
        observer.notice("CUDA graphs are recorded on a GPU alone; steps run eagerly")
        return None
    if spec.torchcompile:
        observer.notice("compiled stages are not recorded as CUDA graphs")
        return None
    return Recordings(CudaRecorder(device), device, held=(trace.model,), notice=observer.notice)


def _update_is_recorded(spec: RunSpec, recordings: Recordings, observer: Observer) -> bool:
    """Tell whether the optimizer's part of a step can be replayed; if not, say so."""
    if spec.amp and spec.amp_dtype == "float16":
        reason: str | None = "the scale of the loss follows from its gradients"
    else:

        def make(parameters: Sequence[nn.Parameter], capturable: bool) -> Optimizer:
            return _optimizer(spec)(nn.ParameterList(parameters), capturable=capturable)

        reason = why_not_replayed(make, recordings.recorder, recordings.device)
    if reason is not None:
        observer.notice(f"{spec.opt} steps eagerly, after a forward and backward from a CUDA graph: {reason}")
    return reason is None


def trainer(
    spec: RunSpec,
    trace: Trace,
    executor: Executor,
    plan: Plan,
    data: Data,
    observer: Observer,
    recordings: Recordings | None = None,
) -> Trainer:
    """Make the trainer of a run, with all that its spec switches on. Raises UsageError for names that timm lacks."""
    train_loader, test_loader = loaders(spec, data)
    update_is_recorded = recordings is not None and _update_is_recorded(spec, recordings, observer)
    steps_per_epoch = train_loader.steps_per_epoch
    forward = Forward(executor, train_loader.device, amp_dtype=_amp_dtype(spec))
    objective = Objective(
        smoothing=spec.smoothing, soft_targets=_soft_targets(spec, data), exits=_exits(spec, trace, plan, data)
    )
    return Trainer(
        plan=plan,
        forward=forward,
        feed=Feed(forward, train_loader, test_loader, policy=_cache_policy(spec, trace, plan, data)),
        objective=objective,
        step=Step(
            forward,
            objective,
            batch_size=spec.batch_size,
            clip_grad=spec.clip_grad,
        ),
        optimizer=PhaseOptimizer(
            executor,
            plan,
            make_optimizer=partial(_optimizer(spec), trace.model, capturable=update_is_recorded),
            make_scheduler=_scheduler(spec, plan),
            steps_per_epoch=steps_per_epoch,
            exits=objective.exits,
            annealing=spec.anneal,
            device=train_loader.device if update_is_recorded else None,
        ),
        endings=Endings(
            forward,
            plan,
            steps_per_epoch=steps_per_epoch,
            average=spec.average,
            recalibrate=spec.recalibrate,
            midpoint=objective.has_midpoint,
            recorded=update_is_recorded,
        ),
        plasticity=_plasticity(executor, steps_per_epoch) if spec.veto else None,
        recordings=recordings,
        update_is_recorded=update_is_recorded,
        log_interval=spec.log_interval,
        observer=observer,
    )


def prove_first_batch(spec: RunSpec, trace: Trace, trainer: Trainer, observer: Observer) -> float:
    """Prove on the first batch that the executor computes what the model computes; return the seconds that it took.

    Compilers may round otherwise, so stages run uncompiled here: the proof is of what the compiler is given. Raises
    ProofError when the two differ.
    """
    began = perf_counter()
    trainer.executor.train()
    batch = next(trainer.feed.train_loader.batches(0))
    with torch.compiler.set_stance("force_eager") if spec.torchcompile else nullcontext():
        proof = prove_batch(
            trace.model,
            trainer.executor,
            batch.images,
            batch.labels,
            micro_batches=trainer.plan.phases[0].micro_batches,
            loss=partial(_loss, spec),
            autocast=trainer.forward.autocast,
            notice=observer.notice,
        )
    if proof is not None and proof.varying:
        observer.notice(
            f"two runs of the plain model differ in {len(proof.varying)} of {proof.compared} values of the first "
            "batch; the partitions were held to these within what they vary by themselves"
        )
    if trainer.recordings is not None:
        _prove_replays(spec, trace, trainer, batch, observer)
    return perf_counter() - began


def _prove_replays(spec: RunSpec, trace: Trace, trainer: Trainer, batch: Batch, observer: Observer) -> None:
    """Compare replayed steps with eager ones on a batch; where they differ, no step is recorded in this run."""
    assert trainer.recordings is not None
    try:
        wrong = differing_replays(
            trace.model,
            trainer.executor,
            batch.images,
            batch.labels,
            micro_batches=trainer.plan.phases[0].micro_batches,
            loss=partial(_loss, spec),
            autocast=trainer.forward.autocast,
            recorder=trainer.recordings.recorder,
        )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        observer.notice("memory does not hold the comparison of replayed steps with eager ones: it is left out")
        return
    if wrong:
        trainer.recordings.give_up(f"replayed steps differ from eager ones in {wrong[0]}")


def _loss(spec: RunSpec, output: Any, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits_of(output), labels, label_smoothing=spec.smoothing)


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


def _soft_targets(spec: RunSpec, data: Data) -> SoftTargets | None:
    if not spec.soft_targets:
        return None
    kind = MeanTargets if spec.soft_from == "mean" else LastTargets
    return kind(len(data.train), weight=spec.soft_targets, temperature=spec.soft_temperature)


def _plasticity(executor: Executor, steps_per_epoch: int) -> Plasticity:
    # Partitions count as quiet after QUIET_INTERVALS intervals, which together last an epoch.
    return Plasticity(named_parameters(executor), interval=max(1, steps_per_epoch // QUIET_INTERVALS))


def _cache_policy(spec: RunSpec, trace: Trace, plan: Plan, data: Data) -> CachePolicy | None:
    if spec.cache == "off" or spec.dry_run:
        return None
    return CachePolicy(
        medium=spec.cache,
        limit_bytes=None if spec.cache_limit is None else int(spec.cache_limit * GIB),
        dtype=None if spec.cache_dtype == "exact" else getattr(torch, spec.cache_dtype),
        folder=str(Path(spec.output).expanduser()),
        peak_bytes=_peak_bytes(spec, trace, plan, data) if data.train.device.type == "cuda" else 0,
        measured=not spec.deterministic,
    )


def _peak_bytes(spec: RunSpec, trace: Trace, plan: Plan, data: Data) -> int:
    """Forecast what a run will take of the memory of its device: the largest of its phases, and the pixels there."""
    ahead = forecast(spec, plan, trace, measured=False)
    pixels = sum(images.resident.nbytes for images in (data.train, data.test) if images.resident is not None)
    return max(phase.peak_bytes for phase in ahead.phases) + pixels


def _scheduler(spec: RunSpec, plan: Plan) -> MakeScheduler:
    return partial(
        make_scheduler,
        name=spec.sched,
        epochs=plan.epochs,
        warmup_epochs=spec.warmup_epochs,
        min_lr=spec.min_lr,
        decay_epochs=spec.decay_epochs,
        decay_milestones=spec.decay_milestones,
        decay_rate=spec.decay_rate,
    )


def _optimizer(spec: RunSpec) -> partial[Optimizer]:
    return partial(make_optimizer, name=spec.opt, lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay)


def _optimizer_of(spec: RunSpec, parameters: Iterable[nn.Parameter]) -> Optimizer:
    return _optimizer(spec)(nn.ParameterList(parameters))


def recorder(
    start: Start,
    trace: Trace,
    plan: Plan,
    passes: Sequence[Pass],
    data: Data,
    trainer: Trainer,
    observer: Observer,
    *,
    began: float,
) -> Recorder:
    """Make the recorder of a run and, unless it is a dry run, its folder.

    `began` is when the run began, on the clock of `perf_counter`. Raises UsageError when the folder cannot be made.
    """
    spec, folder = start.spec, start.folder
    if folder is None and not spec.dry_run:
        folder = RunFolder.new(
            spec.output, model=spec.model, schedule=plan.title, seed=spec.seed, experiment=spec.experiment
        )
    return Recorder(
        folder,
        inspection(spec, trace, plan),
        trace.model,
        state=RunState(trace.model, trainer),
        checkpoints=None if folder is None else Checkpoints(folder.path, keep=spec.checkpoint_keep),
        interval=Interval.read(spec.checkpoint_every),
        spec=spec.to_flat(),
        args_yaml=spec.to_yaml(),
        identity=identity(data),
        environment=environment(data.train.device),
        passes=names_of(passes),
        began=began,
        notice=observer.notice,
    )


def choose_device(name: str) -> torch.device:
    """Find the device of that name; `auto` is CUDA where there is a GPU, else the CPU.

    Raises UsageError when there is no such device.
    """
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
    """Seed every generator, and inside choose kernels for a run; torch's settings are put back at the end.

    With `deterministic` torch refuses kernels that are not; without, a GPU uses TF32 for float32 numbers, and cuDNN
    looks for the fastest kernels, as in timm's train.py.
    """
    random_seed(seed)
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        # cuBLAS reads this when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        with _tf32(not deterministic):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Inside, allow TF32 or not, unless somebody has used torch's newer settings, with which these cannot be mixed."""
    try:
        before = [each.allow_tf32 for each in TF32]
    except RuntimeError:
        yield
        return
    for each in TF32:
        each.allow_tf32 = allowed
    try:
        yield
    finally:
        for each, setting in zip(TF32, before, strict=True):
            each.allow_tf32 = setting
