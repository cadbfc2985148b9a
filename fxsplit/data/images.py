"""Sets of images, in memory or in files: uint8 pixels of one size, read in any order."""

from __future__ import annotations

import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as transforms

from fxsplit.data.decoding import INTERPOLATIONS, Least, decode, image_warnings, read_image, square
from fxsplit.data.randomness import random_stream
from fxsplit.data.staging import free_bytes, read_ahead, rows_of
from fxsplit.data.unreadable import Replacing, Unread, Unreadable
from fxsplit.errors import DataError, reason

# Images that a thread decodes at a time.
DECODE_CHUNK = 64
# Share of a GPU's free memory that the pixels of an image set may take: most of it is for training.
DEVICE_SHARE = 0.25
# What the system sends when a child process ends; Windows has none.
SIGCHLD = getattr(signal, "SIGCHLD", None)
# So long a worker process outlives SIGTERM.
GRACE_SECONDS = 20

# Is called with what Pillow warns of, by the path of the image.
Warned = Callable[[Mapping[str, str]], None]
# Pixels (B, 3, H, W), or the error message of an image; what Pillow warns of, by path; and images that are replaced.
ReadBatch = tuple[Tensor | str, Mapping[str, str], Mapping[str, Unread]]
# Is called with the last two.
Note = Callable[[Mapping[str, str], Mapping[str, Unread]], None]


class OpenImage(Protocol):
    """An image that is about to be read, for what changes it while it is read."""

    def square(self, size: int, interpolation: str) -> Image.Image:
        """Read it as a square of `size` pixels, as unchanged images are."""
        ...

    def at_least(self, least: Least) -> OwnPixels:
        """Read it whole, in no fewer pixels than `least` says."""
        ...


class OwnPixels(NamedTuple):
    """An image as it was read, and the width and height that it has by itself."""

    image: Image.Image
    width: int
    height: int


class ReaderChange(Protocol):
    """Says what readers do with each image: what `change` returns, pixels uint8 (C, H, W), takes its place."""

    @property
    def change(self) -> Callable[..., Tensor]: ...

    def rows(self, ids: Tensor) -> list[np.ndarray[Any, Any]]:
        """Return what `change` takes beside the image, for each of these images: arrays (B, ...)."""
        ...


# The ids of a batch, and the rows of its images.
Wanted = tuple[list[int], list[np.ndarray[Any, Any]]]


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
        """Height and width of the pixels in memory; None for images in files, whose sizes are their own."""
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
    _readers: Readers = field(init=False, repr=False, default_factory=lambda: Readers())

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
        reading = _Reading(_FromMemory(pixels, change.change), kind=change.change)
        return self._readers.read(reading, batches, workers=self.workers, pinned=pinned)


