"""Reads and writes plans as files that people can read, edit, review and compare; records hold the same data.

    "cuts":    ["layer2", "layer3"],                         where the model is cut
    "phases":  [{"from": null, "up_to": null, "epochs": 9},  which partitions train for how long
                {"from": "layer2", "up_to": null, "epochs": 6}],
    "derived": [{"name": "layer2", "macs": 411041792}]       the partitions in full, which follow from the cuts

Phases name the cuts between which they train, so that a cut can be added or removed without renumbering. `derived` is
ignored when a plan is made for a model; only a record, which has no model at hand, is read with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from fxsplit.errors import (
    MOST_SHOWN,
    PartitionError,
    UsageError,
    closest,
    joined,
    nearest,
    reason,
    shortened,
    shown,
    shown_path,
)
from fxsplit.graph import Modes
from fxsplit.plain_data import parse_json, read_json
from fxsplit.plan.cuts import first_ops
from fxsplit.plan.partition import Partition, partition, unusable_paths
from fxsplit.plan.schedule import Phase, Plan, counted, saving_in_words
from fxsplit.presets import PRESETS
from fxsplit.records import json_line, read_record

SCHEMA = 3


class Rule(NamedTuple):
    """Says which values a key may hold: as a predicate, and in words."""

    suits: Callable[[Any], bool]
    words: str


TEXT = Rule(lambda value: isinstance(value, str), "text")
FLAG = Rule(lambda value: isinstance(value, bool), "true or false")
# Of anything; of cuts and phases, which are compared with each other; and of the characters of a name.
MOST, MOST_ROWS, MOST_LETTERS = 10**6, 2000, 200
NAME = Rule(
    lambda value: isinstance(value, str) and 0 < len(value) <= MOST_LETTERS, f"a name of up to {MOST_LETTERS} letters"
)
COUNT = Rule(lambda value: type(value) is int and 1 <= value <= MOST, f"a whole number at least 1 and at most {MOST}")
CUT = Rule(lambda value: value is None or isinstance(value, str), "one of the cuts or null")


class Key(NamedTuple):
    """Describes a key of the file: its rule, and whether it may be left out."""

    name: str
    rule: Rule
    optional: bool = False


class PhaseKey(NamedTuple):
    """Describes a key of a phase in the file, and the field of NamedPhase and Phase that it fills.

    A cut is a name in the file and in a NamedPhase, an index in a Phase. A key with a `default` may be left out; a
    `rare` one is not written when it has its default.
    """

    name: str
    field: str
    rule: Rule
    default: Any = ...
    rare: bool = False

    @property
    def optional(self) -> bool:
        """Whether the key may be left out."""
        return self.default is not ...


PHASE_KEYS = (
    PhaseKey("from", "start", CUT, default=None),
    PhaseKey("up_to", "stop", CUT, default=None),
    PhaseKey("epochs", "epochs", COUNT),
    PhaseKey("fresh_optimizer", "fresh_optimizer", FLAG, default=False),
    PhaseKey("recompute_up_to", "recompute", CUT, default=None),
    PhaseKey("segmented", "segmented", FLAG, default=False, rare=True),
    PhaseKey("micro_batches", "micro_batches", COUNT, default=1, rare=True),
    PhaseKey("thaws", "thaws", FLAG, default=False, rare=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedPhase:
    """Describes a Phase by the names of cuts. None stands for the model's own start or end, or for no recomputing."""

    start: str | None
    stop: str | None
    epochs: int
    fresh_optimizer: bool = False
    recompute: str | None = None
    segmented: bool = False
    micro_batches: int = 1
    thaws: bool = False

    def __str__(self) -> str:
        ends = (("from", self.start), ("up to", self.stop))
        trains = " ".join(f"{word} {cut}" for word, cut in ends if cut is not None) or "all"
        fresh = "fresh optimizer" * self.fresh_optimizer
        thaws = "thaws what had settled" * self.thaws
        saving = saving_in_words(self.recompute, segmented=self.segmented, micro_batches=self.micro_batches)
        return ", ".join(filter(None, (trains, counted(self.epochs, "epoch"), thaws, fresh, saving)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFile:
    """Holds the contents of a plan file.

    `model`, `graph` (the digest of its train graph) and `torch` (the version) say what the plan was made with, or are
    empty. `derived` are the partitions; none if the file has none, or if its cuts were edited since.
    """

    model: str = ""
    graph: str = ""
    torch: str = ""
    preset: str = "none"
    schedule: str
    cuts: tuple[str, ...]
    phases: tuple[NamedPhase, ...]
    derived: tuple[Partition, ...] = ()

    @classmethod
    def of(cls, plan: Plan, *, model: str = "", graph: str = "", torch: str = "") -> PlanFile:
        """Describe a plan by the names of its cuts."""
        names = tuple(part.name for part in plan.partitions[1:])
        cuts = [None, *names, None]
        phases = []
        for phase in plan.phases:
            values = {key: getattr(phase, key.field) for key in PHASE_KEYS}
            named = {key.field: cuts[value] if key.rule is CUT else value for key, value in values.items()}
            phases.append(NamedPhase(**named))
        return cls(
            model=model,
            graph=graph,
            torch=torch,
            preset=plan.preset,
            schedule=plan.schedule,
            cuts=names,
            phases=tuple(phases),
            derived=plan.partitions,
        )

    @property
    def epochs(self) -> int:
        """Sum the epochs of all phases."""
        return sum(phase.epochs for phase in self.phases)

    def plan(self, modes: Modes) -> Plan:
        """Make the plan for a model with these graphs, from the cuts and phases alone.

        Raises PartitionError when a cut is not one of this model or its phases cannot run.
        """
        partitions = partition(modes, at=self.cuts) if self.cuts else partition(modes, count=1)
        index_of = {part.start: part.index for part in partitions}
        op_at = first_ops(modes.train)
        return self._plan(partitions, {cut: index_of[op_at[cut]] for cut in self.cuts})

    def recorded_plan(self) -> Plan:
        """Make the plan with the partitions that are written down, for a record, which has no model at hand.

        Raises PartitionError when the partitions are not written down or the phases cannot run.
        """
        if not self.derived:
            raise PartitionError("the plan does not say of which partitions it was made")
        return self._plan(self.derived, {part.name: part.index for part in self.derived})

    def _plan(self, partitions: tuple[Partition, ...], index_of: Mapping[str, int]) -> Plan:
        phases, faults = [], []
        for number, named in enumerate(self.phases, start=1):
            values = {key.field: getattr(named, key.field) for key in PHASE_KEYS}
            for key in PHASE_KEYS:
                if key.rule is CUT:
                    end = len(partitions) if key.field == "stop" else 0
                    values[key.field] = end if values[key.field] is None else index_of[values[key.field]]
            start, stop, recompute = values["start"], values["stop"], values["recompute"]
            if start >= stop:
                faults.append(f"phase {number} of the plan trains nothing: {named.stop!r} is not after {named.start!r}")
            elif recompute and not start < recompute < stop:
                faults.append(
                    f"phase {number} of the plan cannot recompute up to {named.recompute!r}, outside of what trains"
                )
            else:
                phases.append(Phase(**values))
        if faults:
            raise PartitionError("; ".join(faults))
        return Plan(schedule=self.schedule, preset=self.preset, partitions=partitions, phases=tuple(phases))

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain data as it stands in the file; equal plans give equal data."""
        return {
            "schema": SCHEMA,
            **{key: getattr(self, key) for key in ("model", "graph", "torch", "preset", "schedule")},
            "cuts": list(self.cuts),
            "phases": [
                {
                    key.name: value
                    for key in PHASE_KEYS
                    if (value := getattr(phase, key.field)) != key.default or not key.rare
                }
                for phase in self.phases
            ],
            **({"derived": [asdict(part) for part in self.derived]} if self.derived else {}),
        }

    def to_json(self) -> str:
        """Convert to the text of the file, with one line for each cut, phase and partition."""
        fields = [
            f'"{key}": {_lines(value) if isinstance(value, list) else json_line(value)}'
            for key, value in self.to_dict().items()
        ]
        return "{\n  " + ",\n  ".join(fields) + "\n}\n"


def _lines(rows: Sequence[object]) -> str:
    return "[\n    " + ",\n    ".join(map(json_line, rows)) + "\n  ]" if rows else "[]"


def write_file(file: PlanFile, path: str) -> None:
    """Write a plan file, replacing an earlier one. Raises UsageError when it cannot be written."""
    try:
        Path(path).write_text(file.to_json(), encoding="utf-8")
    except (OSError, ValueError) as error:  # a null character in the path, or a cut whose name is no text
        why = getattr(error, "strerror", None) or reason(error)
        raise UsageError(f"the plan {shown_path(path)} cannot be written: {why}; choose another path") from error


# Reading


def read_file(path: str, *, modes: Modes | None = None) -> PlanFile:
    """Read the plan file at `path`. Raises as `read` does, and UsageError when the file cannot be read."""
    return from_dict(read_json(path, "plan"), origin=path, modes=modes)


def read_options(path: str) -> dict[str, Any]:
    """Read from a plan file what it decides besides the plan: the preset and the number of epochs.

    Raises UsageError as `read_file` does, for all faults that show without a model.
    """
    file = read_file(path)
    return {"preset": file.preset, "epochs": file.epochs}


def read(text: str, *, origin: str, modes: Modes | None = None) -> PlanFile:
    """Parse the text of a plan file. Raises as `from_dict` does, and UsageError when the text is not JSON."""
    return from_dict(parse_json(text, origin=origin, noun="plan"), origin=origin, modes=modes)


def _checked(data: Any, origin: str) -> dict[str, Any]:
    """Return the plain data of a plan if it is an object of this schema, or says no schema. Raises UsageError else."""
    if not isinstance(data, dict):
        raise UsageError(f"the plan {shown_path(origin)} must be a JSON object, with the keys {', '.join(_KEYS)}")
    if (schema := data.get("schema", SCHEMA)) != SCHEMA:
        raise UsageError(
            f"the plan {shown_path(origin)} has schema {shown(schema)}, and this version reads {SCHEMA}; "
            "save the plan anew"
        )
    return data


def from_dict(data: Any, *, origin: str, modes: Modes | None = None) -> PlanFile:
    """Validate the plain data of a plan.

    Args:
        data: as `PlanFile.to_dict` gives it.
        origin: what errors call it, such as the name of the file.
        modes: the graphs of the model for which the plan shall be used; its cuts must then exist there.

    Raises an error that lists all faults at once: UsageError when this is no plan of a known schema, PartitionError
    when only its cuts do not fit the model.
    """
    data = _checked(data, origin)
    faults = list(_faults(data))
    cuts = data.get("cuts", ())
    misfits = unusable_paths(modes, cuts) if modes and _KEYS["cuts"].rule.suits(cuts) else []
    if faults or misfits:
        another = modes and data.get("graph") not in (None, "", modes.train.digest())
        hint = " (it was made for another model than this one)" if another and misfits else ""
        kind = UsageError if faults else PartitionError
        raise kind(joined([*faults, *misfits], f"the plan {shown_path(origin)} cannot be used{hint}: "))
    derived = _partitions(data.get("derived", ()))
    return PlanFile(
        **{key: data[key] for key in ("model", "graph", "torch", "preset", "schedule") if key in data},
        cuts=tuple(cuts),
        phases=tuple(
            NamedPhase(**{key.field: phase.get(key.name, key.default) for key in PHASE_KEYS})
            for phase in data["phases"]
        ),
        derived=derived if [part.name for part in derived[1:]] == cuts else (),
    )


def _partitions(rows: Sequence[Any]) -> tuple[Partition, ...]:
    return tuple(read_record(Partition, row) for row in rows)


def _is_names(value: object) -> bool:
    return _is_list(value) and all(isinstance(name, str) and name for name in value)


def _is_rows(value: object) -> bool:
    return _is_list(value) and all(isinstance(row, dict) for row in value)


def _is_list(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and len(value) <= MOST_ROWS


def _is_derived(value: object) -> bool:
    try:
        return _is_list(value) and bool(_partitions(value) or not value)
    except ValueError:
        return False


_KEYS = {
    key.name: key
    for key in (
        Key("schema", Rule(lambda value: value == SCHEMA, str(SCHEMA))),
        Key("model", TEXT, optional=True),
        Key("graph", TEXT, optional=True),
        Key("torch", TEXT, optional=True),
        Key(
            "preset",
            Rule(lambda value: isinstance(value, str) and value in PRESETS, f"one of {', '.join(PRESETS)}"),
            True,
        ),
        Key("schedule", NAME),
        Key("cuts", Rule(_is_names, f"a list of module paths, at most {MOST_ROWS}")),
        Key("phases", Rule(lambda value: _is_rows(value) and value != [], f"a list of 1 to {MOST_ROWS} phases")),
        Key("derived", Rule(_is_derived, "as it was saved, or left out"), optional=True),
    )
}
_PHASE_KEYS = {key.name: key for key in PHASE_KEYS}


def _faults(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each fault of a plan that shows without a model."""
    yield from _wrong_keys(data, _KEYS, "")
    cuts: list[str] | None = data["cuts"] if _is_names(data.get("cuts")) else None
    yield from (f"the cut {shown(cut)} is given twice" for cut, times in Counter(cuts).items() if times > 1)
    for number, phase in enumerate(data["phases"] if _is_rows(data.get("phases")) else (), start=1):
        yield from _wrong_keys(phase, _PHASE_KEYS, f"phase {number}: ")
        if phase.get("segmented") is True and phase.get("recompute_up_to") is None:
            yield f"phase {number}: segmented is true, but there is no recompute_up_to"
        for key in (key.name for key in PHASE_KEYS if key.rule is CUT):
            cut = phase.get(key)
            if cuts is not None and isinstance(cut, str) and cut not in cuts:
                yield f"phase {number}: {key} is {shown(cut)}, which is none of the cuts{nearest(cut, cuts)}"


def _wrong_keys(data: Mapping[str, Any], keys: Mapping[str, Key] | Mapping[str, PhaseKey], where: str) -> Iterator[str]:
    for name, value in data.items():
        if name not in keys:
            yield f"{where}the key {shown(name)} is not known{nearest(name, keys)}"
        elif not keys[name].rule.suits(value):
            yield f"{where}{name} is {shortened(json_line(value), MOST_SHOWN)}, but must be {keys[name].rule.words}"
    # Of a misspelt key it is said above what it should be.
    here = data.keys() | {meant for name in data if name not in keys for meant in closest(name, keys)}
    yield from (
        f"{where}the key {shown(name)} is missing"
        for name, key in keys.items()
        if not key.optional and name not in here
    )
