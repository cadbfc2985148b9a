"""Where the program begins: until the command line is loaded, an interruption is a word and not a traceback."""

from __future__ import annotations

import sys


def start() -> int:
    """Load the command line, run it, and return its exit code."""
    try:
        from .main import main
    except KeyboardInterrupt:
        sys.stderr.write("fxsplit: interrupted\n")
        return 130
    return main()
