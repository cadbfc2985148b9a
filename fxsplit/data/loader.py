"""The batches of an epoch, in the order, size and memory layout of a run.

    image set ──read──► uint8 pixels ──augment──► float32 / 255 ──► (x - mean) / std ──► Batch

Order and augmentation are drawn on the CPU at the start of an epoch, from the seed and the epoch alone. They are the
same on every device and with any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from fxsplit.data.augmentation import augmentation
from fxsplit.data.batch import Batch
from fxsplit.data.images import ImageSet
from fxsplit.data.randomness import random_stream


@dataclass(frozen=True)
class Loader:
    """Gives the batches of each epoch over one image set, on the device where the images are.

    Equal loaders give equal batches, bit for bit on one device. Torch's global random state is neither used nor
    changed, and nothing waits for the device within an epoch.

    Args:
        images: what is loaded. A run has two loaders, one for the images to train on and one for those to test on.
        batch_size: images in a batch; the last one of an epoch may have fewer.
        training: images come in another order each epoch, and a last batch of a single image, from which BatchNorm can
            take no statistics, is left out. Without, each image comes once, in the order of the set.
        seed: what order and augmentation depend on, besides the epoch.
        augment: how images are changed at random, one of `AUGMENTATIONS`.
        views: how many augmented versions of each image there are, so that a cache can keep them all; None for a new
            one in each epoch.
        mean: subtracted from images in [0, 1]: one number, or one a channel; none leaves them as they are.
        std: what images are then divided by, likewise.
        channels_last: lay images out in memory with the channels last.
        limit: the most batches of an epoch.
    """

    images: ImageSet
    _: KW_ONLY
    batch_size: int
    training: bool = False
    seed: int = 0
    augment: str = "none"
    views: int | None = None
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    channels_last: bool = False
    limit: int | None = None

    @property
    def device(self) -> torch.device:
        """Where batches are made."""
        return self.images.device

    @property
    def steps_per_epoch(self) -> int:
        """How many batches an epoch has."""
        full, rest = divmod(len(self.images), self.batch_size)
        count = full + (rest > self.training)
        return count if self.limit is None else min(count, self.limit)

    def order(self, epoch: int) -> Tensor:
        """Return the ids of an epoch's images, one batch after the other: int64 (M,), on the CPU."""
        count = len(self.images)
        if self.training:
            order = torch.from_numpy(random_stream("order", self.seed, epoch).permutation(count))
        else:
            order = torch.arange(count)
        return order[: self.batch_size * self.steps_per_epoch]

    def view(self, epoch: int) -> int | None:
        """Return the number of the view that an epoch takes, 0 .. views - 1 in turn; None without `views`."""
        return None if self.views is None else epoch % self.views

    def identity(self) -> tuple[object, ...]:
        """Return all that the images of an epoch depend on, besides their order and their view."""
        return self.images.digest, self.seed, self.augment, tuple(self.mean), tuple(self.std), self.channels_last

    def batches(self, epoch: int, *, view: int | None = None) -> Iterator[Batch]:
        """Read, augment and normalize the images of an epoch, and give them batch by batch.

        With a `view`, images are augmented as in every epoch that names the same one; else anew for this epoch. Raises
        UsageError when the augmentation is unknown, and DataError when an image file cannot be decoded.
        """
        order = self.order(epoch)
        if not len(order):
            return  # splitting nothing would give one empty batch
        augment = augmentation(self.augment, self.images, seed=self.seed, draw=epoch if view is None else view)
        mean, std = (torch.tensor(each, device=self.device).view(1, -1, 1, 1) for each in (self.mean, self.std))
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        for pixels, ids in self.images.read(order, self.batch_size):
            x = augment(pixels, ids).to(torch.float32).div_(255)
            if len(self.mean):
                x = x.sub_(mean)
            if len(self.std):
                x = x.div_(std)
            x = x.contiguous(memory_format=layout)
            yield Batch(values=(x,), labels=self.images.labels[ids], ids=ids)
