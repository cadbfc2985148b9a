"""Gives memory of the host that nothing uses back to the system."""

from __future__ import annotations

import ctypes
import sys

# Of the C library, where it is glibc; others give memory back by themselves, or cannot be asked.
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def trim_heap() -> None:
    """Give back what the C library keeps for later allocations.

    Gaps that a phase of training leaves seldom fit what the next one needs, which would take new memory beside them.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)
