"""RunSpec: fields that are complete, read strictly, and do not contradict each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, get_type_hints

import yaml

from fxsplit.errors import UsageError, joined, nearest
from fxsplit.options import key, kind_of, read_value
from fxsplit.plan.planfile import read_options
from fxsplit.presets import PRESETS, preset
from fxsplit.spec.conflicts import HEEDED, PLANNED, conflicts
from fxsplit.spec.fields import DEFAULTS, Fields

# By field, those whose values from earlier layers are dropped when a later layer gives it: they decide the same thing.
WITHDRAWN = {
    "parts": ("at",),
    "at": ("parts",),
    "plan": (*PLANNED, "epochs", "memory_aim"),
    "preset": ("schedule",),
    "model_ema": ("average",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec(Fields):
    """Describes a training run. Every field is also a key of a recipe and an option of `fxsplit train`.

    A field that is not given has the value of the `preset` for this number of epochs, or else the default below;
    `preset="l2l"` is what `--l2l` means. With a `plan`, preset and epochs are those of the file unless they are given.

    Raises UsageError, which names all faults at once, when a value has another type than its field, is not one that the
    field allows, or contradicts another one.
    """

    if not TYPE_CHECKING:  # type checkers see the constructor that dataclass makes, which takes the same arguments

        def __init__(self, **given: Any) -> None:
            """Fill the fields from what is `given`, then plan file, preset and defaults, and check them."""
            if unknown := [name for name in given if name not in KINDS]:
                raise TypeError(f"RunSpec has no field {unknown[0]!r}{nearest(unknown[0], KINDS)}")
            merged = DEFAULTS | _under(given)
            values, problems = read_fields(merged)
            for name, value in (merged | values).items():
                object.__setattr__(self, name, value)
            if sentences := [*problems.values(), *conflicts(self, wrong=problems.keys())]:
                raise UsageError(joined(sentences))

    @classmethod
    def keys(cls) -> tuple[str, ...]:
        """List the keys of a recipe, hyphenated, in the order of the fields."""
        return tuple(key(item.name) for item in fields(cls))

    def to_flat(self) -> dict[str, Any]:
        """Return the recipe of this run: every key, with plain YAML values."""
        values = {key(item.name): getattr(self, item.name) for item in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def to_yaml(self) -> str:
        """Write the recipe as text. Reading it back gives an equal RunSpec."""
        return yaml.safe_dump(self.to_flat(), sort_keys=False)


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge layers of values by field name, as `resolve` describes."""
    merged: dict[str, Any] = {}
    for layer in layers:
        given = [name for name in WITHDRAWN if layer.get(name, DEFAULTS[name]) != DEFAULTS[name]]
        gone = [name for each in given for name in WITHDRAWN[each]]
        gone += [
            other for name, values, others in HEEDED if layer.get(name, values[0]) not in values for other in others
        ]
        merged = {name: value for name, value in merged.items() if name not in gone} | dict(layer)
    return merged


def _under(given: Mapping[str, Any]) -> dict[str, Any]:
    """Complete what is given with the options of the preset; preset and epochs may come from a plan file."""
    path = given.get("plan")
    of_file = {}
    if path and isinstance(path, str) and not {"preset", "epochs"} <= given.keys():
        of_file = read_options(path)
    known = {**DEFAULTS, **of_file, **given}
    name, epochs = known["preset"], known["epochs_total"] or known["epochs"]
    # A wrong preset or number of epochs is refused later, when the fields are read.
    of_preset = preset(name, epochs) if name in list(PRESETS) and isinstance(epochs, int) else {}
    options = {name: value for name, value in given.items() if name != "preset"}
    return of_file | layered(of_preset, options) | dict(given)


def read_fields(values: Mapping[str, object]) -> tuple[dict[str, Any], dict[str, str]]:
    """Read the values that suit their fields, and write a sentence, by name, about each that does not."""
    read: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for name, value in values.items():
        try:
            read[name] = read_value(name, value, KINDS[name], _METADATA[name])
        except ValueError as error:
            problems[name] = str(error)
    return read, problems


KINDS = {name: kind_of(hint) for name, hint in get_type_hints(RunSpec).items()}
_METADATA = {item.name: item.metadata for item in fields(RunSpec)}
