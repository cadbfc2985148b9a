"""Memory that runs out: a phase is tried again with less, from a whole state, or the forecast is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fxsplit
from fxsplit.errors import OutOfMemoryError
from fxsplit.plan.schedule import Phase
from fxsplit.report import Observer
from fxsplit.training.evaluator import Evaluator
from fxsplit.training.step import Step
from fxsplit.training.trainer import Trainer
from tests.saving.runs import differences, left_by
from tests.saving.test_resume import Interrupts, interrupted, resumed, spec, whole

pytestmark = pytest.mark.usefixtures("one_thread")

GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB")
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
)


class Machine:
    """Lets steps, tests or updates fail in phases that take more than it has, which is what `saves` says."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, error: Exception, *, saves: int, since: int, where: str = "backward"
    ) -> None:
        self.failures = 0

        def fails(trainer: Trainer) -> None:
            at = trainer.position
            phase = trainer.plan.phases[at.phase]
            first = trainer.plan.phase_index_at(since)
            if (at.epoch, at.step) >= (since, 2) and at.phase <= first and savings(phase) < saves:
                self.failures += 1
                raise error

        backward, update, evaluate, take = Step.backward, Step.update, Evaluator.score, Trainer._take_step
        now: list[Trainer] = []

        def taken(self: Trainer, *args: Any, **kwargs: Any) -> None:
            now[:] = [self]
            take(self, *args, **kwargs)

        def after_backward(self: Step, *args: Any, **kwargs: Any) -> int:
            counted = backward(self, *args, **kwargs)
            if where == "backward":
                fails(now[0])
            return counted

        def after_update(self: Step, *args: Any, **kwargs: Any) -> None:
            update(self, *args, **kwargs)
            if where == "update":
                fails(now[0])

        def before_evaluation(self: Evaluator, **kwargs: Any) -> Any:
            if where == "test":
                fails(now[0])
            return evaluate(self, **kwargs)

        monkeypatch.setattr(Trainer, "_take_step", taken)
        monkeypatch.setattr(Step, "backward", after_backward)
        monkeypatch.setattr(Step, "update", after_update)
        monkeypatch.setattr(Evaluator, "score", before_evaluation)


def savings(phase: Phase) -> int:
    return phase.recompute + (phase.micro_batches > 1)


def run(tmp_path: Path, heard: Observer, kind: str, **changes: Any) -> fxsplit.RunReport:
    return fxsplit.train(spec(tmp_path, kind, experiment="mine", memory_aim=None, **changes), heard)


def but_for_work(found: list[str]) -> list[str]:
    """Leave out the multiply-adds, of which there are more where partitions recompute."""
    return [each for each in found if "multiply_adds" not in each]


@pytest.mark.parametrize(
    ("kind", "where", "since", "error"),
    [
        ("standard", "backward", 0, GPU),
        ("exits", "update", 1, CPU),
        ("veto", "test", 1, MemoryError()),
    ],
)
def test_a_phase_is_tried_again_with_less_and_nothing_remains_of_the_failure(
    kind: str, where: str, since: int, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recomputing gives the same numbers, so the run ends as one that nothing happened to, bit for bit."""
    changes: dict[str, Any] = {"parts": 4, "memory_aim": None}
    expected, _ = whole(tmp_path, kind, **changes)
    heard = Interrupts()
    with monkeypatch.context() as patched:
        machine = Machine(patched, error, saves=1, since=since, where=where)
        report = run(tmp_path, heard, kind, parts=4, memory_budget="auto")
    assert machine.failures
    assert but_for_work(differences(expected, left_by(tmp_path / "mine"))) == []
    (said,) = [each for each in heard.sentences if "memory ran out" in each][:1]
    phase = report.plan.phases[report.epochs[since].phase]
    assert f"; it is tried again from the last whole state, and {report.plan.saving(phase)}" in said
    assert phase.recompute > phase.start
    # The files say what was done.
    plan = json.loads((tmp_path / "mine" / "plan.json").read_text(encoding="utf-8"))
    assert plan["phases"] == report.to_dict()["plan"]["phases"]
    recipe = (tmp_path / "mine" / "args.yaml").read_text(encoding="utf-8")
    assert "memory-budget: auto" in recipe


def test_it_is_tried_with_less_and_less_and_then_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Interrupts()
    Machine(monkeypatch, GPU, saves=99, since=0)
    with pytest.raises(OutOfMemoryError) as raised:
        run(tmp_path, heard, "standard", parts=4, memory_budget="auto")
    tried = [sentence for sentence in heard.sentences if "it is tried again from the last whole state, and" in sentence]
    assert len(tried) == len(set(tried)) > 1
    assert str(raised.value).startswith("memory ran out in phase 1 of 1, epoch 1: its steps are forecast to need ")
    assert str(raised.value).endswith(" GiB; try a smaller --batch-size, --amp, or more --parts")


@pytest.mark.parametrize("error", [GPU, CPU, MemoryError()])
def test_without_auto_the_forecast_and_three_things_to_try_are_said(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = spec(tmp_path, "standard", parts=4)
    peak = fxsplit.inspect(asked).forecast.phases[0].peak_bytes  # type: ignore[union-attr]
    Machine(monkeypatch, error, saves=1, since=1)
    with pytest.raises(OutOfMemoryError) as raised:
        run(tmp_path, Interrupts(), "standard", parts=4)
    before, said = str(raised.value).split(" GiB; ")
    about, needed = before.rsplit(" ", 1)
    assert about == "memory ran out in phase 1 of 1, epoch 2: its steps are forecast to need"
    assert float(needed) == pytest.approx(peak / 2**30, rel=0.1)
    assert said == (
        "try --memory-budget auto, which recomputes or divides batches where memory runs out, a smaller --batch-size, "
        "or --amp"
    )
    # The run can go on, with what is asked for then.
    monkeypatch.undo()
    expected, _ = whole(tmp_path, "standard", parts=4)
    resumed(tmp_path / "mine")
    assert but_for_work(differences(expected, left_by(tmp_path / "mine"))) == []


def test_a_run_that_goes_on_keeps_the_smaller_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"parts": 4, "memory_budget": "auto"}
    with monkeypatch.context() as patched:
        Machine(patched, GPU, saves=1, since=0)
        folder = interrupted(tmp_path, "standard", 7, **changes)
    report = resumed(folder)
    assert report.plan.phases[0].recompute
    expected, _ = whole(tmp_path, "standard", **changes)
    assert but_for_work(differences(expected, left_by(folder))) == []


def test_a_batch_is_divided_where_that_needs_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of one partition recomputes nothing."""
    heard = Interrupts()
    Machine(monkeypatch, GPU, saves=1, since=0)
    asked = {"model": "paper:cnn", "parts": 1, "img_size": 16, "memory_budget": "auto", "epochs": 1}
    report = fxsplit.train(spec(tmp_path, "standard", experiment="mine", **asked), heard)
    (phase,) = report.plan.phases
    assert phase.micro_batches > 1
    said = f"tried again from the last whole state, and {phase.micro_batches} micro-batches"
    assert any(sentence.endswith(said) for sentence in heard.sentences)


def test_another_error_is_not_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, RuntimeError("mat1 and mat2 shapes"), saves=1, since=0)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        run(tmp_path, Interrupts(), "standard", parts=4, memory_budget="auto")
    assert machine.failures == 1
