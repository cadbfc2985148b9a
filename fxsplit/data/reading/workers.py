"""Worker processes that read images ahead, and what the parent and they tell each other."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fxsplit.data.reading.decoding import Least, image_warnings
from fxsplit.data.reading.unreadable import Unread
from fxsplit.errors import DataError, reason

# What the system sends when a child process ends; Windows has none.
SIGCHLD = getattr(signal, "SIGCHLD", None)
# So long a worker process outlives SIGTERM.
GRACE_SECONDS = 20

# Pixels (B, 3, H, W), or the error message of an image; what Pillow warns of, by path; and images that are replaced.
ReadBatch = tuple[Tensor | str, Mapping[str, str], Mapping[str, Unread]]
# Is called with the last two.
Note = Callable[[Mapping[str, str], Mapping[str, Unread]], None]


class OpenImage(Protocol):
    """An image that is about to be read, for what changes it while it is read."""

    def square(self, size: int, interpolation: str, *, crop_pct: float = 1.0) -> Image.Image:
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


def wanted(ids: Tensor, change: ReaderChange | None) -> Wanted:
    """Say what a worker process is to read."""
    return ids.tolist(), [] if change is None else change.rows(ids)


class Readers:
    """Worker processes that read the batches of one image set ahead, as long as they read in the same way."""

    def __init__(self) -> None:
        self._batches: list[Wanted] = []
        self._kind: object = None
        self._loader: DataLoader[ReadBatch] | None = None

    def read(
        self, reading: Reading, batches: list[Wanted], *, workers: int, pinned: bool, note: Note | None = None
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


class Reading(Dataset["ReadBatch"]):
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
