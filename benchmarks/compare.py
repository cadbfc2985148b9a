"""Layer-to-layer training against standard training: the same run in every arm, one fresh process a run, arms in turn.

    python benchmarks/compare.py run OUT --seeds 0,1,2 -- paper:cnn --epochs 60 --opt adam --lr 1e-3 -b 128
    python benchmarks/compare.py memory OUT -- paper:cnn --epochs 6 --opt adam -b 128 --train-batches-per-epoch 2
    python benchmarks/compare.py table OUT

What follows `--` is given to `fxsplit train` in every arm. The arms are `standard`; `regularised`, which is standard
training with every piece of regularisation that --l2l switches on; `l2l`; and with --budget, which l2l then gets as its
--memory-budget, `checkpointed`, which is standard training within the same. A run that has finished is not done again.

The table gives the accuracy after the last epoch and whole-run seconds, set-up and tests included, as means over the
seeds with 95 % intervals (Student's t), and differences and ratios of runs with the same seed. Processor time is what
other work on the machine changes least. `memory` records what torch's allocator hands out in a run from the first
step to the end, tests and cache included: activations are all that does not outlive its step.
"""

from __future__ import annotations

import argparse
import json
import math
import operator
import os
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.optim.optimizer import register_optimizer_step_post_hook

from fxsplit.measuring import allocations
from fxsplit.presets import preset
from fxsplit.spec import RunSpec
from fxsplit_cli.main import main as fxsplit

app = typer.Typer(pretty_exceptions_enable=False, help=__doc__)

# 97.5 % quantiles of Student's t, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
ARMS = ("standard", "regularised", "checkpointed", "l2l")
PROCESSOR, MEMORY = "processor-seconds", "memory.json"
# A CPU's heap gives large blocks back after each step and faults them in again, unless it is told to keep them.
KEEP_HEAP = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
FORWARDED = {"allow_extra_args": True, "ignore_unknown_options": True}

EVERY = ",".join(ARMS)

Runs = dict[str, dict[str, Any]]
Only = Annotated[str, typer.Option(help="Arms with commas.")]
Budget = Annotated[float | None, typer.Option(help="--memory-budget of checkpointed and l2l.")]
Threads = Annotated[int, typer.Option(help="CPU threads of a run.")]


def options(arm: str, budget: float | None, words: list[str]) -> list[str]:
    """Those of `fxsplit train` by which an arm differs from the others."""
    within = [] if budget is None else ["--memory-budget", str(budget)]
    match arm:
        case "l2l":
            return ["--l2l", *within]
        case "checkpointed":
            return ["--schedule", "standard", *within]
        case "regularised":
            return ["--schedule", "standard", *_regularisation(words)]
    return ["--schedule", "standard"]


def _regularisation(words: list[str]) -> Iterator[str]:
    """What --l2l switches on in a run of as many epochs."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--epochs", type=int, default=RunSpec(model="any").epochs)
    given, _ = parser.parse_known_args(words)
    regularisers = {item.name for item in fields(RunSpec) if item.metadata["group"] == "Regularisation"}
    for name, value in preset("l2l", given.epochs).items():
        if name in regularisers:
            yield f"--{name.replace('_', '-')}"
            if value is not True:
                yield str(value)


def _arms(only: str, budget: float | None) -> list[str]:
    return [arm for arm in ARMS if arm in only.split(",") and (arm != "checkpointed" or budget is not None)]


@app.command(context_settings=FORWARDED)
def run(
    context: typer.Context,
    out: Path,
    seeds: Annotated[str, typer.Option(help="Numbers with commas.")] = "0,1,2",
    threads: Threads = 1,
    only: Only = EVERY,
    budget: Budget = None,
) -> None:
    """Train every arm with every seed."""
    for seed in seeds.split(","):
        for arm in _arms(only, budget):
            folder = out / f"{arm}-s{seed}"
            if not (folder / PROCESSOR).exists():
                shutil.rmtree(folder, ignore_errors=True)
                own = [*options(arm, budget, context.args), "--output", str(out), "--experiment", folder.name]
                words = ["train", *context.args, *own, "--seed", seed, "--quiet"]
                seconds = _call("-m", "fxsplit", *words, threads=threads)
                (folder / PROCESSOR).write_text(str(seconds))


@app.command(context_settings=FORWARDED)
def memory(context: typer.Context, out: Path, threads: Threads = 1, only: Only = EVERY, budget: Budget = None) -> None:
    """Record what every arm allocates, in a run of its own."""
    for arm in _arms(only, budget):
        folder = out / f"{arm}-memory"
        if not (folder / MEMORY).exists():
            shutil.rmtree(folder, ignore_errors=True)
            own = [*options(arm, budget, context.args), "--output", str(out), "--experiment", folder.name, "--quiet"]
            _call(__file__, "record", str(folder / MEMORY), "--", *context.args, *own, threads=threads)


def _call(*words: str, threads: int) -> float:
    """Run Python in a fresh process; the processor seconds that it used."""
    print("python", *words, flush=True)
    before = _children_seconds()
    environment = {**os.environ, **KEEP_HEAP, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, *words], env=environment, check=True)
    return _children_seconds() - before


def _children_seconds() -> float:
    """Processor time of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@app.command(context_settings=FORWARDED, hidden=True)
