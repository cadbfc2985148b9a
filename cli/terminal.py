"""How everything is written: results to stdout, all else to stderr, names shown and never obeyed.

A phase is drawn as one bar, in marks that also tell the roles apart where there is no colour:

    ░░░░░░░ ░░░░░░│███████ ███████ ▒▒▒▒▒▒▒▒      ░ settled  █ training  ▒ frozen  │ cut
       student             teacher

A terminal that knows only ASCII gets . # - | for them, as they are in a printed plan.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from fxsplit.errors import printable
from fxsplit.plan.schedule import Phase, Role

ROLES: dict[Role, tuple[str, str]] = {
    "settled": ("░", "cyan"),
    "training": ("█", "green"),
    "frozen": ("▒", "bright_black"),
}
WIDEST = 100

ASCII = str.maketrans("░█▒│·…×▏▎▍▌▋▊▉", ".#-|-.x   ####")


class Terminal(Console):
    """A console on which names are shown, never obeyed: only styles of its own send escape sequences."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            shown = segment.text if segment.control else encodable(visible(segment.text), self.encoding)
            yield segment._replace(text=shown)

    def on_broken_pipe(self) -> None:
        """Let `main` end the command, where rich would exit as if the model's code had."""
        raise BrokenPipeError


def is_first() -> bool:
    """Tell whether this process is the only one, or the first of those that `torchrun` has started."""
    return os.environ.get("RANK", "0") == "0"


def write(text: str) -> None:
    """Write text to stdout, as it is."""
    # A stream of text in memory has no encoding.
    sys.stdout.write(encodable(text, sys.stdout.encoding or "utf-8"))


def say(line: str) -> None:
    """Write a line to stderr."""
    print(visible(line), file=sys.stderr, flush=True)


def print_whole(console: Console, line: str) -> None:
    """Print a line that may hold the user's words: no markup or emoji in it, and no break, so that it can be copied."""
    console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


def print_sentence(console: Console, line: str) -> None:
    """Print a sentence that nobody copies: a terminal breaks it between words, and a file gets it whole."""
    console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=not console.is_terminal)


def visible(text: str) -> str:
    """Text whose lines are `printable`."""
    return "\n".join(map(printable, text.split("\n")))


def encodable(text: str, encoding: str) -> str:
    """Text that can be written in `encoding`: our own marks in ASCII, other letters that it lacks as escapes."""
    if encoding.lower().startswith("utf"):
        return text
    return text.translate(ASCII).encode(encoding, "backslashreplace").decode(encoding)


def draw(phase: Phase, count: int, width: int) -> Text:
    """Draw the `count` partitions of a phase as one bar of `width` columns."""
    cut = phase.cut(count)
    edges = [round(index * width / count) for index in range(count + 1)]
    bar = Text()
    for index in range(count):
        mark, style = ROLES[phase.role(index)]
        columns = edges[index + 1] - edges[index]
        border = "│" if index + 1 == cut else " " if columns > 2 and index + 1 < count else ""
        bar.append(mark * (columns - len(border)), style).append(border[:columns], "bold")
    return bar


def legend() -> Text:
    """Say what the marks of a drawing mean, and which side of the cut is called what."""
    marks = [Text(f"{mark} {role}", style) for role, (mark, style) in ROLES.items()]
    return Text("  ").join([*marks, Text("│ cut: student before it, teacher after it")])
