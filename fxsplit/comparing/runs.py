"""Reads the folders of finished runs, and what each of them came to."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from fxsplit.comparison import Moment, PlannedRun, RunFigures
from fxsplit.errors import FxsplitError, UsageError, reason
from fxsplit.options import key
from fxsplit.paths import expanded
from fxsplit.report import EpochRecord, RunReport
from fxsplit.resuming import MAY_DIFFER, PLACE, RECIPE, spec_of
from fxsplit.spec import RunSpec

# What may be otherwise in a run than is asked for: it makes no other run.
FREE = {*PLACE, *MAY_DIFFER} - {"epochs", "epochs_total"}
ASKED = tuple(item.name for item in fields(RunSpec) if item.name not in FREE)


def folder_of(output: str, model: str, label: str, seed: int) -> Path:
    """Return the folder of a run."""
    return expanded(output) / "runs" / slug(model) / f"{slug(label)}-s{seed}"


def slug(name: str) -> str:
    """Make a name of a file: `timm:resnet18` becomes `timm-resnet18`."""
    return re.sub(r"[^A-Za-z0-9._@]+", "-", name).strip("-.")


def read_report(folder: Path) -> RunReport | None:
    """Read the report of a run if it is finished. Raises UsageError when it is not one."""
    try:
        report = RunReport.read(folder)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, FxsplitError) as error:
        raise UsageError(f"the report of the run in {str(folder)!r} cannot be read: {reason(error)}") from error
    return replace(report, folder=str(folder)) if report.status == "finished" else None


def finished(run: PlannedRun) -> RunReport | None:
    """Read the report of a planned run if it is finished.

    Raises UsageError when its folder has a run that was asked for something else.
    """
    folder = Path(run.folder)
    if not (folder / RECIPE).is_file():
        return None
    before = spec_of(folder)
    others = [
        f"{key(name)} {getattr(before, name)!r} in place of {getattr(run.spec, name)!r}"
        for name in ASKED
        if getattr(before, name) != getattr(run.spec, name)
    ]
    if others:
        raise UsageError(f"the folder {str(folder)!r} holds a run with {', '.join(others)}; choose another --output")
    return read_report(folder)


def is_on_cpu(report: RunReport) -> bool:
    """Tell whether a run computed on the CPU."""
    return report.environment.get("gpu") is None


def steps_of(report: RunReport) -> int:
    """Count the optimizer steps of a run, from its images and its batches."""
    images, batch = int(report.data.get("train", 0)), int(report.spec.get("batch-size", 1))
    full, rest = divmod(images, batch)
    # A single last image is left out: BatchNorm needs two.
    steps = full + (rest > 1)
    limit = report.spec.get("train-batches-per-epoch")
    return len(report.epochs) * (steps if limit is None else min(steps, limit))


def figures(report: RunReport, seed: int, folder: str) -> RunFigures:
    """Collect what a run came to."""
    epochs = report.epochs
    on_cpu = is_on_cpu(report)

    def most(name: str) -> int | None:
        return max((value for each in epochs if (value := getattr(each, name)) is not None), default=None)

    def total(name: str) -> Any:
        values = [getattr(each, name) for each in epochs]
        return None if None in values else sum(values)

    spent = [_seconds(each, on_cpu) for each in epochs]
    whole = report.processor_seconds if on_cpu and report.processor_seconds is not None else report.total_seconds
    setup = max(0.0, whole - sum(spent))
    ends = list(accumulate(spent, initial=setup))[1:]
    train_seconds = sum(each.train_seconds for each in epochs)
    return RunFigures(
        seed=seed,
        folder=folder,
        accuracy_pct=report.accuracy_pct,
        ensemble_pct=report.ensemble_pct,
        epochs=len(epochs),
        updates=steps_of(report),
        seconds=report.total_seconds,
        processor_seconds=report.processor_seconds,
        setup_seconds=setup,
        multiply_adds=total("multiply_adds"),
        resident_bytes=max(each.peak_resident_bytes for each in epochs),
        allocated_bytes=most("peak_allocated_bytes"),
        reserved_bytes=most("peak_reserved_bytes"),
        device_bytes=most("device_bytes"),
        cache_file_bytes=most("cache_file_bytes"),
        energy_joules=total("energy_joules"),
        images_per_second=sum(each.images_per_second * each.train_seconds for each in epochs) / train_seconds,
        moments=tuple(
            Moment(
                epoch=each.epoch,
                phase=each.phase,
                seconds=end,
                accuracy_pct=each.eval_top1,
                memory_bytes=each.peak_resident_bytes
                if each.peak_allocated_bytes is None
                else each.peak_allocated_bytes,
            )
            for each, end in zip(epochs, ends, strict=True)
        ),
    )


def _seconds(record: EpochRecord, on_cpu: bool) -> float:
    if on_cpu and record.processor_seconds is not None:
        return record.processor_seconds
    return record.train_seconds + record.eval_seconds


def time_of(run: RunFigures, on_cpu: bool) -> float:
    """Return what counts as the time of a run: processor seconds on a CPU, where other work changes these least."""
    return run.processor_seconds if on_cpu and run.processor_seconds is not None else run.seconds


def memory_of(run: RunFigures, on_cpu: bool) -> int:
    """Return what counts as the memory of a run: the peak of the process on a CPU, that of tensors on a GPU."""
    return run.resident_bytes if on_cpu or run.allocated_bytes is None else run.allocated_bytes
