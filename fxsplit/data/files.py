"""Images in files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from PIL import Image
from torch import Tensor

from fxsplit.data.images import CHUNK, Read, ReadImages
from fxsplit.data.reading.decoding import Least, read_image, read_square
from fxsplit.data.reading.unreadable import Replacing, Unread, Unreadable
from fxsplit.data.reading.workers import OwnPixels

# Is called with what Pillow warns of, by the path of the image.
Warned = Callable[[Mapping[str, str]], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class FileImages(ReadImages):
    """Gives images from files.

    Args:
        paths: of the files.
        warned: is called with what Pillow warns of while a batch is read.
        unreadable: counts images that cannot be decoded, and says how many are replaced; None replaces none.
    """

    paths: Sequence[str]
    warned: Warned | None = None
    unreadable: Unreadable | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.paths)

    def subset(self, ids: Tensor) -> FileImages:
        return replace(self, paths=[self.paths[index] for index in ids.tolist()], labels=self.labels[ids])

    def reader(self, change: Callable[..., Tensor]) -> Read:
        return _FromFiles(self._replacing, change)

    def note(self, found: Mapping[str, str], unread: Mapping[str, Unread]) -> None:
        if found and self.warned:
            self.warned(found)
        if self.unreadable is not None:
            self.unreadable.note(unread)

    def fill(self, pixels: Tensor) -> None:
        """Decode by `workers` threads: Pillow's decoders run outside Python's lock."""
        read = self.reader(self.unchanged)

        def decode(start: int) -> dict[str, Unread]:
            unread: dict[str, Unread] = {}
            for index in range(start, min(start + CHUNK, len(self))):
                pixels[index] = read(index, [], unread)
            return unread

        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            for unread in pool.map(decode, range(0, len(self), CHUNK)):
                self.note({}, unread)

    @cached_property
    def _replacing(self) -> Replacing:
        most = 0 if self.unreadable is None else self.unreadable.most
        return Replacing(self.paths, self.labels.tolist(), most=most)


class InFile:
    """An image in a file, as an `OpenImage`."""

    def __init__(self, path: str) -> None:
        self._path = path

    def square(self, size: int, interpolation: str, *, crop_pct: float = 1.0) -> Image.Image:
        return read_square(self._path, size, interpolation, crop_pct=crop_pct)

    def at_least(self, least: Least) -> OwnPixels:
        return OwnPixels(*read_image(self._path, least))


class _FromFiles:
    """Reads images in files by their ids, and changes each: one that replaces another by the rows of the other's place.

    Args:
        replacing: finds the file.
        change: takes an `OpenImage` and the rows of the image; returns pixels uint8 (C, H, W).
    """

    def __init__(self, replacing: Replacing, change: Callable[..., Tensor]) -> None:
        self._replacing, self._change = replacing, change

    def __call__(self, index: int, rows: Sequence[Any], unread: dict[str, Unread]) -> Tensor:
        return self._replacing(index, lambda path: self._change(InFile(path), *rows), unread)
