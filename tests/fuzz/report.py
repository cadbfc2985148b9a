"""A failed case in words: the smallest one that fails alike, as the model's source and what is done to it."""

from __future__ import annotations

from tests.fuzz.harness import Result
from tests.fuzz.source import HEADER, source_of


def reproducer(result: Result) -> str:
    """The model in Python, and the case as it can be given to `run` again."""
    case = result.case
    lines = [
        f"# {result.why}",
        f"# inputs {case.inputs}, cuts {case.cuts}, options {sorted(case.options)}",
        *(f"# {stretch}" for stretch in case.stretches),
        *(f"# {event}" for event in case.events),
        source_of(case).removeprefix(HEADER).strip(),
        f"# {case!r}",
    ]
    if result.detail:
        lines.append("\n".join(f"# {line}" for line in result.detail.splitlines()[-8:]))
    return "\n".join(lines)
