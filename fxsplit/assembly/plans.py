"""The plan of a run, its forecast, and what there is to show of both."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fxsplit.plan.forecast
import fxsplit.plan.scaling
from fxsplit import planning
from fxsplit.assembly.devices import named_device
from fxsplit.assembly.images import loaders, micro_batches, own_batch_size
from fxsplit.assembly.steps import amp_dtype, optimizer_of
from fxsplit.capture.tracing import Trace
from fxsplit.data.images import Data
from fxsplit.distribute.processes import ALONE, Processes
from fxsplit.execute.executor import Executor
from fxsplit.execute.forward import logits_of
from fxsplit.measuring.phase_costs import Loss, time_ratio, update_seconds
from fxsplit.objects.structure import HOST
from fxsplit.plan.budget import fit
from fxsplit.plan.division import Division
from fxsplit.plan.forecast import Forecast
from fxsplit.plan.partition import Partition, most_partitions, with_head
from fxsplit.plan.planfile import PlanFile
from fxsplit.plan.scaling import ScaleForecast
from fxsplit.plan.schedule import SETTLING, Phase, Plan, counted, schedule
from fxsplit.report import Inspection, Observer
from fxsplit.spec import RunSpec
from fxsplit.training.optimizers import SLOTS, slots_of

DEFAULT_PARTS = 8
# What a run may take, relative to its time, for a memory aim that nobody insists on.
MOST_TIME = 1.03


def plan(
    spec: RunSpec,
    trace: Trace,
    observer: Observer,
    saved: PlanFile | None = None,
    processes: Processes = ALONE,
) -> Plan:
    """Cut the model, decide which partitions train when, and what is recomputed to keep within memory.

    The plan `saved` of a run that goes on is taken as it is, but for micro-batches: other processes may take others.

    Raises UsageError when the spec or its plan file cannot be followed, and PartitionError when they do not fit the
    model.
    """
    if saved is not None:
        plan = planning.saved_plan(saved, trace, observer)
        return replace(plan, phases=_as_taken(spec, plan, processes))
    if spec.settled_offload and not offloads(spec):
        observer.notice("settled-offload changes nothing on a CPU, where weights are in memory of the host already")
    plan = _given_plan(spec, trace, observer)
    plan = replace(plan, preset=spec.preset, phases=_as_taken(spec, plan, processes))
    settles = any(phase.start for phase in plan.phases)
    if spec.guard and not settles:
        observer.notice(
            f"guard is {spec.guard:g}, but nothing settles, so there is nothing to undo; its images are held out all "
            "the same"
        )
    if spec.plan is None and spec.schedule in SETTLING and not settles:
        later = "" if spec.thaw_from is None else ", or a later --thaw-from"
        observer.notice(
            f"nothing settles in {counted(plan.epochs, 'epoch')} of {len(plan.partitions)} partitions, so this is "
            f"standard training; more --epochs, an earlier --settle-from or a larger --settle-share change that{later}"
        )
    budget = spec.memory_aim if _insisted(spec) is None else _insisted(spec)
    return plan if budget is None else _within(spec, plan, trace, budget, processes)


def _as_taken(spec: RunSpec, plan: Plan, processes: Processes) -> tuple[Phase, ...]:
    """Return the phases of a plan with as many micro-batches as a full batch makes in these processes."""
    return tuple(
        replace(phase, micro_batches=micro_batches(spec, processes, planned=phase.micro_batches))
        for phase in plan.phases
    )


def _insisted(spec: RunSpec) -> float | None:
    """Return the budget that a plan must keep within; None for one that is to be found out, or for none."""
    return None if isinstance(spec.memory_budget, str) else spec.memory_budget


def _within(spec: RunSpec, plan: Plan, trace: Trace, budget: float, processes: Processes) -> Plan:
    return fit(
        plan,
        trace,
        budget=budget,
        batch_size=own_batch_size(spec, processes),
        micro_batches=micro_batches(spec, processes),
        optimizer_slots=slots(spec),
        strict=_insisted(spec) is not None,
        division=_division(spec, processes),
        offloads=offloads(spec),
    )


def _division(spec: RunSpec, processes: Processes) -> Division | None:
    """Say how processes divide the model; None where each has all of it."""
    if spec.parallel == "fsdp" and processes.count > 1:
        return Division("fsdp", processes.count)
    if processes.pipeline.count > 1:
        return Division("pipeline", processes.pipeline.count, keeps_all=spec.pipeline_schedule != "1f1b")
    return None


def paying_plan(
    spec: RunSpec,
    trace: Trace,
    executor: Executor,
    plan: Plan,
    data: Data,
    device: torch.device,
    observer: Observer,
    processes: Processes = ALONE,
) -> Plan:
    """On a GPU, come only as near to `spec.memory_aim` as some measured steps allow.

    Forecasts from multiply-adds know nothing of how long a GPU waits for its next kernel. On a CPU they are near
    enough, and measured times vary by more than what is asked here: the plan stays as it is, and so it does where the
    run must not depend on measured times. Of runs with CUDA graphs nothing is measured either: their phases recompute
    nothing, which could not be recorded.
    """
    wanted = spec.memory_aim
    count = micro_batches(spec, processes)
    phases = (replace(each, recompute=0, segmented=False, micro_batches=count) for each in plan.phases)
    bare = replace(plan, phases=tuple(phases))
    if device.type != "cuda" or _insisted(spec) is not None or wanted is None or plan == bare:
        return plan
    if spec.cuda_graphs == "on":
        pairs = zip(plan.phases, bare.phases, strict=True)
        return replace(plan, phases=tuple(other if phase.recompute else phase for phase, other in pairs))
    if spec.deterministic:
        return plan
    loss, make_optimizer = _first_batch_loss(spec, data, processes), partial(optimizer_of, spec)
    shares: dict[Plan, float] = {}
    for share in (wanted, *(each for each in (0.7, 0.8, 0.9) if wanted < each)):
        shares.setdefault(_within(spec, bare, trace, share, processes), share)
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


def _first_batch_loss(spec: RunSpec, data: Data, processes: Processes) -> Loss:
    """Make the loss of the run's first batch, of which each micro-batch is given its share.

    One that is not full has fewer of them: some are taken again, so that a step takes as long as one on a full batch.
    """
    loader, _ = loaders(spec, data, processes)
    batch = next(loader.batches(0))

    def loss(net: nn.Module, index: int, count: int) -> torch.Tensor:
        parts = list(batch.divided(count, batch_size=loader.own_batch_size))
        part = parts[index % len(parts)]
        with torch.autocast(loader.device.type, dtype=amp_dtype(spec), enabled=spec.amp):
            mean = cross_entropy(logits_of(net(part.images)), part.labels, label_smoothing=spec.smoothing)
        return mean * (len(part) / len(batch))

    return loss


def _given_plan(spec: RunSpec, trace: Trace, observer: Observer) -> Plan:
    if spec.plan is not None:
        return planning.load_plan(spec.plan, trace, observer).lasting(spec.epochs)
    count = spec.parts
    if count is None and not spec.at:
        most = most_partitions(trace, by=spec.by, units=planning.units(trace, spec.by))
        count = min(DEFAULT_PARTS, most)
    partitions = planning.partition(trace, count=count, at=spec.at, balance=spec.balance, by=spec.by)
    if spec.schedule == "finetune" and not spec.at:
        partitions = _with_head(spec, trace, partitions)
    return schedule(
        spec.schedule,
        partitions=partitions,
        epochs=spec.epochs,
        epochs_total=spec.epochs_total,
        start=spec.settle_from,
        stop=spec.settle_until,
        share=0.0 if spec.shift == "input" else spec.settle_share,
        front=0.0 if spec.shift == "input" else spec.settle_front,
        thaw=spec.thaw_from,
    )


def _with_head(spec: RunSpec, trace: Trace, partitions: tuple[Partition, ...]) -> tuple[Partition, ...]:
    """Give the head a partition of its own. It is one of those that were asked for, if a number was."""
    if spec.parts is None:
        return with_head(trace, partitions)
    counts = range(len(partitions) - 1, 0, -1)
    fewer = (planning.partition(trace, count=count, balance=spec.balance, by=spec.by) for count in counts)
    with_heads = (with_head(trace, each) for each in chain([partitions], fewer))
    return next((found for found in with_heads if len(found) <= spec.parts), partitions)


def forecast(spec: RunSpec, plan: Plan, trace: Trace, *, measured: bool, processes: Processes = ALONE) -> Forecast:
    """Forecast what the phases of a plan will cost each process of a run; in seconds too, if ops are `measured`."""
    optimizer = partial(optimizer_of, spec)
    return fxsplit.plan.forecast.forecast(
        plan,
        trace,
        batch_size=own_batch_size(spec, processes),
        optimizer_slots=slots(spec),
        update_seconds=update_seconds(trace.model.parameters(), make_optimizer=optimizer) if measured else None,
        micro_batches=micro_batches(spec, processes),
        division=_division(spec, processes),
        offloads=offloads(spec),
    )


def offloads(spec: RunSpec) -> bool:
    """Tell whether what settles is moved off the device: beside a CPU it is on the host already.

    A GPU that is named need not be there to be planned for.
    """
    return spec.settled_offload and named_device(spec.device).type != HOST.type


def scaling(
    spec: RunSpec, plan: Plan, trace: Trace, *, devices: int, bandwidth: float, device_bytes: float | None
) -> tuple[ScaleForecast, ...]:
    """Forecast the steps of a plan on up to so many devices, as `fxsplit.plan.scaling.scaling` describes."""
    return fxsplit.plan.scaling.scaling(
        plan,
        trace,
        batch_size=spec.batch_size,
        devices=devices,
        bandwidth=bandwidth,
        device_bytes=device_bytes,
        optimizer_slots=slots(spec),
        update_seconds=update_seconds(trace.model.parameters(), make_optimizer=partial(optimizer_of, spec)),
        offloads=offloads(spec),
    )


def slots(spec: RunSpec) -> int:
    """Count the values that the optimizer keeps for each parameter; of the usual ones that is known."""
    return SLOTS[spec.opt] if spec.opt in SLOTS else slots_of(partial(optimizer_of, spec))


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
