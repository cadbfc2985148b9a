"""The public verbs: train, inspect, check, check_forecasts and trace, each a list of calls in the order of the work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from fxsplit import assembly
from fxsplit.arguments import listed, require
from fxsplit.capture.tracer import Leaf
from fxsplit.capture.tracing import Trace
from fxsplit.capture.tracing import trace as trace_model
from fxsplit.distribute.processes import Processes, joined
from fxsplit.errors import NoModelError, UsageError
from fxsplit.execute.executor import Executor
from fxsplit.execute.passes import effect_of
from fxsplit.measuring.meter import stopwatch
from fxsplit.measuring.op_costs import measure as measure_ops
from fxsplit.models import registry
from fxsplit.plan.partition import most_partitions, partition
from fxsplit.plan.planfile import write_file
from fxsplit.proving.checking import check_model
from fxsplit.proving.first_batch import prove
from fxsplit.proving.forecasts import check_forecast
from fxsplit.proving.workers import call_each
from fxsplit.report import CheckRecord, ForecastRecord, Inspection, Observer, RunReport
from fxsplit.spec import RunSpec
from fxsplit.training.regularisers.batchnorm import check_batches
from fxsplit.trust import trusting_code

Record = TypeVar("Record", CheckRecord, ForecastRecord)

# How a run is asked for.
ASK = "write fxsplit.RunSpec(model=..., ...)"
# Samples of a batch that ops are measured with, where a forecast is for several devices.
MOST_MEASURED = 32


def train(
    spec: RunSpec | None = None,
    observer: Observer | None = None,
    *,
    resume: str | Path | None = None,
    trust_code: bool = False,
) -> RunReport:
    """Train a model as `spec` says, standard or layer-to-layer, and leave a run folder behind.

    An interrupted or failed run keeps weights, records and a checkpoint in its folder before the exception goes on.

    Args:
        spec: what to train, and how; it may be left out with `resume`.
        observer: is called while the run happens.
        resume: the folder of a run to go on with, from its newest checkpoint that is whole, or the file of one. What
            `spec` asks for otherwise is told to the observer, or refused.
        trust_code: run code that comes with a model of Hugging Face, or that a run names which goes on without a spec.

    In each of several processes that `torchrun` has started, or that torch.distributed knows, call it with the same
    arguments: they train the model together. The first one writes the folder and calls its observer.

    Returns the records of the run, of all its processes. Raises a FxsplitError for anything that the user can mend.
    """
    if spec is not None:
        require("spec", spec, RunSpec, "a RunSpec", ASK)
    with joined() as processes, trusting_code(trust_code):
        chosen = observer if observer and processes.is_first else Observer()
        return _train(spec, chosen, resume, processes, trust_code=trust_code)


def _train(
    spec: RunSpec | None, observer: Observer, resume: str | Path | None, processes: Processes, *, trust_code: bool
) -> RunReport:
    elapsed = stopwatch()
    start = assembly.start(spec, resume, processes, observer, trust_code=trust_code)  # anew, or from a checkpoint
    spec = start.spec
    device = assembly.choose_device(spec.device)
    assembly.check_names(spec, device)
    with assembly.determinism(spec.seed, spec.deterministic):
        with processes.in_turn():
            kind = assembly.kind(spec)  # of the images, which are loaded when all else is known to fit
            model = assembly.model(spec, kind, device, observer, goes_on=start.goes_on)  # an untouched nn.Module
        observer.working("tracing the model")
        trace = assembly.trace(spec, model, kind, device)  # its ops in order, in training and in evaluation
        passes = assembly.passes(spec, device, processes)
        for each in passes:
            observer.notice(effect_of(each))
        if spec.balance == "seconds" and spec.plan is None and not start.goes_on:
            images = assembly.random_images(spec, kind, device, processes)
            trace = measure_ops(trace, (images,), device=device, passes=passes)
        # partitions and phases: names and numbers, no tensors
        plan = processes.first(partial(assembly.plan, spec, trace, observer, start.plan, processes))
        executor = assembly.executor(spec, trace, plan, passes)  # the model again, which runs any phase
        with processes.in_turn():
            data = assembly.data(spec, observer).to(device)  # images and labels
        assembly.check_data(start, data, observer)
        assembly.check_alike(trace, data, processes)
        if not start.goes_on:
            pay = partial(assembly.paying_plan, spec, trace, executor, plan, data, device, observer, processes)
            plan = processes.first(pay)
        recordings = assembly.recordings(spec, trace, device, processes, observer)  # of steps, as CUDA graphs
        trainer = assembly.trainer(spec, trace, executor, plan, data, processes, passes, observer, recordings)
        check_batches(trace, plan, trainer.feed.train_loader, trainer.feed.test_loader, together=spec.sync_bn)
        # what each phase is expected to cost
        ahead = assembly.forecast(spec, plan, trace, measured=False, processes=processes)
        shown = assembly.inspection(spec, trace, plan, ahead)
        # and its folder
        run = assembly.recorder(start, shown, trace.model, passes, data, trainer, processes, observer, elapsed=elapsed)
        with run.beginning():
            observer.run_started(
                folder=run.path,
                device=str(device),
                plan=plan,
                train_images=len(data.train),
                test_images=len(data.test),
            )
            observer.forecast_made(ahead)
            run.setup_seconds, _ = elapsed()
            if spec.prove and not start.goes_on:  # the same numbers as the model's, or a ProofError
                observer.working("proving the first batch")
                run.prove_seconds = assembly.prove_first_batch(spec, trace, trainer, observer)
            assembly.seed_apart(spec.seed, processes)
            assembly.restore(run, start, processes, observer)
        with run:
            recovery = assembly.recovery(spec, trace, trainer, run, processes)  # trains, and answers faults
            for record in recovery.epochs(run.pause, most=1 if spec.dry_run else None):
                run.add(record, trainer.confusion())
    return run.report


def inspect(
    spec: RunSpec,
    *,
    measured: bool = False,
    save_to: str | None = None,
    trust_code: bool = False,
    devices: int | None = None,
    bandwidth: float = 10e9,
    device_bytes: float | None = None,
    observer: Observer | None = None,
) -> Inspection:
    """Show the partitions of a model, the phases of its schedule and a forecast of what they cost, without training.

    It needs no weights, data or device, unless ops are to be `measured` (or partitions balanced by seconds): then each
    op is timed on the device of `spec`, in a model with random weights. With `save_to` the plan is also written there,
    as a file to edit and to train by. With `trust_code`, code that comes with a model of Hugging Face is run.

    With `devices` ops are measured, and steps are forecast on up to so many devices like that of `spec`, each of which
    sends `bandwidth` bytes in a second and has `device_bytes` of memory.

    Raises a FxsplitError for anything that the user can mend.
    """
    require("spec", spec, RunSpec, "a RunSpec", ASK)
    if devices is not None and (devices < 1 or bandwidth <= 0):
        raise UsageError(f"devices is {devices} and bandwidth is {bandwidth:g}, but there must be some of both")
    observer = observer or Observer()
    observer.working(f"tracing {spec.model}")
    spec = assembly.with_preprocessing(spec, observer)
    assembly.check_names(spec, torch.device("cpu"), trains=False)
    classes, img_size = assembly.kind(spec)
    measured = measured or spec.balance == "seconds" or devices is not None
    with trusting_code(trust_code):
        device = assembly.choose_device(spec.device) if measured else torch.device("meta")
        make = registry.build if measured else registry.sketch
        model = make(spec.model, num_classes=classes, img_size=img_size, stem=spec.stem, drop_path=spec.drop_path)
        # Ops are measured on what one device may take: the batch of many need not fit here.
        few = min(spec.batch_size, MOST_MEASURED)
        sample = spec if devices is None else replace(spec, batch_size=few, grad_accum_steps=1)
        given = assembly.example_inputs(sample, model, img_size, device)
        trace = trace_model(assembly.in_layout(spec, model.to(device)), given.args, given.kwargs)
        if measured:
            trace = measure_ops(trace, given.args, given.kwargs, device=device, passes=assembly.passes(spec, device))
        plan = assembly.plan(spec, trace, observer)
    found = assembly.inspection(spec, trace, plan, assembly.forecast(spec, plan, trace, measured=measured))
    if devices is not None:
        ahead = assembly.scaling(spec, plan, trace, devices=devices, bandwidth=bandwidth, device_bytes=device_bytes)
        found = replace(found, scaling=ahead, input_shape=(spec.batch_size, *found.input_shape[1:]))
    if save_to is not None:
        write_file(found.plan_file, save_to)
    return found


def check(
    specs: str | Sequence[str],
    *,
    structure_only: bool = False,
    parts: int = 4,
    img_size: int | None = None,
    channels_last: bool = False,
    jobs: int = 1,
    trust_code: bool = False,
    observer: Observer | None = None,
) -> tuple[CheckRecord, ...]:
    """Prove that partitions compute what the models compute, bit for bit; one record a model, in the order of `specs`.

    What is wrong with a model is said in its record, also that there is none of that name.

    Args:
        specs: models as `RunSpec.model` names them, or one of them; wildcards such as `timm:resnet*` stand for many.
            Each gets random weights.
        structure_only: capture and cut on the meta device, and compute nothing.
        parts: partitions of a model, or as many as it allows.
        img_size: side of the images in pixels; None for the size that the model was made for.
        channels_last: run as `train` with that option, and compare each matrix product with its convolution.
        jobs: models that are checked at a time, each in a process of its own if there are several.
        trust_code: run code that comes with models of Hugging Face.
        observer: is given each record when it is there.

    Raises UsageError when no name means a model.
    """
    observer = observer or Observer()
    names = _expanded(specs)
    call = partial(
        check_model, structure_only=structure_only, parts=parts, img_size=img_size, channels_last=channels_last
    )
    found: dict[str, CheckRecord] = {}
    for record in call_each(partial(_trusting, trust_code, call), names, jobs=jobs, died=_died):
        found[record.model] = record
        observer.model_checked(record, len(names))
    records = tuple(found[name] for name in names)
    _refuse_unknown(records)
    return records


def check_forecasts(
    specs: str | Sequence[str],
    *,
    schedule: str = "settle",
    parts: int = assembly.DEFAULT_PARTS,
    img_size: int | None = None,
    batch_size: int = 32,
    device: str = "auto",
    channels_last: bool = False,
    trust_code: bool = False,
    observer: Observer | None = None,
) -> tuple[ForecastRecord, ...]:
    """Compare the forecast of every phase of `schedule` with a few measured steps; one record a model.

    Each model has random weights and is trained by AdamW. One runs at a time, so that none slows another down.

    Args:
        specs: models, as `check` takes them.
        schedule: one of those of `fxsplit.schedule`.
        parts: partitions of a model, or as many as it allows.
        img_size: side of the images in pixels; None for the size that the model was made for.
        batch_size: images in a step.
        device: as `RunSpec.device`.
        channels_last: run as `train` with that option.
        trust_code: run code that comes with models of Hugging Face.
        observer: is given each record when it is there.

    Raises UsageError when no name means a model, and when the device is not there.
    """
    observer = observer or Observer()
    chosen = assembly.choose_device(device)
    names = _expanded(specs)
    records = []
    for name in names:
        call = partial(
            check_forecast,
            schedule=schedule,
            parts=parts,
            img_size=img_size,
            batch_size=batch_size,
            device=chosen,
            channels_last=channels_last,
        )
        record = _trusting(trust_code, call, name)
        records.append(record)
        observer.model_checked(record, len(names))
    _refuse_unknown(records)
    return tuple(records)


def _expanded(specs: str | Sequence[str]) -> list[str]:
    """Return the names of models that specs mean, each once.

    A wildcard that means none stays: checking it makes the record that says so.
    """
    names: dict[str, None] = {}
    for spec in listed(specs):
        try:
            names |= dict.fromkeys(registry.expand(spec))
        except NoModelError:
            names[spec] = None
    return list(names)


def _refuse_unknown(records: Sequence[CheckRecord | ForecastRecord]) -> None:
    """Raise NoModelError, a UsageError, when none of the names means a model."""
    if records and all(record.unknown for record in records):
        raise NoModelError("; ".join(str(record.refusal) for record in records))


def _trusting(yes: bool, call: Callable[[str], Record], name: str) -> Record:
    with trusting_code(yes):
        return call(name)


def _died(spec: str) -> CheckRecord:
    return CheckRecord(model=spec, refusal="the process that checked it died, as it does when memory runs out")


def trace(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    leaves: Leaf | Sequence[Leaf] = (),
    verify: bool = False,
) -> Trace:
    """Capture the ops that `model` runs on `args` and `kwargs`, in training and in evaluation.

    Args:
        model: stays as it is. It may be on the meta device, without weights.
        args: an example of its inputs, of at least two samples; only shapes and types are looked at.
        kwargs: likewise.
        leaves: what stays one op: dotted paths of modules, classes of modules, and functions, or one of them.
        verify: also run the captured ops on `args`, which then need numbers, and compare them with the model as `prove`
            does.

    Raises TraceError when the model itself, and not just a module in it, branches on data before all else or cannot run
    on `args`, ProofError when it is captured wrong, and UsageError when `model` is no module, or `args` no arguments.
    """
    found = trace_model(model, args, kwargs, leaves=leaves)
    if verify:
        count = min(assembly.DEFAULT_PARTS, most_partitions(found))
        prove(model, Executor(found, partition(found, count=count)), args, kwargs)
    return found
