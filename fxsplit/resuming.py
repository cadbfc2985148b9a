"""Going on with a run: which one is meant, and what may be asked for otherwise than before."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from fxsplit.errors import UsageError, shown_path
from fxsplit.options import key
from fxsplit.paths import expanded
from fxsplit.plan.planfile import PlanFile
from fxsplit.spec import RunSpec, read_recipe, read_values, resolve

AUTO = "auto"
RECIPE = "args.yaml"
CHECKPOINTS = "checkpoints"

# Options that may differ when a run goes on, and what follows.
ROUNDING = "numbers may differ by rounding from here on"
MAY_DIFFER = {
    "epochs": "the last phase lasts longer",
    "epochs_total": "the last phase lasts longer",
    "device": ROUNDING,
    "parallel": ROUNDING,
    "pipeline_processes": ROUNDING,
    "pipeline_schedule": "",
    "deterministic": ROUNDING,
    "cuda_graphs": ROUNDING,
    "settled_offload": ROUNDING,
    "torchcompile": ROUNDING,
    "cache": ROUNDING,
    "cache_limit": ROUNDING,
    "data_dir": "",
    "workers": "",
    "max_bad_samples": "",
    "on_nan": "",
    "prove": "",
    "log_interval": "",
    "checkpoint_every": "",
    "checkpoint_keep": "",
}
DEFAULT_OUTPUT = next(each.default for each in fields(RunSpec) if each.name == "output")
# Where the run's folder is: it goes on there, wherever that is now.
PLACE = ("output", "experiment")


def run_folder_of(path: str | Path) -> Path:
    """Return the folder of the run that `path` is, or that a checkpoint at `path` belongs to.

    Raises UsageError when there is none.
    """
    given = expanded(path)
    folder = given.parent if os.path.isfile(given) else given
    folder = folder.parent if folder.name == CHECKPOINTS else folder
    if not os.path.isfile(folder / RECIPE):
        lack = f"it has no {RECIPE}" if os.path.isdir(folder) else "there is no such folder"
        raise UsageError(f"there is no run to go on with at {shown_path(path)}: {lack}")
    return folder


def spec_of(folder: Path) -> RunSpec:
    """Read what the run in a folder was asked for. Raises UsageError as `read_recipe` does."""
    return resolve(read_recipe(folder / RECIPE))


def spec_from(flat: Mapping[str, Any]) -> RunSpec:
    """Make a RunSpec from what `RunSpec.to_flat` returned. Raises UsageError when it is none."""
    return RunSpec(**read_values(flat, source="the checkpoint"))


def differing(before: RunSpec, now: RunSpec) -> list[str]:
    """Say what a run that goes on is asked for otherwise than before, and what follows; one sentence each.

    Raises UsageError when that is something that cannot change.
    """
    names = [each.name for each in fields(RunSpec) if getattr(before, each.name) != getattr(now, each.name)]
    names = [name for name in names if name not in PLACE]
    # The plan stays as it is, so another number would not be heeded.
    may_differ = {**MAY_DIFFER, **({"memory_budget": "where memory runs out"} if now.memory_budget == "auto" else {})}
    if fixed := [name for name in names if name not in may_differ]:
        words = ", ".join(_change(name, before, now) for name in fixed)
        raise UsageError(
            f"{words}: a run goes on as it began; leave {'it' if len(fixed) == 1 else 'them'} out, or begin another "
            "run without --resume"
        )
    return [": ".join(filter(None, (_change(name, before, now), may_differ[name]))) for name in names]


def _change(name: str, before: RunSpec, now: RunSpec) -> str:
    def words(spec: RunSpec) -> str:
        value = getattr(spec, name)
        return "not given" if value is None else ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    return f"{key(name)} was {words(before)} and is now {words(now)}"


def lengthened(plan: PlanFile, before: RunSpec, now: RunSpec) -> PlanFile:
    """Return the plan of a run for the epochs that are asked for now: its last phase lasts longer.

    Raises UsageError when they are fewer, or when epochs are those of each phase.
    """
    if now.epochs_total != before.epochs_total:
        name, asked = "epochs_total", now.epochs_total
    elif now.epochs != before.epochs and plan.epochs == before.epochs:
        name, asked = "epochs", now.epochs
    elif now.epochs != before.epochs:
        raise UsageError(
            f"{_change('epochs', before, now)}, but the run has {plan.epochs} epochs in {len(plan.phases)} phases; say "
            "by --epochs-total how long it is to be"
        )
    else:
        return plan
    if asked is None or asked < plan.epochs:
        raise UsageError(
            f"{_change(name, before, now)}, but the run has {plan.epochs} epochs; one that goes on can become longer, "
            "not shorter"
        )
    *phases, last = plan.phases
    longer = replace(last, epochs=last.epochs + asked - plan.epochs)
    return replace(plan, phases=(*phases, longer))


def newest_run(given: Mapping[str, Any], *, since: float = 0.0) -> Path | None:
    """Find the run that `--resume auto` means: the newest in the output folder that can go on as is asked.

    With an experiment's name it is the run of that name. Returns None when there is none.

    Args:
        given: the options that are given, by field name.
        since: leave out runs that began before, in seconds since 1970.
    """
    output = expanded(given.get("output", DEFAULT_OUTPUT))
    runs = [folder for folder in _runs(output) if (folder / RECIPE).stat().st_mtime >= since]
    if name := given.get("experiment"):
        return output / name if output / name in runs else None
    for folder in sorted(runs, key=_time_of, reverse=True):
        try:
            differing(spec_of(folder), resolve(read_recipe(folder / RECIPE), given))
        except UsageError:
            continue
        return folder
    return None


def free_name(output: str | Path, name: str) -> str:
    """Return `name`, or the first of `name-2`, `name-3`, ... of which there is nothing in the output folder yet."""
    folder, free, number = expanded(output), name, 1
    while os.path.lexists(folder / free):
        number += 1
        free = f"{name}-{number}"
    return free


def _runs(output: Path) -> Iterator[Path]:
    yield from (recipe.parent for recipe in output.glob(f"*/{RECIPE}"))


def _time_of(folder: Path) -> float:
    return (
        max((each.stat().st_mtime for each in (folder / CHECKPOINTS).glob("*.safetensors")), default=0.0)
        or (folder / RECIPE).stat().st_mtime
    )
