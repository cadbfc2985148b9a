"""The two pages of a model: what was inspected, and what a run of it measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import PurePath
from shlex import quote

from fxsplit.graph import Value
from fxsplit.pages import charts
from fxsplit.pages.charts import Plot
from fxsplit.pages.confusion import Confusion
from fxsplit.pages.document import document
from fxsplit.pages.lanes import Expected, forecast_lanes, measured_lanes, timeline
from fxsplit.pages.outline import outline
from fxsplit.plan.cuts import with_ends
from fxsplit.plan.schedule import Plan, Role
from fxsplit.report import Inspection, RunReport


def inspection_page(inspection: Inspection) -> str:
    """Make the page of an inspection: the partitions, and the schedule with its forecast."""
    lanes = tuple(forecast_lanes(inspection.forecast, inspection.plan)) if inspection.forecast else ()
    return _page(inspection, report=None, lanes=lanes)


def report_page(report: RunReport, inspection: Inspection) -> str:
    """Make the page of a run: the same, with what was measured beside the forecast."""
    lanes = measured_lanes(report.epochs, inspection.plan, inspection.forecast)
    return _page(inspection, report=report, lanes=tuple(lanes))


def _page(inspection: Inspection, *, report: RunReport | None, lanes: Sequence[Plot]) -> str:
    all_cuts = with_ends(inspection)
    most_bytes = max(cut.bytes_per_sample for cut in all_cuts)
    ahead = inspection.forecast
    run_name = PurePath(report.folder).name if report else ""
    return document(
        "page.html.jinja",
        script="page.js",
        inspection=inspection,
        report=report,
        run_name=run_name,
        began=_minute(report) if report else "",
        evaluating=f"fxsplit evaluate {quote(report.folder)} --output evaluation.html" if report and run_name else "",
        confusion=Confusion.of(report.confusion, report.data.get("classes", ()))
        if report and report.confusion
        else None,
        expected=Expected.of(ahead, report.epochs) if ahead and report else None,
        plan=inspection.plan,
        graph=inspection.train,
        values=inspection.eval.values | inspection.train.values,
        outline=outline(inspection),
        cuts=all_cuts,
        profile=_profile([cut.bytes_per_sample / most_bytes if most_bytes else 0.0 for cut in all_cuts]),
        most_bytes=most_bytes,
        most_boundary=max(all_cuts[partition.start].bytes_per_sample for partition in inspection.partitions),
        lanes=lanes,
        timeline=timeline(inspection.plan),
        roles=_roles,
        tensors_of=_tensors_of,
    )


def _minute(report: RunReport) -> str:
    """Write when a run was made, to the minute: `2026-11-27 11:33 UTC`."""
    date, _, time = str(report.environment.get("date_utc", "")).partition("T")
    return f"{date} {time[:5]} UTC" if time else date


def _profile(shares: Sequence[float]) -> str:
    """Draw the bytes at every cut as an area over the whole width."""
    count = len(shares)
    return charts.stairs((index / count, (index + 1) / count, 1 - share) for index, share in enumerate(shares))


def _roles(plan: Plan, index: int) -> list[tuple[Role, int, int]]:
    """List the roles of partition `index` over the run, each with its first epoch, from 0, and how many it has."""
    roles: list[tuple[Role, int, int]] = []
    for role, phases in groupby(plan.phases, key=lambda phase: phase.role(index)):
        first = roles[-1][1] + roles[-1][2] if roles else 0
        roles.append((role, first, sum(phase.epochs for phase in phases)))
    return roles


def _tensors_of(names: Iterable[str], values: Mapping[str, Value]) -> list[Value]:
    """Select the tensors among the values of a boundary: sizes and flags, which are passed on too, have no bytes."""
    return [values[name] for name in names if values[name].bytes_per_sample]
