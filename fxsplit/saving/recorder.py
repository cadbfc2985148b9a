"""Collects the records of a run and saves it, while it goes on and when it ends, however it ends."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn

from fxsplit.distribute.processes import ALONE, Processes
from fxsplit.errors import FxsplitError, UsageError
from fxsplit.plan.schedule import Plan
from fxsplit.records import read_record
from fxsplit.report import EpochRecord, Inspection, RunReport
from fxsplit.saving.checkpoints import Checkpoints, Found, Place, find_checkpoint
from fxsplit.saving.model_config import ModelConfig
from fxsplit.saving.run_folder import RunFolder
from fxsplit.saving.run_state import RunState
from fxsplit.saving.signals import Signals
from fxsplit.trust import code_in


class Interval(NamedTuple):
    """Says how often a run is saved: every so many epochs, or steps; never with 0."""

    every: int
    in_steps: bool = False

    @classmethod
    def read(cls, text: str) -> Interval:
        """Read `2` (epochs), `500s` (steps) or `off`."""
        return cls(0 if text == "off" else int(text.rstrip("s")), in_steps=text.endswith("s"))


class Recorder:
    """Collects the records of a run; as a context, saves it, makes its report at the end and finishes its folder.

    The report says whether the run was finished, interrupted (by KeyboardInterrupt) or failed (by another exception),
    which then goes on. Of several processes the first one writes, and all end together when one gets a signal.

    Args:
        folder: where records, checkpoints, weights and report are written; None writes nothing.
        inspection: the plan and the model, for the report and its page.
        model: its weights are saved.
        state: what a checkpoint holds.
        checkpoints: where they are kept; None keeps none.
        interval: how often there is one. An interrupted run leaves one, too.
        spec: the recipe of the run, as plain data.
        args_yaml: the same as the text of a recipe file.
        config: how the model is used when the run is over.
        identity: what a run that goes on is held against, as plain data.
        environment: what numbers depend on besides, as plain data.
        passes: names of the graph passes.
        elapsed: returns the seconds and the processor seconds that this process has spent on the run so far.
        notice: is called with a sentence for each file that cannot be written.
        processes: those of the run.
        is_apart: whether each trains some of the partitions alone: after a failure none has all weights.
    """

    report: RunReport

    def __init__(
        self,
        folder: RunFolder | None,
        inspection: Inspection,
        model: nn.Module,
        *,
        state: RunState,
        checkpoints: Checkpoints | None,
        interval: Interval,
        spec: dict[str, Any],
        args_yaml: str,
        config: ModelConfig,
        identity: dict[str, Any],
        environment: dict[str, Any],
        passes: tuple[str, ...],
        elapsed: Callable[[], tuple[float, float]],
        notice: Callable[[str], None],
        processes: Processes = ALONE,
        is_apart: bool = False,
    ) -> None:
        self._processes, self._is_apart = processes, is_apart
        self.path = self._processes.first(lambda: str(folder.path) if folder else "")
        self.setup_seconds = self.prove_seconds = 0.0
        self._folder, self._inspection, self._model = folder, inspection, model
        self._elapsed, self._earlier = elapsed, (0.0, 0.0)
        # Processor seconds of the other processes, as of the last epoch or checkpoint: at the end they may be gone.
        self._of_others = 0.0
        self.state, self._checkpoints, self._interval = state, checkpoints, interval
        self._spec, self._args_yaml, self._config, self._identity = spec, args_yaml, config, identity
        self._environment, self._passes = environment, passes
        self._notice = notice
        self._epochs: list[EpochRecord] = []
        self._confusion: dict[str, dict[str, int]] = {}
        self._signals = Signals()
        self._saved: Place | None = None
        self._tried: Place | None = None
        # Whether an epoch is missing in the files of records.
        self._is_behind = False

    def later_than(self, found: Found) -> list[str]:
        """List by name the checkpoints of the run that are later than one of them."""
        return [path.name for path in self._checkpoints.later_than(found.path)] if self._checkpoints else []

    def go_on(self, found: Found) -> None:
        """Take over the records and seconds of the run that a checkpoint is of, and restore its state.

        Call it before the context is entered. Checkpoints that are later are removed; nothing else is written. Raises
        UsageError when it is of another model.
        """
        data = found.data
        self.state.load_state_dict(data["state"])
        self._epochs = [read_record(EpochRecord, record) for record in data["epochs"]]
        self._confusion = data.get("confusion", {})
        self._earlier = data["seconds"]["total"], data["seconds"]["processor"]
        self.setup_seconds += data["seconds"]["setup"]
        self.prove_seconds += data["seconds"]["prove"]
        self._saved = Place(*data["place"])
        if self._checkpoints:
            self._checkpoints.remove_after(found.path)

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """Inside is what comes between the making of the folder and the run; an error leaves no empty folder behind."""
        try:
            yield
        except BaseException:
            if self._folder:
                self._folder.close()
            raise

    def newest(self) -> Found | None:
        """Read the newest checkpoint of the run that is whole; None when it has none. Raises DataError if none is."""
        return find_checkpoint(Path(self.path), notice=self._notice) if self._checkpoints else None

    def replan(self, plan: Plan) -> None:
        """Take another plan for the run, with the same partitions, phases and epochs."""
        self._inspection = replace(self._inspection, plan=plan)
        if self._folder:
            try:
                self._folder.write_plan(self._inspection.plan_file.to_json())
            except OSError as error:
                self._notice(f"the new plan cannot be written: {error.strerror}")

    def add(self, record: EpochRecord, confusion: Mapping[tuple[int, int], int]) -> None:
        """Add the record of an epoch that has just ended, write it into the folder, and save the run if it is due.

        Args:
            record: of the epoch.
            confusion: images of its test by label and the class that they were taken for.
        """
        self._epochs.append(record)
        self._count_others()
        self._confusion = {}
        for (label, taken_for), count in confusion.items():
            self._confusion.setdefault(self._config.name_of(label), {})[self._config.name_of(taken_for)] = count
        if fault := self._write_record(record):
            self._notice(f"{fault}; it is tried again after the next epoch")
        every, is_last = self._interval.every, record.epoch == self._inspection.plan.epochs
        is_due = every and (is_last or (not self._interval.in_steps and record.epoch % every == 0))
        self._pause(Place(record.epoch, 0), is_due=bool(is_due), accuracy=record.eval_top1)

    def _write_record(self, record: EpochRecord) -> str:
        """Write the record of an epoch, and earlier ones that could not be written; return what went wrong."""
        try:
            if self._folder and self._is_behind:
                self._folder.write_records(self._epochs)
            elif self._folder:
                self._folder.add(record)
        except OSError as error:
            self._is_behind = True
            return f"the record of epoch {record.epoch} cannot be written: {error.strerror}"
        self._is_behind = False
        return ""

    def pause(self, epoch: int, step: int, *, steps: int, ending: bool = False) -> None:
        """Save the run if it is due, and end it if a signal has asked for that; the state must be whole.

        Args:
            epoch: epochs that are done.
            step: steps that are done of the next.
            steps: steps of the whole run that are done.
            ending: the run ends here by an exception, so it is saved in any case.

        Raises KeyboardInterrupt, or Terminated, with words on how to go on.
        """
        is_due = self._interval.in_steps and self._interval.every and steps % self._interval.every == 0
        if ending and self._processes.count > 1:
            return  # the others may be elsewhere, and where all end together they have saved before
        self._pause(Place(epoch, step), is_due=bool(is_due) or ending)

    def _pause(self, place: Place, *, is_due: bool, accuracy: float | None = None) -> None:
        number = self._processes.vote(self._signals.pending)
        if number or (is_due and place != self._tried):
            with self._signals.saving():
                self._save(place, accuracy)
        if number:
            self._signals.heed(number)
            self._signals.end(self._how_to_go_on())

    def _save(self, place: Place, accuracy: float | None) -> None:
        if not self.path or place == self._saved:
            return
        self._tried = place
        data = self._data(place)
        if self._processes.first(lambda: self._write(place, data, accuracy)):
            self._saved = place

    def _write(self, place: Place, data: dict[str, Any], accuracy: float | None) -> bool:
        """Write a checkpoint, or say why it cannot be written; whatever the reason is, training goes on."""
        assert self._checkpoints
        try:
            self._checkpoints.write(place, data, accuracy=accuracy)
        except Exception as error:
            why = getattr(error, "strerror", None) or " ".join(str(error).split())
            earlier = f"that of {self._saved} stays" if self._saved else "there is none yet"
            self._notice(f"no checkpoint of {place} can be written ({why}); {earlier}")
            return False
        return True

    def _count_others(self) -> None:
        """Note what the other processes have spent so far; all call it together."""
        _, own = self._elapsed()
        self._of_others = float(self._processes.sum(torch.tensor(own, dtype=torch.float64))) - own

    def _spent(self) -> tuple[float, float]:
        """Return the seconds and the processor seconds of the run, of all its processes."""
        seconds, processor = map(sum, zip(self._earlier, self._elapsed(), strict=True))
        return seconds, processor + self._of_others

    def _data(self, place: Place) -> dict[str, Any]:
        self._count_others()
        seconds, processor = self._spent()
        return {
            "place": list(place),
            "spec": self._spec,
            "identity": self._identity,
            "plan": self._inspection.plan_file.to_dict(),
            "epochs": [asdict(record) for record in self._epochs],
            "confusion": self._confusion,
            "seconds": {
                "total": seconds,
                "processor": processor,
                "setup": self.setup_seconds,
                "prove": self.prove_seconds,
            },
            "state": self.state.state_dict(),
        }

    def _how_to_go_on(self) -> str:
        if not self._saved:
            return ""
        # What runs code has to be named again.
        code = code_in(self._spec)
        named = [*([code["model"]] if "model" in code else ()), *(["--data", code["data"]] if "data" in code else ())]
        count = self._processes.local_count
        launched = ["torchrun", "--standalone", f"--nproc-per-node={count}", "-m"]
        together = self._processes.count > 1 and count == self._processes.count
        words = [*(launched if together else ()), "fxsplit", "train", "--resume", self.path, *named]
        return f"saved at {self._saved}; go on with: {shlex.join(words)}"

    def __enter__(self) -> Recorder:
        if self._folder:
            try:
                self._folder.start(
                    args_yaml=self._args_yaml,
                    plan_json=self._inspection.plan_file.to_json(),
                    config=self._config,
                    environment=self._environment,
                    epochs=self._epochs,
                )
            except OSError as error:
                raise UsageError(f"the run folder {self.path!r} cannot be written: {error.strerror}") from error
        self._signals.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            with self._signals.saving():
                faults = self._finish(error)
        finally:
            self._signals.__exit__(kind, error, traceback)
        if faults and error is None:
            raise FxsplitError("; ".join(faults))
        for fault in faults:
            self._notice(fault)

    def _finish(self, error: BaseException | None) -> list[str]:
        stopped = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        seconds, processor = self._spent()
        self.report = RunReport(
            status="finished" if error is None else stopped,
            spec=self._spec,
            environment=self._environment,
            graph_digest=self._inspection.train.digest(),
            plan=self._inspection.plan,
            passes=self._passes,
            epochs=tuple(self._epochs),
            setup_seconds=self.setup_seconds,
            prove_seconds=self.prove_seconds,
            total_seconds=seconds,
            processor_seconds=processor,
            data=self._identity,
            confusion=self._confusion,
            folder=self.path,
        )
        if not self._folder:
            return []
        late = self._write_record(self._epochs[-1]) if self._is_behind else ""
        is_lost = self._is_apart and self.report.status == "failed"
        faults = self._folder.finish(self.report, self._inspection, None if is_lost else self._model, self._config)
        self._folder.close()
        return [*filter(None, [late]), *faults]
