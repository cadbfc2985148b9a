"""fxsplit check."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer

from fxsplit.errors import CheckError, UsageError
from fxsplit.records import json_text

from .. import completion, tables, views
from ..streams import result_alone
from ..terminal import write
from .job import RULES, Job, Json, TrustCode, Verbose


def check(
    *,
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Models, also with wildcards: 'timm:resnet*'.",
            show_default=False,
            autocompletion=completion.models,
        ),
    ],
    meta: Annotated[
        bool, typer.Option("--meta", help="Capture and cut only, without weights; compute nothing.", metavar="")
    ] = False,
    parts: Annotated[
        int | None,
        typer.Option(
            "--parts",
            help="Partitions to make of each [dim]\\[default: 4, of a forecast 8][/dim].",
            metavar="INTEGER",
            min=1,
        ),
    ] = None,
    img_size: Annotated[
        int | None,
        typer.Option("--img-size", help="Pixels a side; by default each model's own.", metavar="INTEGER", min=1),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Models at a time.", metavar="INTEGER", min=1)] = 1,
    forecast: Annotated[
        bool,
        typer.Option(
            "--forecast",
            help="Hold the forecast of time and memory against a few steps of each phase instead.",
            metavar="",
            rich_help_panel="Forecast",
        ),
    ] = False,
    schedule: Annotated[
        str | None,
        typer.Option(
            "--schedule",
            help=f"Whose phases [dim]\\[{', '.join(RULES['schedule']['choices'])}; default: settle][/dim].",
            metavar="TEXT",
            rich_help_panel="Forecast",
            autocompletion=completion.one_of(RULES["schedule"]["choices"]),
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            "-b",
            help="Images a step [dim]\\[default: 32][/dim].",
            metavar="INTEGER",
            min=2,
            rich_help_panel="Forecast",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            help="Where the steps run [dim]\\[default: auto][/dim].",
            metavar="TEXT",
            rich_help_panel="Forecast",
        ),
    ] = None,
    channels_last: Annotated[
        bool,
        typer.Option("--channels-last", help="Run it as train does with that option.", metavar=""),
    ] = False,
    trust_code: TrustCode = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> Job:
    """Prove that partitions compute exactly what a model computes.

    Output, loss, gradients, buffers and random state must equal those of the plain model bit for bit, in training and
    in evaluation, at two batch sizes. With --forecast a few steps of each phase are measured instead: memory must be
    within a tenth of its forecast; time is shown beside its own. The exit code is 4 if any model fails, and 2
    if all that is wrong is a name.
    """
    options: dict[str, Any] = {
        "parts": parts,
        "img_size": img_size,
        "channels_last": channels_last or None,
        "trust_code": trust_code or None,
    }
    if forecast:
        if meta or jobs > 1:
            raise UsageError("--forecast measures one model after the other, and takes no --meta and no --jobs")
        options |= {"schedule": schedule, "batch_size": batch_size, "device": device}
        verb = "check_forecasts"
    else:
        given = {"schedule": schedule, "batch-size": batch_size, "device": device}
        if beside := [name for name, value in given.items() if value is not None]:
            raise UsageError(f"--{beside[0]} says how a forecast is checked, and needs --forecast beside it")
        options |= {"structure_only": meta, "jobs": jobs}
        verb = "check"
    options = {name: value for name, value in options.items() if value is not None}
    return Job(partial(_check, verb, models, options, as_json), verbose)


def _check(verb: str, specs: list[str], options: dict[str, Any], as_json: bool) -> None:
    with views.checking() as observer, result_alone():
        from fxsplit import api

        records = getattr(api, verb)(specs, **options, observer=observer)
    if as_json:
        write(json_text([record.to_dict() for record in records]))
    elif verb == "check":
        tables.checks(records)
    else:
        tables.forecasts(records)
    if unknown := [record for record in records if record.unknown]:
        known = [record for record in records if not record.unknown]
        if all(record.passed for record in known):
            raise UsageError("; ".join(record.refusal for record in unknown))
    if failed := [record.model for record in records if not record.passed]:
        raise CheckError(
            f"{len(failed)} of {len(records)} models failed: {', '.join(failed[:5])}{' ...' * (len(failed) > 5)}"
        )
