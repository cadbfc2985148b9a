"""Compares two plan files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import zip_longest
from typing import TypeAlias

from fxsplit.plan.partition import Partition
from fxsplit.plan.planfile import PlanFile

Figures: TypeAlias = Mapping[str, int]

FIGURES = ("ops", "parameters", "macs", "activation_bytes", "boundary_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Describes one difference. Each side is text, a number or figures by name; None where a plan lacks it."""

    what: str
    before: str | int | Figures | None
    after: str | int | Figures | None


def diff(before: PlanFile, after: PlanFile) -> tuple[Change, ...]:
    """List every difference: what the plans were made with, their cuts, phases, partitions and totals.

    Partitions that begin at the same cut are compared, if both files have figures for their partitions.
    """
    phases = zip_longest(map(str, before.phases), map(str, after.phases))
    changes = [
        *(
            Change(what=key, before=getattr(before, key), after=getattr(after, key))
            for key in ("model", "graph", "torch", "preset", "schedule")
        ),
        *(Change(what="cut", before=old, after=new) for old, new in _aligned(before.cuts, after.cuts)),
        *(Change(what=f"phase {number}", before=old, after=new) for number, (old, new) in enumerate(phases, start=1)),
        *_compared(_figures(before), _figures(after)),
        Change(what="partitions", before=len(before.cuts) + 1, after=len(after.cuts) + 1),
        Change(what="epochs", before=before.epochs, after=after.epochs),
    ]
    return tuple(change for change in changes if change.before != change.after)


def _figures(file: PlanFile) -> dict[str, Figures]:
    """Collect the figures of each partition, by its name."""
    return {part.name: {key: _figure(part, key) for key in FIGURES} for part in file.derived}


def _figure(part: Partition, key: str) -> int:
    return part.stop - part.start if key == "ops" else int(getattr(part, key))


def _aligned(before: Sequence[str], after: Sequence[str]) -> Iterator[tuple[str | None, str | None]]:
    """Pair each item that was removed with the one that replaced it, None where there is none."""
    for word, start, stop, new_start, new_stop in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if word != "equal":
            yield from zip_longest(before[start:stop], after[new_start:new_stop])


def _compared(before: Mapping[str, Figures], after: Mapping[str, Figures]) -> Iterator[Change]:
    if not before or not after:
        return
    for name in (name for name in before if name in after):
        yield _change(f"partition {name}", before[name], after[name])
    largest = ({key: max(part[key] for part in each.values()) for key in FIGURES} for each in (before, after))
    yield _change("largest partition", *largest)


def _change(what: str, before: Figures, after: Figures) -> Change:
    """Describe a difference in figures, leaving out those that are equal."""
    changed = [key for key in FIGURES if before[key] != after[key]]
    return Change(what=what, before={key: before[key] for key in changed}, after={key: after[key] for key in changed})
