"""Fits a plan into a memory budget: in each phase the fastest mix of recomputing and micro-batches that fits.

Partitions recompute one at a time or, where less memory fits, one segment at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from fxsplit.errors import PartitionError
from fxsplit.graph import Modes, Op
from fxsplit.plan.forecast import CostModel, Divide
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
    division: Divide | None = None,
    offloads: bool = False,
) -> Plan:
    """Choose for each phase of `plan` the fastest mix of recomputing and micro-batches that fits `budget`.

    Args:
        plan: gives partitions, and phases whose own choices are replaced.
        modes: the graphs of the model that it was made for.
        budget: at most 1, a fraction of the activation memory of standard training; above 1, bytes of all memory.
        batch_size: samples of a whole batch.
        optimizer_slots: values that the optimizer keeps for each parameter.
        micro_batches: in how many standard training takes a batch. A phase takes 1, 2, 4, ... times as many of equal
            size, or just as many where an op needs the batch as a whole.
        strict: raise when nothing fits; otherwise take what needs least.
        division: how several processes divide the model, each of which is to fit; None if each has all of it.
        offloads: what has settled lies on the host.

    Returns the plan with the new phases. Raises PartitionError, which names the least budget that would do, when a
    phase does not fit and `strict` holds.
    """
    costs = CostModel(
        plan.partitions,
        modes,
        batch_size,
        optimizer_slots,
        micro_batches=micro_batches,
        division=division,
        offloads=offloads,
    )
    standard = costs.phase(costs.standard)

    def need(phase: Phase) -> float:
        forecast = costs.phase(phase)
        if budget > 1:
            return forecast.peak_bytes
        return forecast.activation_bytes / standard.activation_bytes if standard.activation_bytes else 0.0

    phases = []
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
            needed = f"{-(-least * 100 // 1) / 100:.2f}" if budget <= 1 else f"{least:.0f} bytes"
            raise PartitionError(
                f"phase {number} of the {plan.schedule} plan does not fit a memory budget of {budget:g}, whatever "
                f"recomputes: it needs {needed}; raise the budget to that, make more partitions or take smaller batches"
                + (f" (not in micro-batches: {indivisible.name!r} needs a batch as a whole)" if indivisible else "")
            )
        phases.append(found)
    return replace(plan, phases=tuple(phases))


def needs_whole_batch(phase: Phase, plan: Plan, modes: Modes) -> Op | None:
    """Find the first op that forbids micro-batches in a phase, or None.

    It mixes samples, or it writes to a parameter or a buffer, which micro-batches would do several times a step.
    """
    state = {each.name for each in modes.train.state}
    for index, part in enumerate(plan.partitions):
        training = phase.role(index) == "training"
        for op in (modes.train if training else modes.eval).ops[part.span(training=training)]:
            if op.mixes_samples or not state.isdisjoint(op.mutates):
                return op
    return None


def _choices(phase: Phase, *, micro_batches: int, batch_size: int | None) -> Iterator[Phase]:
    """Yield the ways to run a phase in `micro_batches`; unless `batch_size` is None also in 2, 4, ... times as many."""
    while True:
        yield replace(phase, recompute=0, segmented=False, micro_batches=micro_batches)
        for recompute, segmented in product(range(phase.start + 1, phase.stop), (False, True)):
            yield replace(phase, recompute=recompute, segmented=segmented, micro_batches=micro_batches)
        micro_batches *= 2
        if batch_size is None or batch_size % micro_batches:
            return
