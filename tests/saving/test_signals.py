"""Signals while a run goes on, and faults while it is saved: nothing that was done is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

import fxsplit
from fxsplit.distribute.processes import Processes
from fxsplit.errors import FxsplitError, Terminated, UsageError
from fxsplit.report import EpochRecord, Observer, StepRecord
from fxsplit.resuming import CHECKPOINTS
from fxsplit.saving import checkpoint, run_folder
from fxsplit.saving.checkpoints import Place
from fxsplit.saving.files import PART
from fxsplit.saving.lock import LOCK, FolderLock, LockedError
from fxsplit.saving.recorder import Recorder
from fxsplit.saving.signals import Signals
from fxsplit.training.phase_optimizer import PhaseOptimizer
from tests.saving.runs import differences, left_by
from tests.saving.test_resume import Interrupts, interrupted, resumed, spec, whole

pytestmark = pytest.mark.usefixtures("one_thread")

FILES = ["model.safetensors", "report.html", "report.json"]


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Handlers are put back after each run."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)] == before


def test_a_signal_waits_until_the_state_is_whole_and_a_second_does_not() -> None:
    with Signals() as signals:
        assert not signals.pending
        signal.raise_signal(signal.SIGTERM)
        assert signals.pending
        with pytest.raises(Terminated, match="how to go on"):
            signals.end("how to go on")
    with Signals():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt) as raised:
            signal.raise_signal(signal.SIGINT)
    assert raised.type is KeyboardInterrupt


def test_two_signals_do_not_end_what_is_being_saved() -> None:
    children = []
    before = signal.signal(signal.SIGCHLD, lambda *_: children.append(1))
    try:
        with Signals() as signals, signals.saving():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGCHLD)  # where torch would say that a data worker has died
        assert signals.pending
        assert children == []
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_third_ends_the_process() -> None:
    code = (
        "import signal; from fxsplit.saving import signals as module; from fxsplit.saving.signals import Signals\n"
        "module.ECHO_SECONDS = 0\n"
        "with Signals() as signals, signals.saving():\n"
        "    for _ in range(3): signal.raise_signal(signal.SIGTERM)\n"
        "    print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, b"")


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals() as signals:
            signal.raise_signal(signal.SIGINT)
            assert not signals.pending
    finally:
        signal.signal(signal.SIGINT, before)


class Twice(Interrupts):
    """Interrupts once more while the checkpoint, or the report, is written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        super().__init__(7, by=signal.SIGTERM)
        write = getattr(module, name)

        def writes(*args: Any, **kwargs: Any) -> Any:
            signal.raise_signal(signal.SIGTERM)
            return write(*args, **kwargs)

        monkeypatch.setattr(module, name, writes)


