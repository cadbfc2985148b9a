"""fxsplit predict."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from functools import partial
from typing import Annotated, Any

import typer

from fxsplit.errors import DataError
from fxsplit.records import json_line

from .. import tables, views
from ..terminal import say, write
from .job import Device, Job, Run, TrustCode, Verbose


def predict(
    *,
    run: Run,
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE...", help="Image files, and folders of them.", show_default=False),
    ],
    top: Annotated[int, typer.Option("--top", help="Classes of each image.", metavar="INTEGER", min=1)] = 5,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", help="Images at a time.", metavar="INTEGER", min=1)
    ] = 64,
    device: Device = "auto",
    trust_code: TrustCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write a line of JSON for each image.", metavar="")] = False,
    verbose: Verbose = False,
) -> Job:
    """Name the most probable classes of images, by the model of a run.

    Images are prepared as in training. A file that cannot be read is named on stderr, and the rest goes on; the exit
    code is then 1.
    """
    options: dict[str, Any] = {"top": top, "batch_size": batch_size, "device": device, "trust_code": trust_code}
    return Job(partial(_predict, run, images, options, as_json), verbose)


def _predict(run: str, images: list[str], options: dict[str, Any], as_json: bool) -> None:
    with views.observing(run, "live") as observer, redirect_stdout(sys.stderr):
        import fxsplit

        found = fxsplit.predict(run, images, **options, observer=observer)
    count, failed = 0, 0
    for each in found:
        count += 1
        if each.error is not None:
            failed += 1
            say(each.error)
        if as_json:
            write(json_line(each.to_dict()) + "\n")
        elif each.error is None:
            tables.prediction(each)
    if failed:
        raise DataError(f"{failed} of {count} images could not be read")
