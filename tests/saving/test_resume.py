"""A run that is interrupted and goes on ends as one that was not, to the last bit."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

import fxsplit
from fxsplit.report import Observer, StepRecord
from tests.saving.runs import COMMON, KINDS, differences, left_by, model_in

pytestmark = pytest.mark.usefixtures("one_thread")


class Interrupts(Observer):
    """Interrupts a run after a step of it, as Ctrl-C does, and keeps what is said."""

    def __init__(self, step: int | None = None, by: int = signal.SIGINT) -> None:
        self.step, self.by = step, by
        self.sentences: list[str] = []

    def notice(self, sentence: str) -> None:
        self.sentences.append(sentence)

    def step_done(self, record: StepRecord) -> None:
        if (record.epoch - 1) * record.steps + record.step == self.step:
            signal.raise_signal(self.by)


def spec(folder: Path, kind: str, **changes: Any) -> fxsplit.RunSpec:
    return fxsplit.RunSpec(**{**COMMON, **KINDS[kind], "model": model_in(folder), "output": str(folder), **changes})


def whole(folder: Path, kind: str, **changes: Any) -> tuple[dict[str, Any], int]:
    """An untouched run: what it leaves, and its steps."""
    steps = Steps()
    report = fxsplit.train(spec(folder, kind, experiment="whole", **changes), steps)
    assert report.status == "finished"
    return left_by(Path(report.folder)), steps.count


class Steps(Observer):
    count = 0

    def step_done(self, _: StepRecord) -> None:
        self.count += 1


def interrupted(folder: Path, kind: str, step: int, **changes: Any) -> Path:
    """A run that ends after so many steps; its folder."""
    name = f"step{step}"
    with pytest.raises(KeyboardInterrupt, match=r"saved at epoch \d+, step \d+; go on with: fxsplit train --resume "):
        fxsplit.train(spec(folder, kind, experiment=name, **changes), Interrupts(step))
    return folder / name


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """Each is interrupted in three places, which differ by kind; the last one twice."""
    expected, steps = whole(tmp_path, kind)
    places = range(1 + len(kind) % 3, steps, steps // 3)
    for place in places:
        folder = interrupted(tmp_path, kind, place)
        if place == places[-1] and place + 2 <= steps:
            with pytest.raises(KeyboardInterrupt, match="saved at"):
                fxsplit.train(observer=Interrupts(place + 2), resume=folder)
        report = fxsplit.train(resume=folder)
        assert report.status == "finished"
        assert differences(expected, left_by(folder)) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_bit_for_bit_from_every_step(kind: str, tmp_path: Path) -> None:
    expected, steps = whole(tmp_path, kind)
    for place in range(1, steps + 1):
        folder = interrupted(tmp_path, kind, place)
        fxsplit.train(resume=folder)
        assert differences(expected, left_by(folder)) == [], place
