"""What the images of each class are taken for: a table of counts with shades, and the most frequent confusions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# With more classes there is no room for their numbers.
MOST_NUMBERED = 30
# So many of the most frequent confusions are listed, and so many shades tell how frequent one is.
LISTED, SHADES = 20, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Confused:
    """Says how many of the `whole` images of the class `truth` are taken for another."""

    truth: str
    taken_for: str
    count: int
    whole: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Confusion:
    """Counts images by their class and by what they are taken for.

    Args:
        names: of the classes, in order.
        counts: images by class, and then by the class that they are taken for; what is left out is zero.
    """

    names: Sequence[str]
    counts: Mapping[str, Mapping[str, int]]

    @classmethod
    def of(cls, counts: Mapping[str, Mapping[str, int]], classes: Sequence[str]) -> Confusion:
        """Take the names from `classes`, and after those what else images are taken for."""
        others = (name for taken in counts.values() for name in taken)
        return cls(names=tuple(dict.fromkeys((*classes, *counts, *others))), counts=counts)

    @property
    def is_numbered(self) -> bool:
        """Whether there are few enough classes for a table of numbers."""
        return len(self.names) <= MOST_NUMBERED

    @property
    def rows(self) -> list[tuple[str, list[tuple[int, int]]]]:
        """The table: each class with its cells, a count and how dark it is, from 0 for none to SHADES for all."""
        rows = []
        for name in self.names:
            taken = self.counts.get(name, {})
            whole = sum(taken.values())
            row = [taken.get(other, 0) for other in self.names]
            rows.append((name, [(count, -(-SHADES * count // whole) if whole else 0) for count in row]))
        return rows

    @property
    def frequent(self) -> list[Confused]:
        """The most frequent confusions, in order; equally frequent ones are in that of the classes."""
        every = [
            Confused(truth=truth, taken_for=other, count=taken[other], whole=sum(taken.values()))
            for truth in self.names
            for other in self.names
            if truth != other and (taken := self.counts.get(truth, {})).get(other)
        ]
        return sorted(every, key=lambda each: -each.count)[:LISTED]
