"""A batch: images, or what the settled partitions computed from them, with labels and ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Holds the values of some images at a cut, with their labels and ids.

    Args:
        values: the values at the cut, one row an image: tensors (B, ...), or None for a value that this mode does not
            have. At cut 0 it is the images alone, float32 (B, C, H, W).
        cut: how many partitions have been run already.
        labels: int64 (B,).
        ids: positions in the image set, int64 (B,).
        weight: of its loss in the mean over all processes, and over the micro-batches of a batch; with 0 it counts for
            nothing.
        soft_labels: shares of all classes, float32 (B, classes), where images are mixed; `labels` are then those that
            have the largest share. None elsewhere.
    """

    values: tuple[Any, ...]
    cut: int = 0
    labels: Tensor
    ids: Tensor
    weight: float = 1.0
    soft_labels: Tensor | None = None

    @property
    def targets(self) -> Tensor:
        """What cross-entropy takes: soft labels where there are any, else labels."""
        return self.labels if self.soft_labels is None else self.soft_labels

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def counted(self) -> int:
        """How many of its images count."""
        return len(self) if self.weight else 0

    @property
    def images(self) -> Tensor:
        """The images (B, C, H, W) of a batch at cut 0."""
        assert self.cut == 0
        images: Tensor = self.values[0]
        return images

    def divided(self, count: int, *, batch_size: int) -> Iterator[Batch]:
        """Divide the batch into at most `count` micro-batches, of `micro_batch_sizes`; a small batch gives fewer."""
        sizes = micro_batch_sizes(len(self), count, batch_size=batch_size)
        values = ([None] * len(sizes) if value is None else torch.split(value, sizes) for value in self.values)
        soft = [None] * len(sizes) if self.soft_labels is None else torch.split(self.soft_labels, sizes)
        labels, ids = torch.split(self.labels, sizes), torch.split(self.ids, sizes)
        parts = zip(zip(*values, strict=True), labels, ids, soft, strict=True)
        for own_values, own_labels, own_ids, own_soft in parts:
            yield Batch(
                values=own_values,
                cut=self.cut,
                labels=own_labels,
                ids=own_ids,
                weight=self.weight * len(own_labels) / len(self),
                soft_labels=own_soft,
            )


def micro_batch_sizes(samples: int, count: int, *, batch_size: int) -> list[int]:
    """Return how many samples each micro-batch has, when a batch is divided into at most `count` of them.

    They are equal but for the last, as those of `Tensor.chunk`. From a single sample BatchNorm can take no statistics,
    so none stands alone, unless a full batch of `batch_size` gives single samples anyway. A last sample that would be
    alone gets another one from the micro-batch before it, or joins that one if it has two.
    """
    size = max(-(-samples // count), 1 if batch_size <= count else 2)
    full, rest = divmod(samples, size)
    sizes = [size] * full + [rest] * (rest > 0)
    if rest == 1 and full:
        sizes[-2:] = [size - 1, 2] if size > 2 else [3]
    return sizes


def micro_batch_count(samples: int, most: int) -> int:
    """Return a number, at most `most`, of micro-batches that a full batch of `samples` makes if asked for that number.

    Asked for more, `micro_batch_sizes` may make fewer: of three samples one instead of two, of nine three, not four.
    """
    while (count := len(micro_batch_sizes(samples, most, batch_size=samples))) < most:
        most = count
    return most
