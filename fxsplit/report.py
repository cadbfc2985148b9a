"""What a run tells: frozen records that own no tensor, and the observer that hears of them while they happen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fxsplit.graph import Graph
from fxsplit.plan.partition import Partition
from fxsplit.plan.schedule import Phase, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """Where training stands inside an epoch; means and `images_per_second` are over the epoch so far."""

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
    """One epoch: what was trained, how well, how fast, and at what cost.

    `epoch` counts from 0 over the whole run. Partitions [start, stop) trained. Accuracies are on the test images after
    the epoch. Memory peaks are of the run so far for the process, of the phase so far for CUDA; a figure that this
    machine cannot give is None.
    """

    epoch: int
    phase: int
    start: int
    stop: int
    cut: str
    lr: float
    train_loss: float
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


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """A whole run. `status` is "finished", "interrupted" or "failed"; `folder` is where its files lie."""

    status: str
    spec: dict[str, Any]
    environment: dict[str, Any]
    graph_digest: str
    plan: Plan
    epochs: tuple[EpochRecord, ...]
    setup_seconds: float
    total_seconds: float
    folder: str

    @property
    def accuracy_pct(self) -> float:
        """Test accuracy after the last epoch, never the best one."""
        return self.epochs[-1].eval_top1 if self.epochs else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "status": self.status,
            "accuracy_pct": self.accuracy_pct if self.epochs else None,
            "setup_seconds": self.setup_seconds,
            "total_seconds": self.total_seconds,
            "folder": self.folder,
            "graph_digest": self.graph_digest,
            "spec": self.spec,
            "environment": self.environment,
            "plan": self.plan.to_dict(),
            "epochs": [asdict(epoch) for epoch in self.epochs],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """A model seen as partitions: its training graph, where it is cut, and the phases of a schedule."""

    model: str
    input_shape: tuple[int, ...]
    graph: Graph
    plan: Plan
    tied: Mapping[str, tuple[str, ...]]
    opaque: Mapping[str, str]

    @property
    def partitions(self) -> tuple[Partition, ...]:
        return self.plan.partitions


class Observer:
    """Hears of a run while it happens. Every method may be left as it is."""

    def run_started(self, *, folder: str, device: str, plan: Plan, train_images: int, test_images: int) -> None:
        """The model is captured and the data loaded."""

    def notice(self, sentence: str) -> None:
        """Something that was decided for the user and should be said aloud."""

    def phase_started(self, index: int, phase: Phase) -> None:
        """A phase begins."""

    def step_done(self, record: StepRecord) -> None:
        """Every `log_interval` steps, and at the last step of an epoch."""

    def epoch_done(self, record: EpochRecord) -> None:
        """An epoch was trained and tested."""
