"""Runs that take no time: their processes are played, and leave the records of a run whose figures follow from it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fxsplit.comparing import runner
from fxsplit.comparing.compare import compare
from fxsplit.comparing.runner import log_of
from fxsplit.comparison import Comparison, ComparisonSpec, PlannedRun
from fxsplit.records import json_text
from fxsplit.report import RunReport
from fxsplit.resuming import RECIPE

POLLS = 3


class Played:
    """A process of a run: it ends when it was asked three times, over all processes of the run, whether it has."""

    def __init__(self, run: PlannedRun, report: RunReport, code: int = 0) -> None:
        self._run, self._report, self._code = run, report, code
        self._folder = Path(run.folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / RECIPE).write_text(run.spec.to_yaml(), encoding="utf-8")
        self._ends: int | None = None

    def poll(self) -> int | None:
        progress = self._folder / "progress"
        done = len(progress.read_text()) + 1 if progress.exists() else 1
        progress.write_text("." * done)
        if done >= POLLS and self._ends is None:
            if not self._code:
                (self._folder / "report.json").write_text(json_text(self._report.to_dict()))
            self._ends = self._code
        return self._ends

    def send_signal(self, number: int, /) -> None:
        self._ends = 128 + number

    def wait(self) -> int:
        assert self._ends is not None
        return self._ends


class Player:
    """Launches played runs, and knows which, in their order."""

    def __init__(self, report: RunReport) -> None:
        self.report = report
        self.launched: list[tuple[PlannedRun, str | None]] = []
        self.code = 0
        self.change: Callable[[PlannedRun, RunReport], RunReport] = lambda _, report: report

    def __call__(self, run: PlannedRun, device: str | None, _: int) -> Played:
        self.launched.append((run, device))
        if self.code:
            log_of(run).parent.mkdir(parents=True, exist_ok=True)
            log_of(run).write_text("a notice\nfxsplit: it has no such layer\n", encoding="utf-8")
        return Played(run, self.change(run, self.result(run)), self.code)

    def result(self, run: PlannedRun) -> RunReport:
        """What the run comes to: a figure of its arm, and a little of its seed."""
        spec = run.spec
        stream = random.Random(f"{run.model} {run.arm} {run.seed}")
        gain = {"standard": 0.0, "regularised": 2.0, "l2l": 2.1}.get(run.arm, 1.0)
        cost = {"l2l": 0.5}.get(run.arm, 1.0)
        length = spec.epochs_total or spec.epochs
        of_arm = replace(
            self.report.epochs[0],
            eval_top1=60 + gain + stream.gauss(0, 0.3),
            processor_seconds=10 * cost * stream.uniform(0.99, 1.01),
            multiply_adds=round(1000 * cost),
            peak_resident_bytes=10**9,
        )
        phase = replace(self.report.plan.phases[0], epochs=length)
        return replace(
            self.report,
            spec=spec.to_flat(),
            plan=replace(self.report.plan, phases=(phase,)),
            epochs=tuple(replace(of_arm, epoch=number + 1, phase=0) for number in range(length)),
            processor_seconds=length * (of_arm.processor_seconds or 0.0) + 5,
            data={"train": 1000, "test": 100, "labels": f"{spec.data} {spec.seed}", "classes": ["a", "b"]},
            environment={"gpu": None, "torch": "2.14.0"},
            folder=run.folder,
        )


@pytest.fixture
def player(report: RunReport, monkeypatch: pytest.MonkeyPatch) -> Player:
    monkeypatch.setattr(runner, "PAUSE_SECONDS", 0)
    return Player(report)


@pytest.fixture
def comparison(tmp_path: Path, player: Player) -> Comparison:
    player.change = lambda run, report: (
        replace(report, environment={**report.environment, "cpu": "<i>fast</i>"}) if run.arm == "l2l" else report
    )
    run = {"epochs": 4, "batch_size": 100}
    spec = ComparisonSpec(models=("paper:cnn", "<b>.py:make"), output=str(tmp_path), match=("time",), run=run)
    return compare(spec, launch=player)
