"""Forecasts what a plan costs on several devices, from the measured seconds of its ops and a bandwidth.

    ddp        each device a part of the batch       gradients of what trains are added up over all, beside backward
    fsdp       each device a part of the batch       weights of what trains are gathered twice, gradients scattered once
    pipeline   each device some of the partitions    boundaries, for each micro-batch; what is settled sends none back
    ddp,pipeline   several pipelines, each a part of the batch; gradients are added up over them, after backward

The seconds of an op are taken to be in proportion to its batch, and a message to take its bytes by the bandwidth: small
batches and slow networks are worse than that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from fxsplit.errors import UsageError
from fxsplit.graph import Modes
from fxsplit.plan.division import Division, balanced
from fxsplit.plan.forecast import CostModel
from fxsplit.plan.schedule import Phase, Plan

# torch's DistributedDataParallel adds up gradients in buckets of this size; the last one waits for the end of backward.
BUCKET_BYTES = 25 * 2**20
# Micro-batches of a pipeline, for each of its devices.
MICRO_BATCHES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleForecast:
    """Forecasts a step on several devices: means over the epochs of a plan, and the largest memory of a device.

    Args:
        kind: ddp, fsdp, pipeline, or ddp,pipeline for several pipelines.
        devices: how many.
        step_seconds: time of a step on the whole batch.
        idle_share: of that time a device waits, for messages or for its turn in the pipeline, 0 to 1.
        traffic_bytes: what a device sends in a step.
        peak_bytes: the most memory that a device needs.
        is_fastest: whether it is the fastest of those on as many devices that fit into their memory.
        pipeline_devices: the devices of each of several pipelines; None otherwise.
    """

    kind: str
    devices: int
    step_seconds: float
    idle_share: float
    traffic_bytes: int
    peak_bytes: int
    is_fastest: bool = False
    pipeline_devices: int | None = None

    @property
    def way(self) -> str:
        """Its kind in words, with the length of several pipelines."""
        return self.kind if self.pipeline_devices is None else f"{self.kind} of {self.pipeline_devices}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """A step of one phase: seconds, those of them in which a device computes, bytes sent and bytes of memory."""

    seconds: float
    busy_seconds: float
    traffic: float
    memory: float


def scaling(
    plan: Plan,
    modes: Modes,
    *,
    batch_size: int,
    devices: int,
    bandwidth: float,
    device_bytes: float | None = None,
    optimizer_slots: int = 2,
    update_seconds: float | None = None,
    offloads: bool = False,
) -> tuple[ScaleForecast, ...]:
    """Forecast the steps of `plan` on 1, 2, 4, ... `devices`, each in up to four ways.

    More devices than a batch has samples are left out, and so are pipelines of more devices than partitions. Of several
    pipelines, the length is that which is fastest in the memory of a device or, if none fits, needs least of it.

    Args:
        plan: made for a model with the graphs `modes`, whose ops were measured.
        modes: its graphs.
        batch_size: samples of a whole batch, over all devices.
        devices: the most devices.
        bandwidth: bytes that a device sends in a second.
        device_bytes: memory of a device; None for more than enough.
        optimizer_slots: values that the optimizer keeps for each parameter.
        update_seconds: time of the optimizer's update of all parameters, if it was measured.
        offloads: what has settled lies on the host.

    Raises UsageError when the ops were not measured.
    """
    make = partial(
        CostModel,
        plan.partitions,
        modes,
        optimizer_slots=optimizer_slots,
        update_seconds=update_seconds,
        offloads=offloads,
    )

    def excess(way: ScaleForecast) -> float:
        return 0 if device_bytes is None else max(0, way.peak_bytes - device_bytes)

    found: list[ScaleForecast] = []
    for count in _counts(min(devices, batch_size)):
        own = make(-(-batch_size // count))
        if not own.measured:
            raise UsageError("what several devices take can be forecast only of ops that were measured: see --measure")
        ways = [_mean(plan, "ddp", count, [_ddp(own, phase, count, bandwidth) for phase in plan.phases])]
        if count > 1:
            part = make(own.batch_size, division=Division("fsdp", count))
            ways.append(_mean(plan, "fsdp", count, [_fsdp(part, phase, count, bandwidth) for phase in plan.phases]))
        lengths = [each for each in range(2, len(plan.partitions) + 1) if count % each == 0]
        pipelined = [_pipelines(plan, make, count, each, batch_size, bandwidth) for each in lengths]
        ways += [each for each in pipelined if each.pipeline_devices is None]
        if several := [each for each in pipelined if each.pipeline_devices is not None]:
            ways.append(min(several, key=lambda each: (excess(each), each.step_seconds)))
        best = min((each for each in ways if not excess(each)), key=lambda each: each.step_seconds, default=None)
        found += [replace(each, is_fastest=each is best) for each in ways]
    return tuple(found)


def _counts(most: int) -> Iterator[int]:
    count = 1
    while count < most:
        yield count
        count *= 2
    yield most


def _mean(plan: Plan, kind: str, devices: int, steps: Sequence[_Step]) -> ScaleForecast:
    shares = [phase.epochs / plan.epochs for phase in plan.phases]

    def mean(values: Sequence[float]) -> float:
        return sum(share * value for share, value in zip(shares, values, strict=True))

    seconds = mean([step.seconds for step in steps])
    return ScaleForecast(
        kind=kind,
        devices=devices,
        step_seconds=seconds,
        idle_share=1 - mean([step.busy_seconds for step in steps]) / seconds if seconds else 0.0,
        traffic_bytes=round(mean([step.traffic for step in steps])),
        peak_bytes=round(max(step.memory for step in steps)),
    )


def _ddp(costs: CostModel, phase: Phase, devices: int, bandwidth: float) -> _Step:
    forward, backward = costs.seconds(phase)
    ahead = costs.phase(phase)
    # In a ring each device sends every gradient but its own part twice: to add up, and to tell.
    ring = 2 * (devices - 1) / devices
    traffic = ring * ahead.gradient_bytes
    last = ring * min(ahead.gradient_bytes, BUCKET_BYTES) / bandwidth
    busy = forward + backward + costs.update_seconds(phase)
    waiting = max(traffic / bandwidth - backward, last)
    return _Step(seconds=busy + waiting, busy_seconds=busy, traffic=traffic, memory=ahead.peak_bytes)


def _fsdp(costs: CostModel, phase: Phase, devices: int, bandwidth: float) -> _Step:
    forward, backward = costs.seconds(phase)
    trained = [costs.trained_bytes(index, phase) for index in range(phase.start, phase.stop)]
    others = (devices - 1) / devices
    traffic = 3 * others * sum(trained)
    busy = forward + backward + costs.update_seconds(phase) / devices
    # The first weights are gathered before anything runs, the others beside what runs.
    waiting = max(traffic / bandwidth - forward - backward, others * max(trained) / bandwidth)
    return _Step(
        seconds=busy + waiting,
        busy_seconds=busy,
        traffic=traffic,
        memory=costs.phase(phase).peak_bytes,
    )


def _pipelines(
    plan: Plan, make: Callable[..., CostModel], devices: int, length: int, batch_size: int, bandwidth: float
) -> ScaleForecast:
    """Forecast a pipeline of all devices or, where its `length` is less, several on a part of a batch each."""
    replicas = devices // length
    samples = -(-batch_size // replicas)
    size = -(-samples // min(samples, MICRO_BATCHES * length))
    micro_batches, part = -(-samples // size), make(size)
    of_batch = make(samples, division=Division("pipeline", length))
    steps = [
        _pipeline(part, phase, length, micro_batches, bandwidth, of_batch, replicas=replicas) for phase in plan.phases
    ]
    if replicas == 1:
        return _mean(plan, "pipeline", devices, steps)
    return replace(_mean(plan, "ddp,pipeline", devices, steps), pipeline_devices=length)


def _pipeline(
    costs: CostModel,
    phase: Phase,
    devices: int,
    micro_batches: int,
    bandwidth: float,
    of_batch: CostModel,
    *,
    replicas: int,
) -> _Step:
    """Forecast a step from the costs of one micro-batch; its memory from those `of_batch`, of one process."""
    # One micro-batch of each device's partitions takes `slowest` at most, and the pipeline moves on in such beats:
    #
    #     device 0   0 1 2 3 . . .
    #     device 1     0 1 2 3 . .        micro_batches + devices - 1 beats
    #     device 2       0 1 2 3 .
    by_partition = costs.times_by_partition(phase)
    groups = list(pairwise(balanced(costs, phase, devices, starts=range(len(costs.partitions)))))
    loads = [sum(sum(each) for each in by_partition[start:stop]) for start, stop in groups]
    sent = [0.0] * devices
    for rank, (start, _) in enumerate(groups[1:], 1):
        boundary = costs.partitions[start].boundary_bytes * costs.batch_size
        sent[rank - 1] += boundary
        sent[rank] += boundary * (phase.start < start)  # its gradient, if anything before trains
    beat = max(max(load, each / bandwidth) for load, each in zip(loads, sent, strict=True))
    trained = [sum(costs.trained_bytes(index, phase) for index in range(*group)) for group in groups]
    whole = sum(trained) or 1
    update = costs.update_seconds(phase) * max(trained) / whole
    averaged = 2 * (replicas - 1) / replicas * max(trained)
    return _Step(
        seconds=(micro_batches + devices - 1) * beat + averaged / bandwidth + update,
        busy_seconds=micro_batches * sum(loads) / devices + costs.update_seconds(phase) / devices,
        traffic=micro_batches * max(sent) + averaged,
        memory=of_batch.phase(replace(phase, micro_batches=micro_batches)).peak_bytes,
    )