class FileImages(ImageSet):
    """Gives images from files, which worker processes read ahead.

    Only one `read` can go on at a time: a new one ends the one before. It raises DataError when a file cannot be
    decoded, and when a worker process dies.

    Args:
        paths: of the files.
        labels: int64 (N,).
        img_size: side of the images in pixels.
        workers: how many processes read; with 0 this one does.
        interpolation: how images are resized, one of INTERPOLATIONS.
        crop_pct: the share of an image's short side that is left, in its middle.
        warned: is called with what Pillow warns of while a batch is read.
        unreadable: counts images that cannot be decoded, and says how many are replaced; None replaces none.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Tensor,
        *,
        img_size: int,
        workers: int,
        interpolation: str = INTERPOLATIONS[0],
        crop_pct: float = 1.0,
        warned: Warned | None = None,
        unreadable: Unreadable | None = None,
    ) -> None:
        self.paths = tuple(paths)
        self.labels = labels
        self.img_size = img_size
        self.workers = workers
        self.interpolation = interpolation
        self.crop_pct = crop_pct
        self.warned = warned
        self.unreadable = unreadable
        self._readers = Readers()

    def to(self, device: torch.device) -> FileImages:
        return self._with(self.paths, self.labels.to(device))

    def subset(self, ids: Tensor) -> FileImages:
        return self._with([self.paths[index] for index in ids.tolist()], self.labels[ids])

    def labelled(self, labels: Tensor) -> FileImages:
        return self._with(self.paths, labels.to(self.device))

    def cropped(self, crop_pct: float) -> FileImages:
        return self._with(self.paths, self.labels, crop_pct=crop_pct)

    def _with(self, paths: Sequence[str], labels: Tensor, *, crop_pct: float | None = None) -> FileImages:
        return FileImages(
            paths,
            labels,
            img_size=self.img_size,
            workers=self.workers,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct if crop_pct is None else crop_pct,
            warned=self.warned,
            unreadable=self.unreadable,
        )

    def decoded(self) -> MemoryImages:
        """Decode all images into memory, by `workers` threads: Pillow's decoders run outside Python's lock."""
        pixels = torch.empty((len(self), 3, self.img_size, self.img_size), dtype=torch.uint8)
        read = self._reader(None)

        def fill(start: int) -> dict[str, Unread]:
            unread: dict[str, Unread] = {}
            for index in range(start, min(start + DECODE_CHUNK, len(self))):
                pixels[index] = read(index, [], unread)
            return unread

        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            for unread in pool.map(fill, range(0, len(self), DECODE_CHUNK)):
                self._note({}, unread)
        return MemoryImages(pixels=pixels, labels=self.labels, img_size=self.img_size, workers=self.workers)

    def read(self, order: Tensor, batch_size: int, change: ReaderChange | None = None) -> Iterator[Tensor]:
        batches = [wanted(ids, change) for ids in torch.split(order, batch_size)]
        how = None if change is None else change.change
        reading = _Reading(self._reader(how), kind=how)
        pinned = self.device.type == "cuda"
        return self._readers.read(reading, batches, workers=self.workers, pinned=pinned, note=self._note)

    def _note(self, found: Mapping[str, str], unread: Mapping[str, Unread]) -> None:
        if found and self.warned:
            self.warned(found)
        if self.unreadable is not None:
            self.unreadable.note(unread)

    def _reader(self, change: Callable[..., Tensor] | None) -> _FromFiles:
        plain = partial(_as_it_is, img_size=self.img_size, interpolation=self.interpolation, crop_pct=self.crop_pct)
        return _FromFiles(self._replacing, plain if change is None else change)

    @cached_property
    def _replacing(self) -> Replacing:
        most = 0 if self.unreadable is None else self.unreadable.most
        return Replacing(self.paths, self.labels.tolist(), most=most)


def wanted(ids: Tensor, change: ReaderChange | None) -> Wanted:
    """Say what a worker process is to read."""
    return ids.tolist(), [] if change is None else change.rows(ids)


class _InMemory:
    """An image in memory, as an `OpenImage`."""

    def __init__(self, pixels: Tensor) -> None:
        self._pixels = pixels

    def square(self, size: int, interpolation: str) -> Image.Image:
        return square(self._image(), size, interpolation)

    def at_least(self, _least: Least) -> OwnPixels:
        image = self._image()
        return OwnPixels(image, *image.size)

    def _image(self) -> Image.Image:
        image: Image.Image = transforms.to_pil_image(self._pixels)
        return image


class _InFile:
    """An image in a file, as an `OpenImage`."""

    def __init__(self, path: str) -> None:
        self.path = path

    def square(self, size: int, interpolation: str) -> Image.Image:
        image: Image.Image = transforms.to_pil_image(decode(self.path, size, interpolation))
        return image

    def at_least(self, least: Least) -> OwnPixels:
        return OwnPixels(*read_image(self.path, least))


def _as_it_is(image: _InFile, **options: Any) -> Tensor:
    return decode(image.path, **options)


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


class _FromFiles:
    """Reads images in files by their ids, and changes each: one that replaces another by the rows of the other's place.

    Args:
        replacing: finds the file.
        change: as for `_FromMemory`.
    """

    def __init__(self, replacing: Replacing, change: Callable[..., Tensor]) -> None:
        self._replacing, self._change = replacing, change

    def __call__(self, index: int, rows: Sequence[Any], unread: dict[str, Unread]) -> Tensor:
        return self._replacing(index, lambda path: self._change(_InFile(path), *rows), unread)


class Readers:
    """Worker processes that read the batches of one image set ahead, as long as they read in the same way."""

    def __init__(self) -> None:
        self._batches: list[Wanted] = []
        self._kind: object = None
        self._loader: DataLoader[ReadBatch] | None = None

    def read(
        self, reading: _Reading, batches: list[Wanted], *, workers: int, pinned: bool, note: Note | None = None
    ) -> Iterator[Tensor]:
        """Read batch after batch.

        Raises DataError when a file cannot be decoded, when a worker process has died, and what `note` raises.
        """
        if self._loader is None or reading.kind != self._kind:
            self._kind = reading.kind
            self._loader = DataLoader(
                reading,
                sampler=self._batches,
                batch_size=None,
                num_workers=workers,
                persistent_workers=workers > 0,
                pin_memory=pinned,
                # Its own generator leaves the global random state alone.
                generator=torch.Generator(),
                worker_init_fn=_outlive_signals,
            )
        self._batches[:] = batches
        with _dead_worker_named():
            found = _without_sudden_error(partial(iter, self._loader))
        while True:
            with _dead_worker_named():
                batch = next(found, None)
            if batch is None:
                return
            pixels, warnings, unread = batch
            if note is not None:
                note(warnings, unread)
            if isinstance(pixels, str):
                raise DataError(pixels)
            yield pixels


def _outlive_signals(_worker: int) -> None:
    """Leave it to the parent, in a worker process, to end it.

    Ctrl-C goes to both, and so does SIGTERM where a whole process group gets it: the parent ends its step first, and
    saves the run. It may also send SIGTERM by itself, so a worker that has got one is gone after a while.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SECONDS))


