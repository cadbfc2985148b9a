"""A checkpoint: what it gives back, and what is noticed of one that is not whole."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import resource
import stat
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxsplit.errors import DataError
from fxsplit.resuming import CHECKPOINTS
from fxsplit.saving import files
from fxsplit.saving.checkpoint import FORMAT, _digest, read_checkpoint, read_summary, write_checkpoint
from fxsplit.saving.checkpoints import Checkpoints, Place, find_checkpoint
from fxsplit.saving.files import append_whole, replacing, write_whole


def equal(one: Any, other: Any) -> bool:
    """Whether two pieces of plain data are the same, types and memory layouts of tensors included."""
    if isinstance(one, Tensor):
        return (
            isinstance(other, Tensor)
            and (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
            and bool((one == other).all() if not one.is_floating_point() else ((one == other) | one.isnan()).all())
        )
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, float) and math.isnan(one):
        return isinstance(other, float) and math.isnan(other)
    return type(one) is type(other) and one == other


DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint32),
)
DATA = {
    "none": None,
    "dtype": [torch.bfloat16, torch.int64],
    "numbers": [0, -1, 2**130, True, False, 1.5, -0.0, 5e-324, math.inf, -math.inf, math.nan],
    "text": ["", "a\0b", "\u2028 ä \ud800", '{"tensor": 1}'],
    "nested": {1: {(2, 3): ["x"]}, None: (), "tuple": {"float": "nan"}, 1.5: [[]], "": {}},
    "tensors": {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPES},
    "layouts": (
        torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.rand(3, 5).t(),
        torch.tensor(7.0),
        torch.empty(0, 3),
        torch.tensor([math.nan, math.inf, -0.0]),
    ),
    "a/b": {"c": torch.zeros(1)},
    "a": {"b/c": torch.ones(1)},
}


def written(path: Path, data: Any) -> Path:
    write_checkpoint(path, data, summary={"accuracy": 50.0})
    return path


def test_it_gives_back_what_it_was_given(tmp_path: Path) -> None:
    path = written(tmp_path / "one.safetensors", DATA)
    assert equal(read_checkpoint(path), DATA)
    assert read_summary(path) == {"accuracy": 50.0}
    torch.manual_seed(0)
    assert not equal(read_checkpoint(path), {**DATA, "a": {"b/c": torch.zeros(1)}})


def test_other_tools_find_its_tensors_by_where_they_stand(tmp_path: Path) -> None:
    path = written(tmp_path / "one.safetensors", {"model": {"conv.weight": torch.ones(3)}, "step": 4})
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("model/conv.weight"), torch.ones(3))
        assert "pickle" not in file.metadata()["data"]


def test_shared_storage_is_written_once_and_overlapping_views_are_kept_apart(tmp_path: Path) -> None:
    weight = torch.rand(1000, 100)
    path = written(tmp_path / "one.safetensors", {"weight": weight, "tied": weight, "again": [weight.detach()]})
    assert path.stat().st_size < 1.1 * weight.nbytes
    views = {"all": weight, "half": weight[:500], "other": weight[500:]}
    assert equal(read_checkpoint(written(path, views)), views)


@pytest.mark.parametrize("wrong", [{1, 2}, object(), OrderedDict, b"", pickle.dumps(1)])
def test_what_is_no_plain_data_is_named(wrong: object, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=f"here/1 is a {type(wrong).__name__}, which a checkpoint cannot hold"):
        written(tmp_path / "one.safetensors", {"here": [0, wrong]})
    assert list(tmp_path.iterdir()) == []


def test_each_damaged_byte_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path / "one.safetensors", {"a": torch.arange(8), "b": [1.5, "x"], "c": {"d": torch.ones(2)}})
    whole = path.read_bytes()
    for index in range(len(whole)):
        for change in (1, 128):
            path.write_bytes(whole[:index] + bytes([whole[index] ^ change]) + whole[index + 1 :])
            try:
                found = read_checkpoint(path)
            except DataError as error:
                assert str(error).startswith("one.safetensors")  # noqa: PT017 - most bytes, not all
            else:
                # Only what says nothing, such as blanks behind the header, may differ.
                path.write_bytes(whole)
                assert equal(found, read_checkpoint(path)), index


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_noticed(share: float, tmp_path: Path) -> None:
    path = written(tmp_path / "one.safetensors", DATA)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DataError, match=r"one.safetensors cannot be read: it is no whole safetensors file"):
        read_checkpoint(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(DataError, match=r"weights.safetensors is no checkpoint that this version reads"):
        read_checkpoint(tmp_path / "weights.safetensors")
    with pytest.raises(DataError, match=r"none.safetensors cannot be read: it is not there"):
        read_checkpoint(tmp_path / "none.safetensors")
    (tmp_path / "huge.safetensors").write_bytes(b"\xff" * 64)
    for read in (read_checkpoint, read_summary):
        with pytest.raises(DataError, match=r"huge.safetensors cannot be read"):
            read(tmp_path / "huge.safetensors")


# Files


def test_a_file_is_whole_or_the_former_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_whole(path, "former")
    with suppress(KeyboardInterrupt), replacing(path) as part:
        part.write_text("ha")
        assert path.read_text() == "former"
        raise KeyboardInterrupt
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "former"

    # It has its name only when its bytes are on the disk.
    events = []
    sync, replace = files._sync, Path.replace
    monkeypatch.setattr(files, "_sync", lambda path: (events.append(f"sync {path.name}"), sync(path))[1])
    monkeypatch.setattr(Path, "replace", lambda self, to: (events.append(f"rename {self.name}"), replace(self, to))[1])
    write_whole(path, "new")
    assert events == ["sync .a.txt.part", "rename .a.txt.part", f"sync {tmp_path.name}"]
    assert path.read_text() == "new"


def test_files_have_the_mode_of_new_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        written(tmp_path / "one.safetensors", DATA)
        write_whole(tmp_path / "a.txt", "")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(each.stat().st_mode) for each in tmp_path.iterdir()} == {0o640}


def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append_whole(path, "one\n")
    append_whole(path, "two\n")
    assert path.read_text() == "one\ntwo\n"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))  # the system writes two more bytes, and fails then
    try:
        with pytest.raises(OSError, match="File too large"):
            append_whole(path, "three\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "one\ntwo\n"


# Several of a run


def run_of(folder: Path, accuracies: list[float | None], *, keep: int) -> list[str]:
    checkpoints = Checkpoints(folder, keep=keep)
    for epoch, accuracy in enumerate(accuracies, start=1):
        checkpoints.write(Place(epoch, 0), {"epoch": epoch}, accuracy=accuracy)
    return sorted(path.name for path in (folder / CHECKPOINTS).iterdir())


def name(epoch: int, step: int = 0) -> str:
    return f"epoch-{epoch:06d}-step-{step:08d}.safetensors"


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    assert run_of(tmp_path / "", [10.0, 30.0, None, 30.0, 20.0, 5.0], keep=2) == [name(2), name(5), name(6)]


def test_one_may_be_kept(tmp_path: Path) -> None:
    assert run_of(tmp_path, [10.0, 30.0, 40.0], keep=1) == [name(3)]


def test_positions_within_epochs_come_in_order(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=9)
    places = [Place(0, 9), Place(0, 10), Place(1, 0), Place(1, 100), Place(10, 0)]
    for place in places:
        checkpoints.write(place, {"place": list(place)}, accuracy=None)
    found = sorted((tmp_path / CHECKPOINTS).iterdir())
    assert [read_checkpoint(path)["place"] for path in found] == [list(place) for place in places]
    assert checkpoints.later_than(found[1]) == found[2:]
    checkpoints.remove_after(found[1])
    assert [path.name for path in sorted((tmp_path / CHECKPOINTS).iterdir())] == [name(0, 9), name(0, 10)]
    assert [str(place) for place in places[2:4]] == ["epoch 1", "epoch 2, step 100"]


def test_the_newest_whole_one_is_found_and_broken_ones_are_named(tmp_path: Path) -> None:
    run_of(tmp_path, [None] * 4, keep=4)
    folder, said = tmp_path / CHECKPOINTS, []
    (folder / name(4)).write_bytes((folder / name(4)).read_bytes()[:100])
    damaged = bytearray((folder / name(3)).read_bytes())
    damaged[damaged.index(b"epoch")] ^= 1
    (folder / name(3)).write_bytes(damaged)
    (folder / "notes.safetensors").write_bytes(b"")
    found = find_checkpoint(tmp_path, notice=said.append)
    assert found is not None
    assert (found.path.name, found.data) == (name(2), {"epoch": 2})
    assert said == [
        f"the checkpoint {name(4)} cannot be read: it is no whole safetensors file; it is skipped",
        f"the checkpoint {name(3)} is damaged: its checksum is another; it is skipped",
    ]
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 4 checkpoints in .* is whole; remove that folder"):
        find_checkpoint(tmp_path, notice=said.append)


def test_a_run_may_have_none(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, notice=pytest.fail) is None


def test_a_full_disk_leaves_the_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_of(tmp_path, [1.0, 2.0], keep=2)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fxsplit.saving.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        Checkpoints(tmp_path, keep=1).write(Place(3, 0), {}, accuracy=None)
    assert sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir()) == [name(1), name(2)]


def test_its_json_is_strict(tmp_path: Path) -> None:
    path = written(tmp_path / "one.safetensors", copy.deepcopy(DATA))
    with safe_open(path, framework="pt") as file:
        json.loads(file.metadata()["data"], parse_constant=pytest.fail)


@pytest.mark.parametrize(
    "data",
    ["", "[]", "1", '{"data": {"what": 1}}', '{"data": {"tensor": ["no", [], null]}}', '{"data": {"a": 1, "b": 2}}'],
)
def test_a_checkpoint_that_somebody_else_wrote_is_refused(data: str, tmp_path: Path) -> None:
    """Its checksum is right, and it says other things than ours do."""
    metadata = {"format": FORMAT, "data": data, "sha256": _digest(data, {})}
    save_file({}, tmp_path / "one.safetensors", metadata=metadata)
    with pytest.raises(DataError, match=r"one.safetensors is no checkpoint that this version reads"):
        read_checkpoint(tmp_path / "one.safetensors")
    with pytest.raises(DataError, match=r"one.safetensors cannot be read"):
        read_summary(tmp_path / "one.safetensors")
