"""A batch of training: images, or what the settled partitions made of them, with labels and ids."""

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
        values: what crosses the cut, one row an image: tensors (B, ...), or None where nothing does. At cut 0 it is the
            images alone, float32 (B, C, H, W).
        cut: the partitions before it have been run.
        labels: int64 (B,).
        ids: positions in the image set, int64 (B,).
    """

    values: tuple[Any, ...]
    cut: int = 0
    labels: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> Tensor:
        """The images (B, C, H, W) of a batch at cut 0."""
        assert self.cut == 0
        images: Tensor = self.values[0]
        return images

    def divided(self, parts: int, *, batch_size: int) -> Iterator[Batch]:
        """Divide the batch into at most `parts` micro-batches, as `part_sizes` does; a small batch gives fewer."""
        sizes = part_sizes(len(self), parts, batch_size=batch_size)
        values = ([None] * len(sizes) if value is None else torch.split(value, sizes) for value in self.values)
        labels, ids = torch.split(self.labels, sizes), torch.split(self.ids, sizes)
        for part, own_labels, own_ids in zip(zip(*values, strict=True), labels, ids, strict=True):
            yield Batch(values=part, cut=self.cut, labels=own_labels, ids=own_ids)


def part_sizes(samples: int, parts: int, *, batch_size: int) -> list[int]:
    """How many samples are in each part of a batch that is divided into at most `parts`, as `Tensor.chunk` does it.

    But no part holds a single sample, from which BatchNorm can take no statistics, unless those of a full batch of
    `batch_size` do: one that would be left alone gets another from the part before, or joins it where that has two.
    """
    size = max(-(-samples // parts), 1 if batch_size <= parts else 2)
    full, rest = divmod(samples, size)
    sizes = [size] * full + [rest] * (rest > 0)
    if rest == 1 and full:
        sizes[-2:] = [size - 1, 2] if size > 2 else [3]
    return sizes
