"""Plans that keep within memory: which partitions recompute, and in how many micro-batches."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import pytest

from fxsplit.errors import PartitionError
from fxsplit.graph import Graph, Op
from fxsplit.plan.budget import fit, needs_whole_batch
from fxsplit.plan.forecast import PhaseForecast, forecast
from fxsplit.plan.partition import partition
from fxsplit.plan.schedule import Phase, Plan, schedule
from tests.pairs import Pair, both
from tests.plan.test_partition import chain, graph, op


def deep(count: int = 16, **fields: object) -> Graph:
    """Ops in a row, each of which saves what it reads."""
    names = ["x", *(f"a{index}" for index in range(count))]
    return graph(
        tuple(
            op(name, before, size=10, saves=(before,) if before != "x" else (), state=(f"p{4 * index + 4}",), macs=100,
               backward_macs=200, **fields)
            for index, (before, name) in enumerate(pairwise(names))
        )
    )  # fmt: skip


NET = deep()
WHOLE = deep(mixes_samples=True)
PLAN = schedule("settle", partitions=partition(both(NET), count=4), epochs=30)


def ahead(plan: Plan) -> tuple[tuple[PhaseForecast, ...], PhaseForecast]:
    found = forecast(plan, both(NET), batch_size=12, optimizer_slots=2)
    return found.phases, found.standard


def fitted(budget: float, net: Graph = NET) -> Plan:
    return fit(PLAN, both(net), budget=budget, batch_size=12, optimizer_slots=2)


def test_what_fits_anyway_is_left_alone() -> None:
    assert fitted(1.0) == PLAN


@pytest.mark.parametrize(
    ("net", "budget"),
    [(NET, 0.2), (NET, 0.3), (NET, 0.4), (NET, 0.5), (NET, 0.7), (NET, 0.9), (WHOLE, 0.7), (WHOLE, 0.8), (WHOLE, 0.9)],
)
def test_of_what_fits_a_phase_is_the_fastest(net: Graph, budget: float) -> None:
    """12 images make 1, 2 or 4 micro-batches of equal size."""
    plan = fitted(budget, net)
    counts = (1,) if net is WHOLE else (1, 2, 4)
    assert {phase.micro_batches for phase in plan.phases} <= set(counts)
    phases, standard = ahead(plan)
    assert plan != PLAN
    assert all(phase.activation_bytes <= budget * standard.activation_bytes for phase in phases)
    for index, phase in enumerate(plan.phases):
        for recompute, segmented, micro_batches in product(
            (0, *range(phase.start + 1, phase.stop)), (False, True), counts
        ):
            others = list(plan.phases)
            others[index] = replace(
                phase, recompute=recompute, segmented=segmented and recompute > 0, micro_batches=micro_batches
            )
            other = ahead(replace(plan, phases=tuple(others)))[0][index]
            if other.activation_bytes <= budget * standard.activation_bytes:
                assert other.step_cost >= phases[index].step_cost


def test_a_budget_that_is_a_wish_gets_as_near_as_it_can() -> None:
    def wished(budget: float) -> Plan:
        return fit(PLAN, both(WHOLE), budget=budget, batch_size=12, optimizer_slots=2, strict=False)

    assert wished(0.8) == fitted(0.8, WHOLE)
    phases = ahead(wished(0.01))[0]
    for index, phase in enumerate(PLAN.phases):
        for recompute, segmented in product((0, *range(phase.start + 1, phase.stop)), (False, True)):
            others = list(PLAN.phases)
            others[index] = replace(phase, recompute=recompute, segmented=segmented and recompute > 0)
            other = ahead(replace(PLAN, phases=tuple(others)))[0][index]
            assert phases[index].activation_bytes <= other.activation_bytes


def test_micro_batches_that_are_asked_for_are_the_least_and_those_of_standard_too() -> None:
    def fitted(budget: float, net: Graph) -> Plan:
        return fit(PLAN, both(net), budget=budget, batch_size=12, optimizer_slots=2, micro_batches=3)

    assert [phase.micro_batches for phase in fitted(1.0, NET).phases] == [3] * len(PLAN.phases)
    found = [(net, fitted(budget, net)) for net, budget in ((NET, 0.7), (NET, 0.5), (WHOLE, 0.8))]
    for (net, plan), budget in zip(found, (0.7, 0.5, 0.8), strict=True):
        ahead = forecast(plan, both(net), batch_size=12, optimizer_slots=2, micro_batches=3)
        assert all(phase.activation_bytes <= budget * ahead.standard.activation_bytes for phase in ahead.phases)
        assert plan != fitted(1.0, NET)
    assert {phase.micro_batches for phase in found[1][1].phases} == {3, 6}
    assert {phase.micro_batches for phase in found[2][1].phases} == {3}


def test_a_budget_in_bytes_is_one_of_everything() -> None:
    standard = ahead(PLAN)[1]
    assert fitted(float(standard.peak_bytes)) == PLAN
    less = standard.peak_bytes - 8
    assert max(phase.peak_bytes for phase in ahead(fitted(float(less)))[0]) <= less


def test_what_cannot_fit_names_the_least_that_would_do() -> None:
    for net in (NET, WHOLE):
        with pytest.raises(
            PartitionError, match=r"phase 1 of the settle plan does not fit .* it needs 0\.(\d\d);"
        ) as raised:
            fitted(0.1, net)
        assert str(raised.value).endswith("(not in micro-batches: 'a0' needs a batch as a whole)") == (net is WHOLE)
        least = float(str(raised.value).partition("it needs ")[2].partition(";")[0])
        fitted(least, net)
        with pytest.raises(PartitionError):
            fitted(least - 0.02, net)


def test_a_batch_stays_whole_where_an_op_mixes_samples_or_keeps_count() -> None:
    def first(train: tuple[Op, ...], evaluated: tuple[Op, ...], phase: Phase) -> str | None:
        modes = Pair(graph(train), graph(evaluated))
        plan = Plan(schedule="mine", partitions=partition(modes, at=["b", "c"]), phases=(phase,))
        found = needs_whole_batch(phase, plan, modes)
        return found.name if found else None

    names = enumerate(chain("a", "b", "b_", "c"), start=1)
    plain = tuple(replace(each, state=(f"p{4 * number}",)) for number, each in names)
    mixing = tuple(replace(each, mixes_samples=each.name == "b") for each in plain)
    counting = tuple(
        replace(each, state=(*each.state, "b8"), mutates=("b8",)) if each.name == "b" else each for each in plain
    )
    in_place = tuple(replace(each, mutates=each.reads if each.name == "b_" else ()) for each in plain)
    everything, late, early = (Phase(start=start, stop=stop, epochs=1) for start, stop in ((0, 3), (2, 3), (0, 1)))
    assert first(plain, plain, everything) is None
    assert first(in_place, in_place, everything) is None
    for train in (mixing, counting):
        assert first(train, plain, everything) == "b"
        # In evaluation it has statistics of its own.
        assert first(train, plain, late) is first(train, plain, early) is None
        assert first(train, train, late) == first(train, train, early) == "b"
