"""What user's code and libraries print, kept out of the result; and what they would read, kept from them."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress

STDIN, STDOUT, STDERR = range(3)


@contextmanager
def result_alone() -> Iterator[None]:
    """Inside, what is printed goes to stderr, by whatever means, and stdin is at its end.

    A factory that prints spoils no JSON then, and one that asks a question does not wait for an answer.
    """
    sys.stdout.flush()
    with ExitStack() as stack:
        stack.callback(setattr, sys, "stdin", sys.stdin)
        sys.stdin = io.StringIO()
        stack.enter_context(redirect_stdout(sys.stderr))
        nothing = os.open(os.devnull, os.O_RDONLY)
        stack.callback(os.close, nothing)
        stack.enter_context(_leading(STDIN, nothing))
        stack.enter_context(_leading(STDOUT, STDERR))
        yield


@contextmanager
def _leading(stream: int, into: int) -> Iterator[None]:
    """Inside, the file descriptor `stream` is `into`. One that is closed stays so."""
    kept = None
    with suppress(OSError):
        kept = os.dup(stream)
        os.dup2(into, stream)
    try:
        yield
    finally:
        if kept is not None:
            os.dup2(kept, stream)
            os.close(kept)
