"""Storage for rows of tensors, one row a sample: in memory of a device or of the host, or in a file."""

from __future__ import annotations

import errno
import os
import tempfile
import weakref
from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fxsplit.data.staging import rows_of
from fxsplit.errors import DataError


class Column(NamedTuple):
    """Describes how the rows of one value are kept, and converts values to rows and back.

    Dimensions are kept in the order in which they lie in memory. Unpacked values have their type and memory layout
    back, so that the same kernels run on them.

    Args:
        shape: of a row, its dimensions in that order.
        dtype: of the value.
        kept: the type in which rows are kept.
        order: for each dimension of a packed batch, that of the value.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    kept: torch.dtype
    order: tuple[int, ...]

    @classmethod
    def of(cls, value: Tensor, dtype: torch.dtype | None) -> Column:
        """Describe the rows of values like this one (B, ...); `dtype`, unless None, is the type to keep floats in."""
        kept = dtype if dtype is not None and value.is_floating_point() else value.dtype
        order = (0, *sorted(range(1, value.dim()), key=value.stride().__getitem__, reverse=True))
        return cls(tuple(value.shape[dimension] for dimension in order[1:]), value.dtype, kept, order)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return prod(self.shape) * self.kept.itemsize

    def pack(self, value: Tensor, device: torch.device) -> Tensor:
        """Make rows on `device` from a value (B, ...)."""
        return value.detach().permute(self.order).to(device, self.kept).contiguous()

    def unpack(self, rows: Tensor) -> Tensor:
        """Make the value (B, ...) again from rows, on their device."""
        back = [self.order.index(dimension) for dimension in range(len(self.order))]
        return rows.to(self.dtype).permute(back)


class Rows(Protocol):
    """Keeps rows of some columns. `device` is where it takes and gives row numbers and packed values."""

    device: torch.device
    resident_bytes: int
    file_bytes: int

    def write(self, rows: Tensor, packed: Sequence[Tensor], /) -> None:
        """Write packed values (B, ...) of each column into `rows`, int64 (B,)."""
        ...

    def read(self, rows: Tensor, /) -> list[Tensor]:
        """Read packed values (B, ...) of each column from `rows`: copies, which may be written into."""
        ...


class MemoryRows:
    """Keeps `count` rows of each column in memory of a device. Raises MemoryError when there is not enough.

    On a GPU, reading and writing do not wait for it, and can be recorded in a CUDA graph. Rows on the CPU are read into
    pinned memory if `pinned`, so that they can be copied to a GPU beside its work.
    """

    file_bytes = 0

    def __init__(self, count: int, columns: Sequence[Column], device: torch.device, *, pinned: bool = False) -> None:
        self.device = device
        self.resident_bytes = count * sum(column.row_bytes for column in columns)
        self._pinned = pinned and device.type == "cpu"
        try:
            self._tensors = [torch.empty((count, *each.shape), dtype=each.kept, device=device) for each in columns]
        except RuntimeError as error:
            raise MemoryError(str(error)) from error

    def write(self, rows: Tensor, packed: Sequence[Tensor]) -> None:
        """Write packed values (B, ...) of each column into `rows`, int64 (B,)."""
        for tensor, value in zip(self._tensors, packed, strict=True):
            tensor.index_copy_(0, rows, value)

    def read(self, rows: Tensor) -> list[Tensor]:
        """Read packed values (B, ...) of each column from `rows`: copies, which may be written into."""
        if self._pinned:
            return [rows_of(tensor, rows, pinned=True) for tensor in self._tensors]
        return [tensor.index_select(0, rows) for tensor in self._tensors]


class FileRows:
    """Keeps `count` rows of each column in a nameless file in `folder`.

    The file is gone with the object, however the process ends. Rows are read into pinned memory if `pinned`. Raises
    OSError when it cannot be made or the disk is full.
    """

    # Rows are written and read by system calls. These raise an exception on a full or broken disk, where a memory map
    # would end the process by a signal; and pages of a map would count as its memory.

    device = torch.device("cpu")
    resident_bytes = 0

    def __init__(self, count: int, columns: Sequence[Column], folder: str, *, pinned: bool = False) -> None:
        self._columns, self._pinned = columns, pinned
        *self._offsets, self.file_bytes = accumulate((count * column.row_bytes for column in columns), initial=0)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - open as long as the object
        weakref.finalize(self, self._file.close)
        self._file.truncate(self.file_bytes)
        if self.file_bytes and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._file.fileno(), 0, self.file_bytes)  # else a full disk would show later

    def write(self, rows: Tensor, packed: Sequence[Tensor]) -> None:
        """Write packed values (B, ...) of each column into `rows`, int64 (B,). Raises OSError when the disk is full."""
        for column, offset, value in zip(self._columns, self._offsets, packed, strict=True):
            for row, line in zip(rows.tolist(), _lines(value), strict=True):
                if os.pwrite(self._file.fileno(), line, offset + row * column.row_bytes) < column.row_bytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def read(self, rows: Tensor) -> list[Tensor]:
        """Read packed values (B, ...) of each column from `rows`: copies, which may be written into.

        Raises DataError when the disk fails.
        """
        found = []
        try:
            for column, offset in zip(self._columns, self._offsets, strict=True):
                value = torch.empty((len(rows), *column.shape), dtype=column.kept, pin_memory=self._pinned)
                for row, line in zip(rows.tolist(), _lines(value), strict=True):
                    if os.preadv(self._file.fileno(), [line], offset + row * column.row_bytes) < column.row_bytes:
                        raise OSError(errno.EIO, os.strerror(errno.EIO))
                found.append(value)
        except OSError as error:
            raise DataError(
                f"what settled partitions deliver cannot be read back from its file ({error.strerror}); go on with "
                "--resume, and with --cache ram or off if the disk is broken"
            ) from error
        return found

    def forget(self) -> None:
        """Let the system drop what it keeps of the file in memory, so that the next `read` comes from the disk."""
        os.fsync(self._file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _lines(value: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the bytes of each row of a contiguous tensor (B, ...) on the CPU; they are its memory."""
    return value.view(len(value), prod(value.shape[1:])).view(torch.uint8).numpy()
