"""Presets: options that are switched on together, depending on the length of the run. A table for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fxsplit.errors import UsageError, nearest


class Setting(NamedTuple):
    """The value that a preset gives to a field of RunSpec, in runs of at least so many epochs."""

    field: str
    value: Any
    from_epochs: int = 1


NO_PRESET = "none"

# Of several settings of a field, the last one counts for which the run is long enough. The values come from the
# experiments in docs/results.
PRESETS: Mapping[str, tuple[Setting, ...]] = {
    NO_PRESET: (),
    "l2l": (
        Setting("schedule", "settle-far"),
        Setting("by", "natural"),
        Setting("smoothing", 0.1),
        # They cost accuracy in 20 epochs. In 60 the network fits all its images by the middle, and they gain some.
        Setting("soft_targets", 0.8, from_epochs=40),
        Setting("soft_from", "mean"),
        Setting("soft_temperature", 2.0),
        # In 10 epochs weights move fast to the end, and a longer mean would lag behind them; in 20 it does not.
        Setting("average", 0.1),
        Setting("average", 0.25, from_epochs=15),
        Setting("recalibrate", True),
        Setting("memory_aim", 0.6),
    ),
    "finetune": (
        Setting("schedule", "finetune"),
        Setting("by", "natural"),
        Setting("sched", "cosine"),
    ),
}


def preset(name: str, epochs: int) -> dict[str, Any]:
    """Look up what a preset switches on in a run of `epochs`: values by field of RunSpec.

    Raises UsageError when there is no such preset.
    """
    if name not in PRESETS:
        raise UsageError(f"there is no preset {name!r}{nearest(name, PRESETS)} (have: {', '.join(PRESETS)})")
    return {setting.field: setting.value for setting in PRESETS[name] if epochs >= setting.from_epochs}
