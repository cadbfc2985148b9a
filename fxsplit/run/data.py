"""Images in memory or in files, and the batches of an epoch.

    image set ──read──► uint8 pixels ──crop, flip──► float32 / 255 ──► (x - mean) / std ──► Batch

Order, crops and flips are drawn on the CPU at the start of an epoch, from the seed and the epoch alone. They are thus
the same on every device and with any number of workers, and the crop of a sample does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as transforms

from fxsplit.errors import DataError, UsageError, nearest

AUGMENTATIONS = ("none", "crop-flip")
DECODE_CHUNK = 64


class Batch(NamedTuple):
    """`images` float32 (B, C, H, W), `labels` int64 (B,), and `ids` int64 (B,): positions in the image set."""

    images: Tensor
    labels: Tensor
    ids: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MemoryImages:
    """Images held as `pixels` uint8 (N, C, H, W), with `labels` int64 (N,), on one device.

    Pixels of another size than `img_size` are resized batch by batch, so that small images stay small in memory.
    """

    pixels: Tensor
    labels: Tensor
    img_size: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """Where batches are made."""
        return self.labels.device

    def to(self, device: torch.device) -> MemoryImages:
        """The same images on `device`."""
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def subset(self, ids: Tensor) -> MemoryImages:
        """The images `ids` (M,), which get the ids 0 .. M - 1."""
        return replace(self, pixels=self.pixels[ids], labels=self.labels[ids])

    def read(self, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels uint8 (B, C, img_size, img_size) and ids (B,) of each batch, by `order` (M,) on the CPU."""
        size = [self.img_size, self.img_size]
        for ids in order.to(self.device).split(batch_size):
            pixels = self.pixels[ids]
            if list(pixels.shape[-2:]) != size:
                pixels = transforms.resize(pixels, size, antialias=True)
            yield pixels, ids


