"""fxsplit compare."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fxsplit.comparing.arms import RECIPES
from fxsplit.comparison import OPTIONS, ComparisonSpec, read_comparison
from fxsplit.errors import UsageError, shown_path
from fxsplit.plain_data import read_yaml
from fxsplit.records import json_text
from fxsplit.resuming import RECIPE
from fxsplit.spec import DEFAULTS, RunSpec, from_text, read_environment, read_recipe, read_values
from fxsplit.trust import refuse_recipe

from .. import comparing, tables
from ..options import with_spec_options
from ..streams import result_alone
from ..terminal import write
from .job import Job, Json, TrustCode, TrustRecipe, Verbose, terminable

HELP = {item.name: item.metadata for item in OPTIONS}
# Options that each arm, seed or comparison decides itself.
DECIDED = ("model", "seed", "output", "experiment", "dry_run", "ensemble", "preset", "schedule")
RUN_FIELDS = tuple(item.name for item in fields(RunSpec) if item.name not in DECIDED)


def _option(name: str, metavar: str, *flags: str) -> Any:
    default = next(item.default for item in OPTIONS if item.name == name)
    shown = ",".join(default) if isinstance(default, tuple) else default
    note = f" [dim]\\[default: {shown}][/dim]" if shown else ""
    return typer.Option(
        f"--{name}", *flags, help=HELP[name]["help"] + note, metavar=metavar, rich_help_panel="Comparison"
    )


@with_spec_options(RUN_FIELDS)
def compare(
    *,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...",
            help="Models to compare the arms on, or folders of finished runs to compare as they are; may be left to "
            "the recipe.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", "-c", metavar="RECIPE", help="Read options from a recipe: of a comparison, or of a run."
        ),
    ] = None,
    arms: Annotated[str | None, _option("arms", "NAME,...")] = None,
    seeds: Annotated[str | None, _option("seeds", "N")] = None,
    match: Annotated[str | None, _option("match", "NAME,...")] = None,
    margin: Annotated[str | None, _option("margin", "NUMBER")] = None,
    output: Annotated[str | None, _option("output", "FOLDER", "-o")] = None,
    name: Annotated[str | None, _option("name", "TEXT")] = None,
    jobs: Annotated[int | None, _option("jobs", "INTEGER")] = None,
    devices: Annotated[str | None, _option("devices", "NAME,...")] = None,
    trust_recipe: TrustRecipe = False,
    trust_code: TrustCode = False,
    as_json: Json = False,
    verbose: Verbose = False,
    **given: Any,
) -> Job:
    """Compare training methods by accuracy, time and memory, over several seeds, each run in a process of its own.

    A comparison that was interrupted goes on when it is started again. The exit code is 4 if runs cannot be compared,
    since they are of other data than each other's.
    """
    recipe = _read(config) if config else {}
    asked = {
        "models": models, "arms": arms, "seeds": seeds, "match": match, "margin": margin, "output": output,
        "name": name, "jobs": jobs, "devices": devices,
    }  # fmt: skip
    own = {**recipe, **{key: value for key, value in asked.items() if value is not None}}
    options = {key: from_text(key, value) if isinstance(value, str) else value for key, value in given.items()}
    given = read_values({key: value for key, value in options.items() if value is not None})
    given = {**read_environment(os.environ), **given}
    if not trust_recipe:
        _refuse(recipe, own, models or [], given)
    own["run"] = {**recipe.get("run", {}), **given}
    own["models"], folders = _divided(own.get("models", []))
    spec = ComparisonSpec(**own)
    return Job(partial(_compare, spec, folders, trust_code, as_json), verbose)


def _read(path: Path) -> dict[str, Any]:
    """Read a recipe, of a comparison or of a run."""
    values = read_yaml(path, "recipe")
    if not isinstance(values, dict):
        raise UsageError(f"the recipe {shown_path(path)} must be a mapping, with one 'key: value' a line")
    return read_comparison(values, source=f"the recipe {shown_path(path)}")


def _refuse(recipe: dict[str, Any], own: dict[str, Any], models: Collection[str], given: Collection[str]) -> None:
    """Raise UsageError when a recipe, or one of an arm, runs code or writes where nobody has said that it may.

    Args:
        recipe: the values of the recipe, as those of a ComparisonSpec.
        own: those of the comparison that is asked for.
        models: those that the user names.
        given: the options of runs that the user gives.
    """
    shared, of_arms = recipe.get("run", {}), recipe.get("of_arms", {}).values()
    named = recipe.get("models", [])
    for model in [] if models else [named] if isinstance(named, str) else named:
        refuse_recipe({**shared, "model": model}, given, DEFAULTS)
    arms = own.get("arms", [])
    files = [arm.partition("@")[0] for arm in (arms.split(",") if isinstance(arms, str) else arms)]
    for values in (shared, *of_arms, *(read_recipe(file) for file in files if file.endswith(RECIPES))):
        refuse_recipe(values, (*given, "model", "output"), DEFAULTS)


def _divided(names: str | list[str]) -> tuple[list[str], list[str]]:
    """Tell models from folders of runs. Raises UsageError when both are given."""
    given = [names] if isinstance(names, str) else list(names)
    folders = [each for each in given if (Path(each) / RECIPE).is_file()]
    if folders and len(folders) < len(given):
        models = [each for each in given if each not in folders]
        raise UsageError(f"{', '.join(models)} cannot be compared with folders of runs: give models, or folders, alone")
    return ([], folders) if folders else (given, [])


def _compare(spec: ComparisonSpec, folders: list[str], trust_code: bool, as_json: bool) -> None:
    with comparing.observing(spec) as observer, result_alone(), terminable():
        from fxsplit.comparing import compare as verbs

        try:
            found = (
                verbs.compare_folders(folders, spec)
                if folders
                else verbs.compare(spec, observer, trust_code=trust_code)
            )
        except KeyboardInterrupt as error:
            raise type(error)("what is done is kept, and the same command goes on with the rest") from error
    if as_json:
        write(json_text(found.to_dict()))
    else:
        tables.comparison(found, str(Path(spec.output) / spec.name))
