"""Draws series of figures as SVG that stretches with the page; nothing of it needs script.

Positions are shares of the plot, from 0 to 1, so that a path fills a box of one by one, which the page stretches:

    0 ┌──┐     ┌──        stairs: each figure over a part of the axis, filled down to the bottom
      │  └──┐  │
    1 ┴─────┴──┴──        line: from figure to figure

A `Plot` has series over a common axis. A `RowPlot` has named rows, each with single figures, their mean and an
interval. Both have ticks, a value to show under the mouse for every figure, and a table of all figures for those who
read. The template `charts.html.jinja` puts them on a page.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import ceil, floor, isfinite
from typing import Literal

from fxsplit.pages.figures import NUMBER, Unit

Kind = Literal["line", "dots", "stairs", "outline"]
# Positions are written so that they are exact to a tenth of a pixel on the widest screens.
DIGITS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A straight axis from `least` to `most` with ticks; it knows what its figures are called and how they are written.

    Made by `over` for figures, or by itself for a range that is known.
    """

    name: str
    unit: Unit = NUMBER
    least: float = 0.0
    most: float = 1.0
    ticks: tuple[float, ...] = ()

    @classmethod
    def over(
        cls, figures: Iterable[float], name: str, unit: Unit = NUMBER, *, ticks: int = 4, from_zero: bool = False
    ) -> Axis:
        """Make an axis that holds all finite figures and begins and ends at round ones.

        Args:
            figures: what is drawn; without any, the axis has no ticks.
            name: what they are.
            unit: how they are written, and which of them are round.
            ticks: how many there are, roughly.
            from_zero: whether zero is on the axis in any case.
        """
        finite = [figure for figure in figures if isfinite(figure)]
        if not finite:
            return cls(name=name, unit=unit)
        least, most = min(finite), max(finite)
        if from_zero:
            least, most = min(least, 0), max(most, 0)
        if least == most:
            # Equal figures lie in the middle.
            room = abs(least) / 10 or 1.0
            least, most = least - room, most + room
        step = unit.step((most - least) / ticks)
        first, last = floor(least / step + 1e-9), ceil(most / step - 1e-9)
        return cls(
            name=name,
            unit=unit,
            least=first * step,
            most=last * step,
            ticks=tuple(index * step for index in range(first, last + 1)),
        )

    def share(self, figure: float) -> float:
        """Return where on the axis a figure lies, from 0 to 1."""
        return (figure - self.least) / (self.most - self.least)


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Figures `ys` at the places `xs`, in rising order; a figure that is not finite is left out.

    Args:
        name: what the figures are; the table has a column of that name.
        kind: `line` joins them, `dots` does not; `stairs` is a filled staircase and `outline` its upper edge.
        style: a CSS class that sets the colour: `training`, `test`, `measured`, `expected`, or `arm-0` to `arm-7`.
        width: how much of the axis each figure of a staircase stands for, with its place in the middle.
        key: what the legend calls it, and all other series of that key and style; by default its name.
    """

    name: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    kind: Kind = "line"
    style: str = "arm-0"
    width: float = 1.0
    key: str = ""

    @property
    def points(self) -> list[tuple[float, float]]:
        """The places and figures that are finite."""
        return [(x, y) for x, y in zip(self.xs, self.ys, strict=True) if isfinite(x) and isfinite(y)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shade:
    """A named part of an axis, from `start` to `stop`, as a coloured ground behind the figures."""

    name: str
    start: float
    stop: float
    style: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A named figure to hold the others against, drawn as a dashed line across the plot."""

    name: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """A part of the horizontal axis, in shares, and what is said of the figures there."""

    start: float
    stop: float
    caption: str


