"""The order of an epoch, kept on the device beside the number of the present batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fxsplit.data.staging import write


class EpochOrder:
    """Tells a step which rows are in its batch, by a counter on the device: a recorded step finds those of each batch.

    Args:
        length: rows of an epoch.
        batch_size: rows of a full batch; the last one may have fewer.
        device: where the steps run.
    """

    def __init__(self, length: int, batch_size: int, device: torch.device) -> None:
        self._order = torch.empty(length, dtype=torch.int64, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._batch_size, self._size = batch_size, batch_size
        full = length // batch_size
        self._full = self._order[: full * batch_size].view(full, batch_size)

    def batches(self, order: Tensor, first: int = 0) -> Iterator[Tensor]:
        """Copy the `order` of an epoch, int64 on the CPU, to the device; then count its batches, and give each, too.

        Batches before number `first` are left out.
        """
        write(self._order, order)
        # Splitting nothing would give one empty batch.
        batches = torch.split(order, self._batch_size) if len(order) else ()
        for step, rows in enumerate(batches[first:], first):
            self._size = len(rows)
            self._step.fill_(step)
            yield rows

    @property
    def step(self) -> Tensor:
        """The number of the present batch, int64 (1,) on the device."""
        return self._step

    @property
    def size(self) -> int:
        """How many rows the present batch has."""
        return self._size

    def ids(self) -> Tensor:
        """Return the rows of the present batch, int64 (B,) on the device."""
        if self._size < self._batch_size:
            return self._order[-self._size :].clone()
        return self._full.index_select(0, self._step)[0]
