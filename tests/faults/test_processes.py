"""Signals at bad moments, clocks that jump, and several processes that want the same folder."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fxsplit
from fxsplit.caching import rows
from fxsplit.errors import Terminated, UsageError
from fxsplit.report import StepRecord
from fxsplit.resuming import CHECKPOINTS
from fxsplit.saving import checkpoint, run_folder
from fxsplit.saving.run_folder import RunFolder
from fxsplit_cli.main import main
from fxsplit_cli.start import start as command
from tests.saving.runs import differences, left_by
from tests.saving.test_resume import Interrupts, interrupted, resumed, spec, whole

pytestmark = pytest.mark.usefixtures("one_thread")


def three_signals(number: int = signal.SIGTERM) -> None:
    for _ in range(3):
        os.kill(os.getpid(), number)
        time.sleep(0.004)


class Thrice(Interrupts):
    """Sends three signals 4 ms apart, after a step."""

    def step_done(self, record: StepRecord) -> None:
        if (record.epoch, record.step) == (2, 2):
            three_signals()


FILES = {"model.safetensors", "report.json", "report.html", "metrics.jsonl", "summary.csv", "args.yaml", "plan.json"}


@pytest.mark.parametrize("where", ["step", "checkpoint", "report.html"])
def test_three_signals_4_ms_apart_lose_nothing(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a step, or while one of the files of the end is written."""
    expected, _ = whole(tmp_path, "standard", checkpoint_keep=9)
    heard = Thrice() if where == "step" else Interrupts(7, by=signal.SIGTERM)
    with monkeypatch.context() as patched:
        if where == "checkpoint":
            patched.setattr(checkpoint, "save_file", after_signals(checkpoint.save_file, calls=2))
        if where.startswith("report"):
            write = run_folder.write_whole
            patched.setattr(
                run_folder,
                "write_whole",
                lambda path, text: (after_signals(write) if path.name == where else write)(path, text),
            )
        with pytest.raises(Terminated, match="saved at epoch 2, step 2; go on with: fxsplit train --resume"):
            fxsplit.train(spec(tmp_path, "standard", experiment="mine", checkpoint_keep=9), heard)
    folder = tmp_path / "mine"
    left = {path.name for path in folder.iterdir()}
    assert left >= FILES
    assert not [path for path in folder.rglob("*") if path.name.endswith(".part")]
    assert sorted(path.name[:26] for path in (folder / CHECKPOINTS).iterdir()) == [
        "epoch-000001-step-00000000",
        "epoch-000001-step-00000002",
    ]
    assert load_file(folder / "model.safetensors").keys() == expected["weights"].keys()
    resumed(folder)
    assert differences(expected, left_by(folder)) == []


def after_signals(call: Any, calls: int = 1) -> Any:
    """The function, which gets three signals in that one of its calls."""
    left = iter(range(calls - 1, -9, -1))

    def called(*args: Any, **kwargs: Any) -> Any:
        if not next(left):
            three_signals()
        return call(*args, **kwargs)

    return called


@pytest.fixture
def handlers() -> Iterator[None]:
    """Of signals, as they are when Python starts."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


SIGNALLING = """
import os, signal
from torch import nn

