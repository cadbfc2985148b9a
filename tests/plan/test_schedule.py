"""Phases, plans and schedules: what must hold for every schedule, and exact plans worked out by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxsplit.errors import PartitionError, UsageError
from fxsplit.plan.partition import Partition
from fxsplit.plan.schedule import SCHEDULES, Phase, Plan, finetune, grow, schedule, settle, standard, window


def partitions(*macs: int) -> tuple[Partition, ...]:
    return tuple(
        Partition(
            index=index,
            name=f"block{index}",
            start=index,
            stop=index + 1,
            eval_start=index,
            eval_stop=index + 1,
            reads=(f"value{index}",),
            writes=(f"value{index + 1}",),
            state=(f"block{index}.weight",),
            parameters=3,
            state_bytes=12,
            macs=cost,
            activation_bytes=8,
            boundary_bytes=4,
        )
        for index, cost in enumerate(macs)
    )


def drawn(phases: tuple[Phase, ...]) -> list[tuple[int, int, int]]:
    return [(phase.start, phase.stop, phase.epochs) for phase in phases]


costs = st.lists(st.integers(0, 1000), min_size=1, max_size=20)
names = st.sampled_from(sorted(SCHEDULES))


# What holds for every schedule


@given(names, st.lists(st.booleans(), min_size=1, max_size=12).filter(any), st.integers(1, 30))
def test_no_window_is_without_parameters(name: str, holds: list[bool], epochs: int) -> None:
    given_ = tuple(
        replace(part, parameters=int(holding))
        for part, holding in zip(partitions(*[1] * len(holds)), holds, strict=True)
    )
    plan = schedule(name, partitions=given_, epochs=epochs)
    for phase in plan.phases:
        assert any(holds[phase.start : phase.stop])
    if name == "grow" and epochs >= len(holds):
        assert [phase.stop for phase in plan.phases] == list(range(holds.index(True) + 1, len(holds) + 1))
    if name == "window":
        middle = len(plan.phases)
        assert middle == max(1, len(holds) // 2) or not any(holds[middle : len(holds) - middle])


def test_a_window_without_parameters_is_refused() -> None:
    parts = tuple(replace(part, parameters=part.index) for part in partitions(1, 1))
    with pytest.raises(PartitionError, match=r"> #-  1 epoch.*<- the range \[0, 1\) holds no parameter"):
        Plan(schedule="mine", partitions=parts, phases=(Phase(start=0, stop=1, epochs=1),))


@given(names, costs, st.integers(1, 100))
def test_every_schedule_makes_a_plan_of_the_epochs_asked_for(name: str, macs: list[int], epochs: int) -> None:
    plan = schedule(name, partitions=partitions(*macs), epochs=epochs)
    count = max(1, len(macs) // 2) if name == "window" else 1
    assert plan.epochs == count * epochs
    assert plan.schedule == name
    for earlier, later in pairwise(plan.phases):
        assert earlier.start <= later.start or later.thaws
        assert (earlier.start, earlier.stop) != (later.start, later.stop)
    assert all(0 <= phase.start < phase.stop <= len(macs) for phase in plan.phases)
    assert plan.phases[0].start == 0 or name == "finetune"
    assert all(phase.fresh_optimizer == (name == "window") for phase in plan.phases)


@given(names, costs, st.integers(1, 100), st.integers(10, 100))
def test_epochs_total_is_the_length_of_every_schedule(name: str, macs: list[int], epochs: int, total: int) -> None:
    assert schedule(name, partitions=partitions(*macs), epochs=epochs, epochs_total=total).epochs == total


@given(names, costs, st.integers(1, 40))
def test_every_epoch_belongs_to_one_phase(name: str, macs: list[int], epochs: int) -> None:
    plan = schedule(name, partitions=partitions(*macs), epochs=epochs)
    written_out = [index for index, phase in enumerate(plan.phases) for _ in range(phase.epochs)]
    assert [plan.phase_index_at(epoch) for epoch in range(plan.epochs)] == written_out
    assert [plan.first_epoch(index) for index in range(len(plan.phases))] == [
        written_out.index(index) for index in range(len(plan.phases))
    ]
    assert all(plan.phase_at(epoch) is plan.phases[index] for epoch, index in enumerate(written_out))


@given(names, costs, st.integers(1, 40))
def test_a_drawing_has_one_mark_for_each_partition(name: str, macs: list[int], epochs: int) -> None:
    plan = schedule(name, partitions=partitions(*macs), epochs=epochs)
    _, *lines = str(plan).split("\n")
    for line, phase in zip(lines, plan.phases, strict=True):
        marks, length = line.split()[:2]
        frozen = len(macs) - phase.stop
        assert marks == "." * phase.start + "#" * (phase.stop - phase.start) + "-" * frozen
        assert int(length) == phase.epochs


@given(costs, st.integers(1, 200))
def test_the_cut_of_settle_stays_within_its_share_of_the_work(macs: list[int], epochs: int) -> None:
    work = macs if any(macs) else [1] * len(macs)
    before = [done / sum(work) for done in accumulate(work, initial=0)]
    moments = [0.35 + 0.45 * j / 4 for j in range(1, 5)]
    plan = schedule("settle", partitions=partitions(*macs), epochs=epochs)
    for index, phase in enumerate(plan.phases):
        first = plan.first_epoch(index)
        passed = [j for j, moment in enumerate(moments, 1) if max(1, round(moment * epochs)) <= first]
        allowed = 0.6 * max(passed, default=0) / 4 + 1e-9
        assert phase.stop == len(macs)
        if phase.start:
            assert before[phase.start] <= allowed
            # The next cut would be too far, or would leave nothing to train.
            assert phase.start == len(macs) - 1 or before[phase.start + 1] > allowed


# Exact plans


def test_standard_trains_everything_at_once() -> None:
    assert drawn(standard(partitions(1, 1, 1), 7)) == [(0, 3, 7)]


def test_window_over_twelve_partitions_is_the_released_notebook() -> None:
    phases = window(partitions(*[1] * 12), 10)
    assert drawn(phases) == [(i, 12 - i, 10) for i in range(6)]
    assert all(phase.fresh_optimizer for phase in phases)


@pytest.mark.parametrize(
    ("count", "total", "expected"),
    [
        (1, None, [(0, 1, 5)]),
        (2, None, [(0, 2, 5)]),
        (5, None, [(0, 5, 5), (1, 4, 5)]),
        (6, 11, [(0, 6, 4), (1, 5, 4), (2, 4, 3)]),
        (6, 3, [(0, 6, 1), (1, 5, 1), (2, 4, 1)]),
    ],
)
def test_window(count: int, total: int | None, expected: list[tuple[int, int, int]]) -> None:
    assert drawn(window(partitions(*[1] * count), 5, total)) == expected


def test_window_cannot_share_out_fewer_epochs_than_phases() -> None:
    with pytest.raises(UsageError, match="has 3 phases and cannot divide 2 epochs among them"):
        schedule("window", partitions=partitions(*[1] * 6), epochs=5, epochs_total=2)


@pytest.mark.parametrize(
    ("count", "epochs", "expected"),
    [
        (3, 8, [(0, 1, 3), (0, 2, 3), (0, 3, 2)]),
        (4, 4, [(0, 1, 1), (0, 2, 1), (0, 3, 1), (0, 4, 1)]),
        (6, 3, [(0, 2, 1), (0, 4, 1), (0, 6, 1)]),
        (5, 2, [(0, 2, 1), (0, 5, 1)]),
        (5, 1, [(0, 5, 1)]),
    ],
)
def test_grow(count: int, epochs: int, expected: list[tuple[int, int, int]]) -> None:
    assert drawn(grow(partitions(*[1] * count), epochs)) == expected


@pytest.mark.parametrize(
    ("macs", "epochs", "expected"),
    [
        # Moments 9.25, 11.5, 13.75 and 16 of 20 epochs; shares .15, .30, .45 and .60 of ten equal partitions.
        ([1] * 10, 20, [(0, 10, 9), (1, 10, 3), (3, 10, 2), (4, 10, 2), (6, 10, 4)]),
        # A partition ends at exactly .45, which 0.6 * 0.75 misses in binary.
        ([1] * 60, 20, [(0, 60, 9), (9, 60, 3), (18, 60, 2), (27, 60, 2), (36, 60, 4)]),
        # The second partition holds nearly all the work: the cut stops before it.
        ([1, 98, 1], 20, [(0, 3, 9), (1, 3, 11)]),
        # No multiply-adds are known: the number of partitions counts.
        ([0] * 4, 20, [(0, 4, 12), (1, 4, 4), (2, 4, 4)]),
        # Work that lies in the first partition alone never settles.
        ([5, 0, 0], 20, [(0, 3, 20)]),
        # Of work that lies in the last partition alone, all before it settles at once.
        ([0, 0, 5], 20, [(0, 3, 9), (2, 3, 11)]),
        ([1], 20, [(0, 1, 20)]),
        ([1] * 10, 1, [(0, 10, 1)]),
        # Three moments round to epoch 1 and the last to 2, after which no epoch remains.
        ([1] * 10, 2, [(0, 10, 1), (4, 10, 1)]),
    ],
)
def test_settle(macs: list[int], epochs: int, expected: list[tuple[int, int, int]]) -> None:
    assert drawn(settle(partitions(*macs), epochs)) == expected


def test_settle_far_settles_nearly_all_and_in_long_runs_early() -> None:
    # Shares .2375, .475, .7125 and .95 at moments 9.7, 16.4, 23.1 and 29.8 of 60 epochs, 4.3, 5.7, 7.0 and 8.3 of 10.
    plan = schedule("settle-far", partitions=partitions(*[1] * 20), epochs=60)
    assert drawn(plan.phases) == [(0, 20, 10), (4, 20, 6), (9, 20, 7), (14, 20, 7), (19, 20, 30)]
    plan = schedule("settle-far", partitions=partitions(*[1] * 20), epochs=10)
    assert drawn(plan.phases) == [(0, 20, 4), (4, 20, 2), (9, 20, 1), (14, 20, 1), (19, 20, 2)]
    # 6.5, 9.0, 11.5 and 14.0 of 20; 600 epochs settle at the shares of 60.
    plan = schedule("settle-far", partitions=partitions(*[1] * 20), epochs=20)
    assert drawn(plan.phases) == [(0, 20, 7), (4, 20, 2), (9, 20, 3), (14, 20, 2), (19, 20, 6)]
    plan = schedule("settle-far", partitions=partitions(*[1] * 20), epochs=600)
    assert [phase.epochs for phase in plan.phases] == [97, 67, 67, 67, 302]
    for epochs in range(1, 8):
        assert schedule("settle-far", partitions=partitions(*[1] * 20), epochs=epochs).epochs == epochs


def test_shares_given_to_a_schedule_win() -> None:
    ten = partitions(*[1] * 10)
    for name in ("settle", "settle-far"):
        given = schedule(name, partitions=ten, epochs=20, start=0.2, stop=0.8, share=0.4)
        assert given.phases == settle(ten, 20, start=0.2, stop=0.8, share=0.4)


def test_settle_follows_its_parameters() -> None:
    ten = partitions(*[1] * 10)
    assert drawn(settle(ten, 8, start=0, stop=1, share=1)) == [
        (0, 10, 2), (2, 10, 2), (5, 10, 2), (7, 10, 2)
    ]  # fmt: skip
    assert drawn(settle(ten, 8, share=0)) == [(0, 10, 8)]
    # All moments at the very start: the first epoch still trains everything, the last partition always.
    assert drawn(settle(ten, 8, start=0, stop=0, share=1)) == [(0, 10, 1), (9, 10, 7)]


@pytest.mark.parametrize("wrong", [{"start": 0.9}, {"stop": 1.1}, {"start": -0.1}, {"share": -1}, {"share": 1.1}])
def test_settle_refuses_a_cut_that_cannot_move_forward(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"move at 0.9 of the run and stop at 0.8|must be a number from 0 to 1"):
        settle(partitions(1, 1), 10, **wrong)


def test_an_unknown_schedule_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="no schedule 'setle'; did you mean 'settle'"):
        schedule("setle", partitions=partitions(1), epochs=1)
    with pytest.raises(UsageError, match=r"no schedule 'l2l': l2l is a preset: .* --l2l .* settle-far"):
        schedule("l2l", partitions=partitions(1), epochs=1)


@pytest.mark.parametrize("epochs", [{"epochs": 0}, {"epochs": 5, "epochs_total": 0}])
def test_a_run_has_at_least_one_epoch(epochs: dict[str, int]) -> None:
    for name in ("standard", "grow", "settle", "window"):
        with pytest.raises(UsageError, match=r"^epochs(_total)? is 0, but must be a whole number, at least 1"):
            schedule(name, partitions=partitions(1, 1), **epochs)


# Phases and plans


@pytest.mark.parametrize(("start", "stop", "epochs"), [(1, 1, 1), (2, 1, 1), (-1, 1, 1), (0, 1, 0), (0, 1, -3)])
def test_a_phase_trains_something_for_some_time(start: int, stop: int, epochs: int) -> None:
    with pytest.raises(UsageError, match=r"holds none|must be a whole number, at least"):
        Phase(start=start, stop=stop, epochs=epochs)
    with pytest.raises(UsageError, match="only where it recomputes"):
        Phase(start=0, stop=2, epochs=1, segmented=True)


def test_a_plan_is_drawn() -> None:
    plan = Plan(
        schedule="mine",
        partitions=partitions(1, 1, 1, 1),
        phases=(
            Phase(start=0, stop=4, epochs=10, micro_batches=2),
            Phase(start=1, stop=4, epochs=2, recompute=2, segmented=True),
            Phase(start=1, stop=3, epochs=1),
        ),
    )
    assert str(plan) == (
        "mine: 4 partitions, 13 epochs\n"
        "  ####  10 epochs  2 micro-batches\n"
        "  .###  2 epochs   from block1, recomputes up to block2 in segments\n"
        "  .##-  1 epoch    from block1 up to block3"
    )


def test_a_wrong_plan_is_drawn_with_a_mark_at_each_wrong_phase() -> None:
    with pytest.raises(PartitionError) as caught:
        Plan(
            schedule="mine",
            partitions=partitions(1, 1, 1),
            phases=(
                Phase(start=0, stop=9, epochs=1),
                Phase(start=2, stop=3, epochs=1),
                Phase(start=1, stop=2, epochs=1),
                Phase(start=1, stop=4, epochs=1),
            ),
        )
    assert str(caught.value).split("\n") == [
        "the marked phases of the plan cannot run",
        "mine: 3 partitions, 4 epochs",
        "> ###  1 epoch  <- the range [0, 9) ends after the last partition",
        "  ..#  1 epoch  from block2",
        "> .#-  1 epoch  from block1 up to block2  <- partition 1 is settled by an earlier phase, "
        "and the phase does not thaw it",
        "> .##  1 epoch  from block1  <- the range [1, 4) ends after the last partition; "
        "partition 1 is settled by an earlier phase, and the phase does not thaw it",
    ]


def test_of_many_phases_those_about_the_first_wrong_one_are_shown() -> None:
    phases = [Phase(start=0, stop=3, epochs=number) for number in range(1, 101)]
    phases[49:] = [Phase(start=0, stop=9, epochs=50)] * 51
    with pytest.raises(PartitionError) as caught:
        Plan(schedule="mine", partitions=partitions(1, 1, 1), phases=tuple(phases))
    lines = str(caught.value).split("\n")[2:]
    assert lines[0] == lines[-1] == "  ..."
    assert [line[:2] for line in lines[1:-1]] == ["  "] * 6 + ["> "] * 7
    assert lines[6] == "  ###  49 epochs"


def test_a_phase_thaws_what_was_settled_or_is_wrong() -> None:
    head, rest = Phase(start=2, stop=3, epochs=1), Phase(start=1, stop=3, epochs=1, thaws=True)
    plan = Plan(schedule="mine", partitions=partitions(1, 1, 1), phases=(head, rest, replace(rest, thaws=False)))
    assert [phase.start for phase in plan.phases] == [2, 1, 1]
    with pytest.raises(PartitionError, match="phase does not thaw it"):
        Plan(schedule="mine", partitions=plan.partitions, phases=(head, replace(rest, thaws=False)))
    for phases in [(rest,), (head, replace(head, thaws=True)), (head, rest, rest)]:
        with pytest.raises(PartitionError, match="thaws nothing"):
            Plan(schedule="mine", partitions=plan.partitions, phases=phases)


def test_finetune_by_hand() -> None:
    """The head has no multiply-adds to speak of; of 10 eighths each, half of the work never trains."""
    given_ = partitions(*[10] * 10, 0)
    phases = finetune(given_, 8)
    assert drawn(phases) == [(10, 11, 1), (5, 11, 1), (6, 11, 1), (7, 11, 1), (8, 11, 1), (9, 11, 3)]
    assert [phase.thaws for phase in phases] == [False, True, False, False, False, False]
    assert drawn(finetune(given_, 16)) == [(10, 11, 2), (5, 11, 2), (6, 11, 2), (7, 11, 2), (8, 11, 2), (9, 11, 6)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"front": 0.0, "share": 0.0}, [(4, 5, 1), (0, 5, 7)]),
        ({"front": 0.5, "share": 0.2}, [(4, 5, 1), (2, 5, 7)]),
        ({"front": 1.0}, [(4, 5, 8)]),
        ({"start": 0.5, "stop": 0.5, "front": 0.25, "share": 0.5}, [(4, 5, 4), (1, 5, 4)]),
    ],
)
def test_the_front_of_finetune_is_a_share_of_the_work(
    options: dict[str, float], expected: list[tuple[int, int, int]]
) -> None:
    assert drawn(finetune(partitions(1, 1, 1, 1, 0), 8, **options)) == expected


@pytest.mark.parametrize("options", [{"front": -0.1}, {"front": 1.1}, {"start": 0.6, "stop": 0.5}, {"share": -1.0}])
def test_finetune_refuses_what_is_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        finetune(partitions(1, 1), 8, **options)


@pytest.mark.parametrize(
    ("name", "epochs", "thaw", "expected"),
    [
        ("settle", 50, 0.96, [(0, 5, 29), (1, 5, 11), (2, 5, 8), (0, 5, 2)]),
        ("settle", 50, 0.7, [(0, 5, 29), (1, 5, 6), (0, 5, 15)]),
        ("settle", 50, 0.46, [(0, 5, 50)]),
        ("finetune", 8, 0.99, [(4, 5, 1), (2, 5, 3), (3, 5, 3), (0, 5, 1)]),
        ("finetune", 8, 0.01, [(4, 5, 1), (0, 5, 7)]),
        ("settle", 1, 0.5, [(0, 5, 1)]),
    ],
)
def test_at_the_end_everything_may_train_again(
    name: str, epochs: int, thaw: float, expected: list[tuple[int, int, int]]
) -> None:
    plan = schedule(name, partitions=partitions(1, 1, 1, 1, 0), epochs=epochs, thaw=thaw)
    assert drawn(plan.phases) == expected
    assert plan.epochs == epochs


@pytest.mark.parametrize("thaw", [-0.1, 1.1])
def test_it_cannot_do_so_outside_of_the_run(thaw: float) -> None:
    with pytest.raises(UsageError, match=r"thaw is .*, but must be a number from 0 to 1"):
        schedule("settle", partitions=partitions(1, 1), epochs=8, thaw=thaw)


def test_one_epoch_of_finetune_has_no_epoch_for_the_head_alone() -> None:
    assert drawn(finetune(partitions(1, 1, 0), 1)) == [(1, 3, 1)]


def test_a_plan_has_a_phase() -> None:
    with pytest.raises(PartitionError, match="has no phase"):
        Plan(schedule="mine", partitions=partitions(1), phases=())


def test_there_is_no_epoch_and_no_phase_outside_the_run() -> None:
    plan = schedule("standard", partitions=partitions(1), epochs=3)
    for epoch in (-1, 3):
        with pytest.raises(IndexError, match=re.escape(f"epoch {epoch} is outside 0..2")):
            plan.phase_at(epoch)
    for index in (-1, 1):
        with pytest.raises(IndexError, match=re.escape(f"phase {index} is outside 0..0")):
            plan.first_epoch(index)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 200))
def test_a_plan_lasts_as_long_as_asked(lengths: list[int], wanted: int) -> None:
    count = len(lengths)
    phases = tuple(Phase(start=index, stop=count, epochs=length) for index, length in enumerate(lengths))
    plan = Plan(schedule="mine", preset="l2l", partitions=partitions(*[1] * count), phases=phases)
    assert plan.lasting(plan.epochs) == plan
    assert plan.lasting(3 * plan.epochs).phases == tuple(replace(phase, epochs=3 * phase.epochs) for phase in phases)
    if wanted < count:
        with pytest.raises(UsageError, match=f"has {count} phases and cannot be run in {wanted} epoch"):
            plan.lasting(wanted)
        return
    found = plan.lasting(wanted)
    assert found.epochs == wanted
    pairs = zip(found.phases, lengths, strict=True)
    assert replace(found, phases=tuple(replace(phase, epochs=length) for phase, length in pairs)) == plan


def test_phases_end_at_their_shares_of_another_length() -> None:
    def lasting(lengths: list[int], epochs: int) -> list[int]:
        phases = tuple(Phase(start=index, stop=5, epochs=length) for index, length in enumerate(lengths))
        plan = Plan(schedule="mine", preset="l2l", partitions=partitions(*[1] * 5), phases=phases)
        return [phase.epochs for phase in plan.lasting(epochs).phases]

    assert lasting([6, 3, 1], 15) == [9, 5, 1]  # ends at 9, 13.5 and 15
    assert lasting([6, 3, 1], 5) == [3, 1, 1]  # 3, 4.5, which leaves none for the last, and 5
    assert lasting([1, 1, 8], 4) == [1, 1, 2]  # 0.4 and 0.8 are not an epoch
    assert lasting([97, 1, 1, 1], 4) == [1, 1, 1, 1]


def test_a_plan_is_called_by_its_preset_too() -> None:
    plan = schedule("settle", partitions=partitions(1, 1), epochs=4)
    assert plan.title == "settle"
    assert str(replace(plan, preset="l2l")).startswith("l2l (settle): 2 partitions, 4 epochs\n")
