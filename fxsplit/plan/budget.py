"""A plan that keeps within memory: in each phase the fewest partitions recompute that make its forecast fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fxsplit.errors import PartitionError
from fxsplit.graph import Graph
from fxsplit.plan.forecast import forecast
from fxsplit.plan.schedule import Phase, Plan


def fit(plan: Plan, train: Graph, eval_graph: Graph, *, budget: float, batch_size: int, optimizer_slots: int) -> Plan:
    """The fastest of the plans that differ from `plan` in what recomputes and whose forecast keeps within `budget`.

    A budget of at most 1 is a share of the activation memory that standard training takes, a larger one bytes of
    everything at a time. Raises PartitionError, which names the least that would do, when a phase fits none.
    """

    fitting = []
    for number, phase in enumerate(plan.phases, start=1):
        choices = tuple(_choices(phase))
        told = forecast(
            replace(plan, phases=choices), train, eval_graph, batch_size=batch_size, optimizer_slots=optimizer_slots
        )
        needs = [
            each.activation_bytes / told.standard.activation_bytes if budget <= 1 else each.peak_bytes
            for each in told.phases
        ]
        fits = [
            (each.step_cost, choice.recompute, choice)
            for choice, each, need in zip(choices, told.phases, needs, strict=True)
            if need <= budget
        ]
        if not fits:
            least = f"{-(-min(needs) * 100 // 1) / 100:.2f}" if budget <= 1 else f"{min(needs):.0f} bytes"
            raise PartitionError(
                f"phase {number} of the {plan.schedule} plan does not fit a memory budget of {budget:g}, whatever "
                f"recomputes: it needs {least}; allow that much, make more partitions or take smaller batches"
            )
        fitting.append(min(fits)[-1])
    return replace(plan, phases=tuple(fitting))


def _choices(phase: Phase) -> Iterator[Phase]:
    yield replace(phase, recompute=0)
    for last in range(phase.start + 1, phase.stop):
        yield replace(phase, recompute=last)
