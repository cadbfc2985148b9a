"""Student's t on the differences of paired runs, and what belongs to it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy.special import stdtr, stdtrit

# More seeds than that are never asked for.
MOST_SEEDS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """Summarises differences of pairs: their number, their mean, and their standard deviation (NaN for one pair)."""

    count: int
    mean: float
    deviation: float

    @classmethod
    def of(cls, differences: Sequence[float]) -> Paired:
        """Summarise at least one difference."""
        count = len(differences)
        mean = math.fsum(differences) / count
        squares = math.fsum((each - mean) ** 2 for each in differences)
        return cls(count=count, mean=mean, deviation=math.sqrt(squares / (count - 1)) if count > 1 else math.nan)

    def half_width(self, level: float) -> float:
        """Return half of the interval that holds the true mean at this level, such as 0.95; NaN for one pair."""
        return _half_width(self.deviation, self.count, level)

    @property
    def p(self) -> float:
        """The probability of a mean as far from 0, or farther, if the true one is 0; NaN for one pair."""
        if self.count < 2:
            return math.nan
        if not self.deviation:
            return 0.0 if self.mean else 1.0
        t = abs(self.mean) / (self.deviation / math.sqrt(self.count))
        return float(2 * stdtr(self.count - 1, -t))

    def is_within(self, margin: float) -> bool:
        """Tell whether two one-sided tests at 5 % place the true mean within `margin` of 0.

        That is whether the 90 % interval lies there. Source: Schuirmann, A comparison of the two one-sided tests
        procedure and the power approach, 1987.
        """
        return abs(self.mean) + self.half_width(0.90) < margin

    def more_pairs(self, margin: float, *, tests: int = 1) -> int | None:
        """Estimate how many more pairs would show a difference, or that it is within `margin`, whichever are fewer.

        Mean and deviation are taken to stay as they are, and a difference must stand out of so many `tests`. Returns
        None if MOST_SEEDS would not do.
        """
        level = 1 - 0.05 / tests
        for count in range(self.count + 1, MOST_SEEDS + 1):
            shows = _half_width(self.deviation, count, level) < abs(self.mean)
            if shows or abs(self.mean) + _half_width(self.deviation, count, 0.90) < margin:
                return count - self.count
        return None


def _half_width(deviation: float, count: int, level: float) -> float:
    return float(stdtrit(count - 1, (1 + level) / 2)) * deviation / math.sqrt(count) if count > 1 else math.nan


def holm(p_values: Iterable[float]) -> list[float]:
    """Adjust p values for their number, in their order; one that is NaN stays so and is not counted.

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    given = list(p_values)
    ordered = sorted((p, index) for index, p in enumerate(given) if not math.isnan(p))
    adjusted, least = list(given), 0.0
    for rank, (p, index) in enumerate(ordered):
        least = max(least, min(1.0, (len(ordered) - rank) * p))
        adjusted[index] = least
    return adjusted
