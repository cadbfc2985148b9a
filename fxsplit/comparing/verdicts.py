"""What may be said of two arms: a verdict, and a sentence with its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from fxsplit.comparing.statistics import Paired, holm
from fxsplit.comparison import CLAIM, Difference

# Ratios of time and memory within this share of 1 are level.
RATIO_MARGIN = 0.05
LEVEL, NOT_SHOWN, LOOK = "level", "not shown", "a look"


class Words(NamedTuple):
    """What is said of a quantity where it is more, and where it is less."""

    more: str
    less: str


QUANTITIES = {
    "accuracy": Words("more accurate", "less accurate"),
    "time": Words("slower", "faster"),
    "memory": Words("larger", "smaller"),
}


class Pair(NamedTuple):
    """The figures of two arms on one model, by runs with the same seeds."""

    arm: str
    against: str
    quantity: str
    values: Sequence[float]
    others: Sequence[float]

    @property
    def paired(self) -> Paired:
        """Differences of accuracies; of time and memory differences of logarithms."""
        couples = zip(self.values, self.others, strict=True)
        if self.quantity == "accuracy":
            return Paired.of([one - other for one, other in couples])
        return Paired.of([math.log(one / other) for one, other in couples])


def differences(pairs: Sequence[Pair], *, margin: float) -> list[Difference]:
    """Compare the same two arms by the same quantity on several models; p is adjusted for their number."""
    summaries = [pair.paired for pair in pairs]
    adjusted = holm(summary.p for summary in summaries)
    return [
        _difference(pair, summary, p_holm, margin, models=len(pairs))
        for pair, summary, p_holm in zip(pairs, summaries, adjusted, strict=True)
    ]


def _difference(pair: Pair, summary: Paired, p_holm: float, margin: float, *, models: int) -> Difference:
    is_ratio = pair.quantity != "accuracy"
    within = math.log1p(RATIO_MARGIN) if is_ratio else margin
    more_seeds = None
    if summary.count < CLAIM:
        verdict = LOOK
    elif summary.is_within(within):
        verdict = LEVEL
    elif p_holm < 0.05:
        words = QUANTITIES[pair.quantity]
        verdict = words.more if summary.mean > 0 else words.less
    else:
        verdict, more_seeds = NOT_SHOWN, summary.more_pairs(within, tests=models)

    def scaled(number: float) -> float:
        return math.exp(number) if is_ratio else number

    outer, inner = summary.half_width(0.95), summary.half_width(0.90)
    found = Difference(
        arm=pair.arm,
        against=pair.against,
        quantity=pair.quantity,
        seeds=summary.count,
        mean=scaled(summary.mean),
        low=scaled(summary.mean - outer),
        high=scaled(summary.mean + outer),
        inner_low=scaled(summary.mean - inner),
        inner_high=scaled(summary.mean + inner),
        p=summary.p,
        p_holm=p_holm,
        verdict=verdict,
        numbers="",
        more_seeds=more_seeds,
    )
    return _with_numbers(found, margin, models)


def _with_numbers(found: Difference, margin: float, models: int) -> Difference:
    is_accuracy = found.quantity == "accuracy"

    def span(low: float, high: float) -> str:
        return f"{low:+.2f} to {high:+.2f}" if is_accuracy else f"{low:.3f} to {high:.3f}"

    size = f"{found.mean:+.2f} points" if is_accuracy else f"{found.mean:.3f} times the {found.quantity}"
    p = f"p {found.p_holm:.2g}" + (f", adjusted for {models} models" if models > 1 else "")
    if found.verdict == LOOK:
        numbers = f"{found.seeds} seed{'s' * (found.seeds > 1)}, and a claim takes {CLAIM}"
    elif found.verdict == LEVEL:
        within = f"{margin:g} points" if is_accuracy else f"{RATIO_MARGIN:.0%}"
        numbers = f"90 % interval {span(found.inner_low, found.inner_high)}, within {within}"
    else:
        numbers = f"95 % interval {span(found.low, found.high)}, {p}"
    if found.verdict == NOT_SHOWN:
        half = (found.high - found.low) / 2
        width = f"{half:.2f} points" if is_accuracy else f"{half:.3f}"
        count = found.more_seeds
        more = "many more seeds" if count is None else f"about {count} more seed{'s' * (count > 1)}"
        numbers += f", half-width {width}; {more} would show something"
    return replace(found, numbers=f"{size}, {numbers}")
