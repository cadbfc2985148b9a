"""What several devices cost, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fxsplit.errors import UsageError
from fxsplit.graph import Graph
from fxsplit.plan.partition import partition
from fxsplit.plan.scaling import BUCKET_BYTES, ScaleForecast, scaling
from fxsplit.plan.schedule import Phase, Plan
from tests.pairs import Pair, both

# Six ops of 10 kB of parameters each: forward takes 1 s and backward 2 s for the graph's two samples.
UPDATE = 0.6


@pytest.fixture
def modes(graph: Graph) -> Pair:
    ops = tuple(replace(op, seconds=3.0, forward_seconds=1.0) for op in graph.ops)
    return both(replace(graph, ops=ops))


def plan(modes: Pair, start: int = 0) -> Plan:
    parts = partition(modes, count=6)
    return Plan(schedule="settle", partitions=parts, phases=(Phase(start=start, stop=6, epochs=1),))


def forecasts(
    modes: Pair, start: int = 0, bandwidth: float = 1e15, **options: float
) -> dict[tuple[str, int], ScaleForecast]:
    found = scaling(
        plan(modes, start), modes, batch_size=64, devices=8, bandwidth=bandwidth, optimizer_slots=1,
        update_seconds=UPDATE, **options,
    )  # fmt: skip
    return {(each.kind, each.devices): each for each in found}


# Forward and backward of a step on 64 images, in seconds.
FORWARD, BACKWARD = 6 * 32, 6 * 64
WHOLE = FORWARD + BACKWARD


def test_devices_divide_what_is_computed(modes: Pair) -> None:
    found = forecasts(modes)
    assert sorted(found, key=lambda each: each[1]) == [
        ("ddp", 1), ("ddp", 2), ("fsdp", 2), ("pipeline", 2), ("ddp", 4), ("fsdp", 4), ("pipeline", 4),
        ("ddp,pipeline", 4), ("ddp", 8), ("fsdp", 8), ("ddp,pipeline", 8),
    ]  # fmt: skip
    for count in (1, 2, 4, 8):
        assert found["ddp", count].step_seconds == pytest.approx(WHOLE / count + UPDATE)
        assert found["ddp", count].idle_share == pytest.approx(0, abs=1e-9)
    for count in (2, 4, 8):
        assert found["fsdp", count].step_seconds == pytest.approx((WHOLE + UPDATE) / count)
        assert found["fsdp", count].peak_bytes < found["ddp", count].peak_bytes


def test_what_is_settled_is_not_sent(modes: Pair) -> None:
    for start, trained in ((0, 60_000), (4, 20_000)):
        found = forecasts(modes, start)
        for count in (2, 4, 8):
            assert found["ddp", count].traffic_bytes == round(2 * (count - 1) / count * trained)
            assert found["fsdp", count].traffic_bytes == round(3 * (count - 1) / count * trained)
    # A boundary of 16 bytes a sample goes on; its gradient comes back if anything before it trains.
    sizes = {part.boundary_bytes for part in plan(modes).partitions[1:]}
    assert len(sizes) == 1
    crossing = 64 * sizes.pop()
    assert forecasts(modes)["pipeline", 2].traffic_bytes == crossing
    middle = forecasts(modes)["pipeline", 4].traffic_bytes
    assert middle == 2 * crossing
    assert forecasts(modes, 5)["pipeline", 4].traffic_bytes == crossing
    # The third of the devices begins where training does.
    assert forecasts(modes, 4)["pipeline", 4].traffic_bytes == crossing


def test_what_is_settled_may_lie_on_the_host(modes: Pair) -> None:
    """Of four partitions of 10 kB each, three do."""
    without, found = (forecasts(modes, start=4, offloads=offloads) for offloads in (False, True))
    assert {each: way.peak_bytes - found[each].peak_bytes for each, way in without.items()} == dict.fromkeys(
        without, 30_000
    )


def test_a_slow_network_is_waited_for(modes: Pair) -> None:
    backward = BACKWARD / 2
    traffic = 60_000.0
    found = forecasts(modes, bandwidth=traffic / (backward + 100))["ddp", 2]
    # All gradients fit into one bucket, which is full when backward ends.
    assert traffic < BUCKET_BYTES
    assert found.step_seconds == pytest.approx(WHOLE / 2 + UPDATE + backward + 100)
    assert found.idle_share == pytest.approx((backward + 100) / found.step_seconds)


def test_a_pipeline_waits_at_both_ends(modes: Pair) -> None:
    found = forecasts(modes)["pipeline", 2]
    # 8 micro-batches of 8 images, half of the ops on each device.
    beat = WHOLE / 8 / 2
    assert found.step_seconds == pytest.approx((8 + 2 - 1) * beat + UPDATE / 2)
    assert 1 - found.idle_share == pytest.approx((8 * beat + UPDATE / 2) / found.step_seconds)


def test_several_pipelines_average_gradients_after_backward(modes: Pair) -> None:
    beat = WHOLE / 4 / 8 / 2
    found = forecasts(modes)["ddp,pipeline", 8]
    # Four pipelines of two devices wait less than two of four do. Each takes 8 micro-batches of 2 of its 16 images.
    assert found.way == "ddp,pipeline of 2"
    assert found.step_seconds == pytest.approx((8 + 2 - 1) * beat + UPDATE / 2)
    # Of half of the batch half of the bytes cross the cut; each device trains half of the parameters.
    fast, slow = (forecasts(modes, bandwidth=each)["ddp,pipeline", 4] for each in (1e15, 1e4))
    one = forecasts(modes)["pipeline", 2]
    assert fast.traffic_bytes == one.traffic_bytes // 2 + 30_000
    assert slow.step_seconds == pytest.approx(fast.step_seconds + 30_000 / 1e4)
    assert one.way == "pipeline"
    # In less memory, pipelines are longer.
    least = min(each.peak_bytes for each in forecasts(modes).values())
    assert forecasts(modes, device_bytes=least)["ddp,pipeline", 8].pipeline_devices == 4


def test_micro_batches_of_a_pipeline_hold_no_more_images_than_there_are(modes: Pair) -> None:
    """100 images in micro-batches of 7, which 16 would be too many of; the slowest of four devices has two ops."""
    (found,) = (
        each
        for each in scaling(
            plan(modes), modes, batch_size=100, devices=4, bandwidth=1e15, optimizer_slots=1, update_seconds=UPDATE
        )
        if (each.kind, each.devices) == ("pipeline", 4)
    )
    assert found.step_seconds == pytest.approx((15 + 4 - 1) * 2 * 3 * 7 / 2 + UPDATE * 2 / 6)


def test_the_fastest_that_fits_is_marked(modes: Pair) -> None:
    assert [each for each, found in forecasts(modes).items() if found.is_fastest and each[1] > 1] == [
        ("fsdp", 2), ("fsdp", 4), ("fsdp", 8),
    ]  # fmt: skip
    least = min(each.peak_bytes for each in forecasts(modes).values())
    found = forecasts(modes, device_bytes=least)
    assert [each.peak_bytes for each in found.values() if each.is_fastest] == [least]


def test_unmeasured_ops_are_refused(graph: Graph) -> None:
    with pytest.raises(UsageError, match="ops that were measured: see --measure"):
        scaling(plan(both(graph)), both(graph), batch_size=64, devices=2, bandwidth=1e9)
