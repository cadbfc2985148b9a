"""Sets of images, in memory or in files: uint8 pixels of one size, read in any order."""

from __future__ import annotations

import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fxsplit.data.decoding import INTERPOLATIONS, image_warnings
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
    def labelled(self, labels: Tensor) -> ImageSet:
        """Return the same images with other labels, int64 (N,)."""

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

    def labelled(self, labels: Tensor) -> MemoryImages:
        return replace(self, labels=labels.to(self.device))

    def read(self, order: Tensor, batch_size: int) -> Iterator[Tensor]:
        read = partial(rows_of, self.pixels.cpu(), pinned=self.device.type == "cuda")
        return read_ahead(read, torch.split(order, batch_size))


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
        warned: Warned | None = None,
        unreadable: Unreadable | None = None,
    ) -> None:
        self.paths = tuple(paths)
        self.labels = labels
        self.img_size = img_size
        self.workers = workers
        self.interpolation = interpolation
        self.warned = warned
        self.unreadable = unreadable
        self._batches: list[list[int]] = []

    def to(self, device: torch.device) -> FileImages:
        return self._with(self.paths, self.labels.to(device))

    def subset(self, ids: Tensor) -> FileImages:
        return self._with([self.paths[index] for index in ids.tolist()], self.labels[ids])

    def labelled(self, labels: Tensor) -> FileImages:
        return self._with(self.paths, labels.to(self.device))

    def _with(self, paths: Sequence[str], labels: Tensor) -> FileImages:
        return FileImages(
            paths,
            labels,
            img_size=self.img_size,
            workers=self.workers,
            interpolation=self.interpolation,
            warned=self.warned,
            unreadable=self.unreadable,
        )

    def decoded(self) -> MemoryImages:
        """Decode all images into memory, by `workers` threads: Pillow's decoders run outside Python's lock."""
        pixels = torch.empty((len(self), 3, self.img_size, self.img_size), dtype=torch.uint8)
        read = self._reader

        def fill(start: int) -> dict[str, Unread]:
            unread: dict[str, Unread] = {}
            for index in range(start, min(start + DECODE_CHUNK, len(self))):
                pixels[index] = read(index, unread)
            return unread

        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            for unread in pool.map(fill, range(0, len(self), DECODE_CHUNK)):
                self._note(unread)
        return MemoryImages(pixels=pixels, labels=self.labels, img_size=self.img_size)

    def read(self, order: Tensor, batch_size: int) -> Iterator[Tensor]:
        self._batches[:] = [ids.tolist() for ids in torch.split(order, batch_size)]
        with _dead_worker_named():
            batches = _without_sudden_error(lambda: iter(self._loader))
        while True:
            with _dead_worker_named():
                batch = next(batches, None)
            if batch is None:
                return
            pixels, found, unread = batch
            if found and self.warned:
                self.warned(found)
            self._note(unread)
            if isinstance(pixels, str):
                raise DataError(pixels)
            yield pixels

    def _note(self, unread: Mapping[str, Unread]) -> None:
        if self.unreadable is not None:
            self.unreadable.note(unread)

    @property
    def _reader(self) -> Replacing:
        return Replacing(
            self.paths,
            self.labels.tolist(),
            img_size=self.img_size,
            interpolation=self.interpolation,
            most=0 if self.unreadable is None else self.unreadable.most,
        )

    @cached_property
    def _loader(self) -> DataLoader[ReadBatch]:
        """Yields the batches listed in `_batches`; its own generator leaves the global random state alone."""
        return DataLoader(
            _Files(self._reader),
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


class _Files(Dataset["ReadBatch"]):
    """What a worker process reads: a whole batch at a time."""

    def __init__(self, read: Replacing) -> None:
        self._read = read

    def __getitem__(self, ids: list[int]) -> ReadBatch:
        """Return pixels or an error message: an exception raised here would arrive as the text of a traceback."""
        unread: dict[str, Unread] = {}
        with image_warnings() as found:
            try:
                return torch.stack([self._read(index, unread) for index in ids]), found, unread
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
