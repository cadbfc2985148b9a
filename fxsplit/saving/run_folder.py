"""The folder of a run: recipe, plan, records and weights, each in a file that other tools can read."""

from __future__ import annotations

import csv
import io
import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import nn

from fxsplit.errors import FxsplitError, UsageError
from fxsplit.models.weights import WEIGHTS_FILE
from fxsplit.objects.structure import is_divided
from fxsplit.pages.page import report_page
from fxsplit.paths import expanded
from fxsplit.records import json_line, json_text
from fxsplit.report import REPORT, EpochRecord, Inspection, RunReport
from fxsplit.resuming import RECIPE
from fxsplit.saving.files import PART, append_whole, remove_parts, replacing, write_whole
from fxsplit.saving.lock import LOCK, PATIENCE_SECONDS, FolderLock, LockedError
from fxsplit.saving.model_config import MODEL_CONFIG, ModelConfig

# timm's columns first, in its order, so that a program that reads its summaries reads ours.
FIRST = ("epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr")
COLUMNS = (*FIRST, *(field.name for field in fields(EpochRecord) if field.name not in FIRST))

# So often a folder is made again that others remove meanwhile.
TRIES = 10

PLAN, ENVIRONMENT, METRICS, SUMMARY, PAGE = "plan.json", "env.json", "metrics.jsonl", "summary.csv", "report.html"
FILES = frozenset((RECIPE, PLAN, MODEL_CONFIG, ENVIRONMENT, METRICS, SUMMARY, WEIGHTS_FILE, REPORT, PAGE))


class RunFolder:
    """Writes the files of a run into its folder, each whole or not at all. The folder is locked for this process.

        start     args.yaml, plan.json, model.json, env.json, and the records so far
        add       a line in summary.csv and in metrics.jsonl
        finish    model.safetensors, report.json, report.html

    Made by `new` or `reopened`.
    """

    def __init__(self, path: Path, lock: FolderLock) -> None:
        self.path, self._lock = path, lock

    @staticmethod
    def check(output: str, *, experiment: str | None) -> None:
        """Find out whether `new` could make a folder now, and leave nothing behind.

        Raises UsageError as `new` does.
        """
        parent = expanded(output)
        path = parent / experiment if experiment else parent
        try:
            if experiment and path.exists() and _is_used(path):
                raise UsageError(_holds_a_run(path))
            there = next(each for each in (path, *path.parents) if each.exists())
            with tempfile.TemporaryFile(dir=there) as file:
                file.write(b"0")
                file.flush()
        except OSError as error:
            raise UsageError(_cannot_be_made(path, error)) from error

    @classmethod
    def new(cls, output: str, *, model: str, schedule: str, seed: int, experiment: str | None) -> RunFolder:
        """Make the folder of a new run, which no other run gets.

        Args:
            output: the folder in which the run gets its own.
            model: part of its name, as are schedule, seed and time.
            schedule: likewise.
            seed: likewise.
            experiment: its name, instead of that one.

        Raises UsageError when the folder of a named experiment already holds something, or cannot be made.
        """
        parent = expanded(output)
        name = experiment or f"{datetime.now():%Y%m%d-%H%M%S}-{_slug(model)}-{_slug(schedule)}-s{seed}"
        path, number = parent / name, 1
        try:
            while (lock := _locked_if_empty(path)) is None:
                if experiment:
                    raise UsageError(_holds_a_run(path))
                number += 1
                path = parent / f"{name}-{number}"
        except OSError as error:
            raise UsageError(_cannot_be_made(path, error)) from error
        return cls(path, lock)

    @classmethod
    def reopened(cls, path: Path) -> RunFolder:
        """Open the folder of a run that ended before. Raises UsageError when it goes on, or cannot be written."""
        try:
            return cls(path, FolderLock(path, patience=PATIENCE_SECONDS))
        except LockedError as error:
            raise UsageError(f"the run in {str(path)!r} is still going on, in {error}") from error
        except OSError as error:
            raise UsageError(f"the run folder {str(path)!r} cannot be written: {error.strerror}") from error

    def start(
        self,
        *,
        args_yaml: str,
        plan_json: str,
        config: ModelConfig,
        environment: dict[str, Any],
        epochs: Sequence[EpochRecord] = (),
    ) -> None:
        """Write what is known before the first epoch: recipe, plan, how the model is used, what numbers depend on
        besides, and the records so far.
        """
        remove_parts(self.path)
        write_whole(self.path / RECIPE, args_yaml)
        self.write_plan(plan_json)
        write_whole(self.path / MODEL_CONFIG, json_text(config.to_dict()))
        write_whole(self.path / ENVIRONMENT, json_text(environment))
        self.write_records(epochs)

    def write_plan(self, plan_json: str) -> None:
        """Write the plan, in place of a former one. Raises OSError when it cannot be written."""
        write_whole(self.path / PLAN, plan_json)

    def write_records(self, epochs: Sequence[EpochRecord]) -> None:
        """Write the records of all epochs so far, in place of those that are there. Raises OSError when it cannot."""
        write_whole(self.path / METRICS, "".join(map(_line, epochs)))
        write_whole(self.path / SUMMARY, _row(COLUMNS) + "".join(map(_summary, epochs)))

    def add(self, record: EpochRecord) -> None:
        """Write the record of an epoch. Raises OSError when it cannot be written."""
        append_whole(self.path / SUMMARY, _summary(record))
        append_whole(self.path / METRICS, _line(record))

    def finish(
        self, report: RunReport, inspection: Inspection, model: nn.Module | None, config: ModelConfig
    ) -> list[str]:
        """Write the report and the weights, by the model's own names; tied parameters are there once.

        In the metadata of the weights is how the model is used. Where no process has all weights, `model` is None.

        Returns a sentence for each file that could not be written. The others are there.
        """
        writers: dict[str, Callable[[Path], None]] = {
            WEIGHTS_FILE: lambda path: write_weights(model, path, config),
            REPORT: lambda path: write_whole(path, json_text(report.to_dict())),
            PAGE: lambda path: write_whole(path, report_page(report, inspection)),
        }
        faults = []
        for name, write in writers.items():
            try:
                write(self.path / name)
            except Exception as error:  # whatever it is, the other files are written
                faults.append(f"{str(self.path / name)!r} cannot be written: {_reason(error)}")
        return faults

    def close(self) -> None:
        """Release the folder: another process may go on with the run. One in which nothing was written is removed."""
        if not _is_used(self.path):
            remove_parts(self.path)
            with suppress(OSError):  # another process has just taken it
                (self.path / LOCK).unlink(missing_ok=True)
                self.path.rmdir()
        self._lock.release()


