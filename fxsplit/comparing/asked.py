"""What a comparison was asked for, kept in its folder: seeds that are fixed before its runs, and lengths of arms."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fxsplit.comparison import ComparisonSpec
from fxsplit.errors import UsageError, shown_path
from fxsplit.paths import expanded
from fxsplit.records import json_text
from fxsplit.saving.files import write_whole


class Asked:
    """Keeps what was fixed before it could be known what it leads to; goes on with what an earlier process kept.

    `looks` are the seeds, each time that there were more of them. Raises UsageError when the folder cannot be written,
    or holds a comparison of the same name with another margin.
    """

    def __init__(self, spec: ComparisonSpec) -> None:
        self._path = expanded(spec.output) / f"{spec.name}.asked.json"
        before = self._read()
        if before.get("margin", spec.margin) != spec.margin:
            raise UsageError(
                f"the margin of the comparison in {str(self._path.parent)!r} was {before['margin']:g} points and is "
                f"now {spec.margin:g}, but it is given before the runs; keep it, or choose another --name"
            )
        self.looks: tuple[tuple[int, ...], ...] = tuple(tuple(look) for look in before.get("looks", ()))
        self._epochs: dict[str, int] = dict(before.get("epochs", {}))
        self._margin = spec.margin
        seen = set().union(*self.looks) if self.looks else set()
        if not self.looks or set(spec.seed_numbers) - seen:
            self.looks = (*self.looks, spec.seed_numbers)
        self._write()

    def epochs(self, key: str, fitted: Callable[[], int]) -> int:
        """Return the length of an arm that was fitted to another's budget; it is `fitted` once, and then kept."""
        if key not in self._epochs:
            self._epochs[key] = fitted()
            self._write()
        return self._epochs[key]

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UsageError(
                f"{shown_path(self._path)} cannot be read: {error.strerror}; choose another --output or --name"
            ) from error
        except ValueError as error:
            raise UsageError(
                f"{str(self._path)!r} is not what a comparison keeps there; choose another --name"
            ) from error
        return dict(found)

    def _write(self) -> None:
        data = {"margin": self._margin, "looks": [list(look) for look in self.looks], "epochs": self._epochs}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, json_text(data))
        except OSError as error:
            raise UsageError(
                f"the folder {str(self._path.parent)!r} cannot be written: {error.strerror}; choose another --output"
            ) from error
