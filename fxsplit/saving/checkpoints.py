"""The checkpoints of a run: the newest and the best are kept, and the newest whole one is found."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fxsplit.errors import DataError
from fxsplit.resuming import CHECKPOINTS
from fxsplit.saving.checkpoint import read_checkpoint, read_summary, write_checkpoint
from fxsplit.saving.files import remove_parts

SUFFIX = ".safetensors"


class Place(NamedTuple):
    """A position in a run: the epochs that are done, and the steps that are done of the next."""

    epoch: int
    step: int

    def __str__(self) -> str:
        return f"epoch {self.epoch + 1}, step {self.step}" if self.step else f"epoch {self.epoch}"

    @property
    def file_name(self) -> str:
        """The name of its checkpoint: names in order are positions in order."""
        return f"epoch-{self.epoch:06d}-step-{self.step:08d}{SUFFIX}"


class Found(NamedTuple):
    """A checkpoint that is whole: its file and what it holds."""

    path: Path
    data: dict[str, Any]

    @property
    def place(self) -> Place:
        """The position that it is of."""
        return Place(*self.data["place"])


class Checkpoints:
    """Keeps the checkpoints of a run in a folder of their own.

    Args:
        folder: of the run.
        keep: how many of the newest are kept, at least 1; beside them the best by test accuracy.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder, self._keep = folder / CHECKPOINTS, keep

    def write(self, place: Place, data: Mapping[str, Any], *, accuracy: float | None) -> Path:
        """Write a checkpoint, then remove those that are not kept.

        `accuracy` is that on the test images where an epoch has just ended, else None. Raises OSError when it cannot
        be written; then none is removed.
        """
        self._folder.mkdir(exist_ok=True)
        path = self._folder / place.file_name
        known = accuracy is not None and math.isfinite(accuracy)
        write_checkpoint(path, data, summary={"accuracy": accuracy if known else None})
        kept = {*_places(self._folder)[-self._keep :], self._best()}
        for each in _places(self._folder):
            if each not in kept:
                each.unlink(missing_ok=True)
        return path

    def _best(self) -> Path | None:
        """Find the one of the best accuracy; among equals the first."""
        found = {path: _accuracy(path) for path in _places(self._folder)}
        best = max(found, key=found.__getitem__, default=None)
        return None if best is None or found[best] == -math.inf else best

    def later_than(self, path: Path) -> list[Path]:
        """List the checkpoints of later positions than that of the checkpoint `path`."""
        return [each for each in _places(self._folder) if each.name > path.name]

    def remove_after(self, path: Path) -> None:
        """Remove the checkpoints that are `later_than` a checkpoint, and what a killed process was writing."""
        for each in self.later_than(path):
            each.unlink(missing_ok=True)
        remove_parts(self._folder)


def _places(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, in the order of their positions."""
    return sorted(each for each in folder.glob(f"*{SUFFIX}") if re.fullmatch(r"epoch-\d+-step-\d+", each.stem))


def _accuracy(path: Path) -> float:
    try:
        accuracy = read_summary(path).get("accuracy")
    except DataError:
        return -math.inf
    return float(accuracy) if isinstance(accuracy, int | float) and math.isfinite(accuracy) else -math.inf


def find_checkpoint(path: Path, *, notice: Callable[[str], None]) -> Found | None:
    """Return the newest checkpoint of a run that is whole, or None when it has none.

    `notice` is called with a sentence for each newer one that is not whole.

    Args:
        path: the folder of a run, or one checkpoint in it, which then is the one.
        notice: is called with sentences.

    Raises DataError when there are checkpoints and none of them is whole.
    """
    if path.is_file():
        return Found(path, read_checkpoint(path))
    broken = []
    for each in reversed(_places(path / CHECKPOINTS)):
        try:
            return Found(each, read_checkpoint(each))
        except DataError as error:
            broken.append(each)
            notice(f"the checkpoint {error}; it is skipped")
    if broken:
        raise DataError(
            f"none of the {len(broken)} checkpoints in {str(path / CHECKPOINTS)!r} is whole; remove that folder to "
            "begin the run anew"
        )
    return None
