"""A plan that keeps within memory: in each phase the fastest mix of recomputing and micro-batches that fits.

What recomputes does so partition by partition or, where less fits, segment by segment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from fxsplit.errors import PartitionError
from fxsplit.graph import Modes, Op
from fxsplit.plan.forecast import CostModel
from fxsplit.plan.schedule import Phase, Plan


def fit(
    plan: Plan,
    modes: Modes,
    *,
    budget: float,
    batch_size: int,
    optimizer_slots: int,
    micro_batches: int = 1,
    strict: bool = True,
) -> Plan:
    """The fastest of the plans that differ from `plan` in what recomputes, and in micro-batches, and whose forecast
    keeps within `budget`.

    A budget of at most 1 is a share of the activation memory that standard training takes, a larger one bytes of
    everything at a time. Standard training takes a batch in `micro_batches`, a phase in 1, 2, 4, ... times as many of
    equal size, and in no more where an op needs the batch as a whole.
    Raises PartitionError, which names the least that would do, when a phase fits none; unless `strict`, it then takes
    that.
    """
    costs = CostModel(plan.partitions, modes, batch_size, optimizer_slots, micro_batches=micro_batches)
    standard = costs.phase(costs.standard)

    def need(phase: Phase) -> float:
        told = costs.phase(phase)
        return told.activation_bytes / standard.activation_bytes if budget <= 1 else told.peak_bytes

    fitting = []
    for number, phase in enumerate(plan.phases, start=1):
        indivisible = needs_whole_batch(phase, plan, modes)
        choices = sorted(
            _choices(phase, micro_batches=micro_batches, batch_size=None if indivisible else batch_size),
            key=lambda choice: (costs.step_cost(choice), choice.micro_batches, choice.recompute, choice.segmented),
        )
        found = next((choice for choice in choices if need(choice) <= budget), None)
        if not strict:
            found = found or min(choices, key=need)
        if found is None:
            least = min(map(need, choices))
            allow = f"{-(-least * 100 // 1) / 100:.2f}" if budget <= 1 else f"{least:.0f} bytes"
            raise PartitionError(
                f"phase {number} of the {plan.schedule} plan does not fit a memory budget of {budget:g}, whatever "
                f"recomputes: it needs {allow}; allow that much, make more partitions or take smaller batches"
                + (f" (not in micro-batches: {indivisible.name!r} needs a batch as a whole)" if indivisible else "")
            )
        fitting.append(found)
    return replace(plan, phases=tuple(fitting))


def needs_whole_batch(phase: Phase, plan: Plan, modes: Modes) -> Op | None:
    """The first op that forbids micro-batches in a phase, if there is one.

    It mixes samples, or writes to a parameter or a buffer, as it then would once for each micro-batch.
    """
    state = {each.name for each in modes.train.state}
    for index, part in enumerate(plan.partitions):
        training = phase.role(index) == "training"
        for op in (modes.train if training else modes.eval).ops[part.span(training=training)]:
            if op.mixes_samples or not state.isdisjoint(op.mutates):
                return op
    return None


def _choices(phase: Phase, *, micro_batches: int, batch_size: int | None) -> Iterator[Phase]:
    """Ways to run a phase in `micro_batches`, and unless the batch is to stay as it is (None), in parts of these."""
    while True:
        yield replace(phase, recompute=0, segmented=False, micro_batches=micro_batches)
        for recompute, segmented in product(range(phase.start + 1, phase.stop), (False, True)):
            yield replace(phase, recompute=recompute, segmented=segmented, micro_batches=micro_batches)
        micro_batches *= 2
        if batch_size is None or batch_size % micro_batches:
            return
