"""fxsplit evaluate."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from functools import partial
from typing import Annotated, Any

import typer

from fxsplit.records import json_text

from .. import tables, views
from ..terminal import say, write
from .job import RULES, Device, Job, Json, Run, TrustCode, Verbose


def evaluate(
    *,
    run: Run,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help=f"Other images than those the run was tested on: {RULES['data']['help'].rstrip('.')}. Of a folder "
            "without train/ all images.",
            metavar="TEXT",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", "-b", help="Images at a time; those of the run if not given.", metavar="INTEGER", min=1
        ),
    ] = None,
    device: Device = "auto",
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="PAGE", help="Write a page with the confusions and the worst mistakes."),
    ] = None,
    trust_code: TrustCode = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> Job:
    """Evaluate the model of a run: accuracy, loss, each class, what it confuses.

    On the images that the run was tested on, the numbers are those of its last epoch.
    """
    options: dict[str, Any] = {"data": data, "batch_size": batch_size, "device": device, "page": output}
    return Job(partial(_evaluate, run, {**options, "trust_code": trust_code}, as_json), verbose)


def _evaluate(run: str, options: dict[str, Any], as_json: bool) -> None:
    with views.observing(run, "live") as observer, redirect_stdout(sys.stderr):
        import fxsplit

        found = fxsplit.evaluate(run, **options, observer=observer)
    if options["page"]:
        say(f"page: {options['page']}")
    if as_json:
        write(json_text(found.to_dict()))
    else:
        tables.evaluation(found)
