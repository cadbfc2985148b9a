"""The strict reading of what a run is asked for: recipes, the environment, and layers of which later ones win."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxsplit.errors import MOST_SHOWN, UsageError, joined, nearest, printable, shortened, shown, shown_path
from fxsplit.options import key
from fxsplit.plain_data import read_yaml
from fxsplit.spec.run_spec import KINDS, RunSpec, layered, read_fields

ENVIRONMENT_PREFIX = "FXSPLIT_"


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read the values in a recipe file, by field name.

    Raises UsageError when the file cannot be read, is not a YAML mapping, or holds an unknown key or a wrong
    value.
    """
    recipe = read_yaml(path, "recipe")
    if not isinstance(recipe, dict):
        raise UsageError(f"the recipe {shown_path(path)} must be a mapping, with one 'key: value' a line")
    return read_values(recipe, source=f"the recipe {shown_path(path)}")


def read_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Read the values in `FXSPLIT_*` variables, by field name.

    Raises UsageError when such a variable is unknown or has a wrong value.
    """
    given = {name: text for name, text in environ.items() if name.startswith(ENVIRONMENT_PREFIX)}
    known = {f"{ENVIRONMENT_PREFIX}{name.upper()}": name for name in KINDS}
    if unknown := [name for name in given if name not in known]:
        raise UsageError(
            joined(
                [
                    f"the variable {printable(shortened(name, MOST_SHOWN))} is not known{nearest(name, known)}"
                    for name in unknown
                ]
            )
        )
    values = {known[name]: from_text(known[name], text) for name, text in given.items()}
    return read_values(values, source="the environment")


def from_text(name: str, text: str) -> object:
    """Convert text to the type of a field. Text that has no such meaning is returned, for the error to show."""
    kind = KINDS[name].type
    if kind is bool:
        return {"1": True, "true": True, "0": False, "false": False}.get(text.lower(), text)
    if kind is int:
        try:
            return int(text)
        except ValueError:
            return text
    return text


def read_values(values: Mapping[Any, object], *, source: str = "") -> dict[str, Any]:
    """Read values by field name, from a mapping whose keys may have hyphens or underscores.

    Raises UsageError when a key is unknown or given twice, or when a value is wrong; its message begins with `source`,
    which says where the values come from.
    """
    named: dict[str, object] = {}
    sentences = []
    for given, value in values.items():
        name = given.replace("-", "_") if isinstance(given, str) else ""
        if name not in KINDS:
            sentences.append(f"the key {shown(given)} is not known{nearest(key(name), RunSpec.keys())}")
        elif name in named:
            sentences.append(f"{key(name)} is given twice")
        else:
            named[name] = value
    read, problems = read_fields(named)
    if sentences := [*sentences, *problems.values()]:
        raise UsageError(joined(sentences, f"{source}: " * bool(source)))
    return read


def resolve(*layers: Mapping[str, Any]) -> RunSpec:
    """Make a RunSpec from layers of values by field name, of which later ones win.

    A layer also drops values of earlier layers that its own make obsolete: `parts` drops `at`, and `at` drops `parts`;
    `plan` drops all that a plan file decides; `preset` drops `schedule`; `model_ema` drops `average`; a schedule that
    settles nothing drops the fields that say when partitions settle; and in the same way `parallel` and `augment` drop
    what only other values of theirs heed.

    Raises UsageError as RunSpec does.
    """
    return RunSpec(**layered(*layers))
