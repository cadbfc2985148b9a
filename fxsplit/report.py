"""The records of a run: frozen, without tensors. And the observer, which is called while a run happens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fxsplit.errors import UsageError
from fxsplit.graph import Graph
from fxsplit.plan.forecast import Forecast, PhaseForecast
from fxsplit.plan.partition import Partition
from fxsplit.plan.planfile import PlanFile, from_dict
from fxsplit.plan.scaling import ScaleForecast
from fxsplit.plan.schedule import Phase, Plan
from fxsplit.records import read_record

# The schema of a report as plain data. The plan in it has a schema of its own.
SCHEMA = 1
REPORT = "report.json"
CHECKPOINTS = (
    "the model's own gradient checkpointing is looked through, so its partitions keep their activations; "
    "--memory-budget recomputes them here"
)
# The largest error of a forecast of memory, relative to what is measured.
FORECAST_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """Says where training stands within an epoch. Means and `images_per_second` are over the epoch so far.

    `epoch` and `step` count from 1; `phase` is the index in the plan, from 0.
    """

    phase: int
    epoch: int
    step: int
    steps: int
    train_loss: float
    train_accuracy_pct: float
    images_per_second: float
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochRecord:
    """Describes an epoch: what was trained, how well, how fast, and at what cost.

    `epoch` counts from 1 over the whole run; `phase` is its index in the plan, from 0. Partitions [start, stop) train.
    `cut` is the name of the partition that the sliding cut is before, or empty where all trained. `train_loss` and
    `train_top1` are means over the steps of the epoch, in which the weights changed; `eval_loss`, `eval_top1` and
    `eval_top5` are of the test images after the epoch, `held_out_top1` of the training images that are held out, if
    there are any. Accuracies are in per cent.

    Memory peaks are over the run so far for the process, over the phase so far for CUDA; a figure that this machine
    cannot give is None. `train_energy_joules` are those of `energy_joules` that went into training. The cache of the
    settled prefix held `cache_resident_bytes` of memory, of the process or of the GPU, which are part of the peaks
    there, and `cache_file_bytes` of the disk.

    `processor_seconds` are those of all threads, and of processes that read images. `multiply_adds` are those of
    training: forward, backward, what is recomputed, what fills a cache, exits, recalibration, soft targets, and in the
    first epoch the proof; tests are not among them. `ensemble_top1` is the accuracy of a snapshot ensemble: the mean of
    what the network said of each test image, as probabilities, at the end of each phase so far. It is there at the end
    of each phase from the second on.

    With several processes each step reduced `reduced_bytes` of gradients and, where weights are divided, gathered
    `gathered_bytes` of them, both with what rounds parts up to the same size. The stages of a pipeline sent each other
    `sent_bytes` of values and gradients in a step on a full batch, all stages together. Processor time and work are
    those of all processes, memory peaks those of the one that took most, energy and caches those of the first.
    """

    epoch: int
    phase: int
    start: int
    stop: int
    cut: str
    lr: float
    train_loss: float
    train_top1: float
    eval_loss: float
    eval_top1: float
    eval_top5: float
    train_seconds: float
    eval_seconds: float
    images_per_second: float
    trainable_parameters: int
    peak_resident_bytes: int
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    device_bytes: int | None = None
    energy_joules: float | None = None
    train_energy_joules: float | None = None
    cache_resident_bytes: int | None = None
    cache_file_bytes: int | None = None
    held_out_top1: float | None = None
    processor_seconds: float | None = None
    multiply_adds: int | None = None
    ensemble_top1: float | None = None
    reduced_bytes: int | None = None
    gathered_bytes: int | None = None
    sent_bytes: int | None = None

    @property
    def joules_per_image(self) -> float | None:
        """Energy that training took for each image; None where the machine cannot tell."""
        images = self.images_per_second * self.train_seconds
        return self.train_energy_joules / images if self.train_energy_joules is not None and images else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """Describes a whole run. `status` is "finished", "interrupted" or "failed"; `folder` has its files.

    `spec` is its recipe and `environment` its machine, as plain data. `passes` are the graph passes that rewrote its
    stages; without any, these ran what the model runs, bit for bit. `total_seconds` include `setup_seconds`, until the
    first batch, and `prove_seconds`, for the proof on it; `processor_seconds` are those of the whole run and of
    all its processes, of others than the first one up to the last epoch or checkpoint. `data` tells its images from
    others: counts, and checksums of labels and pixels. `confusion` says of each class, in the test after the last
    epoch, how many of its images were taken for which class.
    """

    status: str
    spec: dict[str, Any]
    environment: dict[str, Any]
    graph_digest: str
    plan: Plan
    passes: tuple[str, ...] = ()
    epochs: tuple[EpochRecord, ...]
    setup_seconds: float
    prove_seconds: float = 0.0
    total_seconds: float
    processor_seconds: float | None = None
    data: dict[str, Any] = field(default_factory=dict)
    confusion: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    folder: str

    @property
    def accuracy_pct(self) -> float:
        """Test accuracy after the last epoch, never the best one."""
        return self.epochs[-1].eval_top1 if self.epochs else float("nan")

    @property
    def ensemble_pct(self) -> float | None:
        """Test accuracy of the snapshot ensemble after the last epoch; None without one, or amid a phase."""
        return self.epochs[-1].ensemble_top1 if self.epochs else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: schema, final accuracy and the fields; `plan` is a plan file to train by."""
        file = PlanFile.of(
            self.plan,
            model=str(self.spec.get("model", "")),
            graph=self.graph_digest,
            torch=str(self.environment.get("torch", "")),
        )
        made: dict[str, Any] = {
            "plan": file.to_dict(),
            "passes": list(self.passes),
            "epochs": [asdict(epoch) for epoch in self.epochs],
        }
        plain = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in made}
        return {"schema": SCHEMA, "accuracy_pct": self.accuracy_pct if self.epochs else None, **plain, **made}

    @classmethod
    def read(cls, folder: Path) -> RunReport:
        """Read the report in the folder of a run.

        Raises OSError when there is none, ValueError when it is no JSON, and what `from_dict` raises.
        """
        return cls.from_dict(json.loads((folder / REPORT).read_text(encoding="utf-8")))

    @classmethod
    def from_dict(cls, data: Any) -> RunReport:
        """Make a report from the plain data of `to_dict`, which may have been written as JSON and read back.

        A number that was not finite is NaN then. Raises UsageError when this is no report of a known
        schema, PartitionError when its plan cannot be run.
        """
        if not isinstance(data, Mapping):
            raise UsageError("this is not the report of a run: it must be a JSON object")
        if (schema := data.get("schema")) != SCHEMA:
            raise UsageError(f"the report of a run has schema {schema!r}, and this version reads {SCHEMA}")
        own = {key: value for key, value in data.items() if key not in ("schema", "accuracy_pct")}
        plan = from_dict(own.get("plan"), origin=REPORT).recorded_plan()
        try:
            return read_record(cls, {**own, "plan": plan})
        except ValueError as error:
            raise UsageError(f"this is not the report of a run: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Describes a model as partitions: its graphs in training and evaluation, its cuts, and the phases of its plan.

    `classes` are those of its modules, by path. `tied` has parameters with their other names, `opaque` the modules that
    are kept whole, with the reasons. `torch` is the version that captured it. `checkpoints` says whether the model has
    gradient checkpoints of its own. `forecast` is what the phases are expected to cost. Where ops were measured, their
    costs and the forecast have seconds. `scaling` forecasts steps on several devices, if that was asked for.
    """

    model: str
    input_shape: tuple[int, ...]
    train: Graph
    eval: Graph
    classes: Mapping[str, str]
    plan: Plan
    tied: Mapping[str, tuple[str, ...]]
    opaque: Mapping[str, str]
    torch: str = ""
    checkpoints: bool = False
    forecast: Forecast | None = None
    scaling: tuple[ScaleForecast, ...] = ()

    @property
    def plan_file(self) -> PlanFile:
        """The plan as a file for this model."""
        return PlanFile.of(self.plan, model=self.model, graph=self.train.digest(), torch=self.torch)

    @property
    def partitions(self) -> tuple[Partition, ...]:
        """Those of the plan."""
        return self.plan.partitions

    @property
    def notes(self) -> list[str]:
        """Sentences about how phases save memory, what figures leave out, what is tied and what is kept whole."""
        savings = map(self.plan.saving, self.plan.phases)
        return [
            *(f"phase {number}, to save memory: {words}" for number, words in enumerate(savings, start=1) if words),
            *(f"not counted: the multiply-adds of {op.name} ({op.target})" for op in self.train.ops if op.uncounted),
            *(f"tied: {name} is also {', '.join(others)}" for name, others in self.tied.items()),
            *(f"kept whole: {path}, because {reason}" for path, reason in self.opaque.items()),
            *([CHECKPOINTS] * self.checkpoints),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRecord:
    """Says what checking a model found.

    `refusal` says why it cannot be captured or cut, or is None; `unknown` says that there is no such model. `guards`
    counts those of both modes, `cuts` the legal ones. `batch_sizes` are those at which it was compared with the plain
    model, none if only its structure was checked. `differences` are the values that were not equal then, apart from
    `own_differences`, in which two plain models differ as well.
    """

    model: str
    refusal: str | None = None
    unknown: bool = False
    ops: int = 0
    eval_ops: int = 0
    parameters: int = 0
    opaque: Mapping[str, str] = field(default_factory=dict)
    guards: int = 0
    cuts: int = 0
    partitions: int = 0
    batch_sizes: tuple[int, ...] = ()
    differences: tuple[str, ...] = ()
    own_differences: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether it was captured, cut, and found equal to the plain model wherever two plain models are equal."""
        return self.refusal is None and not self.differences

    @property
    def verdict(self) -> str:
        """The result in a few words."""
        if self.refusal is not None:
            return "unknown" if self.unknown else "refused"
        if self.differences:
            return "differs"
        if self.own_differences:
            return "not deterministic"
        return "equal" if self.batch_sizes else "captured"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "passed": self.passed, "verdict": self.verdict}


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseMeasurement:
    """Holds the measured cost of a step of a phase, loss and optimizer included; `PhaseForecast` has the same figures.

    `step_cost` is relative to a step of standard training, measured in turn with it. `activation_bytes` is the most
    that forward and backward hold at a time, without gradients of parameters; `peak_bytes` is the most of everything
    until the end of backward.
    """

    step_cost: float
    step_seconds: float
    activation_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseCheck:
    """Compares the forecast of a phase that trains partitions [start, stop) with what was measured."""

    start: int
    stop: int
    forecast: PhaseForecast
    measured: PhaseMeasurement

    @property
    def errors(self) -> dict[str, float]:
        """The error of each figure of the forecast, relative to what was measured; positive if it is too high."""
        names = ("step_cost", "activation_bytes", "peak_bytes")
        return {name: getattr(self.forecast, name) / getattr(self.measured, name) - 1 for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastRecord:
    """Says what comparing forecast and measurement of a model's phases found.

    `refusal` says why that could not be done, or is None; `unknown` says that there is no such model.
    """

    model: str
    refusal: str | None = None
    unknown: bool = False
    batch_size: int = 0
    partitions: int = 0
    phases: tuple[PhaseCheck, ...] = ()
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether the memory of every phase is as forecast within 10 %. Time, which varies, does not count."""
        memory = ("activation_bytes", "peak_bytes")
        return self.refusal is None and all(
            abs(phase.errors[name]) <= FORECAST_TOLERANCE for phase in self.phases for name in memory
        )

    @property
    def verdict(self) -> str:
        """The result in a few words."""
        if self.refusal is not None:
            return "unknown" if self.unknown else "refused"
        return "as forecast" if self.passed else "not as forecast"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        phases = [{**asdict(phase), "errors": phase.errors} for phase in self.phases]
        return {**asdict(self), "phases": phases, "passed": self.passed, "verdict": self.verdict}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassScore:
    """Says how well a model knows one class.

    `count` images are of it, `predicted` are taken for it, and of these `correct` are of it.
    """

    name: str
    count: int
    predicted: int
    correct: int

    @property
    def precision_pct(self) -> float | None:
        """Share of the images taken for the class that are of it; None if there are none."""
        return 100 * self.correct / self.predicted if self.predicted else None

    @property
    def recall_pct(self) -> float | None:
        """Share of the images of the class that are taken for it; None if there are none."""
        return 100 * self.correct / self.count if self.count else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistake:
    """An image that was taken for another class.

    `index` is its position among the images, and `probability` what the model gave to each of the two classes.
    """

    index: int
    image: str
    truth: str
    predicted: str
    truth_probability: float
    predicted_probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Describes how well a trained model does on images: mean loss, and accuracies in per cent.

    Row i of `confusion` has for the images of class i how many were taken for each class. `mistakes` are the worst, by
    the probability that the model gave to the true class.
    """

    run: str
    model: str
    data: str
    device: str
    batch_size: int
    images: int
    loss: float
    top1_pct: float
    top5_pct: float
    classes: tuple[ClassScore, ...]
    confusion: tuple[tuple[int, ...], ...]
    mistakes: tuple[Mistake, ...]

    def confused(self) -> list[tuple[str, str, int]]:
        """List truth, prediction and number of images of each confusion, the most frequent first."""
        names = [each.name for each in self.classes]
        pairs = [
            (names[truth], names[predicted], count)
            for truth, row in enumerate(self.confusion)
            for predicted, count in enumerate(row)
            if count and truth != predicted
        ]
        return sorted(pairs, key=lambda pair: -pair[2])

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        classes = [
            {**asdict(each), "precision_pct": each.precision_pct, "recall_pct": each.recall_pct}
            for each in self.classes
        ]
        return {**asdict(self), "classes": classes}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Says which classes an image file may be of, the most probable first, with probabilities from 0 to 1.

    `error` says why it was not read, or is None; there are no classes then.
    """

    file: str
    classes: tuple[tuple[str, float], ...] = ()
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        if self.error is not None:
            return {"file": self.file, "error": self.error}
        return {"file": self.file, "classes": [{"class": name, "probability": share} for name, share in self.classes]}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRecord:
    """Describes an exported model. It was loaded again, and compared with the model on batches of `batch_sizes` images.

    `difference` is the largest found, relative to the largest score; 0 means equal bit for bit. `takes` says what the
    exported model is called with.
    """

    path: str
    format: str
    bytes: int
    takes: str
    batch_sizes: tuple[int, ...]
    difference: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


class Observer:
    """Is called while a run happens, and does nothing. Subclass it, and override the methods that you need."""

    def working(self, what: str) -> None:
        """Called before something that takes a while, such as `reading the data`."""

    def run_started(self, *, folder: str, device: str, plan: Plan, train_images: int, test_images: int) -> None:
        """Called when data, model and plan are ready. `folder` is empty if nothing is written."""

    def forecast_made(self, forecast: Forecast) -> None:
        """Called when the run has started, with what its phases are expected to cost."""

    def notice(self, sentence: str) -> None:
        """Called with a sentence about something that was decided for the user."""

    def phase_started(self, index: int, phase: Phase) -> None:
        """Called when a phase begins; `index` counts from 0."""

    def step_done(self, record: StepRecord) -> None:
        """Called every `log_interval` steps, and at the last step of an epoch."""

    def epoch_done(self, record: EpochRecord) -> None:
        """Called when an epoch was trained and tested."""

    def model_checked(self, record: CheckRecord | ForecastRecord, count: int) -> None:
        """Called when one of the `count` models to check is done."""
