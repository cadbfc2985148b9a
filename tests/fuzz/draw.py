"""From a seed to a case: one seed gives one case, always the same."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from random import Random

from tests.fuzz.case import Case, Event, Stretch, Unit
from tests.fuzz.events import EVENTS
from tests.fuzz.source import source_of
from tests.fuzz.units import NESTING, STATELESS, UNITS

BASIC = ("affine", "norm", "sample norm", "activation", "function")
ROLES = ("everything", "settled", "frozen end", "window")
CONTAINERS = ("tuple", "list", "dict", "named tuple", "dataclass")
OWN_CONTAINERS = ("own dict", "user dict", "own list", "object")
# Each of these is in a case with the probability given.
OPTIONS: Mapping[str, float] = {
    "own train": 0.06,
    "early output": 0.15,
    "input gradient": 0.25,
    "two backwards": 0.1,
    "autocast around": 0.08,
    "evaluation between": 0.4,
    "evaluation with gradients": 0.15,
    "inference mode": 0.1,
    "optimizer given": 0.5,
    "kept gradients": 0.2,
    "release": 0.2,
    "modes": 0.5,
    "double": 0.2,
    "other batch size": 0.3,
}

FEATURES = (
    *UNITS,
    *EVENTS,
    *ROLES,
    *OPTIONS,
    "recompute",
    *(f"input:{kind}" for kind in (*CONTAINERS, *OWN_CONTAINERS)),
    *(f"output:{kind}" for kind in (*CONTAINERS, *OWN_CONTAINERS)),
)


def draw(seed: int, features: Collection[str] = FEATURES) -> Case:
    """The case of a seed, made of these features alone; plain layers and a phase in which all trains always count."""
    dice = Random(seed)
    known = {*features, *BASIC, "everything"}
    image = _units(dice, known, 1 + _few(dice), depth=0, image=True) if dice.random() < 0.5 else ()
    flat = _units(dice, known, (0 if image else 1) + _few(dice), depth=0, image=False)
    stretches = _stretches(dice, known)
    steps = sum(stretch.steps for stretch in stretches)
    options = {name for name, chance in OPTIONS.items() if dice.random() < chance and name in known}
    events = _events(dice, known, steps)
    case = Case(
        seed=seed,
        image=image,
        flat=flat,
        inputs=_form(dice, known, "input"),
        outputs=_form(dice, known, "output"),
        cuts=tuple(dice.random() for _ in range(dice.choice([1, 2, 2, 3, 4]))),
        stretches=stretches,
        events=events,
        options=frozenset(options),
    )
    if "shape question" in case.features and case.outputs in ("dataclass", *OWN_CONTAINERS):
        # Beside such an output the batch size is a fixed one.
        case = replace(case, options=case.options - {"other batch size"})
    if "training branch" in case.features:
        # What a settled partition returns early, and only evaluation makes, has no name in the training that follows.
        case = replace(case, options=case.options - {"early output"})
    if "checkpoint" in case.features:
        # One of the reentrant kind gives no gradients to weights where its input wants none, in evaluation as well.
        case = replace(case, options=case.options - {"evaluation with gradients"})
    if case.features & {"settled", "window"} and any(word in source_of(case) for word in FOLDED):
        # A norm in the weights before it is equal within rounding, which double precision makes small.
        return replace(case, options=case.options | {"double"})
    return case


# What a settled partition computes with other weights, or in another layout.
FOLDED = ("Conv2d", "BatchNorm", "batch_norm")


def _few(dice: Random) -> int:
    return dice.choice([0, 0, 1, 1, 2])


def _units(dice: Random, known: Collection[str], count: int, *, depth: int, image: bool) -> tuple[Unit, ...]:
    special = [kind for kind in UNITS if kind in known and kind not in BASIC and (depth < 2 or kind not in NESTING)]
    made = []
    for _ in range(count):
        kind = dice.choice(special) if special and dice.random() < 0.6 else dice.choice(BASIC)
        if kind == "in place" or kind.startswith("in-place"):
            # On a fresh value, as people do it: autograd may have kept others.
            made.append(Unit(dice.choice(("affine", "norm")), dice.randrange(1 << 16)))
        made.append(_unit(dice, known, kind, depth, image))
    return tuple(made)


def _unit(dice: Random, known: Collection[str], kind: str, depth: int, image: bool) -> Unit:
    choice = dice.randrange(1 << 16)
    if kind not in NESTING:
        return Unit(kind, choice)
    count = dice.choice([1, 1, 2])
    if kind == "checkpoint":
        return Unit(kind, choice, tuple(Unit(dice.choice(STATELESS), dice.randrange(1 << 16)) for _ in range(count)))
    children = _units(dice, known, count, depth=depth + 1, image=image)
    return Unit(kind, choice, children)


def _stretches(dice: Random, known: Collection[str]) -> tuple[Stretch, ...]:
    return tuple(
        Stretch(
            role=dice.choice([role for role in ROLES if role in known]),
            place=dice.random(),
            width=dice.random(),
            recompute=dice.random() if "recompute" in known and dice.random() < 0.3 else None,
            segmented=dice.random() < 0.4,
            fresh_optimizer=dice.random() < 0.2,
            steps=dice.choice([1, 1, 2]),
        )
        for _ in range(dice.choice([1, 2, 2, 3]))
    )


def _events(dice: Random, known: Collection[str], steps: int) -> tuple[Event, ...]:
    kinds = [kind for kind in EVENTS if kind in known]
    count = dice.choice([0, 0, 0, 1, 1, 2]) if kinds else 0
    drawn = [Event(dice.choice(kinds), dice.randrange(1 << 16), dice.randrange(steps)) for _ in range(count)]
    return tuple(sorted(drawn, key=lambda event: event.step))


def _form(dice: Random, known: Collection[str], side: str) -> str:
    kinds = [kind for kind in (*CONTAINERS, *OWN_CONTAINERS) if f"{side}:{kind}" in known]
    return dice.choice(kinds) if kinds and dice.random() < 0.3 else "tensor"


# What is known to go wrong: not drawn unless asked for.
UNSOUND: frozenset[str] = frozenset()
SOUND = tuple(feature for feature in FEATURES if feature not in UNSOUND)
