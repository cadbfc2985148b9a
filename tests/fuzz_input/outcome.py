"""What became of a case, and the rules that every refusal keeps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fxsplit.errors import MOST_MESSAGE, FxsplitError, printable

NAME = "fxsplit: "
# How an error is told that nobody thought of.
UNEXPECTED = re.compile(r"unexpected [A-Z]\w*:|Traceback")


@dataclass
class Outcome:
    """How a case ended: `status` is done, refused or failed; `what` is the exit code or the kind of error."""

    status: str
    what: str = ""
    why: str = ""


def refused(error: FxsplitError, allowed: tuple[type[FxsplitError], ...]) -> Outcome:
    """Judge an error of ours: of a kind that is allowed, one line, short, printable."""
    message, kind = str(error), type(error).__name__
    if not isinstance(error, allowed):
        return Outcome("failed", kind, f"not one of {[each.__name__ for each in allowed]}: {message[:300]}")
    if fault := fault_of(message):
        return Outcome("failed", kind, f"{fault}: {message[:300]}")
    return Outcome("refused", kind, message)


def fault_of(message: str) -> str:
    """Say what is wrong with the sentence of a refusal, if anything is. Below it a plan may be drawn, in some lines."""
    if "plan cannot run\n" in message:
        drawn = message.splitlines()
        return "" if len(drawn) < 20 and all(line == printable(line) for line in drawn) else "a drawing too long"
    if not message:
        return "no sentence"
    if len(message) > MOST_MESSAGE:
        return f"{len(message)} characters"
    if message != printable(message):
        return "not printable"
    return "unexpected" if UNEXPECTED.search(message) else ""


def crashed(error: BaseException) -> Outcome:
    return Outcome("failed", type(error).__name__, f"{type(error).__name__}: {error!s:.300}")


def listing(folder: Path) -> dict[str, int]:
    """What is in a folder: the size of each file, by path."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


@contextmanager
def nothing_made(folder: Path) -> Iterator[None]:
    """Inside, nothing may be made, changed or removed in a folder."""
    before = listing(folder)
    yield
    if (after := listing(folder)) != before:
        raise AssertionError(f"made or changed: {sorted(after.items() ^ before.items())[:3]}")
