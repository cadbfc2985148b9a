"""The plots of a comparison: runs as dots, differences as forests, curves over epochs and time, and the front."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from math import isfinite
from statistics import fmean

from fxsplit.comparison import ArmFigures, Comparison, Difference, Estimate, Moment, Table
from fxsplit.pages.charts import Axis, Plot, Row, RowPlot, Rule, Series, Shade
from fxsplit.pages.figures import BYTES, COUNT, PERCENT, SECONDS, Unit, human

POINTS = Unit(write="{:+.2f} points".format, brief=lambda points: f"{points:+g}" if points else "0")
RATIO = Unit(write="{:.3f}".format, brief="{:g}".format)
# Colours that the style sheet has for arms.
COLOURS = 8


def row_plots(table: Table, comparison: Comparison) -> Iterator[RowPlot]:
    """Plot every run of each arm, the differences between arms, and memory by phase."""
    yield _accuracies(table)
    yield _forest(
        "difference of accuracy, 95 % interval",
        [each for each in table.differences if each.quantity == "accuracy"],
        unit=POINTS,
        none=0.0,
        level=(-comparison.margin, comparison.margin),
    )
    margin = 1 + comparison.ratio_margin
    for quantity in ("time", "memory"):
        yield _forest(
            f"ratio of {quantity} ({getattr(comparison, quantity)}), 95 % interval",
            [each for each in table.differences if each.quantity == quantity],
            unit=RATIO,
            none=1.0,
            level=(1 / margin, margin),
        )
    yield _memory_by_phase(table, comparison)


def plots(table: Table, comparison: Comparison) -> Iterator[Plot]:
    """Plot accuracy over time and over epochs, and arms by accuracy, time and memory."""
    curves = {arm.arm: _mean_moments(arm) for arm in table.arms}
    accuracies = [each.accuracy_pct for moments in curves.values() for each in moments]
    axis = Axis.over(accuracies, "test accuracy", PERCENT)
    over_time = Axis.over(
        (each.seconds for moments in curves.values() for each in moments), comparison.time, SECONDS, from_zero=True
    )
    over_epochs = Axis.over(
        (float(each.epoch) for moments in curves.values() for each in moments), "epoch", COUNT, from_zero=True
    )
    yield Plot(
        title=f"test accuracy over {comparison.time}, means over seeds",
        x=over_time,
        y=axis,
        series=[
            Series(
                name=arm,
                xs=tuple(each.seconds for each in moments),
                ys=tuple(each.accuracy_pct for each in moments),
                style=colour(number),
            )
            for number, (arm, moments) in enumerate(curves.items())
        ],
        shades=_phases(table, curves),
    )
    yield Plot(
        title="test accuracy over epochs, means over seeds",
        x=over_epochs,
        y=axis,
        series=[
            Series(
                name=arm,
                xs=tuple(float(each.epoch) for each in moments),
                ys=tuple(each.accuracy_pct for each in moments),
                style=colour(number),
            )
            for number, (arm, moments) in enumerate(curves.items())
        ],
    )
    yield _front(table, comparison)


def colour(number: int) -> str:
    """Return the CSS class of an arm's colour."""
    return f"arm-{number % COLOURS}"


def front(table: Table) -> list[str]:
    """List the arms than which no other is better in accuracy, time and memory at once, by their means."""

    def beats(one: ArmFigures, other: ArmFigures) -> bool:
        better = (
            one.accuracy.mean >= other.accuracy.mean,
            one.time.mean <= other.time.mean,
            one.memory.mean <= other.memory.mean,
        )
        return all(better) and one != other

    return [arm.arm for arm in table.arms if not any(beats(other, arm) for other in table.arms)]


