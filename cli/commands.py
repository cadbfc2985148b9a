"""The commands: each reads a RunSpec from its options and says which library function to call.

A command returns a Job rather than doing it, so that the work, and every error of it, is outside of typer.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NamedTuple, NoReturn

import typer

from fxsplit.errors import Terminated, UsageError
from fxsplit.spec import RunSpec, from_text, read_environment, read_recipe, read_values, resolve

from . import render
from .options import with_spec_options

TRAIN_FIELDS = tuple(item.name for item in fields(RunSpec) if item.name != "model")
INSPECT_FIELDS = (
    *("stem", "data", "img_size", "batch_size"),
    *("schedule", "epochs", "epochs_total", "parts", "at", "balance"),
)

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="timm:NAME, torchvision:NAME, paper:NAME, file.py:FACTORY or pkg.module:FACTORY; "
        "may be left to the recipe.",
        show_default=False,
    ),
]
Recipe = Annotated[Path | None, typer.Option("--config", "-c", metavar="RECIPE", help="Read options from a recipe.")]
LayerToLayer = Annotated[
    bool,
    typer.Option("--l2l", help="The same as --schedule l2l.", rich_help_panel="Layer-to-layer", metavar=""),
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
    """Train a model, layer-to-layer or by the standard method.

    The command line wins over FXSPLIT_* variables, such as FXSPLIT_BATCH_SIZE, and they over the recipe.
    """
    spec = _resolve(model, config, l2l, given)
    if print_config:
        return Job(partial(render.write, spec.to_yaml()), verbose)
    view: render.View = "quiet" if quiet else "live" if progress else "plain"
    return Job(partial(_train, spec, view, as_json), verbose)


@with_spec_options(INSPECT_FIELDS)
def inspect(
    *,
    model: Model = None,
    config: Recipe = None,
    l2l: LayerToLayer = False,
    as_json: Json = False,
    verbose: Verbose = False,
    **given: Any,
) -> Job:
    """Show a model's partitions and the phases of a schedule, without training."""
    return Job(partial(_inspect, _resolve(model, config, l2l, given), as_json), verbose)


def _train(spec: RunSpec, view: render.View, as_json: bool) -> None:
    # What libraries print belongs beside the progress, not into the result.
    with render.observing(spec.model, view) as observer, redirect_stdout(sys.stderr), _terminable():
        from fxsplit import api

        report = api.train(spec, observer)
    if as_json:
        render.write_json(report.to_dict())
    else:
        render.render_report(report)


def _inspect(spec: RunSpec, as_json: bool) -> None:
    with redirect_stdout(sys.stderr):
        from fxsplit import api

        inspection = api.inspect(spec)
    if as_json:
        render.write_json(render.inspection_to_dict(inspection))
    else:
        render.render_inspection(inspection)


def _resolve(model: str | None, config: Path | None, l2l: bool, given: dict[str, Any]) -> RunSpec:
    options = {
        name: from_text(name, value) if isinstance(value, str) else value
        for name, value in {"model": model, **given}.items()
        if value is not None
    }
    if l2l and options.setdefault("schedule", "l2l") != "l2l":
        raise UsageError(f"--l2l means --schedule l2l and contradicts --schedule {options['schedule']}")
    recipe = read_recipe(config) if config else {}
    return resolve(recipe, read_environment(os.environ), read_values(options))


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
