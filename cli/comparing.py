"""What is seen of a comparison while its runs go on, on stderr."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fxsplit.comparing.runs import read_report
from fxsplit.comparison import ComparisonObserver, ComparisonSpec, PlannedRun
from fxsplit.pages.figures import duration

from .terminal import Terminal, say
from .views import can_be_redrawn

# In a log, runs that go on are told of this often.
NEWS_SECONDS = 600


@contextmanager
def observing(spec: ComparisonSpec) -> Iterator[ComparisonObserver]:
    """Give an observer of a comparison: on a terminal a table that fills, else a line for each run."""
    console = Terminal(stderr=True)
    if can_be_redrawn(console):
        view = LiveTable(spec)
        with Live(console=console, get_renderable=view.drawn, refresh_per_second=2, transient=True):
            yield view
    else:
        yield Lines()


class Progress(ComparisonObserver):
    """Knows which runs are done, which go on, and how long the others will take."""

    def __init__(self) -> None:
        self.runs: dict[str, PlannedRun] = {}
        self.jobs = 1
        self.accuracies: dict[str, float] = {}
        self.faults: dict[str, str] = {}
        self._began: dict[str, float] = {}
        self._seconds: dict[str, float] = {}

    def planned(self, runs: Sequence[PlannedRun], *, jobs: int) -> None:
        self.jobs = jobs
        self.runs |= {run.folder: run for run in runs}

    def began(self, run: PlannedRun) -> None:
        self._began[run.folder] = time.monotonic()

    def ended(self, run: PlannedRun, fault: str = "") -> None:
        self._began.pop(run.folder, None)
        if fault:
            self.faults[run.folder] = fault
        elif (report := read_report(Path(run.folder))) is not None:
            self.accuracies[run.folder] = report.accuracy_pct
            self._seconds[run.folder] = report.total_seconds

    @property
    def done(self) -> int:
        """How many runs have ended."""
        return len(self.accuracies) + len(self.faults)

    def goes_on(self, folder: str) -> bool:
        """Tell whether a run goes on now."""
        return folder in self._began

    def left(self) -> float | None:
        """Estimate the seconds until the last run ends, from those of the same arm and model; None if nothing says."""
        if not self._seconds or self.done == len(self.runs):
            return None
        mean = fmean(self._seconds.values())
        of_kind: dict[tuple[str, str], list[float]] = {}
        for folder, seconds in self._seconds.items():
            of_kind.setdefault(_kind(self.runs[folder]), []).append(seconds)
        total, now = 0.0, time.monotonic()
        for folder, run in self.runs.items():
            if folder not in self._seconds and folder not in self.faults:
                expected = fmean(of_kind.get(_kind(run), [mean]))
                total += max(0.0, expected - (now - self._began.get(folder, now)))
        return total / self.jobs


def _kind(run: PlannedRun) -> tuple[str, str]:
    return run.model, run.arm


def _name(run: PlannedRun) -> str:
    return f"{run.model} {run.arm} seed {run.seed}"


class Lines(Progress):
    """Writes a line when a run begins, now and then where it stands, and what it came to, for logs and pipes."""

    def __init__(self) -> None:
        super().__init__()
        self._told = time.monotonic()

    def began(self, run: PlannedRun) -> None:
        super().began(run)
        say(f"{_name(run)} begins")

    def waiting(self) -> None:
        if time.monotonic() - self._told >= NEWS_SECONDS:
            self._told = time.monotonic()
            for folder, run in self.runs.items():
                if self.goes_on(folder):
                    say(f"{_name(run)} is in epoch {_epochs_of(Path(folder)) + 1}")

    def ended(self, run: PlannedRun, fault: str = "") -> None:
        if run.folder in self.accuracies:
            return  # a run of an earlier table, which this one shares
        super().ended(run, fault)
        left = self.left()
        remaining = "" if left is None else f", about {duration(left)} left"
        result = fault or f"{self.accuracies[run.folder]:.2f} %"
        say(f"{self.done}/{len(self.runs)} {_name(run)}: {result}{remaining}")

    def notice(self, sentence: str) -> None:
        say(sentence)


class LiveTable(Progress):
    """Shows arms as rows and seeds as columns; a cell is an accuracy, the epoch that a run is in, or empty."""

    def __init__(self, spec: ComparisonSpec) -> None:
        super().__init__()
        self._spec = spec

    def drawn(self) -> RenderableType:
        """Draw how things stand."""
        seeds = self._spec.seed_numbers
        table = Table(box=None, pad_edge=False)
        for head in ("model", "arm"):
            table.add_column(head, no_wrap=True)
        for seed in seeds:
            table.add_column(f"seed {seed}", justify="right", no_wrap=True)
        rows: dict[tuple[str, str], dict[int, Text]] = {}
        for folder, run in self.runs.items():
            rows.setdefault(_kind(run), {})[run.seed] = self._cell(folder)
        before = ""
        for (model, arm), cells in rows.items():
            table.add_row(
                Text("" if model == before else model), Text(arm), *(cells.get(seed, Text()) for seed in seeds)
            )
            before = model
        left = self.left()
        foot = f"{self.done} of {len(self.runs)} runs" + ("" if left is None else f", about {duration(left)} left")
        return Group(table, Text(foot, "dim"))

    def _cell(self, folder: str) -> Text:
        if folder in self.accuracies:
            return Text(f"{self.accuracies[folder]:.2f}", "bold")
        if folder in self.faults:
            return Text("failed", "red")
        if self.goes_on(folder):
            return Text(f"epoch {_epochs_of(Path(folder)) + 1}", "green")
        return Text("·", "dim")


def _epochs_of(folder: Path) -> int:
    """Count the epochs of which a run has left records."""
    try:
        return (folder / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0