def _is_used(folder: Path) -> bool:
    """Tell whether a folder holds something whole."""
    return any(each.name != LOCK and not each.name.endswith(PART) for each in folder.iterdir())


def _holds_a_run(path: Path) -> str:
    return f"the folder {str(path)!r} already holds a run; name another --experiment, or go on with it by --resume"


def _cannot_be_made(path: Path, error: OSError) -> str:
    return f"the run folder {str(path)!r} cannot be made: {error.strerror}; choose another --output"


def _locked_if_empty(path: Path) -> FolderLock | None:
    """Make a folder and lock it; return None if it holds something whole or is another run's."""
    for tries_left in reversed(range(TRIES)):
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(path)
            is_used = _is_used(path)
        except LockedError:
            return None
        except (FileNotFoundError, FileExistsError):
            # Another process, which had left it empty, may have removed it just now.
            if tries_left:
                continue
            raise
        if not is_used:
            return lock
        lock.release()
        break
    return None


def write_weights(model: nn.Module | None, path: Path, config: ModelConfig) -> None:
    """Write a model's weights as safetensors, and how the model is used as their metadata.

    Raises FxsplitError when they are divided among processes, of which one has failed.
    """
    if model is None or any(map(is_divided, model.parameters())):
        raise FxsplitError("each process has a part of the weights, and one has failed; a checkpoint has them whole")
    with replacing(path) as part:
        safetensors.torch.save_model(model, str(part), metadata=config.to_metadata())


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    kind = "" if isinstance(error, SafetensorError | FxsplitError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())


def _line(record: EpochRecord) -> str:
    return json_line(asdict(record)) + "\n"


def _summary(record: EpochRecord) -> str:
    values = asdict(record)
    return _row([values[column] for column in COLUMNS])


def _row(values: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text).writerow(values)
    return text.getvalue()


def _slug(name: str) -> str:
    """Make a part of a folder's name: `timm:resnet18` -> `timm-resnet18`; of a path only the last part."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", name.rsplit("/", 1)[-1]).strip("-")
