"""Where rows are kept: decided by seconds and bytes, which are arguments; nothing here depends on a clock."""

from __future__ import annotations

import errno
import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from fxsplit.caching import media
from fxsplit.caching.cache import CachePolicy
from fxsplit.caching.media import GIB, Offer, Refusal, Timed, available, choose, open_rows, reading_seconds
from fxsplit.caching.rows import Column, FileRows
from fxsplit.errors import DataError
from fxsplit.measuring.meter import peak_resident_bytes
from fxsplit.plan.schedule import Phase
from tests.networks import Chain
from tests.training.test_trainer import trainer

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "ram", "disk", "expected"),
    [
        # seconds and bytes, of rows of 100 bytes that take 1 s to compute
        ((0.1, 100), (0.2, 100), (0.3, 100), "device"),
        ((0.9, 100), (0.2, 100), (0.3, 100), "device"),
        ((0.1, 99), (0.2, 100), (0.3, 100), "ram"),
        ((0.1, -5), (0.2, 0), (0.3, 100), "disk"),
        ((1.0, 100), (0.2, 100), (0.3, 100), "ram"),
        ((0.1, 99), (1.0, 100), (0.3, 100), "disk"),
        ((1.0, 100), (1.1, 100), (9.0, 100), "slow"),
        ((math.inf, 0), (math.inf, 0), (math.inf, 0), "slow"),
        ((0.1, 99), (0.1, 98), (0.1, -7), "full"),
        ((0.1, 99), (1.0, 100), (9.0, 100), "full"),
    ],
)
def test_the_first_medium_that_pays_and_has_room_is_chosen(
    device: tuple[float, int], ram: tuple[float, int], disk: tuple[float, int], expected: str
) -> None:
    offers = [Offer(name, *offer) for name, offer in zip(("device", "ram", "disk"), (device, ram, disk), strict=True)]
    refusals = {
        "slow": Refusal("reading rows would take longer than computing them", pays=False),
        "full": Refusal("it needs 9.31e-08 GiB and may take 9.22e-08", pays=True),
    }
    assert choose(offers, size=100, compute_seconds=1.0) == refusals.get(expected, expected)


def test_media_after_the_chosen_one_are_not_measured() -> None:
    def offers() -> Iterator[Offer]:
        yield Offer("device", 0.1, 10)
        pytest.fail("a further medium was asked for")

    assert choose(offers(), size=10, compute_seconds=1.0) == "device"


def test_half_of_what_is_free_is_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=6 * GIB))
    monkeypatch.setattr(media.shutil, "disk_usage", lambda folder: SimpleNamespace(free={str(tmp_path): 10}[folder]))
    for device in (CPU, CUDA):
        assert available("ram", device, str(tmp_path)) == 3 * GIB
        assert available("disk", device, str(tmp_path)) == 5
    assert available("device", CPU, str(tmp_path)) == 3 * GIB


def test_what_training_will_need_of_a_gpu_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver has 40 free, and 20 more when torch has given back what it does not use; 10 are then in use."""
    given_back = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(True))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (60 if given_back else 40, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 10 if given_back else 30)
    assert available("device", CUDA, "") == 60 // 2
    assert available("device", CUDA, "", peak_bytes=50) == (60 - 40) // 2
    assert available("device", CUDA, "", peak_bytes=9) == 60 // 2
    assert available("device", CUDA, "", peak_bytes=200) < 0


def test_rows_beside_are_no_part_of_what_training_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("fxsplit.caching.cache.available", lambda *_, peak_bytes: asked.append(peak_bytes) or 2**40)
    net = trainer(Chain(), plan=(Phase(start=2, stop=4, epochs=2),), cache=CachePolicy(medium="device", peak_bytes=7))
    for _ in net.epochs():
        rows = net.feed.resident_bytes
    assert asked == [7, 7 + rows * 50 // 70]  # of 50 images to train on, and 20 to test on


@pytest.mark.parametrize("medium", ["device", "ram", "disk"])
@pytest.mark.parametrize("cold", [False, True])
def test_reading_is_measured_on_rows_of_the_batch(
    medium: str, cold: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten = []
    monkeypatch.setattr(FileRows, "forget", lambda rows: forgotten.append(rows))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100))
    values = [torch.randn(6, 3, 4), torch.rand(6).bfloat16(), torch.arange(6) > 2]
    given = [(Column.of(value, None), value) for value in values]
    assert 0 < reading_seconds(medium, given, CPU, str(tmp_path), size=101 if cold else 100) < math.inf
    assert len(forgotten) == (media.RUNS if medium == "disk" and cold else 0)
    assert list(tmp_path.iterdir()) == []


def test_rows_are_still_there_when_the_system_has_forgotten_them(tmp_path: Path) -> None:
    values = [torch.randn(6, 3000)]
    rows = open_rows("disk", 6, [Column.of(value, None) for value in values], CPU, str(tmp_path))
    assert isinstance(rows, FileRows)
    rows.write(torch.arange(6), values)
    rows.forget()
    assert torch.equal(rows.read(torch.arange(6))[0], values[0])
    assert rows.read(torch.arange(0))[0].shape == (0, 3000)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of memory")
def test_a_file_is_read_without_taking_memory(tmp_path: Path) -> None:
    """Beside the rows that are read: a memory map would have brought more of the file, 64 MiB, in with each of them."""
    count, width = 16384, 1024
    column = Column.of(torch.empty(1, width), None)
    rows = open_rows("disk", count, [column], CPU, str(tmp_path))
    for numbers in torch.arange(count).split(256):
        rows.write(numbers, [numbers[:, None].expand(-1, width).float().contiguous()])
    spread = torch.arange(0, count, 64)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_resident_bytes()
    (found,) = rows.read(spread)
    assert torch.equal(found[:, -1], spread.float())
    assert peak_resident_bytes() - before <= 4 * found.nbytes


def test_a_disk_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = open_rows("disk", 6, [Column.of(torch.empty(1, 5), None)], CPU, str(tmp_path))
    words = r"cannot be read back from its file \(Input/output error\); go on with --resume"
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda *_: 19)
        with pytest.raises(DataError, match=words):
            rows.read(torch.arange(6))

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(DataError, match=words):
        rows.read(torch.arange(6))


def test_the_least_time_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.chain.from_iterable(([0, 5], [10, 12], [20, 29]))
    monkeypatch.setattr(media, "perf_counter", lambda: next(clock))
    timed = Timed(os.path.join, CPU)
    assert timed.seconds == math.inf
    assert [timed("a", "b") for _ in range(3)] == [os.path.join("a", "b")] * 3
    assert timed.seconds == 2
