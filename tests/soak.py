"""Trains a tiny model for very many steps over many phases, and looks at what a process must not gather meanwhile.

    python -m tests.soak --steps 20000 --phases 50

The cut slides through the first partitions; while it stays at one, phases with and without recomputation, with a frozen
end and with a fresh optimizer take turns. There are caches on disk, exits, soft targets, averages, BatchNorm taken
anew, and a checkpoint each epoch. At the start of each phase these are counted: memory of this process, open files,
threads, child processes, tensors, all objects of Python, and sources that Python keeps for tracebacks. The exit code is
1 if any of them grows.
"""

from __future__ import annotations

import argparse
import gc
import linecache
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

import fxsplit
from fxsplit.plan.schedule import Phase, Plan
from fxsplit.report import Observer
from tests.saving.runs import COMMON, model_in

EPOCHS = 2  # of a phase, so that caches are filled and read
PARTS, CUTS = 8, 5
SWITCHES: dict[str, Any] = {
    "cache": "disk", "exits": 1, "soft_targets": 0.5, "average": 0.2, "recalibrate": True, "anneal": 0.2,
    "augment": "crop-flip", "cache_views": 1, "log_interval": 10, "checkpoint_every": "1", "lr": 1e-3,
}  # fmt: skip

# What is counted, and by how much it may be more in a late phase than in an early one.
COUNTS: dict[str, tuple[Callable[[], int], float]] = {
    "memory, MiB": (lambda: psutil.Process().memory_full_info().uss >> 20, 4),
    "open files": (lambda: psutil.Process().num_fds(), 0),
    "threads": (threading.active_count, 0),
    "threads of the system": (lambda: psutil.Process().num_threads(), 0),
    "child processes": (lambda: len(psutil.Process().children()), 0),
    "tensors": (lambda: sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()), 0),
    "objects": (lambda: len(gc.get_objects()), 500),
    "sources": (lambda: len(linecache.cache), 0),
}


class Counts(Observer):
    """Counts at the start of each phase."""

    def __init__(self) -> None:
        self.rows: list[dict[str, int]] = []

    def phase_started(self, _: int, __: Phase) -> None:
        gc.collect()
        self.rows.append({name: count() for name, (count, _) in COUNTS.items()})

    def epoch_done(self, record: fxsplit.report.EpochRecord) -> None:
        print(f"epoch {record.epoch}, phase {record.phase + 1}", file=sys.stderr, flush=True)


def plan_file(model: Path, folder: Path, phases: int) -> str:
    """Write a plan of so many phases for the tiny model."""
    names: dict[str, Any] = {}
    exec(model.read_text(encoding="utf-8"), names)
    side = COMMON["img_size"]
    trace = fxsplit.trace(names["small"](10), (torch.randn(2, 3, side, side),))
    parts = fxsplit.partition(trace, count=PARTS)
    chosen = tuple(phase(index * CUTS // phases, index) for index in range(phases))
    path = str(folder / "plan.json")
    fxsplit.save_plan(Plan(schedule="soak", partitions=parts, phases=chosen), trace, path)
    return path


def phase(start: int, number: int) -> Phase:
    """One of the kinds of phases that take turns while the cut is before partition `start`."""
    stop = PARTS - number % 2
    recompute = stop - 1 if number % 3 == 1 and stop - 1 > start else 0
    return Phase(start=start, stop=stop, epochs=EPOCHS, recompute=recompute, fresh_optimizer=number % 4 == 3)


def soak(steps: int, phases: int) -> tuple[list[dict[str, int]], int]:
    """Train for about so many steps; return the counts of each phase, and the steps."""
    per_epoch = max(1, steps // (phases * EPOCHS))
    counts = Counts()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = model_in(folder)
        given = {**COMMON, **SWITCHES, "model": model, "output": name, "train_limit": None, "deterministic": False}
        given |= {"plan": plan_file(folder / "small.py", folder, phases), "epochs": phases * EPOCHS, "batch_size": 2}
        report = fxsplit.train(fxsplit.RunSpec(**given, train_batches_per_epoch=per_epoch), counts)
        assert report.status == "finished"
    return counts.rows, per_epoch * len(report.epochs)


def compared(rows: list[dict[str, int]]) -> list[int]:
    """List the phases that are alike: the last before the cut slides on, where caches are open."""
    starts = [index * CUTS // len(rows) for index in range(len(rows))]
    return [index for index in range(1, len(rows) - 1) if starts[index] and starts[index] != starts[index + 1]]


def grown(rows: list[dict[str, int]]) -> dict[str, tuple[int, int]]:
    """Find what is more in the last of such phases than in the first."""
    alike = compared(rows)
    first, last = rows[alike[0]], rows[alike[-1]]
    return {
        name: (first[name], last[name]) for name, (_, allowed) in COUNTS.items() if last[name] - first[name] > allowed
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--phases", type=int, default=50, help="at least 24")
    given = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    rows, steps = soak(given.steps, given.phases)
    print(f"{steps} steps, {len(rows)} phases, {time.perf_counter() - began:.0f} s\n")
    shown = [1, *(index + 1 for index in compared(rows)), len(rows)]
    print(f"| at the start of phase | {' | '.join(map(str, shown))} |\n|---|{'---|' * len(shown)}")
    for name in COUNTS:
        print(f"| {name} | {' | '.join(str(rows[number - 1][name]) for number in shown)} |")
    found = grown(rows)
    for name, (early, late) in found.items():
        print(f"\n{name} grew from {early} to {late}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
