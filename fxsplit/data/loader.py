"""The batches of an epoch, in the order, size and memory layout of a run.

    image set ──read──► pixels ──crop──► float32 / 255 ──► (x - mean) / std ──erase, mix──► Batch

Order and augmentation are drawn on the CPU at the start of an epoch, from the seed and the epoch alone, and copied to
the device. They are the same on every device and with any number of workers.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import repeat

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from fxsplit.data.augmentation.augmenter import Augmenter
from fxsplit.data.augmentation.changes import UNCHANGED, Changes
from fxsplit.data.batch import Batch
from fxsplit.data.images import ImageSet
from fxsplit.data.normalization import Normalization
from fxsplit.data.order import EpochOrder
from fxsplit.data.randomness import random_stream
from fxsplit.data.reading.decoding import INTERPOLATIONS
from fxsplit.data.shares import WHOLE, Share, by_owner, owners, sizes, taken
from fxsplit.data.staging import Staging


@dataclass(frozen=True)
class Loader:
    """Gives the batches of each epoch over one image set, on the device where the images are.

    Equal loaders give equal batches, bit for bit on one device. Torch's global random state is neither used nor
    changed, and nothing waits for the device within an epoch.

    Args:
        images: what is loaded. A run has two loaders, one for the images to train on and one for those to test on.
        batch_size: images in a batch, of all processes together; the last one of an epoch may have fewer.
        training: images come in another order each epoch, and a last batch of a single image, from which BatchNorm can
            take no statistics, is left out. Without, each image comes once, in the order of the set.
        seed: what order and augmentation depend on, besides the epoch.
        augment: how images are cropped and mirrored at random, one of `AUGMENTATIONS`.
        changes: how much, and what else is changed at random.
        classes: of the labels, where images are mixed.
        views: how many augmented versions of each image there are, so that a cache can keep them all; None for a new
            one in each epoch.
        mean: subtracted from images in [0, 1]: one number, or one a channel; none leaves them as they are.
        std: what images are then divided by, likewise.
        interpolation: how images in memory are resized, one of INTERPOLATIONS.
        channels_last: lay images out in memory with the channels last.
        limit: the most batches of an epoch.
        share: the part of every batch that this process takes.
    """

    images: ImageSet
    _: KW_ONLY
    batch_size: int
    training: bool = False
    seed: int = 0
    augment: str = "none"
    changes: Changes = UNCHANGED
    classes: int = 0
    views: int | None = None
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    interpolation: str = INTERPOLATIONS[0]
    channels_last: bool = False
    limit: int | None = None
    share: Share = WHOLE

    @property
    def device(self) -> torch.device:
        """Where batches are made."""
        return self.images.device

    @property
    def is_random(self) -> bool:
        """Whether images are changed at random."""
        return self.augment != "none" or self.changes.changes_images

    @property
    def steps_per_epoch(self) -> int:
        """How many batches an epoch has."""
        full, rest = divmod(len(self.images), self.batch_size)
        count = full + (rest > self.training)
        return count if self.limit is None else min(count, self.limit)

    @property
    def images_per_epoch(self) -> int:
        """How many images an epoch has, of all processes together."""
        count = min(len(self.images), self.batch_size * self.steps_per_epoch)
        # Processes with two images of every batch have no room for a third, and none may stand alone.
        no_room = self.training and self.batch_size == 2 * self.share.ranks > 2
        return count - (count % self.batch_size % 2) if no_room else count

    def _divided(self, ranks: int) -> dict[str, int]:
        """Say how so many processes divide batches: each takes two images at least, if a whole batch has as many."""
        return {"batch_size": self.batch_size, "least": 2 if self.training and self.batch_size >= 2 * ranks else 1}

    def _sizes(self, number: int) -> list[int]:
        """List how many images of batch `number` each process takes."""
        whole = min(self.batch_size, self.images_per_epoch - number * self.batch_size)
        least = 1 if whole == self.batch_size else self._divided(self.share.ranks)["least"]
        return sizes(whole, self.share.ranks, least=least)

    @property
    def own_batch_size(self) -> int:
        """How many images of a batch this process takes."""
        return sizes(self.batch_size, self.share.ranks)[self.share.rank]

    @property
    def own_images_per_epoch(self) -> int:
        """How many images this process takes in an epoch, also those that count for nothing."""
        return len(self.order(0))

    def weight(self, number: int) -> float:
        """Return the weight of this process's part of batch `number` in a mean over the parts of all processes.

        It is 1 where all parts are equal, and 0 where the part counts for nothing.
        """
        parts = self._sizes(number)
        return len(parts) * parts[self.share.rank] / sum(parts)

    def order(self, epoch: int, *, shards: int = 1) -> Tensor:
        """Return the ids of this process's images of an epoch, batch by batch: int64 (M,), on the CPU.

        The batches of all processes together depend on the seed, the epoch and `shards` alone: with several, every
        image belongs to one of so many processes, which is given it in each epoch.
        """
        images, count, share = len(self.images), self.images_per_epoch, self.share
        if self.training:
            order = torch.from_numpy(random_stream("order", self.seed, epoch).permutation(images))
        else:
            order = torch.arange(images)
        if shards > 1 and self.training:
            order = by_owner(order, shards, count=count, **self._divided(shards))
        return taken(order[:count], share, **self._divided(share.ranks)) if share.ranks > 1 else order[:count]

    def own(self) -> Tensor:
        """Return the ids of the images that belong to this process, in order: int64 (N,), on the CPU."""
        if not self.training:
            return torch.tensor(sorted(set(self.order(0).tolist())))
        ranks = self.share.ranks
        return (owners(len(self.images), ranks, **self._divided(ranks)) == self.share.rank).nonzero()[:, 0]

    def view(self, epoch: int) -> int | None:
        """Return the number of the view that an epoch takes, 0 .. views - 1 in turn; None without `views`."""
        return None if self.views is None else epoch % self.views

    def batches(self, epoch: int, *, view: int | None = None) -> Iterator[Batch]:
        """Read, augment and normalize the images of an epoch, and give them batch by batch.

        With a `view`, images are augmented as in every epoch that names the same one; else anew for this epoch. Raises
        UsageError when the augmentation is unknown, and DataError when an image file cannot be decoded.
        """
        source = ImageSource(self)
        for _ in source.put(epoch, view=view):
            yield source.fetch()


class LabelSource:
    """Delivers the batches of a loader, as a `Source`, without their images: for a process that computes with others.

    Args:
        loader: whose batches they are; it mixes no images, since their labels are then mixed with them.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self._order = EpochOrder(loader.own_images_per_epoch, loader.own_batch_size, loader.device)
        self._weight = 1.0

    def put(self, epoch: int, first: int = 0, *, view: int | None = None, shards: int = 1) -> Iterator[Hashable]:  # noqa: ARG002
        """Draw the order of the epoch, then go from batch to batch; arguments are those of `ImageSource.put`."""
        order = self.loader.order(epoch, shards=shards)
        for number, _ in enumerate(self._order.batches(order, first), first):
            self._weight = self.loader.weight(number)
            yield None

    def fetch(self) -> Batch:
        """Return labels and ids of the batch that was put last."""
        ids = self._order.ids()
        labels = self.loader.images.labels.index_select(0, ids)
        return Batch(values=(None,), labels=labels, ids=ids, weight=self._weight)


