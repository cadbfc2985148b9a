"""Images in memory or in files, and the batches of an epoch.

    image set ──read──► uint8 pixels ──crop, flip──► float32 / 255 ──► (x - mean) / std ──► Batch

Order, crops and flips are drawn on the CPU at the start of an epoch, from the seed and the epoch alone. They
are the same on every device and with any number of workers, and a sample's crop does not depend on its batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as transforms

from fxsplit.data.decoding import decode, image_warnings
from fxsplit.errors import DataError, UsageError, nearest

AUGMENTATIONS = ("none", "crop-flip")
DECODE_CHUNK = 64

# Takes what Pillow warns of, by the path of the image.
Warned = Callable[[Mapping[str, str]], None]
# Pixels (B, 3, H, W), or what is wrong with one of the images, and what Pillow warns of.
ReadBatch = tuple[Tensor | str, Mapping[str, str]]


class Batch(NamedTuple):
    """Images float32 (B, C, H, W), labels int64 (B,), and ids int64 (B,): positions in the image set."""

    images: Tensor
    labels: Tensor
    ids: Tensor


class ImageSet(ABC):
    """Square images of `img_size` pixels and their `labels`, int64 (N,), which lie on `device`."""

    labels: Tensor
    img_size: int

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """A fingerprint of the images, as hexadecimal digits; labels do not matter."""
        return sha256(f"{self.img_size} ".encode() + self._identity()).hexdigest()

    @abstractmethod
    def _identity(self) -> bytes:
        """Other bytes for other images."""

    @property
    def device(self) -> torch.device:
        """Where batches are made."""
        return self.labels.device

    @abstractmethod
    def to(self, device: torch.device) -> ImageSet:
        """The same images on `device`."""

    @abstractmethod
    def subset(self, ids: Tensor) -> ImageSet:
        """The images `ids` (M,), which get the ids 0 .. M - 1."""

    @abstractmethod
    def read(self, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels uint8 (B, C, H, W) and ids (B,) of each batch, in the `order` (M,) of ids on the CPU."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MemoryImages(ImageSet):
    """Images held as `pixels`, uint8 (N, C, h, w).

    Pixels of another size than `img_size` are resized batch by batch, so small images stay small in memory.
    """

    pixels: Tensor
    labels: Tensor
    img_size: int

    def to(self, device: torch.device) -> MemoryImages:
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def subset(self, ids: Tensor) -> MemoryImages:
        return replace(self, pixels=self.pixels[ids], labels=self.labels[ids])

    def _identity(self) -> bytes:
        pixels = self.pixels.cpu().contiguous()
        return repr(tuple(pixels.shape)).encode() + sha256(pixels.numpy().data).digest()

    def read(self, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        size = (self.img_size, self.img_size)
        for ids in torch.split(order.to(self.device), batch_size):
            pixels = self.pixels[ids]
            if pixels.shape[-2:] != size:
                pixels = transforms.resize(pixels, list(size), antialias=True)
            yield pixels, ids


class FileImages(ImageSet):
    """Images in files, read by `workers` processes while they are needed (by this one if `workers` is 0).

    One `read` at a time: a new one ends the one before. What Pillow warns of while a batch is read goes to `warned`, by
    path. Raises DataError when a file cannot be decoded.
    """

    def __init__(
        self, paths: Sequence[str], labels: Tensor, *, img_size: int, workers: int, warned: Warned | None = None
    ) -> None:
        self.paths = tuple(paths)
        self.labels = labels
        self.img_size = img_size
        self.workers = workers
        self.warned = warned
        self._turns: list[list[int]] = []

    def to(self, device: torch.device) -> FileImages:
        return self._with(self.paths, self.labels.to(device))

    def subset(self, ids: Tensor) -> FileImages:
        return self._with([self.paths[index] for index in ids.tolist()], self.labels[ids])

    def _with(self, paths: Sequence[str], labels: Tensor) -> FileImages:
        return FileImages(paths, labels, img_size=self.img_size, workers=self.workers, warned=self.warned)

    def decoded(self) -> MemoryImages:
        """The same images in memory, decoded by `workers` threads: decoders do not hold Python's lock."""
        pixels = torch.empty((len(self), 3, self.img_size, self.img_size), dtype=torch.uint8)

        def fill(start: int) -> None:
            for index, path in enumerate(self.paths[start : start + DECODE_CHUNK], start):
                pixels[index] = decode(path, self.img_size)

        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            for _ in pool.map(fill, range(0, len(self), DECODE_CHUNK)):
                pass
        return MemoryImages(pixels=pixels, labels=self.labels, img_size=self.img_size)

    def _identity(self) -> bytes:
        files = (Path(path).stat() for path in self.paths)
        times = [(path, file.st_size, file.st_mtime_ns) for path, file in zip(self.paths, files, strict=True)]
        return repr(times).encode()

    def read(self, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        self._turns[:] = [ids.tolist() for ids in torch.split(order, batch_size)]
        all_ids = torch.split(order.to(self.device), batch_size)
        for (pixels, found), ids in zip(self._loader, all_ids, strict=True):
            if found and self.warned:
                self.warned(found)
            if isinstance(pixels, str):
                raise DataError(pixels)
            yield pixels.to(self.device, non_blocking=True), ids

    @cached_property
    def _loader(self) -> DataLoader[ReadBatch]:
        """Yields the batches listed in `_turns`; its own generator leaves the global random state alone."""
        return DataLoader(
            _Files(self.paths, self.img_size),
            sampler=self._turns,
            batch_size=None,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),
        )


