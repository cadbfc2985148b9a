"""What an arm's name means: the options by which its runs differ from those of other arms."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fxsplit.errors import UsageError, nearest
from fxsplit.plan.schedule import SCHEDULES
from fxsplit.presets import PRESETS
from fxsplit.spec import DEFAULTS, RunSpec, read_recipe, resolve

STANDARD: Mapping[str, Any] = {"preset": "none", "schedule": "standard"}
REGULARISED, CHECKPOINTED = "regularised", "checkpointed"
# Arms that take something over from the one that is tried.
CONTROLS = ("standard", REGULARISED, CHECKPOINTED)
REGULARISERS = tuple(item.name for item in fields(RunSpec) if item.metadata["group"] == "Regularisation")
RECIPES = (".yaml", ".yml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """Describes an arm.

    Args:
        name: what it is called, without epochs.
        under: options that those of all arms win over: of its recipe.
        over: options that win over those of all arms.
        epochs: of the whole run; None for as many as the options say.
    """

    name: str
    under: Mapping[str, Any]
    over: Mapping[str, Any]
    epochs: int | None = None

    @property
    def label(self) -> str:
        """The name, with the epochs where they are fixed."""
        return self.name if self.epochs is None else f"{self.name}@{self.epochs}"

    def lasting(self, epochs: int | None) -> Arm:
        """Return the same arm with another length."""
        return replace(self, epochs=epochs)

    def spec(self, run: Mapping[str, Any], **given: Any) -> RunSpec:
        """Resolve what a run of it is asked for: `run` is what all arms share, and `given` wins over everything."""
        length = {} if self.epochs is None else {"epochs_total": self.epochs}
        return resolve(self.under, run, self.over, length, given)


def read_arms(
    texts: Sequence[str], run: Mapping[str, Any], of_arms: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[Arm, ...]:
    """Read the arms of a comparison whose runs share the options `run`; `of_arms` has those of single arms.

    The last arm that is neither standard nor a control of it is tried: `regularised` gets its regularisers, and
    `checkpointed` the memory that it keeps within. Raises UsageError when a name means nothing, and when there is
    nothing to take over.
    """
    named = {text: _divided(text) for text in texts}
    owned = of_arms or {}
    arms = {
        text: _arm(name, epochs, owned.get(text, {}))
        for text, (name, epochs) in named.items()
        if name not in (REGULARISED, CHECKPOINTED)
    }
    tried = next((arm for arm in reversed(arms.values()) if arm.name not in CONTROLS), None)
    for text, (name, epochs) in named.items():
        if text not in arms:
            if tried is None:
                raise UsageError(
                    f"{name} takes over from the arm that is tried, and there is none; name one, such as l2l"
                )
            like = tried if epochs is None else tried.lasting(epochs)
            arms[text] = _control(name, epochs, like.spec(run, model="any"), owned.get(text, {}))
    return tuple(arms[text] for text in texts)


def _divided(text: str) -> tuple[str, int | None]:
    found = re.fullmatch(r"(.+)@([1-9]\d*)", text)
    return (found[1], int(found[2])) if found else (text, None)


def _arm(name: str, epochs: int | None, own: Mapping[str, Any]) -> Arm:
    if name.endswith(RECIPES):
        return Arm(name=Path(name).stem, under=read_recipe(name), over=own, epochs=epochs)
    if name in PRESETS and name != "none":
        return Arm(name=name, under={}, over={"preset": name, **own}, epochs=epochs)
    if name in SCHEDULES:
        return Arm(name=name, under={}, over={"preset": "none", "schedule": name, **own}, epochs=epochs)
    known = (
        *CONTROLS,
        *(each for each in PRESETS if each != "none"),
        *(each for each in SCHEDULES if each not in ("standard", *PRESETS)),
    )
    raise UsageError(f"there is no arm {name!r}{nearest(name, known)} (have: {', '.join(known)}, and recipes)")


def _control(name: str, epochs: int | None, tried: RunSpec, own: Mapping[str, Any]) -> Arm:
    if name == REGULARISED:
        taken = {each: getattr(tried, each) for each in REGULARISERS}
        if all(value == DEFAULTS[each] for each, value in taken.items()):
            raise UsageError(
                "regularised takes the regularisers of the arm that is tried, the last one, which has none; name one "
                "last that has some, such as l2l, or leave regularised out"
            )
    else:
        budget = tried.memory_aim if tried.memory_budget is None else tried.memory_budget
        if budget is None:
            raise UsageError(
                "checkpointed keeps within the memory of the arm that is tried, which has no memory budget"
            )
        taken = {"memory_budget": budget}
    return Arm(name=name, under={}, over={**STANDARD, **taken, **own}, epochs=epochs)
