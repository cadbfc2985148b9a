"""What a preset switches on, by the length of the run: a table a preset, and the one place where it stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fxsplit.errors import UsageError, nearest


class Setting(NamedTuple):
    """The value that a preset gives to a field of RunSpec, in runs of at least so many epochs."""

    field: str
    value: Any
    from_epochs: int = 1


# Of two settings of a field the later one holds, where the run is long enough for it. Found by the experiments of
# docs/results.
PRESETS: Mapping[str, tuple[Setting, ...]] = {
    "none": (),
    "l2l": (
        Setting("schedule", "settle-far"),
        Setting("by", "natural"),
        Setting("smoothing", 0.1),
        # In 20 epochs they cost accuracy; in 60 the network knows all its images by the middle, and they give some.
        Setting("soft_targets", 0.8, from_epochs=40),
        Setting("soft_from", "mean"),
        Setting("soft_temperature", 2.0),
        # In 10 epochs the weights still move fast, and a longer mean lags behind; in 20 it no longer does.
        Setting("average", 0.1),
        Setting("average", 0.25, from_epochs=15),
        Setting("recalibrate", True),
        Setting("memory_aim", 0.6),
    ),
}


def preset(name: str, epochs: int) -> dict[str, Any]:
    """Look up what a preset switches on in a run of so many epochs: values by field of RunSpec.

    Raises UsageError when there is no such preset.
    """
    if name not in PRESETS:
        raise UsageError(f"there is no preset {name!r}{nearest(name, PRESETS)} (have: {', '.join(PRESETS)})")
    return {setting.field: setting.value for setting in PRESETS[name] if epochs >= setting.from_epochs}
