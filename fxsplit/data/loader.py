"""The batches of a run: both splits, in the order, size and layout that the run asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxsplit.data.images import Batch, ImageSet, batches, epoch_order, steps


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Batches of both splits, on the device where the images are; `limit` and `test_limit` bound their number.

    With `views`, each training image is augmented in that many ways, of which an epoch takes one, wherever a view is
    asked for. Without `shuffle` every epoch has the order of the images, and all of them.
    """

    train: ImageSet
    test: ImageSet
    batch_size: int
    seed: int
    augment: str = "none"
    views: int | None = None
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    channels_last: bool = False
    limit: int | None = None
    test_limit: int | None = None
    shuffle: bool = True

    def for_testing(self) -> Loader:
        """A loader whose epochs are the test images, each once and as it is."""
        return replace(self, train=self.test, augment="none", views=None, limit=self.test_limit, shuffle=False)

    @property
    def device(self) -> torch.device:
        return self.train.device

    @property
    def steps_per_epoch(self) -> int:
        return steps(len(self.train), batch_size=self.batch_size, drop_single=self.shuffle, limit=self.limit)

    def order(self, epoch: int) -> Tensor:
        """The ids of a training epoch's images, int64 (M,), on the CPU: `batch_size` a batch."""
        return epoch_order(
            len(self.train),
            batch_size=self.batch_size,
            shuffle=self.shuffle,
            seed=self.seed,
            epoch=epoch,
            drop_single=self.shuffle,
            limit=self.limit,
        )

    def view(self, epoch: int) -> int | None:
        """The view that an epoch takes, one after the other; None without `views`."""
        return None if self.views is None else epoch % self.views

    def identity(self) -> tuple[object, ...]:
        """All that the images of an epoch depend on, besides their order and their view."""
        return self.train.digest, self.seed, self.augment, tuple(self.mean), tuple(self.std), self.channels_last

    def training(self, epoch: int, *, view: int | None = None) -> Iterator[Batch]:
        """Shuffled and augmented, by the seed and the epoch; augmented by the seed and the view, if there is one."""
        plain = batches(
            self.train,
            batch_size=self.batch_size,
            shuffle=self.shuffle,
            seed=self.seed,
            epoch=epoch,
            augment=self.augment,
            view=view,
            mean=self.mean,
            std=self.std,
            drop_single=self.shuffle,
            limit=self.limit,
        )
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return (batch._replace(images=batch.images.contiguous(memory_format=layout)) for batch in plain)
