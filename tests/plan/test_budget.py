"""Plans that keep within memory: which partitions recompute."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from fxsplit.errors import PartitionError
from fxsplit.graph import Graph
from fxsplit.plan.budget import fit
from fxsplit.plan.forecast import PhaseForecast, forecast
from fxsplit.plan.partition import partition
from fxsplit.plan.schedule import Plan, schedule
from tests.plan.test_partition import graph, op


def deep(count: int = 16) -> Graph:
    """Ops in a row, each of which saves what it reads."""
    names = ["x", *(f"a{index}" for index in range(count))]
    return graph(
        tuple(
            op(name, before, size=10, saves=(before,) if before != "x" else (), state=(f"p{4 * index + 4}",), macs=100,
               backward_macs=200)
            for index, (before, name) in enumerate(pairwise(names))
        )
    )  # fmt: skip


NET = deep()
PLAN = schedule("settle", partitions=partition(NET, NET, count=4), epochs=30)


def ahead(plan: Plan) -> tuple[tuple[PhaseForecast, ...], PhaseForecast]:
    found = forecast(plan, NET, NET, batch_size=4, optimizer_slots=2)
    return found.phases, found.standard


def fitted(budget: float) -> Plan:
    return fit(PLAN, NET, NET, budget=budget, batch_size=4, optimizer_slots=2)


def test_what_fits_anyway_recomputes_nothing() -> None:
    assert fitted(1.0) == PLAN


@pytest.mark.parametrize("budget", [0.7, 0.8, 0.9])
def test_of_what_fits_a_phase_is_the_fastest(budget: float) -> None:
    plan = fitted(budget)
    phases, standard = ahead(plan)
    assert plan != PLAN
    assert all(phase.activation_bytes <= budget * standard.activation_bytes for phase in phases)
    for index, phase in enumerate(plan.phases):
        for recompute in (0, *range(phase.start + 1, phase.stop)):
            others = list(plan.phases)
            others[index] = replace(phase, recompute=recompute)
            other = ahead(replace(plan, phases=tuple(others)))[0][index]
            if other.activation_bytes <= budget * standard.activation_bytes:
                assert other.step_cost >= phases[index].step_cost


def test_a_budget_in_bytes_is_one_of_everything() -> None:
    standard = ahead(PLAN)[1]
    assert fitted(float(standard.peak_bytes)) == PLAN
    less = standard.peak_bytes - 8
    assert max(phase.peak_bytes for phase in ahead(fitted(float(less)))[0]) <= less


def test_what_cannot_fit_names_the_least_that_would_do() -> None:
    with pytest.raises(
        PartitionError, match=r"phase 1 of the settle plan does not fit .* it needs 0\.(\d\d);"
    ) as raised:
        fitted(0.1)
    least = float(str(raised.value).partition("it needs ")[2].partition(";")[0])
    fitted(least)
    with pytest.raises(PartitionError):
        fitted(least - 0.02)