def _accuracies(table: Table) -> RowPlot:
    rows = [
        Row(
            name=arm.arm,
            figures=[(f"seed {run.seed}:", run.accuracy_pct) for run in arm.runs],
            mean=arm.accuracy.mean,
            interval=_interval(arm.accuracy),
            style=colour(number),
            note=f"{arm.epochs} epochs",
        )
        for number, arm in enumerate(table.arms)
    ]
    axis = Axis.over((x for row in rows for x in row.every), "test accuracy", PERCENT)
    return RowPlot(title="test accuracy: every run, mean and 95 % interval", x=axis, rows=rows)


def _interval(estimate: Estimate) -> tuple[float, float] | None:
    return (estimate.low, estimate.high) if isfinite(estimate.low) else None


def _forest(
    name: str, differences: Sequence[Difference], *, unit: Unit, none: float, level: tuple[float, float]
) -> RowPlot:
    rows = [
        Row(
            name=f"{each.arm} against {each.against}",
            mean=each.mean,
            interval=(each.low, each.high) if isfinite(each.low) else None,
            note=each.verdict,
        )
        for each in differences
    ]
    axis = Axis.over([none, *level, *(x for row in rows for x in row.every)], name.partition(",")[0], unit)
    return RowPlot(
        title=name,
        x=axis,
        rows=rows,
        shades=(Shade(name="level", start=level[0], stop=level[1]),),
        rules=(Rule(name="no difference", at=none),),
    )


def _memory_by_phase(table: Table, comparison: Comparison) -> RowPlot:
    rows = []
    for number, arm in enumerate(table.arms):
        phases = sorted({moment.phase for run in arm.runs for moment in run.moments})
        for phase in phases:
            peaks = [
                (f"seed {run.seed}:", float(max(each.memory_bytes for each in run.moments if each.phase == phase)))
                for run in arm.runs
                if any(each.phase == phase for each in run.moments)
            ]
            rows.append(
                Row(
                    name=arm.arm,
                    figures=peaks,
                    mean=fmean(peak for _, peak in peaks),
                    style=colour(number),
                    note=f"phase {phase + 1} of {len(phases)}",
                )
            )
    axis = Axis.over((x for row in rows for x in row.every), comparison.memory, BYTES, ticks=2)
    return RowPlot(title=f"{comparison.memory}, by phase", x=axis, rows=rows)


def _mean_moments(arm: ArmFigures) -> list[Moment]:
    """Average the ends of epochs over seeds, as far as all runs have come; phases are those of the first run."""
    return [
        Moment(
            epoch=together[0].epoch,
            phase=together[0].phase,
            seconds=fmean(each.seconds for each in together),
            accuracy_pct=fmean(each.accuracy_pct for each in together),
            memory_bytes=max(each.memory_bytes for each in together),
        )
        for together in zip(*(run.moments for run in arm.runs), strict=False)
    ]


def _phases(table: Table, curves: dict[str, list[Moment]]) -> list[Shade]:
    """Shade the phases of the last arm that has several."""
    several = [arm.arm for arm in table.arms if len({each.phase for each in curves[arm.arm]}) > 1]
    if not several:
        return []
    shades, start = [], 0.0
    for phase, moments in groupby(curves[several[-1]], key=lambda moment: moment.phase):
        stop = list(moments)[-1].seconds
        shades.append(Shade(name=f"{several[-1]}, phase {phase + 1}", start=start, stop=stop))
        start = stop
    return shades


def _front(table: Table, comparison: Comparison) -> Plot:
    return Plot(
        title="accuracy, time and memory of each arm, means over seeds",
        x=Axis.over((arm.time.mean for arm in table.arms), comparison.time, SECONDS, from_zero=True),
        y=Axis.over((arm.accuracy.mean for arm in table.arms), "test accuracy", PERCENT),
        series=[
            Series(
                name=f"{arm.arm}, {human(arm.memory.mean, 'B')}",
                xs=(arm.time.mean,),
                ys=(arm.accuracy.mean,),
                kind="dots",
                style=colour(number),
            )
            for number, arm in enumerate(table.arms)
        ],
    )
