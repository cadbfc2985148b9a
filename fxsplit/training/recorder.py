"""Collects the records of a run, and makes its report when it ends, however it ends."""

from __future__ import annotations

from time import perf_counter
from types import TracebackType
from typing import Any

from torch import nn

from fxsplit.report import EpochRecord, Inspection, RunReport
from fxsplit.training.run_folder import RunFolder


class Recorder:
    """Collects the records of a run; as a context, makes its report at the end and finishes its folder.

    The report says whether the run was finished, interrupted (by KeyboardInterrupt) or failed (by another exception),
    which then goes on.

    Args:
        folder: where records, weights and report are written; None writes nothing.
        inspection: the plan and the model, for the report and its page.
        model: its weights are saved.
        spec: the recipe of the run, as plain data.
        environment: what numbers depend on besides, as plain data.
        passes: names of the graph passes.
        began: when the run began, on the clock of `perf_counter`.
    """

    report: RunReport

    def __init__(
        self,
        folder: RunFolder | None,
        inspection: Inspection,
        model: nn.Module,
        *,
        spec: dict[str, Any],
        environment: dict[str, Any],
        passes: tuple[str, ...],
        began: float,
    ) -> None:
        self.path = str(folder.path) if folder else ""
        self.setup_seconds = self.prove_seconds = 0.0
        self._folder, self._inspection, self._model, self._began = folder, inspection, model, began
        self._spec, self._environment, self._passes = spec, environment, passes
        self._epochs: list[EpochRecord] = []

    def add(self, record: EpochRecord) -> None:
        """Add the record of an epoch, and write it into the folder."""
        self._epochs.append(record)
        if self._folder:
            self._folder.add(record)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stopped = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        self.report = RunReport(
            status="finished" if kind is None else stopped,
            spec=self._spec,
            environment=self._environment,
            graph_digest=self._inspection.train.digest(),
            plan=self._inspection.plan,
            passes=self._passes,
            epochs=tuple(self._epochs),
            setup_seconds=self.setup_seconds,
            prove_seconds=self.prove_seconds,
            total_seconds=perf_counter() - self._began,
            folder=self.path,
        )
        if self._folder:
            self._folder.finish(self.report, self._inspection, self._model)
