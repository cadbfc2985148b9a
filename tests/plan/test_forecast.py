"""Forecasts against what can be worked out by hand: the bytes that a step holds, and the time that it takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fxsplit.graph import Graph, Op
from fxsplit.plan.forecast import MACS_PER_BYTE, forecast
from fxsplit.plan.memory import Heap, Step, peak_bytes
from fxsplit.plan.partition import partition
from fxsplit.plan.schedule import Phase, Plan
from tests.pairs import Pair, both
from tests.plan.test_partition import graph, op


def test_a_block_is_freed_when_nobody_holds_it() -> None:
    heap = Heap()
    heap.hold("a", 5)
    heap.hold("a", 5)
    heap.hold("b", 3)
    heap.drop("a")
    assert (heap.used, heap.is_shared("a")) == (8, False)
    heap.drop("a")
    heap.borrow(4)
    assert (heap.used, heap.peak) == (3, 8)
    heap.borrow(6)
    assert (heap.used, heap.peak) == (3, 9)
    with pytest.raises(KeyError):
        heap.drop("a")


# a ── relu ── c: relu saves what it delivers, and so does c, which reads it; the input is the caller's.
NET = graph(
    (
        op("a", "x", size=10, state=("p40", "b8"), macs=100, backward_macs=100),
        op("relu", "a", size=10, saves=("relu",), hidden_bytes=1),
        op("c", "relu", size=4, saves=("relu",), state=("p20",), macs=300, backward_macs=600),
    )
)
BACKWARD = {"a": 2.0, "relu": 4.0, "c": 8.0}


def steps(*recorded: str, passes: tuple[str, ...] = ("relu", "c")) -> list[Step]:
    return [
        Step(
            op=each,
            recorded=each.name in recorded,
            trains=tuple(name for name in each.state if name[0] == "p") if each.name in recorded else (),
            passes=each.reads if each.name in passes else (),
        )
        for each in NET.ops
    ]


def peak(found: list[Step], net: Graph = NET, batch_size: int = 1, **gradients: int) -> int:
    return peak_bytes(found, net, batch_size=batch_size, gradient_bytes={"p40": 0, "p20": 0, **gradients})


def test_the_peak_of_a_step_by_hand() -> None:
    everything = steps("a", "relu", "c")
    # In the backward of relu: the output, relu and what it hides, the gradients of relu and of a.
    assert peak(everything) == 4 + 10 + 1 + 10 + 10
    assert peak(everything, batch_size=3) == 3 * 35
    # In the backward of a: the output, both gradients of parameters, the gradient of a.
    assert peak(everything, p20=20, p40=40) == 4 + 20 + 40 + 10
    # Settled but for c, which passes nothing back: a and relu at once in forward.
    assert peak(steps("c", passes=())) == 10 + 10
    assert peak(steps("c", passes=()), p20=20) == 4 + 10 + 4 + 20


def test_a_gradient_that_is_added_to_another_lasts_until_it_is_complete() -> None:
    def adding(net: Graph, **gradients: int) -> int:
        found = [
            Step(op=each, recorded=True, trains=each.state, passes=each.reads[: each.name != "a"]) for each in net.ops
        ]
        return peak_bytes(found, net, batch_size=1, gradient_bytes=gradients, adds=True)

    first, middle, last = (
        op(name, before, size=10, hidden_bytes=1, state=state)
        for name, before, state in (("a", "x", ("p40",)), ("b", "a", ("p20",)), ("c", "b", ("p40",)))
    )
    own = graph((first, middle, replace(last, state=())))
    # In the backward of b, and of a: the output, what is hidden, gradients of values and that of the parameter.
    assert adding(own, p20=20, p40=0) == 10 + 2 + 10 + 10 + 20
    assert adding(own, p20=0, p40=40) == 10 + 1 + 10 + 40
    # Of a parameter that a and c use the gradient is complete when that of a has arrived.
    assert adding(graph((first, middle, last)), p20=20, p40=40) == 10 + 2 + 10 + 10 + 20 + 40


def test_memory_that_kernels_borrow_is_on_top() -> None:
    ops = [replace(each.op, forward_workspace_bytes=50) if each.op.name == "c" else each.op for each in steps()]
    found = [replace(step, op=each) for step, each in zip(steps("c", passes=()), ops, strict=True)]
    assert peak(found) == 10 + 4 + 50
    ops = [replace(each.op, backward_workspace_bytes=50) if each.op.name == "c" else each.op for each in steps()]
    found = [replace(step, op=each) for step, each in zip(steps("a", "relu", "c"), ops, strict=True)]
    assert peak(found) == 4 + 10 + 1 + 4 + 10 + 50


def test_a_gradient_that_is_handed_on_needs_no_memory_and_is_not_written_into() -> None:
    # A sum hands one gradient to both sides. The skip adds its own to it only when the branch is done.
    net = graph(
        (
            op("a", "x", size=10),
            op("branch", "a", size=10, hidden_bytes=1),
            op("sum", "branch", "a", size=10),
            op("out", "sum", size=2, hidden_bytes=1),
        )
    )
    found = [Step(op=each, recorded=True, passes=each.reads if each.name != "a" else ()) for each in net.ops]
    # In the backward of branch: the output, its mask, the gradient of the sum, shared by branch and skip, and a's.
    # Then both are added up in a new place: the first is the skip's no longer, but branch has held it too.
    assert peak_bytes(found, net, batch_size=1, gradient_bytes={}) == max(
        10 + 10 + 10 + 1,  # forward: a, branch and sum at once
        2 + 1 + 10 + 10,  # backward of branch
    )


def test_a_value_that_is_written_in_place_is_one_block() -> None:
    net = graph((op("a", "x", size=10), op("relu_", "a", size=10, storage="a"), op("c", "relu_", size=4)))
    found = [Step(op=each, recorded=False) for each in net.ops]
    assert peak_bytes(found, net, batch_size=1, gradient_bytes={}) == 10 + 4


def timed(net: Graph, *, forward: float, backward: dict[str, float]) -> Graph:
    def seconds(each: Op) -> Op:
        return replace(each, forward_seconds=forward, seconds=forward + backward.get(each.name, 0.0))

    return replace(net, ops=tuple(map(seconds, net.ops)))


def plan_of(*windows: tuple[int, int], epochs: int = 1) -> Plan:
    return Plan(
        schedule="by hand",
        partitions=partition(both(NET), at=["relu", "c"]),
        phases=tuple(Phase(start=start, stop=stop, epochs=epochs) for start, stop in windows),
    )


def test_time_is_that_of_the_ops_that_run() -> None:
    train, evaluation = timed(NET, forward=1.0, backward=BACKWARD), timed(NET, forward=0.5, backward={})
    found = forecast(
        plan_of((0, 3), (2, 3)),
        Pair(train, evaluation),
        batch_size=2,
        optimizer_slots=0,
        update_seconds=6.0,
        steps_per_epoch=10,
    )
    standard, late = found.phases
    assert standard == found.standard
    # Twice the traced batch; the update is of the parameters that train, and does not depend on the batch.
    assert standard.step_seconds == 2 * (3 * 1.0 + 14.0) + 6.0
    # c passes no gradient back: one of its two products.
    assert late.step_seconds == 2 * (2 * 0.5 + 1.0 + 8.0 / 2) + 6.0 * 20 / 60
    assert late.step_cost == late.step_seconds / standard.step_seconds
    assert found.time_ratio == (1 + late.step_cost) / 2
    assert found.seconds == pytest.approx(10 * (standard.step_seconds + late.step_seconds))


def test_micro_batches_take_turns_and_add_gradients_up() -> None:
    train, evaluation = timed(NET, forward=1.0, backward=BACKWARD), timed(NET, forward=0.5, backward={})
    plan = plan_of((0, 3))
    for micro_batches, part in ((1, 24), (2, 12), (4, 6), (5, 5)):
        (phase,) = plan.phases
        split = replace(plan, phases=(replace(phase, micro_batches=micro_batches),))
        found = forecast(split, Pair(train, evaluation), batch_size=24, optimizer_slots=2, update_seconds=7.0)
        (told,) = found.phases
        # An update moves gradients, parameters and two slots, of which it writes the last three: 7 times their bytes.
        assert told.step_seconds == pytest.approx(24 * (3 * 1.0 + 14.0) + 7.0 + (micro_batches - 1) * 3.0)
        assert found.standard.activation_bytes == 24 * 35
        assert (told.gradient_bytes, told.optimizer_bytes) == (60, 120)
        assert told.activation_bytes == part * 35
        # When activations take most there is c's gradient, or there are all of those of the micro-batches before.
        assert told.peak_bytes == part * 35 + (20 if micro_batches == 1 else 60) + 60 + 8 + 120


def test_frozen_ops_run_in_evaluation_and_pass_gradients_on() -> None:
    train, evaluation = timed(NET, forward=1.0, backward=BACKWARD), timed(NET, forward=0.5, backward={})
    plan = plan_of((0, 1))
    found = forecast(plan, Pair(train, evaluation), batch_size=1, optimizer_slots=1, update_seconds=0.0).phases[0]
    # c has no gradient of a weight to find.
    assert found.step_seconds == 1.0 + 2.0 + 0.5 + 4.0 + 0.5 + 8.0 / 2
    assert (found.gradient_bytes, found.optimizer_bytes) == (40, 40)
    assert found.activation_bytes == forecast(plan_of((0, 3)), Pair(train, evaluation), batch_size=1, optimizer_slots=1
                                              ).phases[0].activation_bytes  # fmt: skip


def test_without_seconds_work_is_weighed() -> None:
    found = forecast(plan_of((0, 3), (2, 3)), both(NET), batch_size=1, optimizer_slots=2, steps_per_epoch=10)
    byte = MACS_PER_BYTE
    moved = {"a": 12 + 10 + 48, "relu": 20, "c": 14 + 20}
    standard = 400 + 700 + 3 * byte * sum(moved.values()) + byte * 7 * 60
    late = 100 + byte * (moved["a"] + moved["relu"]) + 300 + byte * moved["c"] + (600 + 2 * byte * moved["c"]) / 2
    assert found.phases[1].step_cost == (late + byte * 7 * 20) / standard
    assert found.phases[1].step_seconds is found.seconds is None


def test_memory_that_lasts() -> None:
    found = forecast(plan_of((0, 3), (2, 3)), both(NET), batch_size=1, optimizer_slots=2)
    standard, late = found.phases
    assert (standard.parameter_bytes, standard.buffer_bytes) == (late.parameter_bytes, late.buffer_bytes) == (60, 8)
    assert (standard.gradient_bytes, standard.optimizer_bytes) == (60, 120)
    assert (late.gradient_bytes, late.optimizer_bytes) == (20, 40)
    assert standard.peak_bytes == 60 + 8 + 120 + 74
    assert (late.activation_bytes, late.peak_bytes) == (20, 60 + 8 + 40 + 38)
    assert found.peak_ratio == 1.0
    assert forecast(plan_of((2, 3)), both(NET), batch_size=1, optimizer_slots=2).peak_ratio == late.peak_bytes / (
        standard.peak_bytes
    )


def test_standard_costs_what_it_costs() -> None:
    found = forecast(plan_of((0, 3), epochs=7), both(NET), batch_size=5, optimizer_slots=1)
    assert (found.time_ratio, found.peak_ratio, found.phases) == (1.0, 1.0, (found.standard,))
