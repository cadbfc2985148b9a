"""Shows a comparison as one HTML file that needs no network, and says in words what its figures are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from fxsplit.comparison import BUDGETS, Comparison, Difference, Table
from fxsplit.pages.charts import Plot, RowPlot
from fxsplit.pages.comparison_plots import colour, front, plots, row_plots
from fxsplit.pages.document import document
from fxsplit.pages.figures import duration, human, spread
from fxsplit.pages.paper_table import ABOUT, PAPER


def comparison_page(comparison: Comparison) -> str:
    """Make the page of a comparison."""
    models = dict.fromkeys(table.model for table in comparison.tables)
    return document(
        "comparison.html.jinja",
        comparison=comparison,
        overview=_overview(comparison) if len(comparison.tables) > 1 else [],
        sections=[_section(table, comparison) for table in comparison.tables],
        colour=colour,
        paper={model: PAPER[model] for model in models if model in PAPER},
        about_paper=ABOUT,
        notes=list(notes(comparison)),
    )


class Section(NamedTuple):
    """What the page has of a table."""

    title: str
    table: Table
    pairs: list[tuple[str, list[Difference]]]
    rows: list[list[str]]
    row_plots: list[RowPlot]
    plots: list[Plot]
    front: list[str]


def _section(table: Table, comparison: Comparison) -> Section:
    return Section(
        title=BUDGETS[table.match],
        table=table,
        pairs=_pairs(table.differences),
        rows=figure_rows(table, comparison),
        row_plots=[plot for plot in row_plots(table, comparison) if plot.rows],
        plots=list(plots(table, comparison)),
        front=front(table),
    )


def _overview(comparison: Comparison) -> list[list[str]]:
    """Write all verdicts of all tables, first the headings: a row for each two arms."""
    body = []
    for table in comparison.tables:
        for name, found in _pairs(table.differences):
            verdicts = {each.quantity: f"{each.verdict}, {_size(each)}" for each in found}
            cells = [verdicts.get(quantity, "-") for quantity in ("accuracy", "time", "memory")]
            body.append([table.model, BUDGETS[table.match], name, *cells])
    return [["model", "budget", "arms", "accuracy", "time", "memory"], *body]


def _size(difference: Difference) -> str:
    return f"{difference.mean:+.2f} points" if difference.quantity == "accuracy" else f"{difference.mean:.3f}"


def figure_rows(table: Table, comparison: Comparison) -> list[list[str]]:
    """Write the figures of each arm in words, first the headings."""
    heads = ["arm", "epochs", "updates", "seeds", "test accuracy, %", "snapshot ensemble, %", comparison.time]
    heads += ["on the clock", comparison.memory, "cache on disk", "multiply-adds", "energy", "images/s"]
    body = []
    for arm in table.arms:
        runs = arm.runs
        caches = [run.cache_file_bytes for run in runs if run.cache_file_bytes is not None]
        body.append(
            [
                arm.arm,
                str(arm.epochs),
                f"{runs[0].updates:,}",
                str(len(runs)),
                spread(arm.accuracy, 2),
                spread(arm.ensemble, 2),
                spread(arm.time, 1),
                duration(sum(run.seconds for run in runs) / len(runs)),
                human(arm.memory.mean, "B"),
                human(max(caches), "B") if caches else "-",
                human(arm.multiply_adds.mean if arm.multiply_adds else None),
                human(arm.energy.mean if arm.energy else None, "J"),
                f"{sum(run.images_per_second for run in runs) / len(runs):,.0f}",
            ]
        )
    return [heads, *body]


def _pairs(differences: Sequence[Difference]) -> list[tuple[str, list[Difference]]]:
    """Group differences by their two arms."""
    grouped = groupby(differences, key=lambda each: f"{each.arm} against {each.against}")
    return [(name, list(group)) for name, group in grouped]


def notes(comparison: Comparison) -> Iterator[str]:
    """Say in words what the figures are, and what is missing."""
    yield (
        "Accuracy is that on the test images after the last epoch. Means have 95 % intervals (Student's t); "
        "differences are of runs with the same seed, of accuracy in points, of time and memory as ratios (geometric "
        f"mean). Level: the 90 % interval lies within {comparison.margin:g} points, or {comparison.ratio_margin:.0%}; "
        "both were given before the runs. Over several models p is adjusted by Holm's method. Fewer than 5 seeds are "
        "a look."
    )
    if len(comparison.looks) > 1:
        sizes = " and then ".join(str(len(look)) for look in comparison.looks)
        yield from (
            "",
            f"**A second look:** there were first {sizes} seeds, so these verdicts are not those of one test.",
        )
    for sentence in comparison.missing:
        yield from ("", f"**Missing:** {sentence}")
