"""A disk that is full, and an output that cannot be written: training goes on, or nothing is begun."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fxsplit
from fxsplit.errors import FxsplitError, ProofError, UsageError
from fxsplit.report import StepRecord
from fxsplit.resuming import CHECKPOINTS
from fxsplit.saving import files
from fxsplit.saving.checkpoint import read_checkpoint
from tests.saving.runs import differences, left_by
from tests.saving.test_resume import Interrupts, resumed, spec, whole

pytestmark = pytest.mark.usefixtures("one_thread")

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Full(Interrupts):
    """From a step of the run on, until another one, the system has no space for what is written or synced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first: int, last: int, *names: str) -> None:
        super().__init__()
        self.first, self.last, self.now, self.refused = first, last, 0, 0
        for name in names:
            monkeypatch.setattr(os, name, self._failing(getattr(os, name)))

    def step_done(self, record: StepRecord) -> None:
        self.now = (record.epoch - 1) * record.steps + record.step

    def _failing(self, call: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            if self.first <= self.now <= self.last:
                self.refused += 1
                raise NO_SPACE
            return call(*args, **kwargs)

        return called


def test_checkpoints_that_cannot_be_written_leave_the_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system notices when a file is synced that there is no room for it."""
    heard = Full(monkeypatch, 8, 15, "fsync")
    there: list[list[str]] = []
    told = heard.notice

    def notice(sentence: str) -> None:
        there.append(names(tmp_path / "mine" / CHECKPOINTS))
        told(sentence)

    monkeypatch.setattr(heard, "notice", notice)
    report = fxsplit.train(spec(tmp_path, "standard", experiment="mine", checkpoint_keep=1), heard)
    assert report.status == "finished"
    assert heard.refused
    assert heard.sentences[-2:] == [
        f"no checkpoint of epoch {epoch} can be written (No space left on device); that of epoch 1 stays"
        for epoch in (2, 3)
    ]
    assert there[-2:] == [["epoch-000001-step-00000000.safetensors"]] * 2
    expected, _ = whole(tmp_path, "standard")
    assert differences(expected, left_by(tmp_path / "mine")) == []


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_records_that_cannot_be_written_are_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard, append = Full(monkeypatch, 10, 14), files.append_whole

    def appended(path: Path, text: str) -> None:
        if heard.first <= heard.now <= heard.last:
            raise NO_SPACE
        append(path, text)

    monkeypatch.setattr("fxsplit.saving.run_folder.append_whole", appended)
    fxsplit.train(spec(tmp_path, "standard", experiment="mine"), heard)
    assert [each for each in heard.sentences if "record" in each] == [
        "the record of epoch 2 cannot be written: No space left on device; it is tried again after the next epoch"
    ]
    expected, _ = whole(tmp_path, "standard")
    assert differences(expected, left_by(tmp_path / "mine")) == []


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_cache_that_has_no_room_is_done_without(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the midst of its filling: rows that are there already are dropped."""
    changes: dict[str, Any] = {"parts": 4, "cache": "disk"}
    expected, _ = whole(tmp_path, "exits", **{**changes, "cache": "off"})
    heard = Full(monkeypatch, 7, 10**9, call)
    fxsplit.train(spec(tmp_path, "exits", experiment="mine", **changes), heard)
    assert heard.refused
    assert [each for each in heard.sentences if "without a cache: No space left on device" in each]
    found = left_by(tmp_path / "mine")
    for each in (expected, found):
        each["state"]["training"].pop("feed")
        for record in each["metrics"]:
            record.pop("cache_file_bytes"), record.pop("cache_resident_bytes")
    assert differences(expected, found) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 512 KiB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    asked = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(asked, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("may not mount a file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_real_disk_that_becomes_full(small_disk: Path, tmp_path: Path) -> None:
    """Training ends, and what could not be written is named; when there is room again, the run is gone on with."""
    expected, _ = whole(tmp_path, "standard", checkpoint_keep=1)

    class Fills(Interrupts):
        def step_done(self, record: StepRecord) -> None:
            if (record.epoch, record.step) == (2, 1):
                (small_disk / "other").write_bytes(b"\1" * room_in(small_disk))

    heard = Fills()
    asked = spec(tmp_path, "standard", experiment="mine", checkpoint_keep=1, output=str(small_disk))
    with pytest.raises(FxsplitError, match=r"model.safetensors' cannot be written: .*No space left on device"):
        fxsplit.train(asked, heard)
    folder = small_disk / "mine"
    assert [each for each in heard.sentences if "that of epoch 1 stays" in each]
    (kept,) = (folder / CHECKPOINTS).iterdir()
    assert read_checkpoint(kept)["place"] == [1, 0]
    assert not [path for path in folder.rglob("*") if path.name.endswith(".part")]
    (small_disk / "other").unlink()
    resumed(folder)
    assert differences(expected, left_by(folder)) == []


def room_in(disk: Path) -> int:
    found = os.statvfs(disk)
    return found.f_bavail * found.f_bsize


# Before anything is begun


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither data nor model are loaded."""

    def loaded(*_: Any, **__: Any) -> None:
        pytest.fail("loaded")

    for name in ("data", "model"):
        monkeypatch.setattr(f"fxsplit.assembly.{name}", loaded)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("experiment", [None, "mine"])
def test_an_output_that_is_no_folder_is_said_first(experiment: str | None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    for output in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(UsageError, match=r"the run folder '.*file.*' cannot be made: Not a directory; choose"):
            fxsplit.train(spec(tmp_path, "standard", output=str(output), experiment=experiment))
    assert names(tmp_path) == ["file", "small.py"]


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_an_output_that_cannot_be_written_is_said_first(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fxsplit.saving.run_folder.tempfile.TemporaryFile", refuse)
    with pytest.raises(UsageError, match=f"the run folder '.*new' cannot be made: {os.strerror(code)}; choose another"):
        fxsplit.train(spec(tmp_path, "standard", output=str(tmp_path / "new")))


@pytest.mark.usefixtures("untouched")
def test_a_name_that_is_taken_is_said_first(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match="mine' already holds a run; name another --experiment"):
        fxsplit.train(spec(tmp_path, "standard", experiment="mine"))


@pytest.mark.parametrize("error", [ProofError("differs"), KeyboardInterrupt(), RuntimeError("odd")])
def test_what_fails_before_the_first_step_leaves_no_empty_folder(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("fxsplit.assembly.proofs.prove_batch", refuse)
    with pytest.raises(type(error)):
        fxsplit.train(spec(tmp_path, "standard", experiment="mine"))
    assert names(tmp_path) == ["small.py"]
    # One that goes on is left as it is.
    monkeypatch.undo()
    before, _ = whole(tmp_path, "standard")
    monkeypatch.setattr("fxsplit.assembly.restore", refuse)
    with pytest.raises(type(error)):
        fxsplit.train(resume=tmp_path / "whole", trust_code=True)
    assert differences(before, left_by(tmp_path / "whole")) == []


def test_a_dry_run_needs_no_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    fxsplit.train(spec(tmp_path, "standard", output=str(tmp_path / "file"), dry_run=True))
