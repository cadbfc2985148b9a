"""The page of a comparison: what is on it, and that names stay text."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from fxsplit.comparison import Comparison
from fxsplit.pages.comparison_page import comparison_page, figure_rows
from fxsplit.pages.comparison_plots import front, plots, row_plots
from fxsplit.pages.figures import spread
from fxsplit.pages.paper_table import PAPER
from fxsplit_cli import tables


def test_names_are_text_and_nothing_is_loaded(comparison: Comparison) -> None:
    text = comparison_page(comparison)
    assert "<b>" not in text
    assert "<i>" not in text
    assert "cpu: standard none; regularised none; l2l &lt;i&gt;fast&lt;/i&gt;" in text
    assert not re.search(r"https?://|\bsrc=|@import|url\(", text)
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text
    assert text.count("<section") == len(comparison.tables) + 3
    assert text.count("more accurate, +") >= 2
    assert "What the paper reports" in text
    assert "theirs" in text


def test_every_run_and_every_difference_is_drawn(comparison: Comparison) -> None:
    table = comparison.tables[0]
    every, *forests, memory = row_plots(table, comparison)
    drawn = {row.name: [figure for _, figure in row.figures] for row in every.rows}
    assert drawn == {arm.arm: [run.accuracy_pct for run in arm.runs] for arm in table.arms}
    assert [len(forest.rows) for forest in forests] == [3, 3, 3]
    for quantity, forest in zip(("accuracy", "time", "memory"), forests, strict=True):
        expected = [each for each in table.differences if each.quantity == quantity]
        assert [(row.mean, row.interval) for row in forest.rows] == [
            (each.mean, (each.low, each.high)) for each in expected
        ]
    assert [len(row.figures) for row in memory.rows] == [5, 5, 5]
    over_time, over_epochs, dots = plots(table, comparison)
    for plot in (over_time, over_epochs):
        assert [series.ys[-1] for series in plot.series] == pytest.approx([arm.accuracy.mean for arm in table.arms])
    assert [series.xs[-1] for series in over_time.series] == pytest.approx([arm.time.mean for arm in table.arms])
    assert [(series.xs[0], series.ys[0]) for series in dots.series] == [
        (arm.time.mean, arm.accuracy.mean) for arm in table.arms
    ]
    heads, *rows = figure_rows(table, comparison)
    assert {len(row) for row in rows} == {len(heads)}


def test_the_front_has_what_nothing_beats(comparison: Comparison) -> None:
    standard, regularised, l2l = comparison.tables[0].arms

    def at(arm, accuracy: float, time: float, memory: float):  # type: ignore[no-untyped-def]
        means = {"accuracy": accuracy, "time": time, "memory": memory}
        return replace(arm, **{name: replace(getattr(arm, name), mean=mean) for name, mean in means.items()})

    table = replace(comparison.tables[0], arms=(at(standard, 60, 10, 5), at(regularised, 62, 10, 5), at(l2l, 61, 5, 5)))
    assert front(table) == ["regularised", "l2l"]


def test_the_papers_figures_are_those_that_it_prints() -> None:
    text = {name: [(row.accuracy_pct, round(row.seconds, 1)) for row in rows] for name, rows in PAPER.items()}
    assert text == {
        "paper:cnn": [(80, 309.2), (78, 72.7)],
        "paper:vgg16": [(10, 2311.3), (9.62, 265.6)],
        "paper:densenet": [(63.98, 68082.0), (60.25, 36045.2)],
        "paper:resnext": [(56.85, 8790.2), (55.28, 3930.1)],
    }


@pytest.mark.parametrize("width", [40, 60, 80])
def test_the_printed_table_fits_its_terminal(
    width: int, comparison: Comparison, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    tables.comparison(comparison, "compare")
    lines = capsys.readouterr().out.splitlines()
    for arm in comparison.tables[0].arms:
        (row,) = [line for line in lines[:6] if line.startswith(arm.arm)]
        assert len(row) <= width
        assert spread(arm.accuracy, 2) in row
        assert (spread(arm.time, 1) in row) is (width >= 50)
        assert row.rstrip().endswith("B") is (width >= 80)
