"""What a run that is interrupted leaves on the screen."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fxsplit
from fxsplit.errors import Terminated
from fxsplit.records import json_text
from fxsplit.report import Observer, RunReport
from fxsplit_cli.main import main

Interrupt = Callable[[RunReport | None], None]


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Interrupt:
    """Make training leave a report, or none, and end by a signal."""

    def interrupted(left: RunReport | None, kind: type[BaseException] = KeyboardInterrupt) -> None:
        def train(_spec: Any, observer: Observer, *, resume: str | None, trust_code: bool) -> RunReport:
            assert resume is None
            assert not trust_code
            if left is not None:
                observer.run_started(folder=str(tmp_path), device="cpu", plan=left.plan, train_images=10, test_images=5)
                (tmp_path / "report.json").write_text(json_text(left.to_dict()), encoding="utf-8")
            raise kind("saved; go on with: this")

        class Api:
            pass

        fake: Any = Api()
        fake.train = train
        monkeypatch.setitem(sys.modules, "fxsplit.api", fake)
        monkeypatch.setattr(fxsplit, "api", fake, raising=False)

    return interrupted


def test_the_table_so_far_and_how_to_go_on(
    interrupt: Interrupt, report: RunReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(replace(report, status="interrupted", epochs=report.epochs[:3], folder=str(tmp_path)))
    assert main(["train", "paper:cnn", "--quiet"]) == 130
    out, err = capsys.readouterr()
    assert err == "fxsplit: interrupted; saved; go on with: this\n"
    assert "52.00 % (last epoch)" in out
    assert out.endswith(f"run folder: {tmp_path}\n")


def test_the_result_so_far_as_json(interrupt: Interrupt, report: RunReport, capsys: pytest.CaptureFixture[str]) -> None:
    interrupt(replace(report, status="interrupted"))
    assert main(["train", "paper:cnn", "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["status"] == "interrupted"


@pytest.mark.parametrize("has_started", [False, True])
def test_nothing_done_is_nothing_shown(
    interrupt: Interrupt, report: RunReport, has_started: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(replace(report, epochs=()) if has_started else None)
    assert main(["train", "paper:cnn", "--quiet"]) == 130
    assert capsys.readouterr() == ("", "fxsplit: interrupted; saved; go on with: this\n")


def test_the_end_by_another_program_is_told_apart(report: RunReport, interrupt: Any) -> None:
    interrupt(report, Terminated)
    assert main(["train", "paper:cnn", "--quiet"]) == 143


def test_an_interruption_while_the_program_loads_is_a_word() -> None:
    """The module that takes longest to load is interrupted as it is found."""
    code = (
        "import signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'fxsplit_cli.main': signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.argv = ['fxsplit', '--version']\n"
        "import runpy; runpy.run_module('fxsplit', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "", "fxsplit: interrupted\n")
