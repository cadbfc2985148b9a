"""Verdicts: what is said of known differences, how often an arm differs from itself, and how often a point is seen."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from fxsplit.comparing.verdicts import Pair, differences
from fxsplit.comparison import Difference


def compared(values: Sequence[float], others: Sequence[float], *, quantity: str = "accuracy") -> Difference:
    return differences([Pair("l2l", "standard", quantity, values, others)], margin=0.3)[0]


OTHERS = [65.0, 66.0, 64.5, 65.5, 65.2]


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ((1.0, 1.2, 0.8, 1.1, 0.9), "more accurate"),
        ((-1.0, -1.2, -0.8, -1.1, -0.9), "less accurate"),
        ((0.1, -0.1, 0.05, -0.05, 0.0), "level"),
        # Within the margin that was given before, though not 0.
        ((0.1, 0.11, 0.09, 0.1, 0.1), "level"),
        ((1.0, -1.0, 2.0, -0.5, 0.5), "not shown"),
        ((1.0, 1.2, 0.8, 1.1), "a look"),
        ((5.0,), "a look"),
    ],
)
def test_accuracies(gains: Sequence[float], verdict: str) -> None:
    others = OTHERS[: len(gains)]
    found = compared([other + gain for other, gain in zip(others, gains, strict=True)], others)
    assert found.verdict == verdict
    assert found.seeds == len(gains)
    assert found.sentence.startswith(f"l2l and standard: {verdict}; {found.mean:+.2f} points, ")
    assert (found.more_seeds is None) == (verdict != "not shown")


@pytest.mark.parametrize(
    ("quantity", "ratio", "verdict"),
    [
        ("time", 0.5, "faster"),
        ("time", 2.0, "slower"),
        ("time", 1.01, "level"),
        ("memory", 0.5, "smaller"),
        ("memory", 2.0, "larger"),
    ],
)
def test_ratios_are_geometric_means(quantity: str, ratio: float, verdict: str) -> None:
    factors = [0.99, 1.01, 1.0, 0.98, 1 / (0.99 * 1.01 * 0.98)]
    found = compared([100 * ratio * factor for factor in factors], [100.0] * 5, quantity=quantity)
    assert found.verdict == verdict
    assert found.mean == pytest.approx(ratio)
    assert found.low * found.high == pytest.approx(ratio**2)


def test_over_models_a_difference_must_stand_out_more() -> None:
    values = [66.0, 66.1, 65.3, 66.9, 66.0]
    (alone,) = differences([Pair("l2l", "standard", "accuracy", values, OTHERS)], margin=0.01)
    assert 0.0125 < alone.p < 0.05
    assert alone.verdict == "more accurate"
    noise = [65.5, 65.5, 64.9, 65.2, 65.2]
    pairs = [Pair("l2l", "standard", "accuracy", each, OTHERS) for each in (values, noise, noise, noise)]
    among = differences(pairs, margin=0.01)[0]
    assert among.p_holm == pytest.approx(4 * alone.p)
    assert among.verdict == "not shown"
    assert "adjusted for 4 models" in among.sentence


def drawn(stream: random.Random, *, gain: float, spread: float, seeds: int = 5) -> Counter[str]:
    def runs(mean: float) -> list[float]:
        return [stream.gauss(mean, spread) for _ in range(seeds)]

    return Counter(compared(runs(65.0 + gain), runs(65.0)).verdict for _ in range(1000))


def test_an_arm_seldom_differs_from_itself() -> None:
    found = drawn(random.Random(20), gain=0.0, spread=0.5)
    assert found["more accurate"] + found["less accurate"] <= 60
    assert sum(found.values()) == 1000


def test_a_point_is_mostly_seen() -> None:
    """By the noncentral t distribution 0.65 of 5 seeds see 1 point where each run varies by 0.5."""
    found = drawn(random.Random(21), gain=1.0, spread=0.5)
    assert found["more accurate"] == pytest.approx(650, abs=60)
    assert found["less accurate"] == 0
