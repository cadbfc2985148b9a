"""The commands: each reads a RunSpec from its options and says which library function to call.

A command returns a Job rather than doing it, so that the work, and every error of it, is outside of typer.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NamedTuple, NoReturn

import typer

from fxsplit.errors import CheckError, Terminated, UsageError, nearest
from fxsplit.plan.plandiff import diff as diff_plans
from fxsplit.plan.planfile import read_file
from fxsplit.records import json_text
from fxsplit.resuming import AUTO, RECIPE, differing, newest_run, run_folder_of
from fxsplit.spec import PLANNED, RunSpec, beside_plan, from_text, read_environment, read_recipe, read_values, resolve

from . import formats, tables, views
from .options import with_spec_options
from .terminal import say, write

TRAIN_FIELDS = tuple(item.name for item in fields(RunSpec) if item.name != "model")
INSPECT_FIELDS = (
    *("stem", "drop_path", "data", "img_size", "batch_size"),
    *("preset", "schedule", "epochs", "epochs_total", "parts", "at", "by", "balance", "plan"),
    *("settle_from", "settle_until", "settle_share"),
    *("opt", "momentum", "device", "channels_last", "memory_budget", "memory_aim", "grad_accum_steps"),
)

RULES = {item.name: item.metadata for item in fields(RunSpec)}
MODEL_FORMS = RULES["model"]["help"].rstrip(".")

Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help=f"{MODEL_FORMS}; may be left to the recipe.", show_default=False),
]
Recipe = Annotated[Path | None, typer.Option("--config", "-c", metavar="RECIPE", help="Read options from a recipe.")]
LayerToLayer = Annotated[
    bool,
    typer.Option("--l2l", help="The same as --preset l2l.", rich_help_panel="Layer-to-layer", metavar=""),
]
Json = Annotated[bool, typer.Option("--json", help="Write the result as JSON.", metavar="")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show the traceback of an unexpected error.", metavar="")
]


class Job(NamedTuple):
    """What a command line asks for."""

    run: Callable[[], None]
    verbose: bool


@with_spec_options(TRAIN_FIELDS)
def train(
    *,
    model: Model = None,
    config: Recipe = None,
    l2l: LayerToLayer = False,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="auto|PATH",
            help="Go on with a run: the newest like this in --output, or a new one (auto), or that of a folder or a "
            "checkpoint (PATH). Needs no other options.",
            rich_help_panel="Run",
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
    spec, resume = _resolve_run(model, config, l2l, given, resume)
    if print_config:
        return Job(partial(write, spec.to_yaml()), verbose)
    view: views.View = "quiet" if quiet else "live" if progress else "plain"
    return Job(partial(_train, spec, resume, view, as_json), verbose)


@with_spec_options(INSPECT_FIELDS)
def inspect(
    *,
    model: Model = None,
    config: Recipe = None,
    l2l: LayerToLayer = False,
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
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write it to a file."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time each op on --device, with random weights.", metavar="")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.", metavar="")] = False,
    verbose: Verbose = False,
    **given: Any,
) -> Job:
    """Show a model's partitions, its costs and the phases of a schedule with their forecast, without training."""
    if diff:
        others = {
            "model": model,
            "config": config,
            "l2l": l2l or None,
            "save-plan": save_plan,
            "format": form,
            "output": output,
            "measure": measure or None,
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
    return Job(partial(_inspect, _resolve(model, config, l2l, given), measure, save_plan, wanted, output), verbose)


def check(
    *,
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Models, also with wildcards: 'timm:resnet*'.", show_default=False),
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
    as_json: Json = False,
    verbose: Verbose = False,
) -> Job:
    """Prove that partitions compute exactly what a model computes.

    Output, loss, gradients, buffers and random state must equal those of the plain model bit for bit, in training and
    in evaluation, at two batch sizes. With --forecast a few steps of each phase are measured instead: memory must be
    within a tenth of its forecast; time is shown beside its own. The exit code is 4 if any model fails, and 2
    if all that is wrong is a name.
    """
    options: dict[str, Any] = {"parts": parts, "img_size": img_size, "channels_last": channels_last or None}
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
    with views.checking() as observer, redirect_stdout(sys.stderr):
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


def _train(spec: RunSpec, resume: str | None, view: views.View, as_json: bool) -> None:
    # What libraries print belongs beside the progress, not into the result.
    with views.observing(spec.model, view) as observer, redirect_stdout(sys.stderr), _terminable():
        from fxsplit import api

        report = api.train(spec, observer, resume=resume)
    if as_json:
        write(json_text(report.to_dict()))
    else:
        tables.report(report)


def _inspect(spec: RunSpec, measure: bool, save_plan: str | None, form: str, output: str | None) -> None:
    with views.observing(spec.model, "plain") as observer, redirect_stdout(sys.stderr):
        from fxsplit import api

        inspection = api.inspect(spec, measured=measure, save_to=save_plan, observer=observer)
    if save_plan:
        say(f"plan file: {save_plan}")
    formats.show(inspection, form, output)


def _diff(before: str, after: str, as_json: bool) -> None:
    files = {path: read_file(path) for path in (before, after)}
    changes = diff_plans(files[before], files[after])
    if as_json:
        write(json_text([asdict(change) for change in changes]))
    else:
        stale = [path for path, file in files.items() if not file.derived]
        tables.diff(before, after, changes, stale=stale)


def _resolve(model: str | None, config: Path | None, l2l: bool, given: dict[str, Any]) -> RunSpec:
    spec, _ = _resolve_run(model, config, l2l, given, None)
    return spec


def _resolve_run(
    model: str | None, config: Path | None, l2l: bool, given: dict[str, Any], resume: str | None
) -> tuple[RunSpec, str | None]:
    """Return what is asked for, and the run to go on with if there is one, whose options are those not given."""
    options = {
        name: from_text(name, value) if isinstance(value, str) else value
        for name, value in {"model": model, **given}.items()
        if value is not None
    }
    if l2l and options.setdefault("preset", "l2l") != "l2l":
        raise UsageError(f"--l2l means --preset l2l and contradicts --preset {options['preset']}")
    layers = (read_recipe(config) if config else {}, read_environment(os.environ), read_values(options))
    found = None
    if resume is not None:
        found = newest_run(_merged(layers)) if resume == AUTO else run_folder_of(resume)
    if found is not None:
        before = read_recipe(found / RECIPE)
        spec = resolve(before, *layers)
        differing(resolve(before), spec)  # or an error before torch is loaded
        return spec, str(found) if resume == AUTO else resume
    if not any("model" in layer for layer in layers):
        raise UsageError(f"no model is given; name one here or in a recipe, as {MODEL_FORMS}")
    spec = resolve(*layers)
    if spec.plan and (beside := [name for name in PLANNED if name in options]):
        raise UsageError(beside_plan(beside))
    return spec, None


def _merged(layers: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for layer in layers for name, value in layer.items()}


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the training as an interruption does: with what there is saved."""

    def terminate(_signum: int, _frame: FrameType | None) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
