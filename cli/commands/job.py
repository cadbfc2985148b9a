"""What all commands share: what they return, and options that several of them have."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NamedTuple, NoReturn

import typer

from fxsplit.errors import Terminated, UsageError
from fxsplit.presets import PRESETS
from fxsplit.resuming import AUTO, RECIPE, differing, free_name, newest_run, run_folder_of
from fxsplit.spec import (
    DEFAULTS,
    PLANNED,
    RunSpec,
    beside_plan,
    from_text,
    read_environment,
    read_recipe,
    read_values,
    resolve,
)
from fxsplit.trust import refuse_recipe, refuse_run

from .. import completion

RULES = {item.name: item.metadata for item in fields(RunSpec)}
MODEL_FORMS = RULES["model"]["help"].rstrip(".")
Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help=f"{MODEL_FORMS}; may be left to the recipe.",
        show_default=False,
        autocompletion=completion.models,
    ),
]
Recipe = Annotated[Path | None, typer.Option("--config", "-c", metavar="RECIPE", help="Read options from a recipe.")]
TrustRecipe = Annotated[
    bool,
    typer.Option(
        "--trust-recipe",
        help="Let the recipe run a Python file as its model, and name folders outside of this one.",
        metavar="",
    ),
]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code",
        help="Run code that comes with a model of Hugging Face, or that a run names as its model.",
        metavar="",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Write the result as JSON.", metavar="")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show the traceback of an unexpected error.", metavar="")
]

Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="The folder of a run, its model.safetensors, or one of its checkpoints.",
        show_default=False,
        autocompletion=completion.runs,
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.", metavar="TEXT")]


class Job(NamedTuple):
    """What a command line asks for."""

    run: Callable[[], None]
    verbose: bool


def resolve_spec(model: str | None, config: Path | None, given: dict[str, Any], *, trust_recipe: bool) -> RunSpec:
    spec, _ = resolve_run(model, config, given, None, trust_recipe=trust_recipe)
    return spec


def resolve_run(
    model: str | None,
    config: Path | None,
    given: dict[str, Any],
    resume: str | None,
    *,
    trust_recipe: bool,
    trust_code: bool = False,
) -> tuple[RunSpec, str | None]:
    """Return what is asked for, and the run to go on with if there is one, whose options are those not given."""
    options = {
        name: from_text(name, value) if isinstance(value, str) else value
        for name, value in {"model": model, **given}.items()
        if value is not None and name not in PRESETS
    }
    for name in (name for name in PRESETS if given.get(name)):
        if options.setdefault("preset", name) != name:
            raise UsageError(f"--{name} means --preset {name} and contradicts --preset {options['preset']}")
    recipe = read_recipe(config) if config else {}
    layers = (recipe, read_environment(os.environ), read_values(options))
    own = _merged(layers[1:])
    if not trust_recipe:
        refuse_recipe(recipe, own, DEFAULTS)
    found = None
    if resume is not None:
        found = newest_run(_merged(layers)) if resume == AUTO else run_folder_of(resume)
    elif (since := _launched()) is not None:
        resume, found = AUTO, newest_run(_merged(layers), since=since)
    if found is not None:
        before = read_recipe(found / RECIPE)
        spec = resolve(before, *layers)
        differing(resolve(before), spec)  # or an error before torch is loaded
        named = (*own, *recipe) if trust_recipe else own
        refuse_run(spec.to_flat(), found, given=named, trust_code=trust_code)
        return spec, str(found) if resume == AUTO else resume
    if not any("model" in layer for layer in layers):
        raise UsageError(f"no model is given; name one here or in a recipe, as {MODEL_FORMS}")
    if (wanted := recipe.get("experiment")) and "experiment" not in own:
        layers[0]["experiment"] = free_name(_merged(layers).get("output", DEFAULTS["output"]), wanted)
    spec = resolve(*layers)
    if spec.plan and (beside := [name for name in PLANNED if name in options]):
        raise UsageError(beside_plan(beside))
    return spec, None


def _launched() -> float | None:
    """Return when the `torchrun` began that has started this process; None if none has.

    When a process dies it starts all of them anew, with the same words. They go on with the run that they began.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    import psutil  # only here: it takes a while to import

    return psutil.Process(os.getppid()).create_time()


def _merged(layers: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for layer in layers for name, value in layer.items()}


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end the work as an interruption does: with what there is saved."""

    def terminate(_signum: int, _frame: FrameType | None) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