class _Files(Dataset["ReadBatch"]):
    """What a worker process reads: a whole batch at a time."""

    def __init__(self, paths: tuple[str, ...], img_size: int) -> None:
        self.paths = paths
        self.img_size = img_size

    def __getitem__(self, ids: list[int]) -> ReadBatch:
        """Pixels, or what is wrong with one image: raised here, it would arrive as a traceback in text."""
        with image_warnings() as found:
            try:
                return torch.stack([decode(self.paths[index], self.img_size) for index in ids]), found
            except DataError as error:
                return str(error), found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Data:
    """Square images to train and to test on, `img_size` pixels wide; label i means `classes[i]`."""

    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    img_size: int
    channels: int = 3

    def to(self, device: torch.device) -> Data:
        """The same data on `device`."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))


def batches(
    images: ImageSet,
    *,
    batch_size: int,
    shuffle: bool = False,
    seed: int = 0,
    epoch: int = 0,
    augment: str = "none",
    view: int | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    drop_single: bool = False,
    limit: int | None = None,
) -> Iterator[Batch]:
    """The batches of one epoch, on the device of `images`; `steps` tells how many.

    Images are in [0, 1], then normalized by `mean` and `std`: one number, or one a channel; none leaves them.
    `augment="crop-flip"` takes a crop of each image, of its own size, after padding it with `img_size // 8` zeros
    on every side, and mirrors it with probability 1/2. These are drawn anew in every epoch; a `view` is a draw that all
    epochs which name it share.

    Equal arguments give equal batches, bit for bit on one device. Torch's global random state is neither used
    nor changed, and nothing waits for the device within an epoch.

    Raises UsageError when the augmentation is unknown, and DataError when an image file cannot be decoded.
    """
    order = epoch_order(
        len(images),
        batch_size=batch_size,
        shuffle=shuffle,
        seed=seed,
        epoch=epoch,
        drop_single=drop_single,
        limit=limit,
    )
    if not len(order):
        return  # splitting nothing would give one empty batch
    change = _augmentation(augment, images, seed, epoch if view is None else view)
    shift, scale = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in (mean, std))
    for pixels, ids in images.read(order, batch_size):
        x = change(pixels, ids).to(torch.float32).div_(255)
        if len(mean):
            x = x.sub_(shift)
        if len(std):
            x = x.div_(scale)
        yield Batch(x, images.labels[ids], ids)


def epoch_order(
    samples: int,
    *,
    batch_size: int,
    shuffle: bool,
    seed: int,
    epoch: int,
    drop_single: bool = False,
    limit: int | None = None,
) -> Tensor:
    """The ids of an epoch's batches, one batch after the other: int64 (M,), on the CPU."""
    order = torch.arange(samples)
    if shuffle:
        order = torch.from_numpy(random_stream("order", seed, epoch).permutation(samples))
    return order[: batch_size * steps(samples, batch_size=batch_size, drop_single=drop_single, limit=limit)]


def steps(samples: int, *, batch_size: int, drop_single: bool = False, limit: int | None = None) -> int:
    """Number of batches of one epoch, at most `limit`.

    An incomplete last batch counts. `drop_single`, meant for training, leaves it out if it would hold a single
    sample, from which BatchNorm can take no statistics.
    """
    full, rest = divmod(samples, batch_size)
    count = full + (rest > drop_single)
    return count if limit is None else min(count, limit)


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


def _augmentation(augment: str, images: ImageSet, seed: int, epoch: int) -> Callable[[Tensor, Tensor], Tensor]:
    """What turns the pixels and ids of a batch into augmented pixels."""
    if augment not in AUGMENTATIONS:
        known, hint = " and ".join(AUGMENTATIONS), nearest(augment, AUGMENTATIONS)
        raise UsageError(f"there is no augmentation {augment!r}, only {known}{hint}")
    if augment == "none":
        return lambda pixels, _: pixels
    padding = images.img_size // 8
    stream = random_stream("crop-flip", seed, epoch)
    corners = torch.from_numpy(stream.integers(2 * padding + 1, size=(len(images), 2))).to(images.device)
    flips = torch.from_numpy(stream.random(len(images)) < 0.5).to(images.device)
    return lambda pixels, ids: crop_flip(pixels, corners[ids], flips[ids], padding=padding)


def crop_flip(pixels: Tensor, corners: Tensor, flips: Tensor, *, padding: int) -> Tensor:
    """Crops of the size of `pixels` (B, C, H, W), out of a border of `padding` zeros; then mirrored where asked.

    `corners` int64 (B, 2): top and left of each crop in the padded image, 0 .. 2 * padding. `flips` bool (B,).
    """
    batch, channels, height, width = pixels.shape
    padded = functional.pad(pixels, (padding,) * 4)
    columns = torch.arange(width, device=pixels.device)
    columns = corners[:, 1, None] + torch.where(flips[:, None], width - 1 - columns, columns)
    rows = corners[:, 0, None] + torch.arange(height, device=pixels.device)
    places = rows[:, :, None] * padded.shape[-1] + columns[:, None, :]
    index = places.view(batch, 1, -1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, index).view(pixels.shape)


def random_stream(purpose: str, *numbers: int) -> np.random.Generator:
    """Random numbers that depend on nothing but the arguments; two purposes never share a stream."""
    return np.random.default_rng([*purpose.encode(), *numbers])
