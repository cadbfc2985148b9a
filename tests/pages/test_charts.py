"""Charts: where figures lie, what is said of each, and that nothing is left out."""

from __future__ import annotations

import pytest

from fxsplit.pages import charts
from fxsplit.pages.charts import Axis, Plot, Row, RowPlot, Rule, Series
from fxsplit.pages.figures import BYTES, COUNT, NUMBER, PERCENT, SECONDS, Unit

NAN, INFINITE = float("nan"), float("inf")


def spans(*ys: float) -> list[tuple[float, float, float]]:
    return [(index / len(ys), (index + 1) / len(ys), y) for index, y in enumerate(ys)]


def test_stairs_reach_as_high_as_the_figures() -> None:
    assert charts.stairs(spans(0, 0.5, 1, 0.75)) == "M0 1V0H0.25V0.5H0.5V1H0.75V0.75H1V1Z"
    assert charts.stairs(spans(0, 0.5), filled=False) == "M0 0H0.5V0.5H1"
    assert charts.stairs([]) == ""


def test_steps_that_do_not_touch_stand_alone() -> None:
    apart = [(0, 0.25, 0.5), (0.5, 0.75, 0)]
    assert charts.stairs(apart) == "M0 1V0.5H0.25V1ZM0.5 1V0H0.75V1Z"
    assert charts.stairs(apart, filled=False) == "M0 0.5H0.25M0.5 0H0.75"


def test_a_line_goes_from_figure_to_figure() -> None:
    assert charts.line([(0, 1), (0.5, 0), (1, 0.5)]) == "M0 1h0L0.5 0L1 0.5"


def test_a_line_is_broken_where_there_is_no_figure() -> None:
    assert charts.line([(0, NAN), (0.25, 1), (0.5, INFINITE), (1, 0)]) == "M0.25 1h0M1 0h0"
    assert charts.line([(0.5, NAN)]) == ""


@pytest.mark.parametrize(
    ("figures", "unit", "ends", "ticks"),
    [
        ((3, 97), PERCENT, (0, 100), ["0 %", "50 %", "100 %"]),
        ((91.2, 92.9), PERCENT, (91, 93), ["91 %", "92 %", "93 %"]),
        ((0.31, 0.69), NUMBER, (0.2, 0.8), ["0.2", "0.4", "0.6", "0.8"]),
        ((1, 2), COUNT, (1, 2), ["1", "2"]),
        ((0, 4.1e9), BYTES, (0, 5e9), ["0 B", "5 GB"]),
        ((0, 100), SECONDS, (0, 120), ["0 s", "1 min", "2 min"]),
        ((0, 7000), SECONDS, (0, 7200), ["0 s", "1 h", "2 h"]),
        ((0, 2.5 * 86_400), SECONDS, (0, 4 * 86_400), ["0 s", "48 h", "96 h"]),
        ((0, 0.3), SECONDS, (0, 0.4), ["0 s", "0.2 s", "0.4 s"]),
        ((5, 5), NUMBER, (4.5, 5.5), ["4.5", "5", "5.5"]),
        ((0, 0, NAN), NUMBER, (-1, 1), ["-1", "0", "1"]),
    ],
)
def test_an_axis_begins_and_ends_at_round_figures(
    figures: tuple[float, ...], unit: Unit, ends: tuple[float, float], ticks: list[str]
) -> None:
    axis = Axis.over(figures, "it", unit, ticks=2)
    assert (axis.least, axis.most) == pytest.approx(ends)
    assert [unit.brief(round(tick, 9)) for tick in axis.ticks] == ticks
    assert [axis.share(place) for place in (*ends, sum(ends) / 2)] == pytest.approx([0, 1, 0.5])
    assert all(0 <= axis.share(figure) <= 1 for figure in figures if figure == figure)


def test_an_axis_has_as_many_ticks_as_asked_for_roughly() -> None:
    for most in (1, 2.3, 7, 9.9, 61, 1234):
        for wanted in (2, 4, 8):
            assert wanted / 2.6 <= len(Axis.over((0, most), "it", ticks=wanted).ticks) - 1 <= wanted + 1


