"""Defines the errors that a user can meet, and the exit code of each.

    FxsplitError                 1   anything else that went wrong
    ├── UsageError               2   a value the user gave is wrong: model, data, option, recipe key
    │   └── NoModelError         2   there is no model of that name
    ├── TraceError               3   the model cannot be captured
    │   └── GuardError           3   an input takes another path through the model than the traced one
    ├── PartitionError           3   the graph cannot be cut or scheduled as asked
    ├── DataError                1   the data cannot be read, downloaded or split
    ├── NotFiniteError           1   a step of training gives numbers that are not finite
    ├── OutOfMemoryError         1   a phase of training needs more memory than there is
    └── CheckError               4   a requested check failed
        └── ProofError           4   on a batch, the partitions and the model differ

A message says what is wrong, which thing is meant, why, and what to do. Two further exceptions are not FxsplitErrors:
`Terminated`, which like KeyboardInterrupt passes through every `except Exception`, and `UntraceableError`, which
tracing raises and catches itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class FxsplitError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(FxsplitError):
    """A value that the user gave is wrong."""

    exit_code = 2


class NoModelError(UsageError):
    """There is no model of the name that the user gave."""


class TraceError(FxsplitError):
    """The model cannot be captured as a graph."""

    exit_code = 3


class GuardError(TraceError):
    """An input would take another path through the model than the one that was traced."""


class PartitionError(FxsplitError):
    """The graph cannot be cut, or the partitions cannot be scheduled, as asked."""

    exit_code = 3


class DataError(FxsplitError):
    """The data cannot be read, downloaded or split."""


class NotFiniteError(FxsplitError):
    """A loss, gradients or weights are NaN or infinite.

    Args:
        what: what is not finite, as a sentence.
        epoch: the epoch in which that was noticed, from 0.
        step: the last step that may have caused it, from 0.
        is_cause: whether it is just this step.
    """

    def __init__(self, what: str, *, epoch: int, step: int, is_cause: bool = False) -> None:
        super().__init__(what)
        self.epoch, self.step, self.is_cause = epoch, step, is_cause


class OutOfMemoryError(FxsplitError):
    """A phase of training needs more memory than there is."""


class CheckError(FxsplitError):
    """A check that the user asked for failed."""

    exit_code = 4


class ProofError(CheckError):
    """Partitions do not compute what the model computes, on a batch that both were given."""


class UntraceableError(Exception):
    """A call in a forward cannot be recorded; the module around it then becomes one op. The message is the reason."""


class BranchError(UntraceableError):
    """Forward asks for an answer that decides how it goes on, and that may differ from call to call."""


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM); the exit code is 143 where that of an interruption is 130."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Suggest the known words closest to `word`: `"; did you mean 'a' or 'b'?"`, or an empty string."""
    close = closest(word, known)
    return f"; did you mean {' or '.join(repr(name) for name in close)}?" if close else ""


def closest(word: str, known: Iterable[str]) -> list[str]:
    """List up to two known words that `word` may be a misspelling of."""
    return get_close_matches(word, list(known), n=2, cutoff=0.6)


def reason(error: BaseException) -> str:
    """Return the first line of an error's message, without its full stop, to stand inside a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def printable(text: str) -> str:
    """Escape unprintable characters as `\\x1b`, so that a name cannot send control sequences to a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
