"""Forecasts of several devices beside runs of as many processes on the cores of this machine.

    python benchmarks/scaling.py paper:cnn --img-size 32 --batch-size 128 --parts 4
    python benchmarks/scaling.py timm:resnet18 --img-size 64 --batch-size 64 --parts 4 --schedule settle --count 4

The forecasts are those of `fxsplit inspect --devices`, made anew in each round with the bandwidth that two processes of
gloo reach here. Runs of all ways take turns. The time of a step is the mean over the epochs after the first of their
phase. Each process has one thread; where processes share cores, the forecast is multiplied by how many share one.
"""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import distributed, multiprocessing

# Each process has one thread, also when ops are timed.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
MESSAGE_BYTES = 25 * 2**20
IMAGES = 512


def main(
    context: typer.Context,
    model: str,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b")] = 128,
    processes: Annotated[int, typer.Option(help="The most.")] = 2,
    rounds: int = 3,
    epochs: int = 3,
) -> None:
    options = ["--batch-size", str(batch_size), "--epochs", str(epochs), *context.args]
    cores = len(os.sched_getaffinity(0))
    forecasts, measured = defaultdict(list), defaultdict(list)
    for _ in range(rounds):
        bandwidth = bytes_per_second()
        several = ["--devices", str(processes), "--bandwidth", str(bandwidth / 1e9), "--device", "cpu", "--json"]
        text = subprocess.check_output(
            [sys.executable, "-m", "fxsplit", "inspect", model, *options, *several], env=ENVIRONMENT, text=True
        )
        for each in json.loads(text)["scaling"]:
            way = each["kind"], each["devices"], each["pipeline_devices"]
            forecasts[way].append(each["step_seconds"] * max(1, each["devices"] / cores))
            measured[way].append(step_seconds(model, options, *way, batch_size=batch_size))
        print(f"gloo: {bandwidth / 1e9:.2f} GB/s", flush=True)
    print(f"{model} {' '.join(options)}, {cores} cores, torch {torch.__version__}: seconds of a step, medians")
    print("| way | processes | forecast | measured | measured / forecast, by round |\n|---|---|---|---|---|")
    for (kind, count, pipeline), ahead in forecasts.items():
        found = measured[kind, count, pipeline]
        way = f"{kind} of {pipeline}" if pipeline else kind
        ratios = ", ".join(f"{one / other:.2f}" for one, other in zip(found, ahead, strict=True))
        print(f"| {way} | {count} | {statistics.median(ahead):.3f} | {statistics.median(found):.3f} | {ratios} |")


def step_seconds(
    model: str, options: list[str], kind: str, count: int, pipeline: int | None, *, batch_size: int
) -> float:
    """Train with `count` processes; return the seconds of a step, mean over the epochs of the plan."""
    length = pipeline or count
    micro_batches = ["--grad-accum-steps", str(4 * length)] if "pipeline" in kind else []
    if pipeline:
        micro_batches += ["--pipeline-processes", str(pipeline)]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"),
            *("-m", "fxsplit", "train", model, *options, "--parallel", kind, *micro_batches),
            *("--train-limit", str(IMAGES), "--device", "cpu", "--no-prove", "--no-progress"),
            *("--cache", "off", "--output", folder, "--experiment", "run"),
        ]
        run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
        if run.returncode:
            sys.exit(run.stderr)
        with (Path(folder) / "run" / "summary.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
    # The first epoch of a phase makes wrappers and pipelines.
    later = [row for before, row in pairwise(rows) if before["phase"] == row["phase"]]
    return statistics.mean(float(row["train_seconds"]) for row in later) / (IMAGES // batch_size)


def bytes_per_second() -> float:
    """Measure what one of two processes sends in a second, while both add up a bucket of gradients."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_add_up, (folder,), nprocs=2)
        return MESSAGE_BYTES / statistics.median(json.loads((Path(folder) / "seconds").read_text()))


def _add_up(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    message, taken = torch.zeros(MESSAGE_BYTES // 4), []
    for _ in range(9):
        begin = time.perf_counter()
        distributed.all_reduce(message)
        taken.append(time.perf_counter() - begin)
    if not rank:
        (Path(folder) / "seconds").write_text(json.dumps(taken))
    distributed.destroy_process_group()


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, help=__doc__)(main)
    sys.exit(app())