@pytest.mark.parametrize(("module", "name"), [(checkpoint, "save_file"), (run_folder, "write_weights")])
def test_a_second_signal_while_it_is_saved_loses_nothing(
    module: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole(tmp_path, "standard")[0]["weights"]
    with monkeypatch.context() as patched:
        asked = spec(tmp_path, "standard", experiment="mine", checkpoint_every="off")
        with pytest.raises(Terminated, match="saved at epoch 2, step 2; go on with: fxsplit train --resume"):
            fxsplit.train(asked, Twice(patched, module, name))
    folder = tmp_path / "mine"
    assert sorted(path.name for path in folder.iterdir() if path.name in FILES) == FILES
    assert json.loads((folder / "report.json").read_text(encoding="utf-8"))["status"] == "interrupted"
    resumed(folder)
    assert differences(expected, load_file(folder / "model.safetensors")) == []


class Fails(Observer):
    """Raises an error after a step, or after an epoch."""

    def __init__(self, step: int | None = None, epoch: int | None = None) -> None:
        self.step, self.epoch, self.sentences = step, epoch, list[str]()

    def notice(self, sentence: str) -> None:
        self.sentences.append(sentence)

    def step_done(self, record: StepRecord) -> None:
        if record.step == self.step:
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal")

    def epoch_done(self, record: EpochRecord) -> None:
        if record.epoch == self.epoch:
            raise RuntimeError("the terminal is gone")


@pytest.mark.parametrize("where", [{"step": 3}, {"epoch": 2}])
def test_an_error_between_steps_leaves_a_checkpoint(where: dict[str, int], tmp_path: Path) -> None:
    expected, _ = whole(tmp_path, "standard")
    with pytest.raises(RuntimeError):
        fxsplit.train(spec(tmp_path, "standard", experiment="mine", checkpoint_every="off"), Fails(**where))
    folder = tmp_path / "mine"
    assert json.loads((folder / "report.json").read_text(encoding="utf-8"))["status"] == "failed"
    place = Place(where.get("epoch", 0), where.get("step", 0))
    assert [path.name for path in (folder / CHECKPOINTS).iterdir()] == [place.file_name]
    # An epoch that was announced is in the records.
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == where.get("epoch", 0)
    resumed(folder)
    assert differences(expected["weights"], load_file(folder / "model.safetensors")) == []


def failing(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_written_keeps_no_other_from_being_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replacing = run_folder.replacing
    write = run_folder.write_whole

    def writes(path: Path, text: str) -> None:
        failing() if path.name == name else write(path, text)

    monkeypatch.setattr(run_folder, "write_whole", writes)
    monkeypatch.setattr(run_folder, "replacing", lambda path: failing() if path.name == name else replacing(path))
    with pytest.raises(FxsplitError, match=f"mine/{name}' cannot be written: No space left on device$"):
        fxsplit.train(spec(tmp_path, "standard", experiment="mine", epochs=1))
    left = sorted(path.name for path in (tmp_path / "mine").iterdir())
    assert [each for each in FILES if each in left] == [each for each in FILES if each != name]


def test_a_full_disk_is_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for a record, which is written later, nor for a checkpoint: the earlier one stays."""
    expected, _ = whole(tmp_path, "standard")
    heard, save, append = Full(), checkpoint.save_file, run_folder.append_whole
    monkeypatch.setattr(checkpoint, "save_file", lambda *a, **k: failing() if heard.is_full else save(*a, **k))
    monkeypatch.setattr(run_folder, "append_whole", lambda *a: failing() if heard.is_full else append(*a))
    fxsplit.train(spec(tmp_path, "standard", experiment="mine"), heard)
    assert differences(expected, left_by(tmp_path / "mine")) == []
    assert heard.sentences[-2:] == [
        "the record of epoch 3 cannot be written: No space left on device; it is tried again after the next epoch",
        "no checkpoint of epoch 3 can be written (No space left on device); that of epoch 2 stays",
    ]


def test_what_cannot_be_saved_is_said_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Interrupts()
    monkeypatch.setattr(PhaseOptimizer, "state_dict", lambda _: {"odd": object()})
    report = fxsplit.train(spec(tmp_path, "standard", experiment="mine", epochs=1), heard)
    assert report.status == "finished"
    assert heard.sentences[-1] == (
        "no checkpoint of epoch 1 can be written (state/training/optimizer/odd is a object, which a checkpoint cannot "
        "hold); there is none yet"
    )


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "write_whole", failing)
    with pytest.raises(UsageError, match=r"the run folder '.*mine' cannot be written: No space left on device$"):
        fxsplit.train(spec(tmp_path, "standard", experiment="mine", epochs=1))


class Full(Interrupts):
    """The disk is full at the end of the third epoch."""

    is_full = False

    def step_done(self, record: StepRecord) -> None:
        self.is_full = record.epoch == 3


# Two processes


def test_a_run_that_is_going_on_is_not_gone_on_with(tmp_path: Path) -> None:
    folder = interrupted(tmp_path, "standard", 7)
    with other_process_locks(folder) as pid:
        with pytest.raises(UsageError, match=f"the run in .* is still going on, in process {pid}"):
            resumed(folder)
        with pytest.raises(UsageError, match="already holds a run; name another --experiment, or go on with it by"):
            fxsplit.train(spec(tmp_path, "standard", experiment=folder.name))
    resumed(folder)


@contextmanager
def other_process_locks(folder: Path) -> Iterator[int]:
    code = (
        "import sys; from pathlib import Path; from fxsplit.saving.lock import FolderLock\n"
        f"lock = FolderLock(Path({str(folder)!r})); print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        yield process.pid
        process.kill()


def test_a_lock_ends_with_its_process_and_not_with_its_children(tmp_path: Path) -> None:
    code = (
        "import os, time; from fxsplit.saving.lock import FolderLock; from pathlib import Path\n"
        f"lock = FolderLock(Path({str(tmp_path)!r}))\n"
        "if os.fork(): print('locked', flush=True); time.sleep(60)\n"
        "else: time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(LockedError, match=f"process {process.pid}"):
            FolderLock(tmp_path)
        process.kill()
        process.wait()
        FolderLock(tmp_path, patience=5).release()
        os.killpg(process.pid, signal.SIGKILL)


def test_runs_that_start_together_get_folders_of_their_own(tmp_path: Path) -> None:
    code = (
        "import sys; from fxsplit.saving.run_folder import RunFolder; from fxsplit.errors import UsageError\n"
        "sys.stdin.readline()\n"
        f"given = {{'model': 'm', 'schedule': 's', 'seed': 0, 'experiment': sys.argv[1] or None}}\n"
        f"try: folder = RunFolder.new({str(tmp_path)!r}, **given)\n"
        "except UsageError: print('refused')\n"
        "else: print(folder.path, flush=True); (folder.path / 'args.yaml').touch()\n"
        "sys.stdin.readline()"
    )
    for name in ("", "named"):
        started = [
            subprocess.Popen(
                [sys.executable, "-c", code, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for _ in range(4)
        ]
        pipes: list[Any] = [(process.stdin, process.stdout) for process in started]
        for stdin, _ in pipes:
            stdin.write("go\n")
            stdin.flush()
        found = [stdout.readline().strip() for _, stdout in pipes]
        for process in started:
            process.communicate("end\n")
        made = [each for each in found if each != "refused"]
        assert len(set(made)) == len(made) == (1 if name else 4)


def test_a_folder_whose_run_was_killed_before_it_wrote_anything_is_free(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in (LOCK, f".args.yaml{PART}"):
        (tmp_path / "mine" / name).write_text("", encoding="utf-8")
    assert fxsplit.train(spec(tmp_path, "standard", experiment="mine", epochs=1)).status == "finished"
    assert not [path for path in (tmp_path / "mine").iterdir() if path.name.endswith(PART)]


@pytest.mark.parametrize(
    ("count", "local_count", "begins"),
    [(1, 1, "fxsplit train"), (4, 4, "torchrun --standalone --nproc-per-node=4 -m fxsplit train"), (8, 4, "fxsplit")],
)
def test_the_processes_of_one_machine_go_on_by_one_command(count: int, local_count: int, begins: str) -> None:
    run: Any = SimpleNamespace(
        _saved="epoch 3", _spec=fxsplit.RunSpec(model="paper:cnn").to_flat(), path="output/train/mine",
        _processes=Processes(0, count, local_count=local_count),
    )  # fmt: skip
    said = Recorder._how_to_go_on(run)
    assert said.startswith(f"saved at epoch 3; go on with: {begins} ")
    assert said.endswith(" train --resume output/train/mine")
