"""Paths that a user writes: `~` is the home folder, and what leads out of the current folder is told."""

from __future__ import annotations

from pathlib import Path

from fxsplit.errors import UsageError, shown_path


def expanded(path: str | Path) -> Path:
    """Put the home folder in the place of `~` and `~user`.

    Raises UsageError when there is no such user, or the path holds a null character.
    """
    if "\0" in str(path):
        raise UsageError(f"{shown_path(path)} is no path: it holds a null character")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(
            f"{shown_path(path)} begins with the home folder of a user who is not known; write the path in full, or "
            "./ before a folder of that name"
        ) from error


def leads_out(path: str) -> bool:
    """Tell whether a path leads out of the current folder, or may do so on another system."""
    parts = path.replace("\\", "/").split("/")
    return ".." in parts or parts[0] == "" or parts[0].startswith("~") or parts[0].endswith(":")


def has_home(path: str) -> bool:
    """Tell whether the home folder is known with which a path, or one after `folder:`, begins, if it does."""
    try:
        expanded(path.removeprefix("folder:"))
    except UsageError:
        return False
    return True
