"""fxsplit inspect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import typer

from fxsplit.errors import UsageError, nearest
from fxsplit.plan.plandiff import diff as diff_plans
from fxsplit.plan.planfile import read_file
from fxsplit.records import json_text
from fxsplit.report import Inspection
from fxsplit.spec import RunSpec

from .. import completion, formats, tables, views
from ..options import with_spec_options
from ..streams import result_alone
from ..terminal import say, write
from .job import Job, Model, Recipe, TrustCode, TrustRecipe, Verbose, resolve_spec

# GB that a device sends in a second, unless given.
BANDWIDTH = 10.0
INSPECT_FIELDS = (
    *("stem", "drop_path", "data", "img_size", "batch_size"),
    *("preset", "schedule", "epochs", "epochs_total", "parts", "at", "by", "balance", "plan"),
    *("settle_from", "settle_until", "settle_share", "settle_front", "thaw_from", "shift"),
    *("opt", "momentum", "device", "channels_last", "memory_budget", "memory_aim", "grad_accum_steps"),
    "settled_offload",
)


@with_spec_options(INSPECT_FIELDS)
def inspect(
    *,
    model: Model = None,
    config: Recipe = None,
    trust_recipe: TrustRecipe = False,
    trust_code: TrustCode = False,
    save_plan: Annotated[
        str | None,
        typer.Option(
            "--save-plan",
            metavar="FILE",
            help="Write a plan file, to edit and to train by.",
            rich_help_panel="Plan files",
        ),
    ] = None,
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--diff",
            metavar="FILE FILE",
            help="Show what differs between two plan files, and no more.",
            rich_help_panel="Plan files",
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help=f"How to show it: {', '.join(formats.FORMATS)} [dim]\\[default: table][/dim].",
            autocompletion=completion.one_of(formats.FORMATS),
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write it to a file."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time each op on --device, with random weights.", metavar="")
    ] = False,
    devices: Annotated[
        int | None,
        typer.Option(
            "--devices",
            metavar="INTEGER",
            min=1,
            help="Time each op, and forecast a step on 1, 2, 4, ... up to so many devices.",
            rich_help_panel="Several devices",
        ),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(
            "--bandwidth",
            metavar="NUMBER",
            min=1e-6,
            help=f"GB that a device sends in a second [dim]\\[default: {BANDWIDTH:g}][/dim].",
            rich_help_panel="Several devices",
        ),
    ] = None,
    device_memory: Annotated[
        float | None,
        typer.Option(
            "--device-memory",
            metavar="NUMBER",
            min=0,
            help="GB of memory of a device, within which the fastest way is marked.",
            rich_help_panel="Several devices",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.", metavar="")] = False,
    verbose: Verbose = False,
    **given: Any,
) -> Job:
    """Show a model's partitions, its costs and the phases of a schedule with their forecast, without training."""
    if diff:
        others = {
            "model": model,
            "config": config,
            "save-plan": save_plan,
            "format": form,
            "output": output,
            "measure": measure or None,
            "devices": devices,
            **given,
        }
        if beside := [name.replace("_", "-") for name, value in others.items() if value is not None]:
            raise UsageError(f"--diff compares two plan files, and takes no {', '.join(beside)} beside them")
        return Job(partial(_diff, *diff, as_json), verbose)
    wanted = form or ("json" if as_json else "table")
    if wanted not in formats.FORMATS:
        hint = nearest(wanted, formats.FORMATS)
        raise UsageError(f"there is no format {wanted!r}{hint} (have: {', '.join(formats.FORMATS)})")
    if as_json and wanted != "json":
        raise UsageError(f"--json means --format json and contradicts --format {wanted}")
    for name, value in {"bandwidth": bandwidth, "device-memory": device_memory}.items():
        if value is not None and devices is None:
            raise UsageError(f"--{name} is given, but no --devices, which it is about")
    spec = resolve_spec(model, config, given, trust_recipe=trust_recipe)
    several = {
        "devices": devices,
        "bandwidth": 1e9 * (BANDWIDTH if bandwidth is None else bandwidth),
        "device_bytes": None if device_memory is None else 1e9 * device_memory,
    }
    show = partial(formats.show, name=wanted, path=output)
    return Job(partial(_inspect, spec, trust_code, measure, save_plan, several, show), verbose)


def _inspect(
    spec: RunSpec,
    trust_code: bool,
    measure: bool,
    save_plan: str | None,
    several: dict[str, Any],
    show: Callable[[Inspection], None],
) -> None:
    with views.observing(spec.model, "live") as observer, result_alone():
        from fxsplit import api

        inspection = api.inspect(
            spec, measured=measure, save_to=save_plan, trust_code=trust_code, observer=observer, **several
        )
    if save_plan:
        say(f"plan file: {save_plan}")
    show(inspection)


def _diff(before: str, after: str, as_json: bool) -> None:
    files = {path: read_file(path) for path in (before, after)}
    changes = diff_plans(files[before], files[after])
    if as_json:
        write(json_text([asdict(change) for change in changes]))
    else:
        stale = [path for path, file in files.items() if not file.derived]
        tables.diff(before, after, changes, stale=stale)
