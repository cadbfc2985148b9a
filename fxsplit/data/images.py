"""Sets of images, in memory or in files: uint8 pixels of one size, read in any order."""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fxsplit.data.decoding import INTERPOLATIONS, decode, image_warnings
from fxsplit.data.randomness import random_stream
from fxsplit.data.staging import free_bytes, read_ahead, rows_of
from fxsplit.errors import DataError

# Images that a thread decodes at a time.
DECODE_CHUNK = 64
# Share of a GPU's free memory that the pixels of an image set may take: most of it is for training.
DEVICE_SHARE = 0.25
# So long a worker process outlives SIGTERM.
GRACE_SECONDS = 20

# Is called with what Pillow warns of, by the path of the image.
Warned = Callable[[Mapping[str, str]], None]
# Pixels (B, 3, H, W), or the error message of an image; and what Pillow warns of, by path.
ReadBatch = tuple[Tensor | str, Mapping[str, str]]


class ImageSet(ABC):
    """Gives batches of square images, `img_size` pixels wide, with `labels`, int64 (N,); image i has the id i."""

    labels: Tensor
    img_size: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """Where batches are made."""
        return self.labels.device

    @property
    def resident(self) -> Tensor | None:
        """The pixels of all images, uint8 (N, C, h, w), where they lie in memory on `device`; else None."""
        return None

    @abstractmethod
    def to(self, device: torch.device) -> ImageSet:
        """Return the same images, whose batches are made on `device`."""

    @abstractmethod
    def subset(self, ids: Tensor) -> ImageSet:
        """Select the images `ids` (M,), which get the ids 0 .. M - 1."""

    @abstractmethod
    def read(self, order: Tensor, batch_size: int) -> Iterator[Tensor]:
        """Read the pixels of batch after batch, in an `order` of ids int64 (M,): uint8 (B, C, h, w), all on the CPU.

        They are in pinned memory if `device` is a GPU.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class MemoryImages(ImageSet):
    """Gives images from `pixels` in memory, uint8 (N, C, h, w).

    On a GPU the pixels lie in its memory if they take at most DEVICE_SHARE of what is free there, else on the CPU.
    Pixels of another size than `img_size` are resized batch by batch, so small images stay small in memory.
    """

    pixels: Tensor
    labels: Tensor
    img_size: int

    @property
    def resident(self) -> Tensor | None:
        return self.pixels if self.pixels.device == self.device else None

    def to(self, device: torch.device) -> MemoryImages:
        labels = self.labels.to(device)
        free = free_bytes(device)
        fits = free is None or self.pixels.nbytes <= DEVICE_SHARE * free
        return replace(self, pixels=self.pixels.to(device if fits else "cpu"), labels=labels)

    def subset(self, ids: Tensor) -> MemoryImages:
        return replace(self, pixels=self.pixels[ids], labels=self.labels[ids])

    def read(self, order: Tensor, batch_size: int) -> Iterator[Tensor]:
        read = partial(rows_of, self.pixels.cpu(), pinned=self.device.type == "cuda")
        return read_ahead(read, torch.split(order, batch_size))


class FileImages(ImageSet):
    """Gives images from files, which worker processes read ahead.

    Only one `read` can go on at a time: a new one ends the one before. It raises DataError when a file cannot be
    decoded.

    Args:
        paths: of the files.
        labels: int64 (N,).
        img_size: side of the images in pixels.
        workers: how many processes read; with 0 this one does.
        interpolation: how images are resized, one of INTERPOLATIONS.
        warned: is called with what Pillow warns of while a batch is read.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Tensor,
        *,
        img_size: int,
        workers: int,
        interpolation: str = INTERPOLATIONS[0],
        warned: Warned | None = None,
    ) -> None:
        self.paths = tuple(paths)
        self.labels = labels
        self.img_size = img_size
        self.workers = workers
        self.interpolation = interpolation
        self.warned = warned
        self._batches: list[list[int]] = []

    def to(self, device: torch.device) -> FileImages:
        return self._with(self.paths, self.labels.to(device))

    def subset(self, ids: Tensor) -> FileImages:
        return self._with([self.paths[index] for index in ids.tolist()], self.labels[ids])

    def _with(self, paths: Sequence[str], labels: Tensor) -> FileImages:
        return FileImages(
            paths,
            labels,
            img_size=self.img_size,
            workers=self.workers,
            interpolation=self.interpolation,
            warned=self.warned,
        )

    def decoded(self) -> MemoryImages:
        """Decode all images into memory, by `workers` threads: Pillow's decoders run outside Python's lock."""
        pixels = torch.empty((len(self), 3, self.img_size, self.img_size), dtype=torch.uint8)

        def fill(start: int) -> None:
            for index, path in enumerate(self.paths[start : start + DECODE_CHUNK], start):
                pixels[index] = decode(path, self.img_size, self.interpolation)

        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            for _ in pool.map(fill, range(0, len(self), DECODE_CHUNK)):
                pass
        return MemoryImages(pixels=pixels, labels=self.labels, img_size=self.img_size)

    def read(self, order: Tensor, batch_size: int) -> Iterator[Tensor]:
        self._batches[:] = [ids.tolist() for ids in torch.split(order, batch_size)]
        for pixels, found in self._loader:
            if found and self.warned:
                self.warned(found)
            if isinstance(pixels, str):
                raise DataError(pixels)
            yield pixels

    @cached_property
    def _loader(self) -> DataLoader[ReadBatch]:
        """Yields the batches listed in `_batches`; its own generator leaves the global random state alone."""
        return DataLoader(
            _Files(self.paths, self.img_size, self.interpolation),
            sampler=self._batches,
            batch_size=None,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),
            worker_init_fn=_outlive_signals,
        )


def _outlive_signals(_worker: int) -> None:
    """Leave it to the parent, in a worker process, to end it.

    Ctrl-C goes to both, and so does SIGTERM where a whole process group gets it: the parent ends its step first, and
    saves the run. It may also send SIGTERM by itself, so a worker that has got one is gone after a while.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SECONDS))


class _Files(Dataset["ReadBatch"]):
    """What a worker process reads: a whole batch at a time."""

    def __init__(self, paths: tuple[str, ...], img_size: int, interpolation: str) -> None:
        self.paths = paths
        self.img_size = img_size
        self.interpolation = interpolation

    def __getitem__(self, ids: list[int]) -> ReadBatch:
        """Return pixels or an error message: an exception raised here would arrive as the text of a traceback."""
        with image_warnings() as found:
            try:
                pixels = [decode(self.paths[index], self.img_size, self.interpolation) for index in ids]
                return torch.stack(pixels), found
            except DataError as error:
                return str(error), found


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