class FileImages:
    """Images in files, read by `workers` processes while they are needed (by this one if `workers` is 0).

    One `read` at a time: a new one ends the one before. Raises DataError when a file cannot be decoded.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Tensor,
        *,
        img_size: int,
        workers: int,
        device: torch.device | None = None,
    ) -> None:
        self.paths = tuple(paths)
        self.labels = labels.to(device)
        self.img_size = img_size
        self.workers = workers
        self._turns: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def device(self) -> torch.device:
        """Where batches are made."""
        return self.labels.device

    def to(self, device: torch.device) -> FileImages:
        """The same images, delivered on `device`."""
        return FileImages(
            self.paths, self.labels, img_size=self.img_size, workers=self.workers, device=device
        )

    def subset(self, ids: Tensor) -> FileImages:
        """The images `ids` (M,), which get the ids 0 .. M - 1."""
        paths = [self.paths[index] for index in ids.tolist()]
        return FileImages(paths, self.labels[ids], img_size=self.img_size, workers=self.workers)

    def decoded(self) -> MemoryImages:
        """All images, decoded into memory by `workers` threads (at least one): decoders release Python's lock."""
        size = self.img_size
        pixels = torch.empty((len(self), 3, size, size), dtype=torch.uint8)

        def fill(start: int) -> None:
            for index, path in enumerate(self.paths[start : start + DECODE_CHUNK], start):
                pixels[index] = decode(path, size)

        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            for _ in pool.map(fill, range(0, len(self), DECODE_CHUNK)):
                pass
        return MemoryImages(pixels=pixels, labels=self.labels, img_size=size)

    def read(self, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels uint8 (B, 3, img_size, img_size) and ids (B,) of each batch, by `order` (M,) on the CPU."""
        self._turns[:] = [ids.tolist() for ids in order.split(batch_size)]
        for pixels, ids in zip(self._loader, order.to(self.device).split(batch_size), strict=True):
            if isinstance(pixels, DataError):
                raise pixels
            yield pixels.to(self.device, non_blocking=True), ids

    @cached_property
    def _loader(self) -> DataLoader[Tensor | DataError]:
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


ImageSet = MemoryImages | FileImages


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Data:
    """Images to train and to test on: `channels` channels, square, `img_size` pixels wide; label i is `classes[i]`."""

    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    img_size: int
    channels: int = 3

    def to(self, device: torch.device) -> Data:
        """The same data, batched on `device`."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))


def batches(
    images: ImageSet,
    *,
    batch_size: int,
    shuffle: bool = False,
    seed: int = 0,
    epoch: int = 0,
    augment: str = "none",
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    drop_single: bool = False,
    limit: int | None = None,
) -> Iterator[Batch]:
    """The batches of one epoch, on the device of `images`; `steps` tells how many.

    Images are in [0, 1], then normalized by `mean` and `std` (one number, or one a channel; none leaves them). With
    `augment="crop-flip"` every sample gets its own crop out of a border of zeros `img_size // 8` wide, and is
    mirrored with probability 1/2. Equal arguments give equal batches, bit for bit on one device; torch's global
    random state is neither used nor changed, and nothing waits for the device inside the epoch.

    Raises UsageError when the augmentation is unknown, and DataError when an image file cannot be decoded.
    """
    count = steps(len(images), batch_size=batch_size, drop_single=drop_single, limit=limit)
    order = torch.arange(len(images))
    if shuffle:
        order = torch.from_numpy(random_stream("order", seed, epoch).permutation(len(images)))
    change = _augmentation(augment, images, seed, epoch)
    shift, scale = (torch.tensor(numbers, device=images.device).view(1, -1, 1, 1) for numbers in (mean, std))
    for pixels, ids in images.read(order[: count * batch_size], batch_size):
        x = change(pixels, ids).to(torch.float32).div_(255)
        if len(mean):
            x = x.sub_(shift)
        if len(std):
            x = x.div_(scale)
        yield Batch(x, images.labels[ids], ids)


def steps(samples: int, *, batch_size: int, drop_single: bool = False, limit: int | None = None) -> int:
    """Number of batches of one epoch.

    An incomplete last batch is kept: its samples count. With `drop_single`, meant for training, it is dropped if it
    would hold a single sample, from which BatchNorm has no statistics to take, unless it is the only batch.
    """
    full, rest = divmod(samples, batch_size)
    dropped = rest == 0 or (drop_single and rest == 1 and full > 0)
    count = full + (not dropped)
    return count if limit is None else min(count, limit)


def crop_flip(pixels: Tensor, offsets: Tensor, flips: Tensor, *, padding: int) -> Tensor:
    """Crops of `pixels` (B, C, H, W), padded with zeros on all sides, at their own size; then mirrored where asked.

    `offsets` int64 (B, 2) are the top and left corners in the padded images, 0 .. 2 * padding; `flips` is bool (B,).
    """
    batch, channels, height, width = pixels.shape
    padded = functional.pad(pixels, (padding,) * 4)
    columns = torch.arange(width, device=pixels.device)
    columns = offsets[:, 1, None] + torch.where(flips[:, None], width - 1 - columns, columns)
    rows = offsets[:, 0, None] + torch.arange(height, device=pixels.device)
    places = rows[:, :, None] * padded.shape[-1] + columns[:, None, :]
    index = places.view(batch, 1, -1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, index).view(pixels.shape)


def decode(path: str | Path, img_size: int) -> Tensor:
    """The RGB image in a file, uint8 (3, img_size, img_size): short side resized, centre cropped.

    Raises DataError when the file cannot be decoded.
    """
    with open_image(path) as image:
        rgb = image.convert("RGB")
    if rgb.size != (img_size, img_size):
        rgb = transforms.center_crop(transforms.resize(rgb, [img_size], antialias=True), [img_size])
    pixels: Tensor = transforms.pil_to_tensor(rgb)
    return pixels


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """An image file, open; DataError whenever reading it fails, since every decoder fails in its own way."""
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:
        raise DataError(
            f"the image {str(path)!r} cannot be decoded ({error}); repair or remove the file"
        ) from error


def random_stream(purpose: str, *numbers: int) -> np.random.Generator:
    """Random numbers that depend on nothing but the arguments; two purposes never share a stream."""
    return np.random.default_rng([*purpose.encode(), *numbers])


def _augmentation(
    augment: str, images: ImageSet, seed: int, epoch: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """What turns the pixels and ids of a batch into augmented pixels."""
    if augment not in AUGMENTATIONS:
        raise UsageError(
            f"there is no augmentation {augment!r}, only {' and '.join(AUGMENTATIONS)}"
            f"{nearest(augment, AUGMENTATIONS)}"
        )
    if augment == "none":
        return lambda pixels, _: pixels
    padding = images.img_size // 8
    stream = random_stream("crop-flip", seed, epoch)
    offsets = torch.from_numpy(stream.integers(2 * padding + 1, size=(len(images), 2))).to(images.device)
    flips = torch.from_numpy(stream.random(len(images)) < 0.5).to(images.device)
    return lambda pixels, ids: crop_flip(pixels, offsets[ids], flips[ids], padding=padding)


class _Files(Dataset["Tensor | DataError"]):
    """What a worker process reads: a whole batch at a time."""

    def __init__(self, paths: tuple[str, ...], img_size: int) -> None:
        self.paths = paths
        self.img_size = img_size

    def __getitem__(self, ids: list[int]) -> Tensor | DataError:
        """Pixels of the images, or what is wrong with them: a worker's exception would arrive as a traceback in text."""
        try:
            return torch.stack([decode(self.paths[index], self.img_size) for index in ids])
        except DataError as error:
            return error
