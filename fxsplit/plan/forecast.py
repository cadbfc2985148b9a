"""Forecasts what a plan will cost: time and memory of a step in each phase, from the costs of the ops alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice

from fxsplit.arguments import require, require_whole
from fxsplit.graph import Modes, Op, Value
from fxsplit.plan.memory import Step, peak_bytes
from fxsplit.plan.partition import Partition
from fxsplit.plan.schedule import Phase, Plan
from fxsplit.plan.segments import segments

# Without measured seconds: how many multiply-adds a device does while it moves one byte.
MACS_PER_BYTE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseForecast:
    """Forecasts one step of a phase, optimizer included, loss and data left out.

    Args:
        step_cost: time relative to a step of standard training.
        step_seconds: time, or None where the ops were not measured.
        activation_bytes: the most that values, what autograd saves and the gradients of values take at a time. With
            micro-batches those of one, and the gradient of a parameter until it is added to the earlier sum.
        parameter_bytes, buffer_bytes: of the whole model; without what lies on the host, but for the settled partition
            that has most of it: one is copied to the device at a time.
        gradient_bytes, optimizer_bytes: of the parameters that train.
        peak_bytes: the most of everything at a time. That is less than the sum of all, since most activations are freed
            before the last gradients of parameters arrive.
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
    """Forecasts a whole plan beside standard training: time over all epochs, and the largest peak, as ratios.

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
    division: Divide | None = None,
    offloads: bool = False,
) -> Forecast:
    """Forecast what the phases of `plan` will cost beside standard training.

    Args:
        plan: made for a model with the graphs `modes`.
        batch_size: samples of a whole batch.
        optimizer_slots: values that the optimizer keeps for each parameter: 2 for Adam, 1 for SGD with momentum, 0 for
            plain SGD.
        update_seconds: time of the optimizer's update of all parameters, if it was measured.
        steps_per_epoch: needed for `Forecast.seconds`.
        micro_batches: in how many standard training takes a batch.
        division: how several processes divide the model, for the memory of one of them; None if each has all of it.
        offloads: what has settled lies on the host.

    Time is the sum of measured seconds where all ops of both graphs have them. Else it is counted in multiply-adds, a
    moved byte for MACS_PER_BYTE of them. An update without measured time is converted by the same rule.

    Raises UsageError when `plan` is no Plan, or one of the numbers cannot be.
    """
    require("plan", plan, Plan, "a Plan", "fxsplit.schedule(...) makes one")
    require_whole(1, batch_size=batch_size)
    require_whole(0, optimizer_slots=optimizer_slots)
    costs = CostModel(
        plan.partitions,
        modes,
        batch_size,
        optimizer_slots,
        update_seconds,
        micro_batches=micro_batches,
        division=division,
        offloads=offloads,
    )
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


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """Counts the multiply-adds that a phase takes for one image.

    Args:
        settled: forward through the settled partitions, which a cache spares.
        rest: forward, backward and what is recomputed of all others.
    """

    settled: int
    rest: int


def step_work(plan: Plan, modes: Modes) -> tuple[StepWork, ...]:
    """Count the multiply-adds that an image takes in each phase of `plan`, made for a model with the graphs `modes`."""
    costs = CostModel(plan.partitions, modes, 1, 0)
    return tuple(map(costs.work, plan.phases))


# Turns the forecast of a phase of a whole model into that of one of several processes that divide it.
Divide = Callable[["CostModel", Phase, PhaseForecast], PhaseForecast]


class CostModel:
    """Computes what a step costs in any phase over some partitions; the arguments are those of `forecast`."""

    def __init__(
        self,
        partitions: Sequence[Partition],
        modes: Modes,
        batch_size: int,
        optimizer_slots: int,
        update_seconds: float | None = None,
        *,
        micro_batches: int = 1,
        division: Divide | None = None,
        offloads: bool = False,
    ) -> None:
        train, evaluation = modes.train, modes.eval
        self.partitions, self.modes, self._division, self._offloads = partitions, modes, division, offloads
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
        """Compute the time of a step relative to standard training, without its memory, so that this is quick."""
        return self._step_time(phase) / self.standard_time if self.standard_time else 1.0

    def work(self, phase: Phase) -> StepWork:
        """Count the multiply-adds of an image, as `step_work` does."""
        settled = self.partitions[: phase.start]
        counted = sum(op.macs for part in settled for op in self.modes.eval.ops[part.span(training=False)])
        return StepWork(
            settled=sum(part.macs for part in settled), rest=round(self._time(phase, _multiply_adds)) - counted
        )

    def phase(self, phase: Phase) -> PhaseForecast:
        """Forecast time and memory of a step."""
        steps = list(self._steps(phase))
        gradients = {name: self.bytes[name] for name in self._trained(phase)}
        state = self._on_device(phase)
        parameter_bytes = sum(size for name, size in state.items() if name in self.parameters)
        optimizer_bytes = self.optimizer_slots * sum(gradients.values())
        micro_batch_size = -(-self.batch_size // phase.micro_batches)
        if phase.micro_batches == 1:
            activations, with_gradients = (
                peak_bytes(steps, self.modes.train, batch_size=micro_batch_size, gradient_bytes=counted)
                for counted in (dict.fromkeys(gradients, 0), gradients)
            )
        else:
            activations = peak_bytes(
                steps, self.modes.train, batch_size=micro_batch_size, gradient_bytes=gradients, adds=True
            )
            with_gradients = activations + sum(gradients.values())
        found = PhaseForecast(
            step_cost=self.step_cost(phase),
            step_seconds=self._step_time(phase) if self.measured else None,
            activation_bytes=activations,
            parameter_bytes=parameter_bytes,
            buffer_bytes=sum(state.values()) - parameter_bytes,
            gradient_bytes=sum(gradients.values()),
            optimizer_bytes=optimizer_bytes,
            peak_bytes=sum(state.values()) + optimizer_bytes + with_gradients,
        )
        return found if self._division is None else self._division(self, phase, found)

    @cached_property
    def _inputs(self) -> frozenset[str]:
        return frozenset(value.name for value in self.modes.train.inputs)

    @cached_property
    def _segment_of(self) -> dict[str, int]:
        """Map each op of the train graph to the start of its segment."""
        every = chain.from_iterable(segments(self.partitions, self.modes))
        ops = self.modes.train.ops
        return {op.name: segment.start for segment in every for op in ops[segment.span(training=True)]}

    def _on_device(self, phase: Phase) -> dict[str, int]:
        """Return the bytes of parameters and buffers that are on the device at a time, by name."""
        settled = self._used[: phase.start] if self._offloads else ()
        hosted = set().union(*settled).difference(*self._used[phase.start :])
        most = max(settled, key=lambda names: sum(self.bytes[name] for name in names & hosted), default=hosted)
        return {name: size for name, size in self.bytes.items() if name not in hosted - most}

    @cached_property
    def _used(self) -> list[set[str]]:
        """List the parameters and buffers that each partition uses, in either mode."""
        return [
            {
                name
                for training, graph in ((True, self.modes.train), (False, self.modes.eval))
                for op in graph.ops[part.span(training=training)]
                for name in op.state
            }
            for part in self.partitions
        ]

    def _trained(self, phase: Phase) -> frozenset[str]:
        training = self.partitions[phase.start : phase.stop]
        return frozenset(name for part in training for name in part.state if name in self.parameters)

    def _steps(self, phase: Phase) -> Iterator[Step]:
        """Yield every op of a phase in the order in which it runs."""
        # The ops of a phase from left to right, and the gradients that come back through those that are recorded.
        #
        #     0             start            recompute            stop              n
        #     ├─── settled ───┼──────── trains ──┼──── trains ──────┼──── frozen ─────┤
        #     │ (1) eval graph│ (1) train graph                     │ (1) eval graph  │
        #     │ (4) folded    │ (5) runs again   │ kept             │ (3) as trained  │
        #                     ◄────────────── gradients ─────────────────────────── loss
        #
        # (1) Which graph an op is taken from. Outside of what trains, all runs in evaluation.
        # (2) Autograd records an op that has a parameter which trains, or that reads the output of a recorded op. So
        #     gradients go back through the frozen ops to the first op that trains.
        # (3) A frozen op saves, and takes in backward, what was measured of the same op in the train graph.
        # (4) A settled op takes the time and memory that were measured after folding.
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
        """Estimate a step in seconds where all ops were measured, else in multiply-adds."""
        key = phase.start, phase.stop, phase.recompute
        if key not in self._times:
            self._times[key] = self._time(phase, self._seconds if self.measured else self._work)
        update = self.update_seconds(phase)
        # Each further micro-batch reads two gradients of a parameter and writes their sum.
        added = (phase.micro_batches - 1) * 3 / (3 + 2 * self.optimizer_slots)
        return self._times[key] + update * (1 + added)

    def _time(self, phase: Phase, times: Callable[[Op], tuple[float, float]]) -> float:
        """Sum forward and backward of all ops, whose two times `times` gives."""
        total = 0.0
        for step in self._steps(phase):
            forward, backward = self._of_step(step, times)
            total += forward
            total += backward
        return total

    def _of_step(self, step: Step, times: Callable[[Op], tuple[float, float]]) -> tuple[float, float]:
        """Return forward and backward of one op, whose two times `times` gives."""
        forward, backward = times(step.op)
        forward = forward if step.recomputes is None else 2 * forward
        if not step.recorded:
            return forward, 0.0
        # A product has two operands, and the cost is that of both gradients, unless one is an input's.
        whole = (step.trains and step.passes) or not step.op.macs or self._inputs.issuperset(step.op.reads)
        return forward, backward if whole else backward / 2

    def times_by_partition(self, phase: Phase) -> list[tuple[float, float]]:
        """Return forward and backward of each partition, without the update.

        In seconds where all ops were measured, else in multiply-adds.
        """
        steps, times = self._steps(phase), self._seconds if self.measured else self._work
        found = []
        for index, part in enumerate(self.partitions):
            training = phase.role(index) == "training"
            ops = len((self.modes.train if training else self.modes.eval).ops[part.span(training=training)])
            pairs = [self._of_step(step, times) for step in islice(steps, ops)]
            found.append((sum(forward for forward, _ in pairs), sum(backward for _, backward in pairs)))
        return found

    def seconds(self, phase: Phase) -> tuple[float, float]:
        """Return measured forward and backward of all partitions, without the update."""
        found = self.times_by_partition(phase)
        return sum(forward for forward, _ in found), sum(backward for _, backward in found)

    def update_seconds(self, phase: Phase) -> float:
        """Return the time of the optimizer's update of what trains, in seconds where all ops were measured."""
        trained = sum(self.bytes[name] for name in self._trained(phase))
        return self.update_time * trained / self.parameter_bytes if trained else 0.0

    def trained_bytes(self, index: int, phase: Phase) -> int:
        """Return the bytes of the parameters of partition `index` that train in a phase."""
        trained = self._trained(phase) if phase.start <= index < phase.stop else frozenset()
        return sum(self.bytes[name] for name in self.partitions[index].state if name in trained)

    def _seconds(self, op: Op) -> tuple[float, float]:
        scale = self.batch_size / self.modes.train.batch_size
        forward = op.forward_seconds or 0.0
        return scale * forward, scale * ((op.seconds or 0.0) - forward)

    def _work(self, op: Op) -> tuple[float, float]:
        """Estimate forward and backward in multiply-adds; backward moves gradients beside the values."""
        moved = self.batch_size * sum(self.values[name].bytes_per_sample for name in (*op.reads, op.name))
        moved += sum(self.bytes[name] for name in op.state)
        return (
            self.batch_size * op.macs + MACS_PER_BYTE * moved,
            self.batch_size * op.backward_macs + 2 * MACS_PER_BYTE * moved,
        )


def _multiply_adds(op: Op) -> tuple[float, float]:
    """Return those of forward and of backward."""
    return op.macs, op.backward_macs


def _is_differentiable(value: Value) -> bool:
    """Whether a value can have a gradient; a tuple of tensors, whose dtypes are not known, counts as one."""
    return value.dtype.startswith(("float", "bfloat", "complex")) or (
        value.shape is None and value.bytes_per_sample > 0
    )


def _settled(op: Op, shared: dict[str, str]) -> Op:
    """Give a settled op its measured costs. One that was folded away returns its input; `shared` keeps whose memory."""
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
    """Give a frozen op of the eval graph the backward costs of the same op in the train graph, if that has it.

    An op that only returns its input in evaluation, such as dropout, has no backward costs.
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
