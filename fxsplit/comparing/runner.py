"""Does the runs of a comparison, each in a fresh process, several at a time if asked for."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

from fxsplit.comparing.runs import finished
from fxsplit.comparison import ComparisonObserver, PlannedRun
from fxsplit.errors import TraceError, UsageError
from fxsplit.resuming import CHECKPOINTS, RECIPE
from fxsplit.spec import ENVIRONMENT_PREFIX
from fxsplit.trust import is_code_of_data

PAUSE_SECONDS = 0.2
# Exit codes of runs that were asked for what cannot be: the others of their kind would end likewise.
HOPELESS = (UsageError.exit_code, TraceError.exit_code)
THREADS = "OMP_NUM_THREADS"


class Process(Protocol):
    """A process that was started, as of subprocess."""

    def poll(self) -> int | None:
        """Return its exit code, or None while it goes on."""

    def send_signal(self, number: int, /) -> None:
        """Send it a signal."""

    def wait(self) -> int:
        """Wait until it has ended."""


Launch = Callable[[PlannedRun, str | None, int], Process]


def turned(arms: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Give seeds and arms in the order of their runs: all arms of a seed, beginning with another one for each seed.

    So whatever changes in the course of hours falls on all arms alike.
    """
    for number, seed in enumerate(seeds):
        first = number % len(arms)
        yield from ((seed, arm) for arm in (*arms[first:], *arms[:first]))


def launch(run: PlannedRun, device: str | None, jobs: int, *, trust_code: bool = False) -> Process:
    """Start the process of a run, or go on with it where an earlier one has begun; what it says is kept beside it.

    `trust_code` lets it run code that comes with a model of Hugging Face.
    """
    folder = Path(run.folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    on = [] if device is None else ["--device", device]
    trusted = ["--trust-code"] if trust_code else []
    if (folder / RECIPE).is_file():
        # What runs code has to be named again.
        words = ["--resume", str(folder), *(["--data", run.spec.data] if is_code_of_data(run.spec.data) else [])]
    else:
        recipe = folder.with_name(f"{folder.name}.yaml")
        recipe.write_text(run.spec.to_yaml(), encoding="utf-8")
        words = ["--config", str(recipe), "--trust-recipe"]  # it was written above
    environment = {name: text for name, text in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}
    environment.setdefault(THREADS, str(max(1, (os.cpu_count() or 1) // jobs)))
    with log_of(run).open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "fxsplit", "train", run.model, "--quiet", *words, *on, *trusted],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env=environment,
            # In a session of its own, so that Ctrl-C reaches this process alone, which then ends the others in order.
            start_new_session=True,
        )


def log_of(run: PlannedRun) -> Path:
    """Return the file of what the process of a run has said."""
    folder = Path(run.folder)
    return folder.with_name(f"{folder.name}.log")


class _Running(NamedTuple):
    run: PlannedRun
    process: Process


def do_runs(
    runs: Sequence[PlannedRun],
    observer: ComparisonObserver,
    *,
    jobs: int | None = None,
    devices: Sequence[str] = (),
    launch: Launch = launch,
) -> dict[str, str]:
    """Do the runs that are not finished yet, in their order; return what went wrong, by the folder of the run.

    A run that was interrupted goes on from its last checkpoint; one that is finished keeps none. When this process is
    interrupted, the runs that go on are asked to save themselves and end, and are waited for.

    Args:
        runs: all of them.
        observer: is told of each.
        jobs: how many go on at a time; None for one a device.
        devices: they are given to the runs in turn; none leaves the choice to each run.
        launch: starts the process of a run on a device.

    Raises UsageError when a run ends because it cannot be done as asked.
    """
    jobs = jobs or max(1, len(devices))
    waiting = []
    for run in runs:
        if finished(run) is None:
            waiting.append(run)
        else:
            observer.ended(run)
    places: list[_Running | None] = [None] * jobs
    faults: dict[str, str] = {}
    try:
        while waiting or any(places):
            for number, place in enumerate(places):
                if place is not None and (code := place.process.poll()) is not None:
                    places[number] = None
                    if fault := _fault(place.run, code):
                        faults[place.run.folder] = fault
                        if code in HOPELESS:
                            raise UsageError(f"{place.run.model} cannot be trained as {place.run.arm}: {fault}")
                    else:
                        shutil.rmtree(Path(place.run.folder) / CHECKPOINTS, ignore_errors=True)
                    observer.ended(place.run, fault)
                if places[number] is None and waiting:
                    run = waiting.pop(0)
                    device = devices[number % len(devices)] if devices else None
                    observer.began(run)
                    places[number] = _Running(run, launch(run, device, jobs))
            observer.waiting()
            time.sleep(PAUSE_SECONDS)
    finally:
        left = [place.process for place in places if place is not None]
        for process in left:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process in left:
            process.wait()
    return faults


def _fault(run: PlannedRun, code: int) -> str:
    """Say why a run is not finished; empty if it is."""
    if finished(run) is not None:
        return ""
    try:
        said = log_of(run).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        said = []
    return said[-1].removeprefix("fxsplit: ") if said else f"its process ended with exit code {code}"
