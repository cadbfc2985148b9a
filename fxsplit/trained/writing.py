"""Results that are written whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fxsplit.errors import UsageError, shown_path
from fxsplit.paths import expanded
from fxsplit.resuming import RECIPE
from fxsplit.saving.files import replacing
from fxsplit.saving.run_folder import FILES


@contextmanager
def written(path: str | Path) -> Iterator[Path]:
    """Inside, write the file whose path is given; at the end it takes the place of `path`, or is gone after an error.

    Raises UsageError when `path` cannot be written, at once where that is known, and when a run has left it.
    """
    target = expanded(path)
    if os.path.isdir(target):
        raise UsageError(f"{shown_path(path)} is a folder; name a file in it to write to")
    if target.name in FILES and os.path.isfile(target.parent / RECIPE):
        raise UsageError(f"{shown_path(path)} is a file that its run has left; choose another file to write to")
    try:
        with replacing(target) as part:
            yield part
    except OSError as error:
        raise UsageError(
            f"{shown_path(path)} cannot be written: {error.strerror or error}; choose another file to write to"
        ) from error
