"""A lock on a folder, held by one process at a time and released with it, however it ends."""

from __future__ import annotations

import os
import time
import weakref
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
# A process that was killed may take so long to be gone.
PATIENCE_SECONDS = 2.0


class LockedError(Exception):
    """Another process holds the lock; the message names it."""


class FolderLock:
    """Locks a folder for this process, until `release` is called. Raises LockedError if another process has locked it.

    POSIX record locks belong to the process: its forked children do not hold them after it.
    """

    def __init__(self, folder: Path, *, patience: float = 0.0) -> None:
        self._file: IO[str] = (folder / LOCK).open("a+", encoding="ascii")
        self.release = weakref.finalize(self, self._file.close)
        deadline = time.monotonic() + patience
        while not self._locked():
            if time.monotonic() >= deadline:
                self._file.seek(0)
                holder = self._file.read(32).strip()
                self.release()
                raise LockedError(f"process {holder}" if holder else "another process")
            time.sleep(0.05)
        if not os.path.samestat(os.fstat(self._file.fileno()), os.stat(folder / LOCK)):
            self.release()
            raise LockedError("another process")  # which has made the folder anew
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def _locked(self) -> bool:
        if fcntl is None:
            return True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        return True
