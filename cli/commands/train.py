"""fxsplit train."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fxsplit.errors import FxsplitError
from fxsplit.records import json_text
from fxsplit.report import RunReport
from fxsplit.spec import RunSpec

from .. import completion, tables, views
from ..options import with_spec_options
from ..streams import result_alone
from ..terminal import is_first, write
from .job import (
    Job,
    Json,
    Model,
    Recipe,
    TrustCode,
    TrustRecipe,
    Verbose,
    resolve_run,
    terminable,
)

TRAIN_FIELDS = tuple(item.name for item in fields(RunSpec) if item.name != "model")


@with_spec_options(TRAIN_FIELDS)
def train(
    *,
    model: Model = None,
    config: Recipe = None,
    trust_recipe: TrustRecipe = False,
    trust_code: TrustCode = False,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="auto|PATH",
            help="Go on with a run: the newest like this in --output, or a new one (auto), or that of a folder or a "
            "checkpoint (PATH). Needs no other options.",
            rich_help_panel="Run",
            autocompletion=completion.runs_to_resume,
        ),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Write the resolved recipe, and no more.", metavar="")
    ] = False,
    as_json: Json = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Say nothing but the result and errors.", metavar="")
    ] = False,
    verbose: Verbose = False,
    progress: Annotated[
        bool,
        typer.Option(
            "--progress/--no-progress",
            help="Draw a live view if on a terminal (the default), or write plain lines.",
            metavar="",
            show_default=False,
        ),
    ] = True,
    **given: Any,
) -> Job:
    """Train an image classifier, layer to layer or by the standard method.

    The command line wins over FXSPLIT_* variables, such as FXSPLIT_BATCH_SIZE, and they over the recipe.
    """
    spec, resume = resolve_run(
        model,
        config,
        given,
        resume,
        trust_recipe=trust_recipe or print_config,
        trust_code=trust_code,
    )
    if print_config:
        return Job(partial(write, spec.to_yaml()), verbose)
    view: views.View = "quiet" if quiet or not is_first() else "live" if progress else "plain"
    return Job(partial(_train, spec, resume, trust_code, view, as_json), verbose)


def _train(spec: RunSpec, resume: str | None, trust_code: bool, view: views.View, as_json: bool) -> None:
    with views.observing(spec.model, view) as observer, result_alone(), terminable():
        from fxsplit import api

        report: RunReport | None
        interruption: KeyboardInterrupt | None = None
        try:
            report = api.train(spec, observer, resume=resume, trust_code=trust_code)
        except KeyboardInterrupt as error:
            report, interruption = _report_so_far(observer.folder), error
    if report is not None and is_first():
        _show(report, as_json)
    if interruption is not None:
        raise interruption


def _report_so_far(folder: str) -> RunReport | None:
    """Read the report that an interrupted run has left in its folder; None if there is none, or one without epochs."""
    try:
        report = RunReport.read(Path(folder))
    except (OSError, ValueError, FxsplitError):
        return None
    return report if report.epochs else None


def _show(report: RunReport, as_json: bool) -> None:
    if as_json:
        write(json_text(report.to_dict()))
    else:
        tables.report(report)
