"""Where a training step gets its batch from, so that the step can be recorded once and replayed for every batch.

    host    put      copies the next batch into static tensors, or only advances a counter
    step    fetch    reads the static tensors, or gathers rows by the counter ──► Batch ──► forward ──► ...

A replayed step runs no Python and reads the same memory each time. So what changes from batch to batch is written by
`put` into tensors that stay where they are, or is counted on the device.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Protocol

from fxsplit.data.batch import Batch


class Source(Protocol):
    """Delivers the batches of training epochs: one part runs on the host before a step, the other inside the step."""

    def put(self, epoch: int, first: int = 0) -> Iterator[Hashable]:
        """Make the batches of an epoch, from number `first` on, ready for `fetch`: one with each `next`, with its key.

        Batches with equal keys are fetched by the same ops from the same memory, so one recording serves them all. The
        key is None where the step is to run eagerly, as for the smaller last batch of an epoch.
        """
        ...

    def fetch(self) -> Batch:
        """Return the batch that was put last; its tensors may be written again when the next one is put.

        It runs once in each step: as a call, or as a part of the replay. While it is recorded, nothing is computed, so
        it may count on the device. It must not wait for the device.
        """
        ...


def batches_of(source: Source, epoch: int) -> Iterator[Batch]:
    """Put and fetch the batches of an epoch, one after the other."""
    for _ in source.put(epoch):
        yield source.fetch()
