"""The guard: which falls count, and that the cut goes back and stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxsplit
from fxsplit import assembly
from fxsplit.execute.executor import Executor
from fxsplit.plan.schedule import Phase, Plan
from fxsplit.report import EpochRecord, Observer
from fxsplit.training.guard import Guard
from tests.networks import Chain
from tests.plan.test_schedule import partitions
from tests.saving.runs import COMMON, SETTLING, model_in
from tests.saving.test_resume import Interrupts
from tests.training.test_trainer import trainer

pytestmark = pytest.mark.usefixtures("one_thread")

PLAN = Plan(
    schedule="mine",
    partitions=partitions(1, 1, 1),
    phases=(
        Phase(start=2, stop=3, epochs=1),
        Phase(start=0, stop=3, epochs=1, thaws=True),
        Phase(start=1, stop=3, epochs=2),
        Phase(start=2, stop=3, epochs=1),
    ),
)


def right(*wrong: int, count: int = 100) -> Tensor:
    flags = torch.ones(count, dtype=torch.bool)
    flags[list(wrong)] = False
    return flags


@pytest.mark.parametrize(
    ("lost", "gained", "falls"),
    [(4, 0, False), (5, 0, True), (6, 2, False), (13, 5, False), (14, 5, True), (0, 30, False)],
)
def test_a_fall_counts_from_two_standard_errors_on(lost: int, gained: int, falls: bool) -> None:
    """4 - 0 is 2 of sqrt(4), and not more; 14 - 5 is 9, and twice the root of 19 is 8.7."""
    guard = Guard(PLAN)
    assert guard.epoch_done(1, right(*range(gained))) == ""
    words = guard.epoch_done(2, right(*range(gained, gained + lost)))
    assert bool(words) is falls
    assert guard.last_phase == (1 if falls else 3)
    if (lost, gained) == (5, 0):
        assert words.startswith(
            "with the cut before block1 the accuracy on held-out images fell from 100.0 % to 95.0 %"
        )


def test_only_the_first_epoch_after_more_has_settled_is_judged() -> None:
    guard = Guard(PLAN)
    for phase, flags in [(0, right()), (1, right(*range(50))), (2, right(*range(50))), (2, right(*range(90)))]:
        assert guard.epoch_done(phase, flags) == ""
    assert guard.epoch_done(3, right(*range(99))) != ""
    assert guard.last_phase == 2


def test_where_the_cut_stays_everything_may_still_train_again() -> None:
    phases = (PLAN.phases[1], PLAN.phases[3], PLAN.phases[1], PLAN.phases[2])
    made = trainer(Chain(), plan=(replace(phases[0], thaws=False), *phases[1:]))
    made.guard = Guard(made.plan)
    made.guard.last_phase = 0
    assert [made._phase_of(epoch) for epoch in range(made.plan.epochs)] == [0, 0, 2, 0, 0]
    assert [made._end_of(index, stays=stays) for index, stays in ((0, True), (2, True), (1, False))] == [2, 5, 2]


class Epochs(Observer):
    def __init__(self) -> None:
        self.records: list[EpochRecord] = []
        self.sentences: list[str] = []

    def notice(self, sentence: str) -> None:
        self.sentences.append(sentence)

    def epoch_done(self, record: EpochRecord) -> None:
        self.records.append(record)


def run(folder: Path, heard: Observer, **changes: Any) -> fxsplit.RunReport:
    options = {"model": model_in(folder), "output": str(folder), **SETTLING, "guard": 0.25, "epochs": 6, **changes}
    return fxsplit.train(fxsplit.RunSpec(**{**COMMON, **options}), heard)


def test_a_move_that_costs_accuracy_is_undone_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[tuple[int, int]] = []

    def judge(guard: Guard, phase: int, flags: Tensor) -> str:
        judged.append((phase, len(flags)))
        if phase == 1:
            guard.last_phase = 0
            return "back"
        return ""

    monkeypatch.setattr(Guard, "epoch_done", judge)
    heard = Epochs()
    report = run(tmp_path, heard)
    assert report.status == "finished"
    planned = [report.plan.phase_index_at(epoch) for epoch in range(6)]
    first = planned.index(1)
    found = [record.phase for record in heard.records]
    assert found == [*planned[: first + 1], *[0] * (5 - first)]
    assert [record.start for record in heard.records] == [report.plan.phases[phase].start for phase in found]
    trained = {record.phase: record.trainable_parameters for record in heard.records}
    assert [record.trainable_parameters for record in heard.records] == [trained[phase] for phase in found]
    assert judged == [(phase, 17) for phase in found]
    assert heard.sentences.count("back") == 1


def test_held_out_images_are_not_trained_on(tmp_path: Path) -> None:
    """A quarter of 68 is 17; what is left gives 4 batches, the last of 3 images."""
    heard = Epochs()
    run(tmp_path, heard)
    assert "of 68 images to train on 17 are held out for the guard" in heard.sentences
    assert all(record.held_out_top1 is not None for record in heard.records)
    asked = fxsplit.RunSpec(model="any", img_size=8, train_limit=99)
    whole = assembly.data(asked, Observer())
    data = whole.holding_out(0.25, seed=3)
    assert data.held_out is not None
    ids = [images.read(torch.arange(len(images)), len(images)) for images in (data.train, data.held_out, whole.train)]
    train, out, everything = (torch.cat(list(pixels)).flatten(1) for pixels in ids)
    assert len(train) + len(out) == len(everything)
    both = torch.cat([train, out])
    assert torch.equal(both.double().sum(dim=0), everything.double().sum(dim=0))
    assert torch.equal(data.holding_out(0.25, seed=3).train.labels, data.holding_out(0.25, seed=3).train.labels)
    assert not torch.equal(whole.holding_out(0.25, seed=4).train.labels, data.train.labels)


def test_held_out_images_go_through_the_settled_partitions_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From epoch 3 of 6 a front is settled; 51 images train, 17 are held out and 128 are tested."""
    computed: list[int] = []
    settle_to = Executor.settle_to

    def counted(net: Executor, stop: int, /, images: Tensor) -> list[Any]:
        if stop and not net.training:
            computed.append(len(images))
        return settle_to(net, stop, images)

    changes = {"settle_from": 0.4, "settle_until": 0.41, "batch_size": 17}
    plain, cached = Epochs(), Epochs()
    run(tmp_path, plain, cache="off", experiment="plain", **changes)
    monkeypatch.setattr(Executor, "settle_to", counted)
    report = run(tmp_path, cached, cache="ram", experiment="cached", **changes)
    assert [record.held_out_top1 for record in cached.records] == [record.held_out_top1 for record in plain.records]
    # Both sets once, and the first batch of each twice again, to see that it repeats.
    assert sum(computed) == 128 + 17 + 2 * (17 + 17)
    work = [[record.multiply_adds for record in heard.records[-2:]] for heard in (plain, cached)]
    front = sum(each.macs for each in report.plan.partitions[: cached.records[-1].start])
    assert work[0] == [each + (51 + 17) * front for each in work[1]]


def test_a_guard_goes_on_from_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after it has sent the cut back, and with what was right before the move in hand."""
    guards = [Guard(PLAN), Guard(PLAN), Guard(PLAN)]
    sentences = []
    for index, (phase, flags) in enumerate([(1, right()), (2, right(0)), (3, right(*range(30)))]):
        sentences.append(guards[index].epoch_done(phase, flags))
        for later in guards[index + 1 : index + 2]:
            later.load_state_dict(guards[index].state_dict())
    assert [bool(sentence) for sentence in sentences] == [False, False, True]
    assert guards[2].last_phase == 2

    def judge(guard: Guard, phase: int, _: Tensor) -> str:
        guard.last_phase = min(guard.last_phase, phase - 1) if phase == 1 else guard.last_phase
        return ""

    monkeypatch.setattr(Guard, "epoch_done", judge)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Interrupts(23), experiment="cut")
    heard = Epochs()
    resumed = fxsplit.train(observer=heard, resume=tmp_path / "cut", trust_code=True)
    assert [record.phase for record in resumed.epochs] == [0, 0, 0, 1, 0, 0]