def record(context: typer.Context, path: Path) -> None:
    """Train, recording the allocator; `memory` calls it in a process of its own."""
    register_optimizer_step_post_hook(lambda *_: allocations.mark("step"))
    device = torch.device("cuda" if torch.cuda.is_available() and "cpu" not in context.args else "cpu")
    with allocations.recorded(device) as events:
        status = fxsplit(["train", *context.args])
    if status:
        sys.exit(status)
    steps = list(_steps(events))[1:]  # the first begins with the set-up
    peak = max(allocations.peak(step, without=allocations.survivors(step)) for step in steps)
    path.write_text(json.dumps({"activation_bytes": peak, "steps": len(steps)}))


def _steps(events: Iterable[allocations.Event]) -> Iterator[list[allocations.Event]]:
    """The events of each step, without the frees of what is older."""
    step: list[allocations.Event] = []
    own: set[int] = set()
    for event in events:
        if event.mark:
            yield step
            step, own = [], set()
        elif event.size > 0:
            own.add(event.address)
            step.append(event)
        elif event.address in own:
            own.remove(event.address)
            step.append(event)
    yield step


@app.command()
def table(out: Path) -> None:
    """Write the table of a folder of runs, in Markdown."""
    runs = {arm: _read(out, arm) for arm in ARMS}
    recorded = {arm: path for arm in ARMS if (path := out / f"{arm}-memory" / MEMORY).exists()}
    bytes_of = {arm: json.loads(path.read_text())["activation_bytes"] for arm, path in recorded.items()}
    rows: dict[str, list[str]] = {}
    for arm, mine in runs.items():
        if not mine:
            continue
        accuracies = [each["accuracy_pct"] for each in mine.values()]
        rows[arm] = [
            _spread(accuracies),
            " ".join(f"{value:.2f}" for value in accuracies),
            _paired(mine, runs["standard"], "accuracy_pct", operator.sub),
            _paired(mine, runs["regularised"], "accuracy_pct", operator.sub),
            f"{statistics.mean(each['processor'] for each in mine.values()):.0f}",
            _paired(mine, runs["standard"], "processor", operator.truediv),
            _paired(mine, runs["standard"], "total_seconds", operator.truediv),
            f"{bytes_of[arm] / bytes_of['standard']:.3f}" if {arm, "standard"} <= set(bytes_of) else "",
            f"{statistics.mean(each['epochs'][-1]['peak_resident_bytes'] for each in mine.values()) / 1e6:.0f}",
            f"{max(record['cache_file_bytes'] or 0 for each in mine.values() for record in each['epochs']) / 1e6:.0f}",
        ]
    heads = ["arm", "test accuracy, %", "by seed", "- standard", "- regularised", "processor, s", "/ standard"]
    heads += ["clock / standard", "activations / standard", "peak resident, MB", "cache file, MB"]
    for cells in (heads, ["---"] * len(heads), *([arm, *row] for arm, row in rows.items())):
        print(f"| {' | '.join(cells)} |")


def _paired(mine: Runs, others: Runs, key: str, compare: Callable[[float, float], float]) -> str:
    """How a figure compares with that of the other arm's run with the same seed."""
    return _spread([compare(mine[seed][key], others[seed][key]) for seed in mine if seed in others])


def _read(out: Path, arm: str) -> Runs:
    """The reports of the finished runs of an arm, by seed."""
    found = {}
    for path in sorted(out.glob(f"{arm}-s*/{PROCESSOR}")):
        report = json.loads((path.parent / "report.json").read_text())
        found[path.parent.name.rpartition("-s")[2]] = {**report, "processor": float(path.read_text())}
    return found


def _spread(values: list[float]) -> str:
    """Mean and half of the 95 % interval."""
    if not values:
        return ""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.2f}"
    return f"{mean:.2f} ± {STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values)):.2f}"


if __name__ == "__main__":
    app()
