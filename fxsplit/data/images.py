"""Sets of images, in memory or elsewhere: uint8 pixels of one size, read in any order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from fxsplit.data.randomness import random_stream
from fxsplit.data.reading.decoding import INTERPOLATIONS, Least, square
from fxsplit.data.reading.unreadable import Unread
from fxsplit.data.reading.workers import OpenImage, OwnPixels, ReaderChange, Readers, Reading, wanted
from fxsplit.data.staging import free_bytes, read_ahead, rows_of

# Images that are read into memory at a time.
CHUNK = 64
# Share of a GPU's free memory that the pixels of an image set may take: most of it is for training.
DEVICE_SHARE = 0.25


class ImageSet(ABC):
    """Gives batches of square images, `img_size` pixels wide, with `labels`, int64 (N,); image i has the id i."""

    labels: Tensor
    img_size: int
    # The share of an image's short side that is left, in its middle.
    crop_pct: float

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """Where batches are made."""
        return self.labels.device

    @property
    def channels(self) -> int:
        """How many values a pixel has."""
        return 3

    @property
    def resident(self) -> Tensor | None:
        """The pixels of all images, uint8 (N, C, h, w), where they lie in memory on `device`; else None."""
        return None

    @property
    def stored_size(self) -> tuple[int, int] | None:
        """Height and width of the pixels in memory; None for images elsewhere, whose sizes are their own."""
        return None

    @abstractmethod
    def to(self, device: torch.device) -> ImageSet:
        """Return the same images, whose batches are made on `device`."""

    @abstractmethod
    def cropped(self, crop_pct: float) -> ImageSet:
        """Return the same images, of whose short side only the share `crop_pct` is left."""

    @abstractmethod
    def subset(self, ids: Tensor) -> ImageSet:
        """Select the images `ids` (M,), which get the ids 0 .. M - 1."""

    @abstractmethod
    def labelled(self, labels: Tensor) -> ImageSet:
        """Return the same images with other labels, int64 (N,)."""

    @abstractmethod
    def read(self, order: Tensor, batch_size: int, change: ReaderChange | None = None) -> Iterator[Tensor]:
        """Read the pixels of batch after batch, in an `order` of ids int64 (M,): uint8 (B, C, h, w), all on the CPU.

        They are in pinned memory if `device` is a GPU. With a `change`, worker processes change each image by it.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class MemoryImages(ImageSet):
    """Gives images from `pixels` in memory, uint8 (N, C, h, w).

    On a GPU the pixels lie in its memory if they take at most DEVICE_SHARE of what is free there, else on the CPU.
    Pixels of another size than `img_size` are resized batch by batch, so small images stay small in memory.

    Args:
        pixels: of all images.
        labels: int64 (N,).
        img_size: side of the images that are given, in pixels.
        crop_pct: the share of an image's short side that is left, in its middle.
        workers: how many processes change images where they are read; with 0 this one does.
    """

    pixels: Tensor
    labels: Tensor
    img_size: int
    crop_pct: float = 1.0
    workers: int = 0
    _readers: Readers = field(init=False, repr=False, default_factory=Readers)

    @property
    def channels(self) -> int:
        return self.pixels.shape[1]

    @property
    def resident(self) -> Tensor | None:
        return self.pixels if self.pixels.device == self.device else None

    @property
    def stored_size(self) -> tuple[int, int]:
        height, width = self.pixels.shape[-2:]
        return height, width

    def to(self, device: torch.device) -> MemoryImages:
        labels = self.labels.to(device)
        free = free_bytes(device)
        fits = free is None or self.pixels.nbytes <= DEVICE_SHARE * free
        return replace(self, pixels=self.pixels.to(device if fits else "cpu"), labels=labels)

    def cropped(self, crop_pct: float) -> MemoryImages:
        return replace(self, crop_pct=crop_pct)

    def subset(self, ids: Tensor) -> MemoryImages:
        return replace(self, pixels=self.pixels[ids], labels=self.labels[ids])

    def labelled(self, labels: Tensor) -> MemoryImages:
        return replace(self, labels=labels.to(self.device))

    def read(self, order: Tensor, batch_size: int, change: ReaderChange | None = None) -> Iterator[Tensor]:
        pinned, pixels = self.device.type == "cuda", self.pixels.cpu()
        if change is None:
            return read_ahead(partial(rows_of, pixels, pinned=pinned), torch.split(order, batch_size))
        batches = [wanted(ids, change) for ids in torch.split(order, batch_size)]
        reading = Reading(_FromMemory(pixels, change.change), kind=change.change)
        return self._readers.read(reading, batches, workers=self.workers, pinned=pinned)


