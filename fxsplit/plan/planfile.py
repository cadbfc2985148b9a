"""A plan as a file, for people to read, edit, review, compare and use again.

    "cuts":    ["layer2", "layer3"],                         what says where the model is cut, and
    "phases":  [{"from": null, "up_to": null, "epochs": 9},  which partitions train for how long
                {"from": "layer2", "up_to": null, "epochs": 6}],
    "derived": [{"partition": "layer2", "macs": 411041792}]  what follows from it: written, never believed

Phases name the cuts between which they train, so that a cut may be added or taken away without renumbering. Read
against a model, all else is worked out anew.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxsplit.errors import PartitionError, UsageError, nearest
from fxsplit.graph import Modes
from fxsplit.plan.cuts import places_of
from fxsplit.plan.partition import partition, wrong_places
from fxsplit.plan.schedule import Phase, Plan, saving_in_words

# Another one than that of Plan.to_dict, which has all fields of the partitions and is not made to be edited.
SCHEMA = 2
FIGURES = ("ops", "parameters", "macs", "activation_bytes", "boundary_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A phase by places: from the cut `begin` (the model's start where None) up to the cut `end` (its end).

    Up to the cut `recompute` no activations are kept, and if `segmented`, pieces of partitions are made again one after
    the other; a batch is taken in `micro_batches` parts.
    """

    begin: str | None
    end: str | None
    epochs: int
    fresh_optimizer: bool = False
    recompute: str | None = None
    segmented: bool = False
    micro_batches: int = 1

    def __str__(self) -> str:
        places = (("from", self.begin), ("up to", self.end))
        trains = " ".join(f"{word} {place}" for word, place in places if place is not None) or "all"
        epochs = "1 epoch" if self.epochs == 1 else f"{self.epochs} epochs"
        fresh = "fresh optimizer" * self.fresh_optimizer
        saving = saving_in_words(self.recompute, segmented=self.segmented, micro_batches=self.micro_batches)
        return ", ".join(filter(None, (trains, epochs, fresh, saving)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFile:
    """What a plan file says. `model`, `graph` (the digest) and `torch` tell what it was made with, or are empty.

    `figures` are those of each partition by name, in order; None where the cuts were edited since, or none are given.
    """

    model: str = ""
    graph: str = ""
    torch: str = ""
    schedule: str
    cuts: tuple[str, ...]
    phases: tuple[Window, ...]
    figures: Mapping[str, Mapping[str, int]] | None = None

    @classmethod
    def of(cls, plan: Plan, *, model: str, graph: str, torch: str) -> PlanFile:
        """The file of a plan."""
        places = [None, *(part.name for part in plan.partitions[1:]), None]
        return cls(
            model=model,
            graph=graph,
            torch=torch,
            schedule=plan.schedule,
            cuts=tuple(part.name for part in plan.partitions[1:]),
            phases=tuple(
                Window(
                    begin=places[phase.start],
                    end=places[phase.stop],
                    epochs=phase.epochs,
                    fresh_optimizer=phase.fresh_optimizer,
                    recompute=places[phase.recompute],
                    segmented=phase.segmented,
                    micro_batches=phase.micro_batches,
                )
                for phase in plan.phases
            ),
            figures={
                part.name: {"ops": part.stop - part.start} | {key: getattr(part, key) for key in FIGURES[1:]}
                for part in plan.partitions
            },
        )

    @property
    def epochs(self) -> int:
        """Epochs of all phases together."""
        return sum(phase.epochs for phase in self.phases)

    def plan(self, modes: Modes) -> Plan:
        """The plan for a model with these graphs, of which all figures are worked out.

        Raises PartitionError when a cut is not one of this model or its phases cannot run.
        """
        partitions = partition(modes, at=self.cuts) if self.cuts else partition(modes, count=1)
        index_of = {part.start: part.index for part in partitions}
        places = places_of(modes.train)
        phases, faults = [], []
        for number, window in enumerate(self.phases, start=1):
            start = 0 if window.begin is None else index_of[places[window.begin]]
            stop = len(partitions) if window.end is None else index_of[places[window.end]]
            if start >= stop:
                faults.append(
                    f"phase {number} of the plan trains nothing: {window.end!r} is not after {window.begin!r}"
                )
                continue
            recompute = 0 if window.recompute is None else index_of[places[window.recompute]]
            if recompute and not start < recompute < stop:
                faults.append(
                    f"phase {number} of the plan cannot recompute up to {window.recompute!r}, outside of what trains"
                )
                continue
            phases.append(
                Phase(
                    start=start,
                    stop=stop,
                    epochs=window.epochs,
                    fresh_optimizer=window.fresh_optimizer,
                    recompute=recompute,
                    segmented=window.segmented,
                    micro_batches=window.micro_batches,
                )
            )
        if faults:
            raise PartitionError("; ".join(faults))
        return Plan(schedule=self.schedule, partitions=partitions, phases=tuple(phases))

    def to_json(self) -> str:
        """The text of the file, one line a cut, a phase and a partition; the same for the same plan."""
        head = {"schema": SCHEMA, **{key: getattr(self, key) for key in ("model", "graph", "torch", "schedule")}}
        windows = [
            {
                "from": phase.begin,
                "up_to": phase.end,
                "epochs": phase.epochs,
                "fresh_optimizer": phase.fresh_optimizer,
                "recompute_up_to": phase.recompute,
                **({"segmented": True} if phase.segmented else {}),
                **({"micro_batches": phase.micro_batches} if phase.micro_batches > 1 else {}),
            }
            for phase in self.phases
        ]
        figures = [{"partition": name, **figures} for name, figures in (self.figures or {}).items()]
        fields = [f'"{key}": {json.dumps(value)}' for key, value in head.items()]
        fields += [f'"{key}": {_lines(rows)}' for key, rows in (("cuts", self.cuts), ("phases", windows))]
        fields += [f'"derived": {_lines(figures)}'] if figures else []
        return "{\n  " + ",\n  ".join(fields) + "\n}\n"


def _lines(rows: Sequence[object]) -> str:
    return "[\n    " + ",\n    ".join(map(json.dumps, rows)) + "\n  ]" if rows else "[]"


def write_file(file: PlanFile, path: str) -> None:
    """Write a plan file, in the place of what was there. Raises UsageError when it cannot be written."""
    try:
        Path(path).write_text(file.to_json(), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the plan {path!r} cannot be written: {error.strerror}; choose another path") from error


# Reading


def read_file(path: str, *, modes: Modes | None = None) -> PlanFile:
    """The plan file at `path`. Raises as `read` does, and UsageError when it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the plan {path!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"the plan {path!r} cannot be read: it is no text") from error
    return read(text, source=path, modes=modes)


def read(text: str, *, source: str, modes: Modes | None = None) -> PlanFile:
    """What the text of a plan file says; with the `modes` of a model its cuts are looked for there.

    Raises an error, which tells all that is wrong at once and begins with `source`: UsageError when this is no plan
    of a known schema, PartitionError when no more than its cuts are wrong.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"the plan {source!r} is not valid JSON near line {error.lineno}: {error.msg}") from error
    if not isinstance(data, dict):
        raise UsageError(f"the plan {source!r} must be a JSON object, with the keys {', '.join(_KEYS)}")
    if (schema := data.get("schema", SCHEMA)) != SCHEMA:
        raise UsageError(
            f"the plan {source!r} has schema {schema!r}, and this version reads {SCHEMA}; save the plan anew"
        )
    faults = list(_faults(data))
    cuts = data.get("cuts", ())
    misfits = wrong_places(modes, cuts) if modes and _KEYS["cuts"][0](cuts) else []
    if faults or misfits:
        another = modes and data.get("graph") not in (None, "", modes.train.digest())
        hint = " (it was made for another model than this one)" if another and misfits else ""
        kind = UsageError if faults else PartitionError
        raise kind(f"the plan {source!r} cannot be used{hint}: {'; '.join([*faults, *misfits])}")
    return PlanFile(
        **{key: data[key] for key in ("model", "graph", "torch", "schedule") if key in data},
        cuts=tuple(cuts),
        phases=tuple(
            Window(
                begin=phase.get("from"),
                end=phase.get("up_to"),
                epochs=phase["epochs"],
                fresh_optimizer=phase.get("fresh_optimizer", False),
                recompute=phase.get("recompute_up_to"),
                segmented=phase.get("segmented", False),
                micro_batches=phase.get("micro_batches", 1),
            )
            for phase in data["phases"]
        ),
        figures=_figures(data.get("derived", ()), tuple(cuts)),
    )


def _figures(rows: Sequence[Mapping[str, Any]], cuts: tuple[str, ...]) -> dict[str, dict[str, int]] | None:
    figures = {row["partition"]: {key: row[key] for key in FIGURES} for row in rows}
    return figures if tuple(figures)[1:] == cuts and figures else None


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


def _is_derived(value: object) -> bool:
    return _is_rows(value) and all(
        set(row) == {"partition", *FIGURES}
        and _is_text(row["partition"])
        and all(type(row[key]) is int for key in FIGURES)
        for row in value  # type: ignore[attr-defined]
    )


# By key: what suits it, the words for that, and whether it may be left out.
_Rules = Mapping[str, tuple[Callable[[Any], bool], str, bool]]
_KEYS: _Rules = {
    "schema": (lambda value: value == SCHEMA, str(SCHEMA), False),
    "model": (_is_text, "text", True),
    "graph": (_is_text, "text", True),
    "torch": (_is_text, "text", True),
    "schedule": (lambda value: _is_text(value) and value != "", "a name", False),
    "cuts": (_is_names, "a list of module paths", False),
    "phases": (lambda value: _is_rows(value) and value != [], "a list of at least one phase", False),
    "derived": (_is_derived, "as it was saved, or left out", True),
}
_PHASE_KEYS: _Rules = {
    "from": (lambda value: value is None or _is_text(value), "one of the cuts or null", True),
    "up_to": (lambda value: value is None or _is_text(value), "one of the cuts or null", True),
    "epochs": (lambda value: type(value) is int and value >= 1, "a whole number at least 1", False),
    "fresh_optimizer": (lambda value: isinstance(value, bool), "true or false", True),
    "recompute_up_to": (lambda value: value is None or _is_text(value), "one of the cuts or null", True),
    "segmented": (lambda value: isinstance(value, bool), "true or false", True),
    "micro_batches": (lambda value: type(value) is int and value >= 1, "a whole number at least 1", True),
}


def _faults(data: Mapping[str, Any]) -> Iterator[str]:
    """A sentence about everything that is wrong in a plan, whatever model it is for."""
    yield from _wrong_keys(data, _KEYS, "")
    cuts: list[str] | None = data["cuts"] if _is_names(data.get("cuts")) else None
    yield from (f"the cut {cut!r} is given twice" for cut, times in Counter(cuts).items() if times > 1)
    for number, phase in enumerate(data["phases"] if _is_rows(data.get("phases")) else (), start=1):
        yield from _wrong_keys(phase, _PHASE_KEYS, f"phase {number}: ")
        if phase.get("segmented") is True and phase.get("recompute_up_to") is None:
            yield f"phase {number}: segmented is true, but there is no recompute_up_to"
        for word in ("from", "up_to", "recompute_up_to"):
            place = phase.get(word)
            if cuts is not None and isinstance(place, str) and place not in cuts:
                yield f"phase {number}: {word} is {place!r}, which is none of the cuts{nearest(place, cuts)}"


def _wrong_keys(data: Mapping[str, Any], rules: _Rules, where: str) -> Iterator[str]:
    for key, value in data.items():
        if key not in rules:
            yield f"{where}the key {key!r} is not known{nearest(key, rules)}"
        elif not rules[key][0](value):
            yield f"{where}{key} is {json.dumps(value)[:80]}, but must be {rules[key][1]}"
    yield from (f"{where}the key {key!r} is missing" for key, rule in rules.items() if not rule[2] and key not in data)
