"""Kills one of the processes of a run at random moments, and compares how it ends with a run that nothing happened to.

    python -m tests.kill_rank --count 10 --output docs/results/killed-ranks.md
    python -m tests.kill_rank --count 4 --kinds mesh mesh-rows

`torchrun --max-restarts` starts all processes of the run anew, and they go on from its newest checkpoint. The exit code
is 1 if any run ends otherwise than its untouched twin, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from tests.saving.runs import COMMON, KINDS, differences, left_by, model_in

# Their caches are of a fixed medium, and their partitions settle, so that images belong to processes later on.
CHOSEN = ("standard", "l2l", "exits", "views", "few", "pipeline")
MESH = {"parallel": "ddp,pipeline", "grad_accum_steps": 2}
# Of several processes alone.
TOGETHER: dict[str, dict[str, Any]] = {
    "pipeline": {**KINDS["mixed"], "parallel": "pipeline", "grad_accum_steps": 4},
    "mesh": {**KINDS["mixed"], "mixup": 0.0, "cutmix": 0.0, **MESH},
    "mesh-rows": {**KINDS["views"], "soft_targets": 0.5, "average": 0.3, **MESH},
}
INTERVALS = ("1", "1s", "2s")


def command(model: str, kind: str, folder: Path, name: str, interval: str, processes: int) -> list[str]:
    given: dict[str, Any] = {
        **COMMON,
        **(KINDS | TOGETHER)[kind],
        "output": folder,
        "experiment": name,
        "checkpoint_every": interval,
    }
    words = ["train", model, "--no-progress"]
    for option, value in given.items():
        flag = f"--{option.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--max-restarts=5"]
    return [sys.executable, "-m", *launcher, "-m", "fxsplit", *words]


def run(words: list[str], log: Path, *, moments: list[float], draw: random.Random) -> tuple[int, float, int]:
    """Run the command; kill a process at each of these seconds after the first record or the last kill.

    Returns the exit code, the seconds from the folder to the end, and how many were killed.
    """
    killed, began = 0, None
    with log.open("wb") as file:
        launched = subprocess.Popen(words, stdout=file, stderr=file)
        while launched.poll() is None:
            time.sleep(0.02)
            if began is None and log.read_bytes().count(b"run folder") > killed:
                began = time.monotonic()
            if began is not None and killed < len(moments) and time.monotonic() - began > moments[killed]:
                with suppress(psutil.NoSuchProcess, IndexError):
                    os.kill(draw.choice(psutil.Process(launched.pid).children()).pid, signal.SIGKILL)
                    killed, began = killed + 1, None
    return launched.returncode, time.monotonic() - (began or time.monotonic()), killed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10, help="runs in which a process is killed")
    parser.add_argument("--kinds", nargs="+", default=list(CHOSEN), choices=[*KINDS, *TOGETHER], help="runs to try")
    parser.add_argument(
        "--processes", type=int, help="of each run; 2 unless given, and 4 of a mesh, which has pipelines of 2"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, help="file for the result, as Markdown")
    given = parser.parse_args()
    draw, lines, faults = random.Random(given.seed), [], 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = model_in(folder)
        twins: dict[tuple[str, str], tuple[dict[str, Any], float]] = {}
        for index in range(given.count):
            rounds, number = divmod(index, len(given.kinds))
            kind, interval = given.kinds[number], INTERVALS[(number + rounds) % len(INTERVALS)]
            processes = given.processes or (4 if kind.startswith("mesh") else 2)
            key = kind, interval
            if key not in twins:
                twin = f"whole-{kind}-{interval}"
                log = folder / f"{twin}.log"
                words = command(model, kind, folder, twin, interval, processes)
                code, seconds, _ = run(words, log, moments=[], draw=draw)
                assert code == 0, log.read_text("utf-8")
                twins[key] = left_by(folder / twin), seconds
            whole, seconds = twins[key]
            moments = [draw.random() * seconds for _ in range(draw.choice((1, 1, 2)))]
            killed, tries = 0, 0
            while not killed:  # one that has ended before is run again, and killed sooner
                name = f"run{index}-{tries}"
                log, tries = folder / f"{name}.log", tries + 1
                words = command(model, kind, folder, name, interval, processes)
                code, _, killed = run(words, log, moments=[moment / 2**tries for moment in moments], draw=draw)
            wrong = differences(whole, left_by(folder / name))[:3] if code == 0 else [f"exit code {code}"]
            goes_on = [line for line in log.read_text("utf-8").splitlines() if line.startswith("goes on after")]
            line = f"{kind}, a checkpoint every {interval}: {killed} killed; {'; '.join(goes_on) or 'begun anew'}"
            lines.append(f"- {line}: {'; '.join(wrong) or 'the same'}")
            faults += bool(wrong)
            print(lines[-1], flush=True)
    text = "\n".join(
        [
            "# Runs of several processes of which one is killed",
            "",
            f"`{shlex.join(['python', '-m', 'tests.kill_rank', *sys.argv[1:]])}`, "
            f"torch {torch.__version__}, gloo. Weights, state and records are compared bit for bit with those of an "
            f"untouched run; {faults} of {given.count} differ.",
            "",
            *lines,
            "",
        ]
    )
    if given.output:
        given.output.write_text(text, encoding="utf-8")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
