"""What one of several processes needs of memory, and how partitions are divided among them, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fxsplit.graph import Graph
from fxsplit.plan.budget import fit
from fxsplit.plan.division import Division, _balanced, balanced
from fxsplit.plan.forecast import CostModel, PhaseForecast, forecast
from fxsplit.plan.scaling import scaling
from tests.pairs import Pair, both
from tests.plan.test_scaling import modes, plan

__all__ = ["modes"]
BATCH, SLOTS = 64, 1


def of_one(graph: Graph, division: Division | None, *, offloads: bool = False, **changes: int) -> PhaseForecast:
    """Six partitions of 10 kB of parameters each."""
    made = plan(both(graph))
    phase = replace(made.phases[0], **changes)
    return CostModel(made.partitions, both(graph), BATCH, SLOTS, division=division, offloads=offloads).phase(phase)


def bytes_of(found: PhaseForecast) -> tuple[int, int, int, int]:
    return found.parameter_bytes, found.gradient_bytes, found.optimizer_bytes, found.activation_bytes


@pytest.mark.parametrize(
    ("start", "expected"), [(0, (35_000, 15_000, 15_000)), (4, (65_000, 5_000, 5_000)), (5, (62_500, 2_500, 2_500))]
)
def test_shards_are_parts_of_what_trains_and_two_partitions_are_whole(
    graph: Graph, start: int, expected: tuple[int, int, int]
) -> None:
    """What is settled is whole, and one partition alone is gathered alone."""
    found = of_one(graph, Division("fsdp", 4), start=start)
    activations = of_one(graph, None, start=start).activation_bytes
    assert bytes_of(found) == (*expected, activations)
    assert found.peak_bytes == sum(expected) + activations


def test_of_what_lies_on_the_host_one_partition_at_a_time_is_on_the_device(graph: Graph) -> None:
    without, found = (of_one(graph, None, start=4, offloads=offloads) for offloads in (False, True))
    assert (without.parameter_bytes, found.parameter_bytes) == (60_000, 30_000)
    assert replace(found, parameter_bytes=60_000, peak_bytes=found.peak_bytes + 30_000) == without
    assert of_one(graph, None, offloads=True) == of_one(graph, None)
    # Two partitions train, in parts of a quarter, and are whole at a time.
    assert of_one(graph, Division("fsdp", 4), start=4, offloads=True).parameter_bytes == 10_000 + 5_000 + 20_000
    # What trains uses a weight of the first partition as well.
    *ops, last = graph.ops
    tied = replace(graph, ops=(*ops, replace(last, state=(*last.state, *ops[0].state))))
    assert of_one(tied, None, start=4, offloads=True).parameter_bytes == 40_000


def test_a_budget_is_kept_with_what_is_left_on_the_device(graph: Graph) -> None:
    made, modes = plan(both(graph)), both(graph)
    late = replace(made, phases=(replace(made.phases[0], start=4),))
    needed = of_one(graph, None, start=4, offloads=True).peak_bytes
    options = {"budget": needed, "batch_size": BATCH, "optimizer_slots": SLOTS}
    assert fit(late, modes, **options, offloads=True) == late
    assert fit(late, modes, **options, strict=False) != late


def test_a_process_of_a_pipeline_has_all_weights_and_the_rest_of_its_own_partitions(graph: Graph) -> None:
    first, *others = plan(both(graph)).partitions
    (kept,), (begin,) = ({getattr(each, name) for each in others} for name in ("activation_bytes", "boundary_bytes"))
    two = Division("pipeline", 2)
    # 8 micro-batches of 8 images, of which the first process has two on their way.
    assert bytes_of(of_one(graph, two, micro_batches=8)) == (60_000, 30_000, 30_000, 3 * kept * 2 * 8)
    assert bytes_of(of_one(graph, two)) == (60_000, 30_000, 30_000, 3 * kept * BATCH)
    # The second of the processes trains alone, with one on its way.
    assert bytes_of(of_one(graph, two, start=4, micro_batches=8)) == (60_000, 20_000, 20_000, 2 * kept * 8)
    # Four of six keep what they begin with, and one at a time saves all of it again.
    again = bytes_of(of_one(graph, Division("pipeline", 1), recompute=4, micro_batches=8))
    assert again == (60_000, 60_000, 60_000, (first.boundary_bytes + 3 * begin + 2 * kept + kept) * 8)
    assert bytes_of(of_one(graph, Division("pipeline", 64)))[1] == 10_000


def test_activations_are_those_of_the_process_that_keeps_most(graph: Graph) -> None:
    """Though another one needs more of everything together; and other schedules keep all micro-batches."""
    heavy = replace(graph, state=(*graph.state[:-1], replace(graph.state[-1], bytes=10**9)))
    kept = plan(both(graph)).partitions[1].activation_bytes
    made = plan(both(heavy))
    phase = replace(made.phases[0], micro_batches=8)

    def found(division: Division) -> PhaseForecast:
        return CostModel(made.partitions, both(heavy), BATCH, SLOTS, division=division).phase(phase)

    two = found(Division("pipeline", 2))
    _, stop, _ = balanced(CostModel(made.partitions, both(heavy), BATCH, SLOTS), phase, 2, starts=range(6))
    assert two.gradient_bytes >= 10**9
    assert two.activation_bytes == max(stop * kept * 2 * 8, (6 - stop) * kept * 8)
    assert found(Division("pipeline", 2, keeps_all=True)).activation_bytes == max(stop, 6 - stop) * kept * BATCH


def test_nothing_to_save_is_no_fault(graph: Graph) -> None:
    made = plan(both(graph))
    parts = tuple(replace(each, activation_bytes=0) for each in made.partitions)
    given = {"budget": 0.5, "batch_size": BATCH, "optimizer_slots": SLOTS, "division": Division("pipeline", 2)}
    assert fit(replace(made, partitions=parts), both(graph), **given).phases == made.phases


def test_forecasts_and_budgets_are_those_of_one_process(graph: Graph) -> None:
    made = plan(both(graph))
    whole, divided = (
        forecast(made, both(graph), batch_size=BATCH, optimizer_slots=SLOTS, division=each)
        for each in (None, Division("fsdp", 4))
    )
    assert divided.phases == (of_one(graph, Division("fsdp", 4)),)
    assert divided.time_ratio == whole.time_ratio
    budget = divided.phases[0].peak_bytes
    given = {"budget": budget, "batch_size": BATCH, "optimizer_slots": SLOTS}
    assert fit(made, both(graph), division=Division("fsdp", 4), **given) == made
    assert fit(made, both(graph), strict=False, **given) != made


def test_several_devices_are_forecast_likewise(modes: Pair) -> None:
    made = plan(modes)
    found = {
        (each.kind, each.devices): each.peak_bytes
        for each in scaling(made, modes, batch_size=BATCH, devices=4, bandwidth=1e9, optimizer_slots=SLOTS)
    }
    for kind, batch, micro_batches in (("fsdp", BATCH // 4, 1), ("pipeline", BATCH, 16)):
        costs = CostModel(made.partitions, modes, batch, SLOTS, division=Division(kind, 4))
        assert found[kind, 4] == costs.phase(replace(made.phases[0], micro_batches=micro_batches)).peak_bytes


def test_neighbours_are_grouped_evenly() -> None:
    assert _balanced([1, 1, 1, 1, 4, 1], 3) == [0, 4, 5, 6]
    assert _balanced([5, 1, 1], 3) == [0, 1, 2, 3]


def test_settled_partitions_count_forward_alone(modes: Pair, graph: Graph) -> None:
    """In seconds, and without these in multiply-adds."""
    counted = both(replace(graph, ops=tuple(replace(op, backward_macs=2 * op.macs) for op in graph.ops)))
    for each in (modes, counted):
        for start, cuts in ((0, [0, 3, 6]), (4, [0, 4, 6])):
            made = plan(each, start)
            costs = CostModel(made.partitions, each, 8, 1)
            assert balanced(costs, made.phases[0], 2, starts=range(6)) == cuts
            assert balanced(costs, made.phases[0], 2, starts=(0, 1, 2)) == [0, 2, 6]