class ImageSource:
    """Delivers the batches of a loader, as a `Source`: the host counts or reads batches, and the device does the rest.

    Pixels in memory on the device are gathered there. Others are read on the host and come through `Staging`, and so
    are those that worker processes change.

    Args:
        loader: whose batches they are.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        device = loader.device
        self._order = EpochOrder(loader.own_images_per_epoch, loader.own_batch_size, device)
        self._staging = Staging(device, loader.own_batch_size)
        self._weight = 1.0
        self._augmenter = Augmenter(
            loader.images,
            loader.augment,
            loader.changes,
            seed=loader.seed,
            interpolation=loader.interpolation,
            mean=loader.mean,
            steps=loader.steps_per_epoch,
            classes=loader.classes,
        )
        self._resident = None if self._augmenter.is_on_host else loader.images.resident
        self._normalize = Normalization(loader.mean, loader.std, device)
        self._layout = torch.channels_last if loader.channels_last else torch.contiguous_format

    def put(self, epoch: int, first: int = 0, *, view: int | None = None, shards: int = 1) -> Iterator[Hashable]:
        """Draw order and augmentation of the epoch, then go from batch to batch.

        `view` is as for `Loader.batches`, `shards` as for `Loader.order`. Batches before number `first` are not read.
        Raises UsageError when the augmentation is unknown, and DataError when an image file cannot be decoded.
        """
        loader, images, order = self.loader, self.loader.images, self.loader.order(epoch, shards=shards)
        on_host = self._augmenter.draw(epoch if view is None else view, epoch)
        size = loader.own_batch_size
        read = repeat(None) if self._resident is not None else images.read(order[first * size :], size, on_host)
        is_static = self._resident is not None or self._staging.is_static
        for number, (ids, pixels) in enumerate(zip(self._order.batches(order, first), read, strict=False), first):
            if pixels is not None:
                self._staging.put([pixels])
            self._weight = loader.weight(number)
            yield self if is_static and len(ids) == size else None

    def fetch(self) -> Batch:
        """Gather, augment and normalize the batch that was put last."""
        images, ids = self.loader.images, self._order.ids()
        resident = self._resident
        pixels = self._staging.taken()[0] if resident is None else resident.index_select(0, ids)
        if not self._augmenter.resizes:
            pixels = self._sized(pixels)
        pixels = self._augmenter.crop(pixels, ids)
        x = self._augmenter.erase(self._normalize(pixels), ids)
        x, labels, soft = self._augmenter.mix(x, images.labels.index_select(0, ids), self._order.step)
        x = x.contiguous(memory_format=self._layout)
        return Batch(values=(x,), labels=labels, soft_labels=soft, ids=ids, weight=self._weight)

    def _sized(self, pixels: Tensor) -> Tensor:
        """Resize pixels that are not of the right size, and leave out what is around the middle."""
        images = self.loader.images
        size, side = images.img_size, int(images.img_size / images.crop_pct)
        if pixels.shape[-2:] == (size, size) and (side == size or images.stored_size is None):
            return pixels
        mode = InterpolationMode(self.loader.interpolation)
        resized: Tensor = transforms.resize(pixels, [side, side], mode, antialias=True)
        return resized if side == size else transforms.center_crop(resized, [size, size])
