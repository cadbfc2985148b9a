"""A case of the fuzz: plain data that is drawn from a seed, made smaller by shrinking, and written down as a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Unit:
    """A few statements of forward. `choice` seeds what is left open, such as which earlier value a skip adds."""

    kind: str
    choice: int
    children: tuple[Unit, ...] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """Something that the user does to the model before a step."""

    kind: str
    choice: int
    step: int


@dataclass(frozen=True, slots=True)
class Stretch:
    """A phase, before the partitions are known: places from 0 (the first cut) to 1, and how many steps it lasts."""

    role: str
    place: float
    width: float
    recompute: float | None
    segmented: bool
    fresh_optimizer: bool
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Everything that happens in one case. `image` units take (N, C, H, W), `flat` ones (N, F)."""

    seed: int
    image: tuple[Unit, ...]
    flat: tuple[Unit, ...]
    inputs: str
    outputs: str
    cuts: tuple[float, ...]
    stretches: tuple[Stretch, ...]
    events: tuple[Event, ...]
    options: frozenset[str]

    @property
    def features(self) -> frozenset[str]:
        """The names of all that the case is made of."""
        found = {f"input:{self.inputs}", f"output:{self.outputs}", *self.options}
        found |= {event.kind for event in self.events} | {stretch.role for stretch in self.stretches}
        todo = [*self.image, *self.flat]
        while todo:
            unit = todo.pop()
            found.add(unit.kind)
            todo.extend(unit.children)
        return frozenset(found)