class Signalling(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.number, self.first, self.inner = number, True, nn.Conv2d(3, 4, 3)
    def forward(self, x):
        if self.first:
            self.first = False
            os.kill(os.getpid(), self.number)
        return self.inner(x)

def make(num_classes):
    return nn.Sequential(Signalling(signal.{name}), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
"""


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("name", "code", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_a_signal_while_tracing_ends_the_run_before_it_has_a_folder(
    name: str, code: int, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.py"
    file.write_text(SIGNALLING.replace("{name}", name), encoding="utf-8")
    functions = torch.zeros, nn.Module.__call__, torch.Tensor.__getitem__
    words = ["train", f"{file}:make", "--data", "synthetic", "--img-size", "12", "--output", str(tmp_path / "out")]
    assert main([*words, "--no-progress"]) == code
    assert capsys.readouterr().err.splitlines()[-1] == f"fxsplit: {word}"
    assert not (tmp_path / "out").exists()
    # Nothing stays patched: the same process traces and trains the next model.
    assert functions == (torch.zeros, nn.Module.__call__, torch.Tensor.__getitem__)
    assert fxsplit.train(spec(tmp_path, "standard", epochs=1)).status == "finished"


def test_ctrl_c_while_the_program_is_imported_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Importing:
        def __getattr__(self, _: str) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "fxsplit_cli.main", Importing())  # type: ignore[arg-type]
    assert command() == 130
    assert capsys.readouterr() == ("", "fxsplit: interrupted\n")


def test_the_cache_of_a_run_leaves_no_file_however_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file has no name. One that was being filled is filled again in the same order."""
    expected, _ = whole(tmp_path, "exits", cache="disk")
    made: list[set[str]] = []
    make = rows.FileRows.__init__

    def opened(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        made.append({path.name for path in tmp_path.iterdir()})

    monkeypatch.setattr(rows.FileRows, "__init__", opened)
    folder = interrupted(tmp_path, "exits", 12, cache="disk")  # in the midst of an epoch that fills it
    assert made
    assert set.union(*made) <= {"small.py", "whole", folder.name}
    resumed(folder)
    assert differences(expected, left_by(folder)) == []


# Clocks


def test_a_clock_that_jumps_back_gives_no_folder_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [datetime.datetime(2026, 10, 25, 2, 59, 59), datetime.datetime(2026, 10, 25, 2, 0, 0)]

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, _: Any = None) -> datetime.datetime:  # type: ignore[override]
            return now[len(folders) % 2]

    monkeypatch.setattr(run_folder, "datetime", Clock)
    folders: list[RunFolder] = []
    for _ in range(6):
        folders.append(RunFolder.new(str(tmp_path), model="m", schedule="s", seed=0, experiment=None))
        folders[-1].write_plan("{}")
    assert len({folder.path for folder in folders}) == 6


def test_a_clock_that_jumps_back_makes_no_time_negative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.time()
    monkeypatch.setattr(time, "time", lambda: 2 * began - REAL())
    report = fxsplit.train(spec(tmp_path, "standard", epochs=2))
    seconds = [report.setup_seconds, report.prove_seconds, report.total_seconds]
    for record in report.epochs:
        seconds += [record.train_seconds, record.eval_seconds, record.images_per_second]
    assert min(seconds) > 0


REAL = time.time


# Several processes


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("experiment", ["pair", None])
def test_of_100_pairs_that_start_together_none_shares_a_folder(experiment: str | None, tmp_path: Path) -> None:
    """Half of them then leave without having written anything, which removes their folder."""
    context = multiprocessing.get_context("fork")
    barrier, found = context.Barrier(2), context.SimpleQueue()

    def start(number: int) -> None:
        for index in range(100):
            barrier.wait(60)
            name = f"{experiment}{index}" if experiment else None
            try:
                folder = RunFolder.new(str(tmp_path), model="m", schedule="s", seed=0, experiment=name)
                if (index + number) % 2:
                    folder.write_plan(f"{number}")
                    found.put((index, str(folder.path), number))
                folder.close()
            except UsageError:
                found.put((index, "", number))

    processes = [context.Process(target=start, args=(number,)) for number in range(2)]
    for process in processes:
        process.start()
    written = []
    while any(process.is_alive() for process in processes) or not found.empty():
        if found.empty():
            processes[0].join(0.01)
        else:
            written.append(found.get())
    assert [process.exitcode for process in processes] == [0, 0]
    refused, written = [each for each in written if not each[1]], [each for each in written if each[1]]
    assert len({path for _, path, _ in written}) == len(written)
    for _, path, number in written:
        assert (Path(path) / "plan.json").read_text(encoding="utf-8") == str(number)
    if experiment is None:
        assert not refused
        assert len(written) == len(list(tmp_path.iterdir())) == 100
    else:
        assert len(written) + len(refused) >= 100


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_run_that_goes_on_is_locked(tmp_path: Path) -> None:
    """The second process says who has it, and changes nothing."""
    folder = interrupted(tmp_path, "standard", 7)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    other = context.Process(target=hold, args=(str(folder), there))
    other.start()
    assert here.recv() == "held"
    with pytest.raises(UsageError, match=f"is still going on, in process {other.pid}"):
        fxsplit.train(resume=folder, trust_code=True)
    here.send("end")
    other.join()
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def hold(folder: str, pipe: Any) -> None:
    kept = RunFolder.reopened(Path(folder))
    pipe.send("held")
    pipe.recv()
    kept.close()
