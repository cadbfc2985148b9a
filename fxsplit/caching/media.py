"""Where rows are kept: in memory of the device, in memory of the host, or in a file; chosen by seconds and bytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from math import inf
from time import perf_counter
from typing import Generic, NamedTuple, ParamSpec, TypeVar

import psutil
import torch
from torch import Tensor

from fxsplit.caching.rows import Column, FileRows, MemoryRows, Rows
from fxsplit.data.staging import free_bytes

DEVICE, RAM, DISK = "device", "ram", "disk"
# What "auto" chooses from, by device, from the fastest to the largest. A CPU's own memory is left to training.
AUTO = {"cuda": (DEVICE, RAM, DISK), "cpu": (DISK,)}
# Where a run may not depend on measured seconds, these stand for them: bytes a second that a medium is read at, and
# multiply-adds a second of a device. They are of the order of today's machines.
READ_BYTES_PER_SECOND = {DEVICE: 5e11, RAM: 1e10, DISK: 1e9}
MACS_PER_SECOND = {"cuda": 5e12, "cpu": 2e10}
# Reading is timed so many times.
RUNS = 3
GIB = 2**30

Given = ParamSpec("Given")
Result = TypeVar("Result")


class Offer(NamedTuple):
    """Says what a medium offers: how long reading a batch of rows takes, and how many bytes rows may have there."""

    medium: str
    seconds: float
    limit_bytes: int


class Refusal(NamedTuple):
    """Says why there are no rows, and whether they would have paid."""

    why: str
    pays: bool = True


def choose(offers: Iterable[Offer], *, size: int, compute_seconds: float) -> str | Refusal:
    """Return the first medium that is faster than computing and has room, or the reason why there is none.

    Args:
        offers: of the media, in the order in which they are preferred.
        size: bytes of all rows.
        compute_seconds: time in which the settled partitions compute a batch.
    """
    limits = []
    for offer in offers:
        if offer.seconds < compute_seconds:
            if size <= offer.limit_bytes:
                return offer.medium
            limits.append(offer.limit_bytes)
    if not limits:
        return Refusal("reading rows would take longer than computing them", pays=False)
    return Refusal(f"it needs {size / GIB:.3g} GiB and may take {max(0, *limits) / GIB:.3g}")


def available(medium: str, device: torch.device, folder: str, *, peak_bytes: int = 0) -> int:
    """Return how many bytes a medium has for rows: half of what is free. The rest is for others, and for errors.

    Args:
        medium: one of the three.
        device: of the steps.
        folder: of the file.
        peak_bytes: what torch is forecast to need of a GPU's memory in all. What it has not taken yet is not free.
    """
    if medium == DISK:
        return shutil.disk_usage(folder).free // 2
    free = free_bytes(device) if medium == DEVICE else None
    if free is None:
        return int(psutil.virtual_memory().available // 2)
    still_needed = max(0, peak_bytes - torch.cuda.memory_reserved(device))
    return (free - still_needed) // 2


def open_rows(medium: str, count: int, columns: Sequence[Column], device: torch.device, folder: str) -> Rows:
    """Make room for `count` rows. Raises MemoryError or OSError when there is none."""
    if medium == DISK:
        return FileRows(count, columns, folder, pinned=device.type == "cuda")
    return MemoryRows(count, columns, device if medium == DEVICE else torch.device("cpu"), pinned=device.type == "cuda")


def reading_seconds(
    medium: str, values: Sequence[tuple[Column, Tensor]], device: torch.device, folder: str, *, size: int
) -> float:
    """Measure how long it takes to read the rows of a batch from a medium and to make values of them.

    Args:
        medium: one of the three.
        values: of a batch (B, ...), each with its column.
        device: of the values.
        folder: of the file.
        size: bytes of all rows. A file that will not fit in memory is read from the disk itself.

    Raises MemoryError or OSError when there is no room for a batch.
    """
    columns, count = [column for column, _ in values], len(values[0][1])
    rows = open_rows(medium, count, columns, device, folder)
    rows.write(torch.arange(count, device=rows.device), [column.pack(value, rows.device) for column, value in values])
    order = torch.arange(count, device=rows.device).flip(0)
    is_cold = size > psutil.virtual_memory().available

    def read() -> list[Tensor]:
        packed = (each.to(device, non_blocking=True) for each in rows.read(order))
        return [column.unpack(each) for column, each in zip(columns, packed, strict=True)]

    timed = Timed(read, device)
    for _ in range(RUNS):
        if isinstance(rows, FileRows) and is_cold:
            rows.forget()
        timed()
    return timed.seconds


class Timed(Generic[Given, Result]):
    """Calls a function, and keeps the least time of its calls as `seconds`, until the device is done.

    Whatever else a machine does only adds to the time of a call.
    """

    def __init__(self, function: Callable[Given, Result], device: torch.device) -> None:
        self._function, self._device = function, device
        self.seconds = inf

    def __call__(self, *args: Given.args, **kwargs: Given.kwargs) -> Result:
        self._wait()
        began = perf_counter()
        result = self._function(*args, **kwargs)
        self._wait()
        self.seconds = min(self.seconds, perf_counter() - began)
        return result

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
