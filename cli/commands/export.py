"""fxsplit export."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from functools import partial
from typing import Annotated, Any

import typer

from fxsplit.records import json_text

from .. import tables, views
from ..terminal import write
from .job import Job, Json, Run, TrustCode, Verbose


def export(
    *,
    run: Run,
    form: Annotated[
        str,
        typer.Option("--format", metavar="FORMAT", help="onnx, torchscript, torch-export or safetensors."),
    ] = "onnx",
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="The file to write; model.onnx, .pt, .pt2 in RUN if not given."
        ),
    ] = None,
    pixels: Annotated[
        bool,
        typer.Option(
            "--pixels",
            help="Let the exported model take pixels, uint8 from 0 to 255, and scale and normalize them itself.",
            metavar="",
        ),
    ] = False,
    trust_code: TrustCode = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> Job:
    """Export the model of a run for other programs, and check what was written.

    The file is loaded again and must give the model's scores, bit for bit or, from ONNX, within 1e-4 of the largest
    one. Otherwise there is no file, and the exit code is 4.
    """
    options: dict[str, Any] = {"format": form, "pixels": pixels, "trust_code": trust_code}
    return Job(partial(_export, run, output, options, as_json), verbose)


def _export(run: str, output: str | None, options: dict[str, Any], as_json: bool) -> None:
    with views.observing(run, "live"), redirect_stdout(sys.stderr):
        import fxsplit

        record = fxsplit.export(run, output, **options)
    if as_json:
        write(json_text(record.to_dict()))
    else:
        tables.exported(record)