@dataclass(frozen=True)
class Plot:
    """Series over the axis `x`, with shaded parts of it, and figures of `y` to hold them against."""

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    shades: Sequence[Shade] = ()
    rules: Sequence[Rule] = ()

    @property
    def keys(self) -> list[tuple[str, str]]:
        """The legend: style and name of each series, and of the rules; equal ones once."""
        keys = dict.fromkeys((each.style, each.key or each.name) for each in self.series)
        rules = [("rule", f"{rule.name}: {self.y.unit.write(rule.at)}") for rule in self.rules]
        return [*keys, *rules]

    @property
    def paths(self) -> list[tuple[str, str]]:
        """The drawing of each series that is not of dots: CSS classes and an SVG path."""
        return [
            (f"{'area' if each.kind == 'stairs' else 'curve'} {each.style}", self._path(each))
            for each in self.series
            if each.kind != "dots"
        ]

    @property
    def dots(self) -> list[tuple[str, float, float, str]]:
        """Each dot: style, place from the left, place from the top, and what is said of it."""
        return [
            (
                each.style,
                self.x.share(x),
                1 - self.y.share(y),
                f"{each.name}: {self.x.unit.write(x)}, {self.y.unit.write(y)}",
            )
            for each in self.series
            if each.kind == "dots"
            for x, y in each.points
        ]

    @property
    def bands(self) -> list[Band]:
        """The axis cut midway between the places that have figures, dots left out, with the figures of each place."""
        found = [(each.name, x, y) for each in self.series if each.kind != "dots" for x, y in each.points]
        places = sorted({x for _, x, _ in found})
        if not places:
            return []
        said: dict[float, list[str]] = {}
        for name, x, y in found:
            said.setdefault(x, []).append(f"{name} {self.y.unit.write(y)}" if len(self.series) > 1 else self._write(y))
        edges = [(before + after) / 2 for before, after in pairwise(places)]
        first = max(self.x.least, 2 * places[0] - edges[0]) if edges else self.x.least
        last = min(self.x.most, 2 * places[-1] - edges[-1]) if edges else self.x.most
        spans = zip(places, pairwise([first, *edges, last]), strict=True)
        return [
            Band(
                start=self.x.share(start),
                stop=self.x.share(stop),
                caption=f"{self.x.name} {self.x.unit.write(place)}: {', '.join(said[place])}",
            )
            for place, (start, stop) in spans
        ]

    @property
    def table(self) -> list[list[str]]:
        """All figures, first the headings: a row for each place, a column for each series."""
        columns = [dict(each.points) for each in self.series]
        places = sorted({x for column in columns for x in column})
        rows = [
            [self.x.unit.write(x), *(self._write(column[x]) if x in column else "" for column in columns)]
            for x in places
        ]
        return [[self.x.name, *(each.name for each in self.series)], *rows]

    @property
    def extent(self) -> str:
        """The range of the figures, in words."""
        ys = [y for each in self.series for _, y in each.points]
        return f"{self._write(min(ys))} to {self._write(max(ys))}" if ys else "no figures"

    def _write(self, y: float) -> str:
        return self.y.unit.write(y)

    def _path(self, series: Series) -> str:
        if series.kind == "line":
            places = ((self.x.share(x), 1 - self.y.share(y)) for x, y in zip(series.xs, series.ys, strict=True))
            return line(places)
        half = series.width / 2
        spans = [(self.x.share(x - half), self.x.share(x + half), 1 - self.y.share(y)) for x, y in series.points]
        return stairs(spans, filled=series.kind == "stairs")


@dataclass(frozen=True)
class Row:
    """A row of a `RowPlot`: single figures, each with what it is of, and their mean with an interval around it.

    A row of single figures alone, or of a mean and an interval alone, is drawn likewise. `note` stands behind the name.
    """

    name: str
    figures: Sequence[tuple[str, float]] = ()
    mean: float | None = None
    interval: tuple[float, float] | None = None
    style: str = "arm-0"
    note: str = ""

    @property
    def every(self) -> list[float]:
        """All figures that must be on the axis."""
        mean = [] if self.mean is None else [self.mean]
        return [*(figure for _, figure in self.figures), *mean, *(self.interval or ())]


@dataclass(frozen=True)
class RowPlot:
    """Named rows over a common axis: every run of each arm as a dot, or differences with their intervals."""

    title: str
    x: Axis
    rows: Sequence[Row]
    shades: Sequence[Shade] = ()
    rules: Sequence[Rule] = ()

    @cached_property
    def table(self) -> list[list[str]]:
        """All figures, first the headings: a row for each row."""
        write = self.x.unit.write
        body = [
            [
                row.name,
                "" if row.mean is None else write(row.mean),
                "" if row.interval is None else f"{write(row.interval[0])} to {write(row.interval[1])}",
                ", ".join(f"{name} {write(figure)}".strip() for name, figure in row.figures),
                row.note,
            ]
            for row in self.rows
        ]
        headings = ["", f"{self.x.name}, mean", "interval", "single figures", ""]
        kept = [index for index in range(len(headings)) if any(row[index] for row in body)]
        return [[row[index] for index in kept] for row in (headings, *body)]


def line(places: Iterable[tuple[float, float]]) -> str:
    """Draw a curve through places; it is broken where one is not finite."""
    path, is_drawn = "", False
    for x, y in places:
        is_finite = isfinite(x) and isfinite(y)
        if is_finite:
            # A line of no length has round ends, so that a figure without neighbours is seen as a dot.
            path += f"L{_short(x)} {_short(y)}" if is_drawn else f"M{_short(x)} {_short(y)}h0"
        is_drawn = is_finite
    return path


def stairs(spans: Iterable[tuple[float, float, float]], *, filled: bool = True) -> str:
    """Draw a staircase of `(start, stop, y)`: the area under it, or its edge. Steps that do not touch stand alone."""
    path, end, y = "", None, 1.0
    for start, stop, y in spans:
        if end is None or abs(start - end) > 1e-9:
            path += "V1Z" if end is not None and filled else ""
            path += f"M{_short(start)} 1V{_short(y)}" if filled else f"M{_short(start)} {_short(y)}"
        else:
            path += f"V{_short(y)}"
        path += f"H{_short(stop)}"
        end = stop
    return path + ("V1Z" if path and filled else "")


def _short(number: float) -> str:
    return f"{round(number, DIGITS) + 0.0:g}"
