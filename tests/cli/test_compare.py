"""fxsplit compare: its table while runs go on, its lines, its results, its exit codes."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from fxsplit.comparing import compare as verbs
from fxsplit.comparing.arms import read_arms
from fxsplit.comparing.compare import planned
from fxsplit.comparison import ComparisonSpec, PlannedRun
from fxsplit_cli import comparing
from fxsplit_cli.comparing import LiveTable
from fxsplit_cli.main import main
from tests.comparing.conftest import Player
from tests.comparing.conftest import player as player

WORDS = ["compare", "paper:cnn", "--arms", "standard,l2l", "--epochs", "4", "--batch-size", "100"]


@pytest.fixture
def played(player: Player, monkeypatch: pytest.MonkeyPatch) -> Player:
    monkeypatch.setattr(verbs, "compare", partial(verbs.compare, launch=player))
    return player


def test_results_go_to_stdout_and_progress_to_stderr(
    played: Player, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, "--seeds", "5", "-o", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "l2l and standard: more accurate; +" in out
    assert "l2l and standard: faster; 0.5" in out
    assert f"written: {tmp_path}/compare.json" in out
    lines = err.splitlines()
    assert len(lines) == 20
    assert lines[0] == "paper:cnn standard seed 0 begins"
    assert lines[1].startswith("1/10 paper:cnn standard seed 0: 6")
    assert lines[1].endswith(" left")
    assert "left" not in lines[-1]
    assert len(played.launched) == 10
    assert main([*WORDS, "--seeds", "5", "-o", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    assert len(played.launched) == 10


def test_exit_codes(played: Player, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    played.change = lambda run, report: replace(report, data={"train": 1}) if run.arm == "l2l" else report
    assert main([*WORDS, "--seeds", "1", "-o", str(tmp_path)]) == 4
    assert "so they cannot be compared" in capsys.readouterr().err
    assert main([*WORDS, "--seeds", "none"]) == 2
    assert "seeds is 'none', but must be N, for the seeds from 0 on" in capsys.readouterr().err
    folder = next(tmp_path.glob("runs/*/*/args.yaml")).parent
    assert main(["compare", "paper:cnn", str(folder)]) == 2
    assert main(["compare", str(folder), "-o", str(tmp_path / "again")]) == 0


def test_what_is_unequal_is_red(played: Player, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(run: PlannedRun, report: verbs.RunReport) -> verbs.RunReport:
        return replace(report, environment={"gpu": None, "torch": f"2.{run.arm}"})

    played.change = elsewhere
    shown: list[str] = []
    monkeypatch.setattr("fxsplit_cli.tables.Terminal", lambda **_: Console(file=Lines(shown), force_terminal=True))
    assert main([*WORDS, "--seeds", "1", "-o", str(tmp_path)]) == 0
    assert "\x1b[31mnot equal: torch: standard 2.standard; l2l 2.l2l" in "".join(shown)


class Lines:
    """A stream that keeps what is written into it."""

    def __init__(self, kept: list[str]) -> None:
        self.kept = kept

    def write(self, text: str) -> int:
        self.kept.append(text)
        return len(text)

    def flush(self) -> None:
        pass


def test_a_log_is_told_where_a_long_run_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = ComparisonSpec(models=("paper:cnn",), arms=("standard", "l2l"), seeds="7,", output=str(tmp_path))
    first, second = planned(spec, "paper:cnn", read_arms(spec.arms, {}))
    clock = iter((100.0, 100.0, 101.0, 699.0, 701.0, 701.0, 702.0, 1300.0, 1302.0, 1302.0))
    monkeypatch.setattr(comparing.time, "monotonic", lambda: next(clock))
    view = comparing.Lines()
    view.planned([first, second], jobs=1)
    view.began(first)
    Path(first.folder).mkdir(parents=True)
    (Path(first.folder) / "metrics.jsonl").write_text("{}\n{}\n", encoding="utf-8")
    for _ in range(6):
        view.waiting()
    name = "paper:cnn standard seed 7"
    assert capsys.readouterr().err.splitlines() == [f"{name} begins", *[f"{name} is in epoch 3"] * 2]


def test_a_table_fills(player: Player, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ComparisonSpec(models=("paper:cnn",), arms=("standard", "l2l"), seeds="2", output=str(tmp_path))
    runs = planned(spec, "paper:cnn", read_arms(spec.arms, {}))
    view = LiveTable(spec)
    now = 100.0
    monkeypatch.setattr(comparing.time, "monotonic", lambda: now)

    def shown() -> list[str]:
        console = Console(width=100, record=True, file=Lines([]))
        console.print(view.drawn())
        return console.export_text().splitlines()

    view.planned(runs, jobs=1)
    heads, standard, l2l, foot = shown()
    assert heads.split() == ["model", "arm", "seed", "0", "seed", "1"]
    assert standard.split() == ["paper:cnn", "standard", "·", "·"]
    assert foot.strip() == "0 of 4 runs"
    first = runs[0]
    view.began(first)
    process = player(first, None, 1)
    (Path(first.folder) / "metrics.jsonl").write_text("{}\n{}\n", encoding="utf-8")
    assert shown()[1].split() == ["paper:cnn", "standard", "epoch", "3", "·"]
    while process.poll() is None:
        pass
    view.ended(first)
    view.began(runs[1])
    now += 20
    heads, standard, l2l, foot = shown()
    assert standard.split() == ["paper:cnn", "standard", f"{player.result(first).accuracy_pct:.2f}", "·"]
    assert l2l.split() == ["l2l", "epoch", "1", "·"]
    # Three runs of 71.5 s like the first, of which one has gone on for 20 s.
    assert foot.strip() == "1 of 4 runs, about 3 min 14 s left"
    view.planned(runs, jobs=2)
    assert shown()[-1].strip() == "1 of 4 runs, about 1 min 37 s left"
    view.ended(runs[1], "it has no such layer")
    assert shown()[2].split() == ["l2l", "failed", "·"]
