"""The records of a comparison: frozen, without tensors. And the observer, which is called while its runs are done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_type_hints

from fxsplit.errors import UsageError, nearest, shown
from fxsplit.options import key, kind_of, option, read_value
from fxsplit.spec import RunSpec, read_values

# The schema of a comparison as plain data.
SCHEMA = 1
BUDGETS = {"epochs": "equal epochs", "time": "equal time", "work": "equal work", "off": "each arm as it is"}
MATCHES = tuple(BUDGETS)
# So many seeds, at least, are more than a look.
CLAIM = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonSpec:
    """Describes a comparison of arms.

    `run` are the options that all its runs share, by field of RunSpec, and `of_arms` those of single arms, which win.

    Raises UsageError, which names all faults at once, when a value cannot be.
    """

    models: tuple[str, ...] = option("Comparison", "Models to compare the arms on.", (), words="names")
    arms: tuple[str, ...] = option(
        "Comparison",
        "What is compared, with commas: standard, regularised (standard with every regulariser of the last arm), "
        "checkpointed (standard within the memory of the last arm), l2l, a schedule, or a recipe; NAME@N in N epochs.",
        ("standard", "regularised", "l2l"),
        words="names",
    )
    seeds: str = option(
        "Comparison",
        "N, for the seeds from 0 on, or seeds with commas, such as 3,7 or 7,; each arm has a run of every seed.",
        "5",
        pattern=r"[1-9]\d{0,3}|\d+,|\d+(,\d+)+",
    )
    match: tuple[str, ...] = option(
        "Comparison",
        "What is equal in all arms, each a table of its own: epochs; time or work of the last arm, to which the others "
        "are fitted anew; off to leave each arm as it is.",
        ("epochs",),
        words="names",
    )
    margin: float = option(
        "Comparison", "Arms whose accuracies differ by less than so many points are level.", 0.3, above=0
    )
    output: str = option("Comparison", "Folder of the comparison and its runs.", "output/compare", flags=("-o",))
    name: str = option(
        "Comparison", "letters, digits, dots and dashes: the name of its files.", "compare", pattern=r"[A-Za-z0-9._-]+"
    )
    jobs: int | None = option("Comparison", "Runs at a time; by default one for each of the devices.", None, least=1)
    devices: tuple[str, ...] = option("Comparison", "Devices for the runs, such as cuda:0,cuda:1.", (), words="names")
    run: Mapping[str, Any] = field(default_factory=dict)
    of_arms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = []
        for item in OPTIONS:
            given = getattr(self, item.name)
            try:
                read = read_value(item.name, given, KINDS[item.name], item.metadata)
            except ValueError as error:
                problems.append(str(error))
            else:
                object.__setattr__(self, item.name, read)
                if read == () and isinstance(given, str):
                    problems.append(f"{item.name} is {shown(given)}, which names nothing; name some, or leave it out")
        if not problems:
            problems += [
                f"there is no match {each!r}{nearest(each, MATCHES)} (have: {', '.join(MATCHES)})"
                for each in self.match
                if each not in MATCHES
            ]
            if "off" in self.match and len(self.match) > 1:
                problems.append("match off leaves each arm as it is, and goes with no other")
            problems += [f"{name} names nothing" for name in ("arms", "match") if not getattr(self, name)]
            if len(set(self.arms)) < len(self.arms):
                problems.append(f"arms are {','.join(self.arms)}, but each must be there once")
            if len(set(self.seed_numbers)) < len(self.seed_numbers):
                problems.append(f"seeds are {self.seeds}, but each must be there once")
        if problems:
            raise UsageError("; ".join(problems))

    @property
    def seed_numbers(self) -> tuple[int, ...]:
        """The seeds themselves."""
        numbers = tuple(map(int, self.seeds.rstrip(",").split(",")))
        return numbers if "," in self.seeds else tuple(range(numbers[0]))

    @property
    def matches(self) -> tuple[str, ...]:
        """The tables to make. Equal time and equal work are fitted from runs of equal epochs, so these come first."""
        return (
            self.match
            if "off" in self.match
            else tuple(each for each in MATCHES[:3] if each in (*self.match, "epochs"))
        )


RUN = tuple(item.name for item in fields(RunSpec))
OPTIONS = tuple(item for item in fields(ComparisonSpec) if item.metadata)
KINDS = {name: kind_of(hint) for name, hint in get_type_hints(ComparisonSpec).items()}


def read_comparison(values: Mapping[Any, Any], *, source: str = "") -> dict[str, Any]:
    """Read the values of a recipe into those of a ComparisonSpec: its own, and under `run` the options of its runs.

    `model` is one of the models of a comparison. `arms` may be a mapping from arms to options of their own, or to none.
    Raises UsageError, whose message begins with `source`, when a key is of neither, or when a value is wrong.
    """
    own: dict[str, Any] = {}
    rest = {}
    known = [item.name for item in OPTIONS]
    for given, value in values.items():
        name = str(given).replace("-", "_")
        if name == "model":
            own["models"] = value
        elif name == "arms" and isinstance(value, Mapping):
            own["arms"] = [str(arm) for arm in value]
            own["of_arms"] = {
                str(arm): read_values(options, source=f"{source}: the arm {str(arm)!r}".lstrip(": "))
                for arm, options in value.items()
                if isinstance(options, Mapping)
            }
        elif name == "match" and value is False:
            own[name] = "off"  # as YAML reads that word
        elif name in known and name != "output":
            own[name] = _seeds(value) if name == "seeds" else value
        elif name in RUN:
            rest[given] = value
        else:
            every = map(key, (*known, *RUN))
            where = f"{source}: " if source else ""
            raise UsageError(f"{where}the key {str(given)!r} is not known{nearest(key(name), every)}")
    return {**own, "run": read_values(rest, source=source)}


def _seeds(value: Any) -> Any:
    """Write seeds that a recipe gives as a number or a list as the command line would have them."""
    if isinstance(value, list) and value:
        return ",".join(map(str, value)) + ("," if len(value) == 1 else "")
    return str(value) if isinstance(value, int) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """Names a run of a comparison by model, arm and seed, and its folder. `spec` is what it is asked for."""

    model: str
    arm: str
    seed: int
    folder: str
    spec: RunSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Says where a run stood at the end of an epoch. `seconds` count from its beginning, in the table's time."""

    epoch: int
    phase: int
    seconds: float
    accuracy_pct: float
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFigures:
    """Holds what a finished run came to. What its machine could not tell is None.

    Args:
        accuracy_pct: on the test images after the last epoch; `ensemble_pct` is that of the snapshot ensemble.
        updates: optimizer steps.
        seconds: of the whole run, on the clock; `processor_seconds` are those of processors, and `setup_seconds` what
            is spent besides epochs, in the table's time.
        multiply_adds: of training.
        resident_bytes, allocated_bytes, reserved_bytes, device_bytes: peaks of memory; `cache_file_bytes` is the most
            of the disk.
        energy_joules: of the whole run.
        images_per_second: mean over the epochs, training alone.
        moments: the end of each epoch.
    """

    seed: int
    folder: str
    accuracy_pct: float
    ensemble_pct: float | None
    epochs: int
    updates: int
    seconds: float
    processor_seconds: float | None
    setup_seconds: float
    multiply_adds: int | None
    resident_bytes: int
    allocated_bytes: int | None
    reserved_bytes: int | None
    device_bytes: int | None
    cache_file_bytes: int | None
    energy_joules: float | None
    images_per_second: float
    moments: tuple[Moment, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Holds a mean with its 95 % interval, which is not finite for fewer than two values."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmFigures:
    """Holds the runs of an arm on one model, and the means over them. `time` and `memory` are as the table has them."""

    arm: str
    epochs: int
    runs: tuple[RunFigures, ...]
    accuracy: Estimate
    time: Estimate
    memory: Estimate
    ensemble: Estimate | None = None
    multiply_adds: Estimate | None = None
    energy: Estimate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Compares two arms by their runs with the same seeds.

    Args:
        quantity: "accuracy" (points, `arm` less `against`), "time" or "memory" (`arm` divided by `against`).
        mean: of the differences; of ratios the geometric one. `low` and `high` are the ends of its 95 % interval,
            `inner_low` and `inner_high` those of its 90 % interval; not finite for fewer than two seeds.
        p: of Student's test that there is no difference; `p_holm` is adjusted for the number of models.
        verdict: in a word or two, such as "more accurate"; `numbers` are those it rests on, in words.
        more_seeds: about how many further ones would show something, where nothing is shown.
    """

    arm: str
    against: str
    quantity: str
    seeds: int
    mean: float
    low: float
    high: float
    inner_low: float
    inner_high: float
    p: float
    p_holm: float
    verdict: str
    numbers: str
    more_seeds: int | None = None

    @property
    def sentence(self) -> str:
        """All of it, in a sentence."""
        return f"{self.arm} and {self.against}: {self.verdict}; {self.numbers}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Compares arms on one model within one budget: equal "epochs", "time" or "work", or "off"."""

    model: str
    match: str
    arms: tuple[ArmFigures, ...]
    differences: tuple[Difference, ...]
    unequal: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Holds a whole comparison.

    Args:
        margin: within which accuracies are level, in points; `ratio_margin` that of time and memory, as a share.
        looks: the seeds that were asked for, each time that there were more; the first were fixed before any run.
        time: what `time` means: "processor seconds" on a CPU, where other work changes these least, else "seconds".
        memory: what `memory` means.
        missing: sentences about runs that are not there.
    """

    name: str
    margin: float
    ratio_margin: float
    looks: tuple[tuple[int, ...], ...]
    time: str
    memory: str
    tables: tuple[Table, ...]
    missing: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"schema": SCHEMA, **asdict(self)}


class ComparisonObserver:
    """Is called while the runs of a comparison are done, and does nothing. Override the methods that you need."""

    def planned(self, runs: Sequence[PlannedRun], *, jobs: int) -> None:
        """Called when it is known which runs there are to be; again when more are planned."""

    def began(self, run: PlannedRun) -> None:
        """Called when the process of a run is started."""

    def ended(self, run: PlannedRun, fault: str = "") -> None:
        """Called when a run is finished, or was before; or with what went wrong."""

    def waiting(self) -> None:
        """Called some times a second while runs go on."""

    def notice(self, sentence: str) -> None:
        """Called with a sentence about something that was decided for the user."""
