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

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from os import PathLike


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


# Longer words are no misspellings, and comparing them takes long.
LONGEST_WORD = 100


def nearest(word: str, known: Iterable[str]) -> str:
    """Suggest the known words closest to `word`: `"; did you mean 'a' or 'b'?"`, or an empty string."""
    close = closest(word, known)
    return f"; did you mean {' or '.join(shown(name) for name in close)}?" if close else ""


def closest(word: str, known: Iterable[str]) -> list[str]:
    """List up to two known words that `word` may be a misspelling of."""
    if len(word) > LONGEST_WORD:
        return []
    return get_close_matches(word, [each for each in known if len(each) <= LONGEST_WORD], n=2, cutoff=0.6)


# The characters of a value that an error shows, of a path, of a library's reason, and of a message as a whole.
MOST_SHOWN, MOST_PATH, MOST_REASON, MOST_MESSAGE = 80, 240, 200, 500


def reason(error: BaseException) -> str:
    """Return the first line of an error's message, without its full stop, to stand inside a sentence."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # the error of a user's code may have a method of its own
        lines = []
    return shortened(lines[0].rstrip("."), MOST_REASON) if lines else type(error).__name__


def shown(value: object, most: int = MOST_SHOWN) -> str:
    """Return how a value is written in Python, for an error: at most `most` characters, all of them printable."""
    try:
        return shortened(printable(repr(value)), most)
    except ValueError:  # Python writes no numbers of thousands of digits
        return f"a value of type {type(value).__name__}"


def shown_path(path: str | PathLike[str]) -> str:
    """Return how a path is written in Python, for an error. It may be longer than other values."""
    return shown(str(path), MOST_PATH)


def shortened(text: str, most: int = MOST_MESSAGE) -> str:
    """Cut text to `most` characters: its middle is left out."""
    if len(text) <= most:
        return text
    end = (most - 5) // 3
    return f"{text[: most - 5 - end]} ... {text[-end:]}"


def joined(sentences: Sequence[str], start: str = "") -> str:
    """Join sentences about faults to a message that begins with `start`; where it grows too long, say how many more."""
    room = MOST_MESSAGE - len(start) - len("; and 10000 more faults")
    taken, length = 0, 0
    for sentence in sentences:
        length += len(sentence) + 2
        if taken and length > room:
            break
        taken += 1
    left = len(sentences) - taken
    more = [f"and {left} more {'faults' if left > 1 else 'fault'}"] if left else []
    return start + "; ".join([*(shortened(each, room) for each in sentences[:taken]), *more])


def printable(text: str) -> str:
    """Escape unprintable characters as `\\x1b`, so that a name cannot send control sequences to a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