def _without_sudden_error(make: Callable[[], Iterator[ReadBatch]]) -> Iterator[ReadBatch]:
    """Make an iterator over a DataLoader whose dying workers raise no error in the midst of something else.

    torch has a handler of signals for that, which raises wherever the program is: within a step, whose state is lost
    then, or while the run is saved. Without it the next batch says it, a few seconds later.
    """
    if threading.current_thread() is not threading.main_thread() or SIGCHLD is None:
        return make()
    before = signal.getsignal(SIGCHLD)
    try:
        return make()
    finally:
        signal.signal(SIGCHLD, before)


@contextmanager
def _dead_worker_named() -> Iterator[None]:
    """Inside, an error of torch about a worker process that is gone becomes a DataError."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:  # those of the system where it dies while it hands over a batch
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a process that reads images has died ({reason(error)}), as happens when memory runs out; use fewer "
            "--workers, and go on with --resume"
        ) from error


class _Reading(Dataset["ReadBatch"]):
    """What a worker process does: it reads a whole batch at a time.

    Args:
        read: takes the id of an image, its rows, and a dict to which it adds images that others replace.
        kind: equal for those that read in the same way.
    """

    def __init__(self, read: Callable[[int, Sequence[Any], dict[str, Unread]], Tensor], kind: object) -> None:
        self._read, self.kind = read, kind

    def __getitem__(self, wanted: Wanted) -> ReadBatch:
        """Return pixels or an error message: an exception raised here would arrive as the text of a traceback."""
        ids, rows = wanted
        unread: dict[str, Unread] = {}
        with image_warnings() as found:
            try:
                pixels = [self._read(index, [each[place] for each in rows], unread) for place, index in enumerate(ids)]
                return torch.stack(pixels), found, unread
            except DataError as error:
                return str(error), found, unread


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
