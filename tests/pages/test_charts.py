"""Series of figures as SVG paths."""

from __future__ import annotations

import pytest

from fxsplit.pages import charts

NAN, INFINITE = float("nan"), float("inf")


def test_steps_reach_as_high_as_the_figures() -> None:
    assert charts.steps([4, 2, 0, 1], 4) == "M0 1V0H1V0.5H2V1H3V0.75H4V1Z"
    assert charts.steps([1], 2) == "M0 1V0.5H1V1Z"


@pytest.mark.parametrize("figures", [[], [0, 0]])
def test_steps_of_nothing_are_flat(figures: list[float]) -> None:
    assert set(charts.steps(figures, 0)) <= set("M0 1VH2Z")


def test_a_line_lies_between_its_bounds() -> None:
    assert charts.line([1, 3, 2], 1, 3) == "M0.5 1h0L1.5 0L2.5 0.5"


def test_a_line_is_broken_where_there_is_no_figure() -> None:
    assert charts.line([NAN, 0, INFINITE, 1], 0, 1) == "M1.5 1h0M3.5 0h0"
    assert charts.line([NAN], 0, 0) == ""


def test_equal_figures_lie_in_the_middle() -> None:
    assert charts.line([7, 7], 7, 7) == "M0.5 0.5h0L1.5 0.5"


def test_bounds_are_those_of_the_finite_figures() -> None:
    assert charts.bounds([NAN, 2, INFINITE, 1]) == (1, 2)
    assert charts.bounds([NAN]) is None
