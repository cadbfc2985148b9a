"""Takes processes away from runs that go on with fewer, and compares how they end with runs of one process.

    python -m tests.fewer_ranks

    4 processes ─ SIGTERM ─► checkpoint ─► 2 processes ─ SIGTERM ─► checkpoint ─► 1 process ─► end
    2 machines with a process each, --nnodes 1:2 ─ one is killed ─► the other goes on alone ─► end

The exit code is 1 if losses or weights of any run are others than those of one process, beyond rounding.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.distribute.test_data_parallel import COMMON, SCORES, SPECS, metrics, weights, write_models

# Time enough to take processes away; and AdamW would make far more of a difference in rounding.
LONGER: dict[str, Any] = {"train_limit": 500, "epochs": 10, "log_interval": 50, "opt": "momentum"}
CHOSEN = ("standard", "settle")


def words(folder: Path, kind: str, output: str, **asked: Any) -> list[str]:
    """The command line of a run, after `python -m fxsplit`."""
    given = {**COMMON, **SPECS[kind], **LONGER, **asked, "output": folder / output, "experiment": kind}
    flags = ((f"--{name.replace('_', '-')}", value) for name, value in given.items())
    options = [word for flag, value in flags for word in ([flag] if value is True else [flag, str(value)])]
    return ["train", f"{folder / 'plain.py'}:plain", "--no-progress", "--resume", "auto", *options]


def launched(launcher: list[str], run: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start torchrun, or without `launcher` a single process."""
    command = [sys.executable, "-m", *(["torch.distributed.run", *launcher, "-m"] if launcher else []), "fxsplit", *run]
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file)


def wait_for(epochs: int, folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until so many epochs of a run are done."""
    file = folder / "metrics.jsonl"
    while process.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") < epochs):
        time.sleep(0.01)


def fewer(folder: Path, kind: str, parallel: str) -> str:
    """4 processes, then 2, then 1."""
    output = f"fewer-{parallel}"
    log, run = folder / f"{output}-{kind}.log", words(folder, kind, output, parallel=parallel)
    for processes, epochs in ((4, 2), (2, 4)):
        process = launched(["--standalone", f"--nproc-per-node={processes}"], run, log)
        wait_for(epochs, folder / output / kind, process)
        process.send_signal(signal.SIGTERM)
        process.wait()
    launched([], run, log).wait()
    places = [line for line in log.read_text("utf-8").splitlines() if line.startswith("goes on after")]
    return f"4, 2 and 1 processes: {'; '.join(dict.fromkeys(places))}"


def elastic(folder: Path, kind: str, parallel: str) -> str:
    """Two launchers that find each other, of which one is killed with its process."""
    output = f"elastic-{parallel}"
    log = folder / f"{output}-{kind}.log"
    run = words(folder, kind, output, parallel=parallel, checkpoint_every="20s")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = f"localhost:{free.getsockname()[1]}"
    launcher = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=fewer"]
    launcher += [f"--rdzv-endpoint={place}", "--rdzv-conf=last_call_timeout=5"]
    first = launched(launcher, run, log)
    time.sleep(2)  # it keeps where they find each other
    second = launched(launcher, run, folder / f"{output}-{kind}-second.log")
    wait_for(2, folder / output / kind, first)
    for each in (second.pid, *(child.pid for child in psutil.Process(second.pid).children(recursive=True))):
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    second.wait()
    first.wait()
    said = log.read_text("utf-8").splitlines()
    places = [line for line in said if line.startswith(("goes on after", "the processes that share"))]
    return f"2 machines, then 1: {'; '.join(dict.fromkeys(places))}"


def difference(ours: Path, plain: Path) -> tuple[float, float]:
    """Return the largest difference of a weight, and the largest of a loss as a share of it."""
    expected = weights(plain)
    moved = max(float((each - expected[name]).abs().max()) for name, each in weights(ours).items())
    pairs = zip(metrics(ours), metrics(plain), strict=True)
    losses = [name for name in SCORES if name.endswith("loss")]
    return moved, max(abs(mine[name] / other[name] - 1) for mine, other in pairs for name in losses)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parallel", nargs="+", default=["ddp", "fsdp"], help="ways to try")
    parser.add_argument("--kinds", nargs="+", default=list(CHOSEN), choices=list(SPECS), help="runs to try")
    given = parser.parse_args()
    faults = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_models(folder)
        for kind in given.kinds:
            log = folder / "one.log"
            assert launched([], words(folder, kind, "one"), log).wait() == 0, log.read_text("utf-8")
            for parallel in given.parallel:
                ways: dict[str, Callable[[Path, str, str], str]] = {"fewer": fewer, "elastic": elastic}
                for name, way in ways.items():
                    said = way(folder, kind, parallel)
                    moved, lost = difference(folder / f"{name}-{parallel}" / kind, folder / "one" / kind)
                    wrong = moved > 1e-4 or lost > 1e-4
                    faults += wrong
                    print(
                        f"- {kind}, {parallel}, {said}: weights within {moved:.1g}, losses within {lost:.1g}",
                        flush=True,
                    )
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
