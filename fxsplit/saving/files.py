"""Files that are written whole or not at all, whatever ends the process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# The end of the name of a file that is being written.
PART = ".part"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Inside, write the file whose path is given; at the end it takes the place of `path`, or is gone after an error.

    It lies in the same folder, and is on the disk before it takes the name: after a power failure there is the former
    file or the new one. Its mode is that of any new file, as the umask has it. Two processes must not write the same
    `path` at a time.
    """
    part = path.with_name(f".{path.name}{PART}")
    part.unlink(missing_ok=True)
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = part.stat().st_mode
    try:
        yield part
        part.chmod(mode)  # some writers make a private file instead
        _sync(part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Write a text file, replacing a former one. Raises OSError when it cannot be written; the former one stays."""
    with replacing(path) as part:
        part.write_bytes(text.encode("utf-8"))


def append_whole(path: Path, text: str) -> None:
    """Append to a text file. Raises OSError when all of it cannot be written; the file is then as it was."""
    with path.open("ab", buffering=0) as file:
        size, data = file.tell(), text.encode("utf-8")
        try:
            written = 0
            while written < len(data):
                written += file.write(data[written:])
        except OSError:
            file.truncate(size)
            raise


def remove_parts(folder: Path) -> None:
    """Remove what a process that was killed has left of files in `folder` that it was writing."""
    for part in folder.glob(f".*{PART}"):
        part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Some systems cannot open folders."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    with suppress(PermissionError, IsADirectoryError):
        descriptor = os.open(path, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
