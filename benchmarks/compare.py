"""Layer-to-layer training against standard training: the same run in every arm, one fresh process a run, arms in turn.

    python benchmarks/compare.py run OUT --seeds 0,1,2 -- paper:cnn --epochs 60 --opt adam --lr 1e-3 -b 128
    python benchmarks/compare.py table OUT

What follows `--` is given to `fxsplit train` in every arm. The arms are `standard`; `regularised`, which is standard
training with every piece of regularisation that --l2l switches on; and `l2l`. A run whose folder is there already is
not done again. The table gives the accuracy after the last epoch and whole-run seconds, set-up and tests included, as
means over the seeds with 95 % intervals (Student's t), and ratios of runs with the same seed. Processor time is what
other work on the machine changes least.
"""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from fxsplit.spec import RunSpec

app = typer.Typer(pretty_exceptions_enable=False, help=__doc__)

# 97.5 % quantiles of Student's t, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
PROCESSOR = "processor-seconds"
# A CPU's heap gives large blocks back after each step and faults them in again, unless it is told to keep them.
KEEP_HEAP = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}


def arms() -> dict[str, list[str]]:
    """The options by which the arms differ."""
    chosen = RunSpec(model="any", schedule="l2l")
    regularised = []
    for item in fields(RunSpec):
        usual, with_l2l = item.metadata["defaults"]
        if item.metadata["group"] == "Regularisation" and with_l2l != usual:
            value = getattr(chosen, item.name)
            option = f"--{item.name.replace('_', '-')}"
            regularised += [option] if value is True else [option, str(value)]
    return {
        "standard": ["--schedule", "standard"],
        "regularised": ["--schedule", "standard", *regularised],
        "l2l": ["--l2l"],
    }


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(
    context: typer.Context,
    out: Path,
    seeds: Annotated[str, typer.Option(help="Numbers with commas.")] = "0,1,2",
    threads: Annotated[int, typer.Option(help="CPU threads of a run.")] = 1,
    only: Annotated[str, typer.Option(help="Arms with commas.")] = "standard,regularised,l2l",
) -> None:
    """Train every arm with every seed."""
    environment = {**os.environ, **KEEP_HEAP, "OMP_NUM_THREADS": str(threads)}
    for seed in seeds.split(","):
        for arm, options in arms().items():
            name = f"{arm}-s{seed}"
            if arm not in only.split(",") or (out / name / "report.json").exists():
                continue
            command = [sys.executable, "-m", "fxsplit", "train", *context.args, *options, "--seed", seed]
            command += ["--output", str(out), "--experiment", name, "--quiet"]
            print(" ".join(command), flush=True)
            before = _children_seconds()
            subprocess.run(command, env=environment, check=True)
            (out / name / PROCESSOR).write_text(str(_children_seconds() - before))


def _children_seconds() -> float:
    """Processor time of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@app.command()
def table(out: Path) -> None:
    """Write the table of a folder of runs, in Markdown."""
    reports: dict[str, dict[str, Any]] = {}
    for arm in arms():
        found = {path.parent.name.rpartition("-s")[2]: path for path in out.glob(f"{arm}-s*/report.json")}
        reports[arm] = {seed: json.loads(path.read_text()) for seed, path in sorted(found.items())}
        for seed, path in found.items():
            reports[arm][seed]["processor"] = float((path.parent / PROCESSOR).read_text())
    heads = ("arm", "test accuracy, %", "seeds", "seconds", "of standard's", "processor, of standard's")
    print(f"| {' | '.join((*heads, 'peak resident, MB', 'cache file, MB'))} |")
    print("|---|---|---|---|---|---|---|---|")
    for arm, runs in reports.items():
        if runs:
            both = [seed for seed in runs if seed in reports["standard"]]
            ratios, busy = (
                [runs[seed][key] / reports["standard"][seed][key] for seed in both]
                for key in ("total_seconds", "processor")
            )
            epochs = [run["epochs"] for run in runs.values()]
            accuracies = [run["accuracy_pct"] for run in runs.values()]
            cells = [
                arm,
                _spread(accuracies),
                " ".join(f"{value:.2f}" for value in accuracies),
                f"{statistics.mean(run['total_seconds'] for run in runs.values()):.0f}",
                _spread(ratios),
                _spread(busy),
                f"{statistics.mean(each[-1]['peak_resident_bytes'] for each in epochs) / 1e6:.0f}",
                f"{max(record['cache_file_bytes'] or 0 for each in epochs for record in each) / 1e6:.0f}",
            ]
            print(f"| {' | '.join(cells)} |")


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
