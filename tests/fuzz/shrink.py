"""The smallest case that fails like another one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tests.fuzz.case import Case, Unit
from tests.fuzz.harness import Result, run, runs


def shrink(result: Result, tries: int = 300) -> Result:
    """Leave out what can be left out of a case, as long as it fails with a message of the same beginning."""
    kind = _kind(result)
    progress = True
    while progress and tries > 0:
        progress = False
        for smaller in _smaller(result.case):
            tries -= 1
            if tries <= 0:
                break
            if runs(smaller):
                again = run(smaller)
                if again.status == "failed" and _kind(again) == kind:
                    result, progress = again, True
                    break
    return result


def _kind(result: Result) -> str:
    words = result.why.split(" differs ")[0].split()
    return " ".join(word for word in words[:5] if not any(letter.isdigit() for letter in word))


def _smaller(case: Case) -> Iterator[Case]:
    for name in ("stretches", "events", "cuts", "image", "flat"):
        held: tuple[Any, ...] = getattr(case, name)
        for index in range(len(held)):
            rest = held[:index] + held[index + 1 :]
            if (name == "stretches" and not rest) or (name in ("image", "flat") and not (rest or _other(case, name))):
                continue
            yield _after(case, **{name: rest})
        if name in ("image", "flat"):
            for index, unit in enumerate(held):
                for inner in _inner(unit):
                    yield replace(case, **{name: (*held[:index], *inner, *held[index + 1 :])})
    for name in ("inputs", "outputs"):
        if getattr(case, name) != "tensor":
            yield replace(case, **{name: "tensor"})
    for option in sorted(case.options):
        if option != "double":
            yield replace(case, options=case.options - {option})
    for index, stretch in enumerate(case.stretches):
        for change in ({"role": "everything"}, {"recompute": None}, {"segmented": False}, {"steps": 1}):
            if any(getattr(stretch, key) != value for key, value in change.items()):
                changed = replace(stretch, **change)  # type: ignore[arg-type]
                yield _after(case, stretches=(*case.stretches[:index], changed, *case.stretches[index + 1 :]))


def _after(case: Case, **changes: Any) -> Case:
    """With events at steps that are still there."""
    changed = replace(case, **changes)
    steps = sum(stretch.steps for stretch in changed.stretches)
    return replace(changed, events=tuple(replace(each, step=min(each.step, steps - 1)) for each in changed.events))


def _other(case: Case, name: str) -> bool:
    return bool(case.image if name == "flat" else True)


def _inner(unit: Unit) -> Iterator[tuple[Unit, ...]]:
    """Smaller forms of a unit that holds others: these alone, or all but one of them."""
    if unit.children:
        yield unit.children
    for index in range(len(unit.children)):
        if len(unit.children) > 1:
            yield (replace(unit, children=unit.children[:index] + unit.children[index + 1 :]),)
        for inner in _inner(unit.children[index]):
            yield (replace(unit, children=(*unit.children[:index], *inner, *unit.children[index + 1 :])),)