def test_an_axis_without_figures_has_no_ticks() -> None:
    axis = Axis.over([NAN], "it")
    assert axis.ticks == ()
    assert Axis.over([3, 4], "it", from_zero=True).least == 0


@pytest.fixture
def plot() -> Plot:
    """Two curves with a place of their own each, a staircase and a dot."""
    return Plot(
        "accuracy",
        Axis(name="epoch", unit=COUNT, least=0, most=4),
        Axis(name="accuracy", unit=PERCENT, least=0, most=100),
        [
            Series(name="a", xs=(1, 2), ys=(0, 50), style="test"),
            Series(name="b", xs=(1, 2, 3), ys=(100, NAN, 25), style="training", key="both"),
            Series(name="c", xs=(3.5,), ys=(50,), kind="stairs", style="training", key="both"),
            Series(name="d", xs=(4,), ys=(75,), kind="dots"),
        ],
        rules=[Rule(name="standard", at=90)],
    )


def test_a_plot_draws_every_series_to_the_scale_of_its_axes(plot: Plot) -> None:
    assert plot.paths == [
        ("curve test", "M0.25 1h0L0.5 0.5"),
        ("curve training", "M0.25 0h0M0.75 0.75h0"),
        ("area training", "M0.75 1V0.5H1V1Z"),
    ]
    assert plot.dots == [("arm-0", 1, 0.25, "d: 4, 75.00 %")]


def test_every_figure_is_said_under_the_mouse(plot: Plot) -> None:
    captions = [band.caption for band in plot.bands]
    assert captions == [
        "epoch 1: a 0.00 %, b 100.00 %", "epoch 2: a 50.00 %", "epoch 3: b 25.00 %", "epoch 3.5: c 50.00 %",
    ]  # fmt: skip
    edges = [(band.start, band.stop) for band in plot.bands]
    assert edges == [(0.125, 0.375), (0.375, 0.625), (0.625, 0.8125), (0.8125, 0.9375)]


def test_the_table_has_every_figure(plot: Plot) -> None:
    assert plot.table == [
        ["epoch", "a", "b", "c", "d"],
        ["1", "0.00 %", "100.00 %", "", ""],
        ["2", "50.00 %", "", "", ""],
        ["3", "", "25.00 %", "", ""],
        ["3.5", "", "", "50.00 %", ""],
        ["4", "", "", "", "75.00 %"],
    ]


def test_a_legend_has_each_key_once(plot: Plot) -> None:
    assert plot.keys == [("test", "a"), ("training", "both"), ("arm-0", "d"), ("rule", "standard: 90.00 %")]


def test_a_plot_of_nothing_is_drawn() -> None:
    axis = Axis.over([], "it")
    empty = Plot("it", axis, axis, [Series(name="a", xs=(), ys=())])
    assert (empty.paths, empty.bands, empty.table) == ([("curve arm-0", "")], [], [["it", "a"]])


def test_rows_have_their_figures_mean_and_interval_in_the_table() -> None:
    rows = [
        Row("l2l", [("seed 0", 91.0), ("seed 1", 92.0)], mean=91.5, interval=(90.5, 92.5), note="level"),
        Row("paper", [("", 90.1)]),
    ]
    plot = RowPlot("runs", Axis.over([figure for row in rows for figure in row.every], "accuracy", PERCENT), rows)
    assert (plot.x.least, plot.x.most) == (90, 93)
    assert plot.table == [
        ["", "accuracy, mean", "interval", "single figures", ""],
        ["l2l", "91.50 %", "90.50 % to 92.50 %", "seed 0 91.00 %, seed 1 92.00 %", "level"],
        ["paper", "", "", "90.10 %", ""],
    ]
    bare = RowPlot("differences", plot.x, [Row("l2l - standard", mean=91.0)])
    assert bare.table == [["", "accuracy, mean"], ["l2l - standard", "91.00 %"]]
