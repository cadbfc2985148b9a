"""What a plan will cost, before it runs: time and memory of a step in each phase, from the costs of the ops alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

from fxsplit.graph import Modes, Op, Value
from fxsplit.plan.memory import Step, peak_bytes
from fxsplit.plan.partition import Partition
from fxsplit.plan.schedule import Phase, Plan
from fxsplit.plan.segments import segments

# Without measured seconds: how many multiply-adds a machine does while it moves one byte.
MACS_PER_BYTE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseForecast:
    """One step of a phase, optimizer included, loss and data left out.

    `step_cost` is relative to a step of `standard`; `step_seconds` is None where the ops were not measured.
    `activation_bytes` is the most that values, what autograd saves and their gradients hold at a time; with
    micro-batches those of one, and a parameter's gradient until it is added to that of the ones before. Optimizer state
    and `gradient_bytes` are those of the parameters that train. `peak_bytes` is the most of everything at a time: by
    when the last gradients of parameters arrive, most activations are gone.
    """

    step_cost: float
    step_seconds: float | None
    activation_bytes: int
    parameter_bytes: int
    buffer_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """A whole plan beside `standard`: `time_ratio` over all its epochs, `peak_ratio` of the largest peaks.

    `seconds` of all training steps is None where the ops were not measured or the steps of an epoch are not known.
    """

    batch_size: int
    phases: tuple[PhaseForecast, ...]
    standard: PhaseForecast
    time_ratio: float
    peak_ratio: float
    seconds: float | None


def forecast(
    plan: Plan,
    modes: Modes,
    *,
    batch_size: int,
    optimizer_slots: int = 2,
    update_seconds: float | None = None,
    steps_per_epoch: int | None = None,
    micro_batches: int = 1,
) -> Forecast:
    """What the phases of `plan`, made for a model with these graphs, will cost with batches of `batch_size`.

    `standard`, to which they are held, takes a batch in `micro_batches`.

    `optimizer_slots` is the number of values that the optimizer keeps a parameter: 2 for Adam, 1 for SGD with momentum,
    0 for plain SGD. Time is that of the measured ops where both graphs have seconds, with `update_seconds` for the
    optimizer's update of all parameters; else multiply-adds and bytes moved are weighed, MACS_PER_BYTE of the ones for
    one of the others, and so is an update whose seconds are not given.
    """
    costs = CostModel(plan.partitions, modes, batch_size, optimizer_slots, update_seconds, micro_batches=micro_batches)
    epochs = plan.epochs
    standard = costs.phase(costs.standard)
    phases = tuple(costs.phase(phase) for phase in plan.phases)
    cost = sum(phase.epochs * found.step_cost for phase, found in zip(plan.phases, phases, strict=True))
    seconds = None
    if standard.step_seconds is not None and steps_per_epoch is not None:
        seconds = steps_per_epoch * cost * standard.step_seconds
    return Forecast(
        batch_size=batch_size,
        phases=phases,
        standard=standard,
        time_ratio=cost / epochs,
        peak_ratio=max(phase.peak_bytes for phase in phases) / standard.peak_bytes,
        seconds=seconds,
    )


class CostModel:
    """What a step costs in any phase over these partitions; the arguments are those of `forecast`."""

    def __init__(
        self,
        partitions: Sequence[Partition],
        modes: Modes,
        batch_size: int,
        optimizer_slots: int,
        update_seconds: float | None = None,
        *,
        micro_batches: int = 1,
    ) -> None:
        train, evaluation = modes.train, modes.eval
        self.partitions, self.modes = partitions, modes
        self.batch_size, self.optimizer_slots = batch_size, optimizer_slots
        self.values = train.values | evaluation.values
        self.bytes = {state.name: state.bytes for graph in (evaluation, train) for state in graph.state}
        self.parameters = {state.name for state in train.state if state.is_parameter}
        self.parameter_bytes = sum(self.bytes[name] for name in self.parameters)
        self.measured = all(op.seconds is not None for graph in (train, evaluation) for op in graph.ops)
        self.standard = Phase(start=0, stop=len(partitions), epochs=1, micro_batches=micro_batches)
        self._times: dict[tuple[int, int, int], float] = {}
        # An update reads gradients, parameters and slots, and writes the last two.
        self.update_time = float(MACS_PER_BYTE * (3 + 2 * optimizer_slots) * self.parameter_bytes)
        if self.measured and update_seconds is not None:
            self.update_time = update_seconds
        elif self.measured and (work := self._time(self.standard, self._work)):
            self.update_time *= self._time(self.standard, self._seconds) / work
        self.standard_time = self._step_time(self.standard)

    def step_cost(self, phase: Phase) -> float:
        """The time of a step relative to one of `standard`; memory is left alone, so that this is quick."""
        return self._step_time(phase) / self.standard_time if self.standard_time else 1.0

    def phase(self, phase: Phase) -> PhaseForecast:
        steps = list(self._steps(phase))
        gradients = {name: self.bytes[name] for name in self._trained(phase)}
        optimizer_bytes = self.optimizer_slots * sum(gradients.values())
        part = -(-self.batch_size // phase.micro_batches)
        if phase.micro_batches == 1:
            activations, most = (
                peak_bytes(steps, self.modes.train, batch_size=part, gradient_bytes=counted)
                for counted in (dict.fromkeys(gradients, 0), gradients)
            )
        else:
            activations = peak_bytes(steps, self.modes.train, batch_size=part, gradient_bytes=gradients, adds=True)
            most = activations + sum(gradients.values())
        return PhaseForecast(
            step_cost=self.step_cost(phase),
            step_seconds=self._step_time(phase) if self.measured else None,
            activation_bytes=activations,
            parameter_bytes=self.parameter_bytes,
            buffer_bytes=sum(self.bytes.values()) - self.parameter_bytes,
            gradient_bytes=sum(gradients.values()),
            optimizer_bytes=optimizer_bytes,
            peak_bytes=sum(self.bytes.values()) + optimizer_bytes + most,
        )

    @cached_property
    def _segment_of(self) -> dict[str, int]:
        """By the name of each op of the train graph, the place where its segment starts."""
        parts = chain.from_iterable(segments(self.partitions, self.modes))
        return {op.name: part.start for part in parts for op in self.modes.train.ops[part.span(training=True)]}

    def _trained(self, phase: Phase) -> frozenset[str]:
        window = self.partitions[phase.start : phase.stop]
        return frozenset(name for part in window for name in part.state if name in self.parameters)

    def _steps(self, phase: Phase) -> Iterator[Step]:
        """Every op in the order in which it runs: settled in evaluation, then training, then frozen in evaluation."""
        # The ops of a phase from left to right, and the gradients that come back through those that are recorded.
        #
        #     0             start            recompute            stop              n
        #     ├─── settled ───┼──────── trains ──┼──── trains ──────┼──── frozen ─────┤
        #     │ (1) eval graph│ (1) train graph                     │ (1) eval graph  │
        #     │ (4) folded    │ (5) made again   │ kept             │ (3) as trained  │
        #                     ◄────────────── gradients ─────────────────────────── loss
        #
        # (1) Which graph an op is taken from. Outside of what trains, all runs in evaluation.
        # (2) Autograd records an op that has a parameter which trains, or that reads a value which an op before it has
        #     made a gradient wanted for. So gradients go back through the frozen ops to the first op that trains.
        # (3) What a frozen op saves and what its backward takes was measured of its twin in the train graph.
        # (4) A settled op takes what it was measured to take when it is folded.
        # (5) What recomputes runs again in backward, together with all of its partition or of its segment.
        train, evaluation = self.modes.train, self.modes.eval
        trained = self._trained(phase)
        in_training = {op.name: op for op in train.ops}
        wanting: set[str] = set()
        shared: dict[str, str] = {}
        for index, part in enumerate(self.partitions):
            settled, frozen = index < phase.start, index >= phase.stop
            training = not (settled or frozen)
            for op in (train if training else evaluation).ops[part.span(training=training)]:  # (1)
                trains = () if settled else tuple(name for name in op.state if name in trained)
                passes = tuple(name for name in op.reads if name in wanting)
                recorded = bool(trains or passes) and _is_differentiable(op.output)  # (2)
                if recorded:
                    wanting.add(op.name)
                if frozen:
                    op = _frozen(op, in_training.get(op.name))  # (3)
                if settled:
                    op = _settled(op, shared)  # (4)
                again = phase.start <= index < phase.recompute
                recomputes = (self._segment_of[op.name] if phase.segmented else part.start) if again else None  # (5)
                yield Step(op=op, recorded=recorded, trains=trains, passes=passes, recomputes=recomputes)

    def _step_time(self, phase: Phase) -> float:
        """Seconds of a step where they are measured, else work in multiply-adds."""
        key = phase.start, phase.stop, phase.recompute
        if key not in self._times:
            self._times[key] = self._time(phase, self._seconds if self.measured else self._work)
        trained = sum(self.bytes[name] for name in self._trained(phase))
        update = self.update_time * trained / self.parameter_bytes if trained else 0.0
        # Each further micro-batch reads two gradients of a parameter and writes their sum.
        added = (phase.micro_batches - 1) * 3 / (3 + 2 * self.optimizer_slots)
        return self._times[key] + update * (1 + added)

    def _time(self, phase: Phase, times: Callable[[Op], tuple[float, float]]) -> float:
        """Of all ops, forward and backward."""
        inputs = {value.name for value in self.modes.train.inputs}
        total = 0.0
        for step in self._steps(phase):
            forward, backward = times(step.op)
            total += forward if step.recomputes is None else 2 * forward
            if step.recorded:
                # A product has two operands, and the cost is that of both gradients, unless one is an input's.
                whole = (step.trains and step.passes) or not step.op.macs or inputs.issuperset(step.op.reads)
                total += backward if whole else backward / 2
        return total

    def _seconds(self, op: Op) -> tuple[float, float]:
        share = self.batch_size / self.modes.train.batch_size
        forward = op.forward_seconds or 0.0
        return share * forward, share * ((op.seconds or 0.0) - forward)

    def _work(self, op: Op) -> tuple[float, float]:
        """In multiply-adds; backward moves gradients beside the values."""
        moved = self.batch_size * sum(self.values[name].bytes_per_sample for name in (*op.reads, op.name))
        moved += sum(self.bytes[name] for name in op.state)
        return (
            self.batch_size * op.macs + MACS_PER_BYTE * moved,
            self.batch_size * op.backward_macs + 2 * MACS_PER_BYTE * moved,
        )


def _is_differentiable(value: Value) -> bool:
    """Tuples of tensors have no type of their own, and count as such."""
    return value.dtype.startswith(("float", "bfloat", "complex")) or (
        value.shape is None and value.bytes_per_sample > 0
    )


def _settled(op: Op, shared: dict[str, str]) -> Op:
    """A settled op as it was measured. One that was folded away delivers what it reads; `shared` remembers that."""
    if op.settled_seconds is None:
        return op
    if not op.settled_seconds and op.reads:
        shared[op.name] = shared.get(op.reads[0], op.reads[0])
    return replace(
        op,
        output=replace(op.output, storage=shared.get(op.output.storage, op.output.storage)),
        seconds=op.settled_seconds,
        forward_seconds=op.settled_seconds,
        forward_workspace_bytes=op.settled_workspace_bytes,
    )


def _frozen(op: Op, trained: Op | None) -> Op:
    """An op of the eval graph that passes gradients on: what it saves and how long its backward takes is known of its
    twin in training. One that delivers what it reads, as dropout does in evaluation, has neither.
    """
    if trained is None or op.output.storage != trained.output.storage:
        return op
    forward = op.forward_seconds
    seconds = None
    if forward is not None and trained.seconds is not None and trained.forward_seconds is not None:
        seconds = forward + trained.seconds - trained.forward_seconds
    return replace(
        op,
        macs=trained.macs,
        backward_macs=trained.backward_macs,
        saves=trained.saves,
        hidden_bytes=trained.hidden_bytes,
        seconds=seconds,
        backward_workspace_bytes=trained.backward_workspace_bytes,
    )