# Reads an image by its id, given its rows and a dict to which images are added that others replace.
Read = Callable[[int, Sequence[Any], dict[str, Unread]], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadImages(ImageSet):
    """Gives images that lie elsewhere, in any size, which worker processes read ahead.

    Only one `read` can go on at a time: a new one ends the one before. It raises DataError when an image cannot be
    read, and when a worker process dies.

    Args:
        labels: int64 (N,).
        img_size: side of the images in pixels.
        workers: how many processes read; with 0 this one does.
        interpolation: how images are resized, one of INTERPOLATIONS.
        crop_pct: the share of an image's short side that is left, in its middle.
    """

    labels: Tensor
    img_size: int
    workers: int
    interpolation: str = INTERPOLATIONS[0]
    crop_pct: float = 1.0
    _readers: Readers = field(init=False, repr=False, default_factory=Readers)

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """What each image is called."""

    @abstractmethod
    def subset(self, ids: Tensor) -> Self:
        """Select the images `ids` (M,), which get the ids 0 .. M - 1."""

    @abstractmethod
    def reader(self, change: Callable[..., Tensor]) -> Read:
        """Make what reads an image and changes it: `change` takes an `OpenImage` and the rows of the image."""

    def note(self, found: Mapping[str, str], unread: Mapping[str, Unread]) -> None:
        """Take note of what Pillow warns of, and of images that are replaced."""

    def to(self, device: torch.device) -> Self:
        return replace(self, labels=self.labels.to(device))

    def labelled(self, labels: Tensor) -> Self:
        return replace(self, labels=labels.to(self.device))

    def cropped(self, crop_pct: float) -> Self:
        return replace(self, crop_pct=crop_pct)

    def in_memory(self) -> MemoryImages:
        """Read all images into memory."""
        pixels = torch.empty((len(self), 3, self.img_size, self.img_size), dtype=torch.uint8)
        self.fill(pixels)
        return MemoryImages(pixels=pixels, labels=self.labels, img_size=self.img_size, workers=self.workers)

    def fill(self, pixels: Tensor) -> None:
        """Read all images into `pixels`, uint8 (N, 3, img_size, img_size)."""
        order = torch.arange(len(self))
        for rows, batch in zip(torch.split(order, CHUNK), self.read(order, CHUNK), strict=True):
            pixels[rows] = batch

    def read(self, order: Tensor, batch_size: int, change: ReaderChange | None = None) -> Iterator[Tensor]:
        batches = [wanted(ids, change) for ids in torch.split(order, batch_size)]
        how = None if change is None else change.change
        reading = Reading(self.reader(how or self.unchanged), kind=how)
        pinned = self.device.type == "cuda"
        return self._readers.read(reading, batches, workers=self.workers, pinned=pinned, note=self.note)

    @property
    def unchanged(self) -> Callable[..., Tensor]:
        """Makes the pixels of an `OpenImage` that is not changed, uint8 (3, img_size, img_size)."""
        return partial(_as_it_is, size=self.img_size, interpolation=self.interpolation, crop_pct=self.crop_pct)


def _as_it_is(image: OpenImage, *, size: int, interpolation: str, crop_pct: float) -> Tensor:
    pixels: Tensor = transforms.pil_to_tensor(image.square(size, interpolation, crop_pct=crop_pct))
    return pixels


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Data:
    """Holds square images to train and to test on, `img_size` pixels wide; label i means `classes[i]`.

    `held_out` are images that could be trained on and are not, to judge the training by.
    """

    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    img_size: int
    channels: int = 3
    held_out: ImageSet | None = None

    def holding_out(self, share: float, *, seed: int) -> Data:
        """Hold out a share of the images to train on, drawn with the seed: one at least, and all but one at most."""
        count = len(self.train)
        order = torch.from_numpy(random_stream("held out", seed).permutation(count))
        out = min(max(1, round(share * count)), count - 1)
        held_out, rest = order[:out].sort().values, order[out:].sort().values
        return replace(self, train=self.train.subset(rest), held_out=self.train.subset(held_out))

    def to(self, device: torch.device) -> Data:
        """Return the same data, whose batches are made on `device`."""
        held_out = None if self.held_out is None else self.held_out.to(device)
        return replace(self, train=self.train.to(device), test=self.test.to(device), held_out=held_out)


class _InMemory:
    """An image in memory, as an `OpenImage`."""

    def __init__(self, pixels: Tensor) -> None:
        self._pixels = pixels

    def square(self, size: int, interpolation: str, *, crop_pct: float = 1.0) -> Image.Image:
        return square(self._image(), size, interpolation, crop_pct=crop_pct)

    def at_least(self, _least: Least) -> OwnPixels:
        image = self._image()
        return OwnPixels(image, *image.size)

    def _image(self) -> Image.Image:
        image: Image.Image = transforms.to_pil_image(self._pixels)
        return image


class _FromMemory:
    """Reads images in memory by their ids, and changes each.

    Args:
        pixels: of all images, uint8 (N, C, h, w).
        change: takes an `OpenImage` and the rows of the image; returns pixels uint8 (C, H, W).
    """

    def __init__(self, pixels: Tensor, change: Callable[..., Tensor]) -> None:
        self._pixels, self._change = pixels, change

    def __call__(self, index: int, rows: Sequence[Any], _unread: dict[str, Unread]) -> Tensor:
        return self._change(_InMemory(self._pixels[index]), *rows)
