"""Where a training step gets its batch from, so that the step can be recorded once and replayed for every batch.

    host    put      copies the next batch into static tensors, or only advances a counter
    step    fetch    reads the static tensors, or gathers rows by the counter ──► Batch ──► forward ──► ...

A replayed step runs no Python and reads the same memory each time. So what changes from batch to batch is written by
`put` into tensors that stay where they are, or is counted on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from fxsplit.data.batch import Batch

# Gives the batches of an epoch.
Batches = Callable[[int], Iterable[Batch]]


class Source(Protocol):
    """Delivers the batches of training epochs: one part runs on the host before a step, the other inside the step."""

    def put(self, epoch: int) -> Iterator[Hashable]:
        """Make the batches of an epoch ready for `fetch`, one with each `next`, and give the key of each.

        Batches with equal keys are fetched by the same ops from the same memory, so one recording serves them all. The
        key is None where the step is to run eagerly, as for the smaller last batch of an epoch.
        """
        ...

    def fetch(self) -> Batch:
        """Return the batch that was put last.

        It runs once in each step: as a call, or as a part of the replay. While it is recorded, nothing is computed, so
        it may count on the device. It must not wait for the device.
        """
        ...


class PlainSource:
    """Delivers batches as they come; every step runs eagerly.

    Args:
        batches: gives those of an epoch.
    """

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def put(self, epoch: int) -> Iterator[Hashable]:
        """Hold each batch in turn."""
        for batch in self._batches(epoch):
            self._batch = batch
            yield None

    def fetch(self) -> Batch:
        """Return the batch that is held."""
        return self._batch


class StaticSource:
    """Copies full batches into tensors that stay where they are; others are delivered as they come.

    Args:
        batches: gives those of an epoch, on the device where steps run.
        batch_size: images in a full batch.
    """

    def __init__(self, batches: Batches, *, batch_size: int) -> None:
        self._batches, self._batch_size = batches, batch_size
        self._static: Batch | None = None

    def put(self, epoch: int) -> Iterator[Hashable]:
        """Copy each full batch in turn. The key is the static batch, a new one where shapes or layout change."""
        for batch in self._batches(epoch):
            is_full = len(batch) == self._batch_size
            self._batch = self._copied(batch) if is_full else batch
            yield self._batch if is_full else None

    def _copied(self, batch: Batch) -> Batch:
        if self._static is None or _layout(self._static) != _layout(batch):
            self._static = batch.map(torch.clone)  # what comes may be a part of tensors that others read
        else:
            for into, value in zip(_tensors(self._static), _tensors(batch), strict=True):
                into.copy_(value, non_blocking=True)
        return self._static

    def fetch(self) -> Batch:
        """Return the static batch, or one that came and is not full."""
        return self._batch


def _tensors(batch: Batch) -> list[Tensor]:
    return [each for each in (*batch.values, batch.labels, batch.ids) if each is not None]


def _layout(batch: Batch) -> Hashable:
    given = [None if each is None else (each.shape, each.stride(), each.dtype, each.device) for each in batch.values]
    return batch.cut, batch.labels.device, *given
