"""Statistics of paired runs: those of scipy, and those of textbooks."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from fxsplit.comparing.statistics import Paired, holm

# Student's own example: hours of sleep that two drugs gained for the same ten patients (Biometrika, 1908).
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def test_students_own_example() -> None:
    found = Paired.of([second - first for first, second in zip(FIRST, SECOND, strict=True)])
    assert found.mean == pytest.approx(1.58)
    assert found.deviation == pytest.approx(1.23, abs=0.005)
    assert found.mean / (found.deviation / math.sqrt(10)) == pytest.approx(4.0621, abs=1e-4)
    assert found.p == pytest.approx(0.00283, abs=1e-5)


@pytest.mark.parametrize("count", [2, 3, 5, 10])
@pytest.mark.parametrize("level", [0.90, 0.95])
def test_intervals_and_p_are_those_of_scipy(count: int, level: float) -> None:
    first, second = FIRST[:count], SECOND[:count]
    found, expected = (
        Paired.of([one - two for one, two in zip(first, second, strict=True)]),
        stats.ttest_rel(first, second),
    )
    interval = expected.confidence_interval(level)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.mean - found.half_width(level) == pytest.approx(interval.low)
    assert found.mean + found.half_width(level) == pytest.approx(interval.high)


@pytest.mark.parametrize("margin", [0.05, 0.18, 0.5, 1.0])
def test_two_one_sided_tests_are_those_of_scipy(margin: float) -> None:
    differences = [0.1, -0.2, 0.15, 0.05, -0.1, 0.2]
    below = stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
    above = stats.ttest_1samp(differences, margin, alternative="less").pvalue
    assert Paired.of(differences).is_within(margin) == (max(below, above) < 0.05)


def test_one_pair_tells_nothing_and_equal_pairs_everything() -> None:
    assert math.isnan(Paired.of([1.0]).p)
    assert math.isnan(Paired.of([1.0]).half_width(0.95))
    assert (Paired.of([0.0] * 5).p, Paired.of([0.5] * 5).p) == (1.0, 0.0)
    assert Paired.of([0.0] * 5).is_within(0.1)


def test_more_pairs_are_as_many_as_it_takes() -> None:
    found = Paired.of([1.0, -0.5, 1.5, 0.0, 0.5])
    more = found.more_pairs(0.01)
    assert more is not None

    def shows(count: int) -> bool:
        return bool(stats.t.ppf(0.975, count - 1) * found.deviation / math.sqrt(count) < found.mean)

    assert shows(5 + more)
    assert not any(map(shows, range(5, 5 + more)))
    stricter = found.more_pairs(0.01, tests=4)
    assert stricter is not None
    assert stats.t.ppf(1 - 0.025 / 4, 4 + stricter) * found.deviation / math.sqrt(5 + stricter) < found.mean
    assert stats.t.ppf(1 - 0.025 / 4, 3 + stricter) * found.deviation / math.sqrt(4 + stricter) > found.mean
    assert Paired.of([1.0, -1.0, 1.0, -1.0, 1e-9]).more_pairs(0.001) is None


def test_holms_method_by_its_steps() -> None:
    # In rising order 4 * 0.005, 3 * 0.01, 2 * 0.02 and 0.03, which may not be less than the one before.
    assert holm([0.01, 0.03, 0.02, 0.005]) == pytest.approx([0.03, 0.04, 0.04, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04]
    found = holm([math.nan, 0.03])
    assert math.isnan(found[0])
    assert found[1] == 0.03
