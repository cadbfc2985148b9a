"""Shows a model, or a run of one, as one HTML file that needs no network.

A page loads nothing. Its content security policy has the digests of its own style sheet and script, so that the browser
runs no others. All else, such as the names of models and modules, is escaped.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import pairwise
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fxsplit.errors import printable
from fxsplit.graph import Value
from fxsplit.pages import charts, figures
from fxsplit.pages.outline import outline
from fxsplit.plan.cuts import with_ends
from fxsplit.plan.forecast import Forecast
from fxsplit.plan.schedule import Plan, Role
from fxsplit.report import EpochRecord, Inspection, RunReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """A figure over the epochs, drawn as stairs or as named curves; `captions` has the figure of each epoch as text."""

    name: str
    extent: str
    captions: tuple[str, ...]
    stairs: str = ""
    curves: tuple[tuple[str, str], ...] = ()


def inspection_page(inspection: Inspection) -> str:
    """Make the page of an inspection: the partitions, and the schedule with its forecast."""
    lanes = tuple(_forecast_lanes(inspection.forecast, inspection.plan)) if inspection.forecast else ()
    return _page(inspection, report=None, lanes=lanes)


def report_page(report: RunReport, inspection: Inspection) -> str:
    """Make the page of a run: the same, with what was measured in place of the forecast."""
    return _page(inspection, report=report, lanes=tuple(_measured_lanes(report.epochs)))


def _page(inspection: Inspection, *, report: RunReport | None, lanes: tuple[Lane, ...]) -> str:
    all_cuts = with_ends(inspection)
    most_bytes = max(cut.bytes_per_sample for cut in all_cuts)
    style, script = _asset("page.css"), _asset("page.js")
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            inspection=inspection,
            report=report,
            plan=inspection.plan,
            graph=inspection.train,
            values=inspection.eval.values | inspection.train.values,
            outline=outline(inspection),
            cuts=all_cuts,
            profile=charts.steps([cut.bytes_per_sample for cut in all_cuts], most_bytes),
            most_bytes=most_bytes,
            most_boundary=max(all_cuts[partition.start].bytes_per_sample for partition in inspection.partitions),
            lanes=lanes,
            style=Markup(style),
            style_digest=_digest(style),
            script=Markup(script),
            script_digest=_digest(script),
        )
    )


def _forecast_lanes(forecast: Forecast, plan: Plan) -> Iterator[Lane]:
    pairs = zip(forecast.phases, plan.phases, strict=True)
    by_epoch = [predicted for predicted, phase in pairs for _ in range(phase.epochs)]
    cost, peak = [each.step_cost for each in by_epoch], [each.peak_bytes for each in by_epoch]
    yield _staircase("time of a step", cost, lambda value: f"{value:.2f} of standard", most=max(1.0, *cost))
    standard = forecast.standard.peak_bytes
    yield _staircase("peak memory", peak, _bytes, most=max(standard, *peak), beside=f" (standard: {_bytes(standard)})")


def _measured_lanes(epochs: Sequence[EpochRecord]) -> Iterator[Lane]:
    accuracies = {
        "training": [record.train_top1 for record in epochs],
        "test": [record.eval_top1 for record in epochs],
    }
    yield _curves("accuracy", accuracies, lambda value: f"{value:.2f} %")
    losses = {
        "training": [record.train_loss for record in epochs],
        "test": [record.eval_loss for record in epochs],
    }
    yield _curves("loss", losses, lambda value: f"{value:.4f}")
    yield _staircase("seconds to train", [record.train_seconds for record in epochs], figures.duration)
    joules = [record.joules_per_image for record in epochs if record.joules_per_image is not None]
    if joules and len(joules) == len(epochs):
        yield _staircase("energy an image", joules, figures.millijoules)
    allocated = [record.peak_allocated_bytes for record in epochs if record.peak_allocated_bytes is not None]
    if allocated:
        yield _staircase("peak memory, CUDA", allocated, _bytes)
    else:
        yield _staircase("peak memory, process", [record.peak_resident_bytes for record in epochs], _bytes)


def _staircase(
    name: str, values: Sequence[float], write: Callable[[float], str], *, most: float | None = None, beside: str = ""
) -> Lane:
    """Draw one figure, on a scale that ends at `most`, or at the largest value; `beside` follows that value."""
    top = max(values, default=0)
    return Lane(
        name=name,
        extent=f"up to {write(top)}{beside}" if values else "",
        stairs=charts.steps(values, top if most is None else most),
        captions=tuple(map(write, values)),
    )


def _curves(name: str, curves: dict[str, list[float]], write: Callable[[float], str]) -> Lane:
    """Draw several curves on one scale."""
    found = charts.bounds(value for values in curves.values() for value in values)
    least, most = found or (0.0, 0.0)
    epochs = zip(*curves.values(), strict=True)
    return Lane(
        name=name,
        extent=f"{write(least)} to {write(most)}" if found else "",
        curves=tuple((side, charts.line(values, least, most)) for side, values in curves.items()),
        captions=tuple(
            ", ".join(f"{side} {write(value)}" for side, value in zip(curves, values, strict=True)) for values in epochs
        ),
    )


def _bytes(number: float | None) -> str:
    return figures.human(number, "B")


def _share(part: float, whole: float) -> str:
    """Write the share of `part` in `whole` for an attribute of SVG, such as `12.5%`; that of 0 in 0 is `0%`."""
    return f"{100 * part / whole if whole else 0:.4g}%"


def _roles(plan: Plan, index: int) -> list[tuple[Role, int, int]]:
    """List the roles of partition `index` over the run, each with its first epoch, from 0, and how many it has."""
    roles = [plan.phase_at(epoch).role(index) for epoch in range(plan.epochs)]
    firsts = [epoch for epoch in range(plan.epochs) if epoch == 0 or roles[epoch] != roles[epoch - 1]]
    return [(roles[first], first, stop - first) for first, stop in pairwise([*firsts, plan.epochs])]


def _tensors_of(names: Iterable[str], values: Mapping[str, Value]) -> list[Value]:
    """Select the tensors among the values of a boundary: sizes and flags, which are passed on too, have no bytes."""
    return [values[name] for name in names if values[name].bytes_per_sample]


def _shown(value: Any) -> Any:
    """Escape control characters in names: a page may be printed to a terminal."""
    return "\n".join(map(printable, value.split("\n"))) if type(value) is str else value


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("fxsplit.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "human": figures.human,
        "duration": figures.duration,
        "shape": figures.shape,
    }
    environment.filters |= filters
    environment.globals |= {
        "epochs_of": figures.epochs_of,
        "in_words": figures.in_words,
        "roles": _roles,
        "share": _share,
        "tensors_of": _tensors_of,
        "trains": figures.trains,
    }
    return environment


def _asset(name: str) -> str:
    return files("fxsplit.pages").joinpath("templates", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
