"""Images that cannot be read: they are named and counted, and others of their class take their places."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from fxsplit.errors import DataError, printable


class Unread(NamedTuple):
    """An image that cannot be read: the sentence that says why, and the path of the image that takes its place."""

    why: str
    instead: str


class Replacing:
    """Reads the images of a set by id; the next readable one of its class takes the place of one that cannot be read.

    Which one that is depends on the files alone, and not on the batch or on the process that reads it.

    Args:
        paths: of the files.
        labels: the class of each.
        most: how many images may be replaced; one more of the class is tried in place of one, and with 0 none.
    """

    def __init__(self, paths: Sequence[str], labels: Sequence[int], *, most: int = 0) -> None:
        self._paths, self._labels, self._most = paths, labels, most

    def __call__(self, index: int, read: Callable[[str], Tensor], unread: dict[str, Unread]) -> Tensor:
        """Return the pixels of image `index`, uint8 (3, H, W); if it cannot be read, it is added to `unread`.

        `read` reads the file at a path, and raises DataError when it cannot. It is raised here when neither that file
        nor those that are tried in its place can be read.
        """
        try:
            return _read(read, self._paths[index])
        except DataError as error:
            why = str(error)
        for other in self._others(index):
            try:
                pixels = _read(read, self._paths[other])
            except DataError:
                continue
            unread[self._paths[index]] = Unread(why, self._paths[other])
            return pixels
        raise DataError(why)

    def _others(self, index: int) -> list[int]:
        """List the next images of the same class, from the first again after the last."""
        if not self._most:
            return []
        count, label = len(self._paths), self._labels[index]
        following = ((index + step) % count for step in range(1, count))
        found = []
        for other in following:
            if self._labels[other] == label:
                found.append(other)
                if len(found) > self._most:
                    break
        return found


def _read(read: Callable[[str], Tensor], path: str) -> Tensor:
    refuse_special(path)
    return read(path)


def refuse_special(path: str) -> None:
    """Raise DataError when a path leads to a pipe or a device, or to a folder: reading it could go on for ever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise DataError(f"the image {path!r} is not a file; put the image back, or remove it")


class Unreadable:
    """Counts the images of a run that cannot be read, and says of each once what takes its place.

    Args:
        most: more of them than this end the run.
        notice: is called with the sentences.
    """

    def __init__(self, most: int, notice: Callable[[str], None]) -> None:
        self.most, self._notice = most, notice
        self._known: set[str] = set()

    def note(self, unread: Mapping[str, Unread]) -> None:
        """Count those that are new. Raises DataError when they are too many."""
        for path, (why, instead) in unread.items():
            if path in self._known:
                continue
            self._known.add(path)
            count = len(self._known)
            if count > self.most:
                raise DataError(f"{why}; it is number {count}, and --max-bad-samples allows {self.most}")
            self._notice(
                f"{printable(why)}; until then {printable(repr(instead))} takes its place (bad image {count} of at "
                f"most {self.most})"
            )
