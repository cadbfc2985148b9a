"""What is printed: results to stdout; progress, notices and errors to stderr. Inspections have formats of their own.

A phase is drawn as one bar, in marks that also tell the roles apart where there is no colour:

    ░░░░░░░ ░░░░░░│███████ ███████ ▒▒▒▒▒▒▒▒      ░ settled  █ training  ▒ frozen  │ cut
       student             teacher
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from statistics import median
from typing import Any, Literal

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fxsplit.errors import printable
from fxsplit.pages.figures import epochs_of, human
from fxsplit.plan.plandiff import Change
from fxsplit.plan.schedule import Phase, Plan, Role
from fxsplit.report import CheckRecord, EpochRecord, ForecastRecord, Observer, RunReport, StepRecord

View = Literal["live", "plain", "quiet"]

ROLES: dict[Role, tuple[str, str]] = {
    "settled": ("░", "cyan"),
    "training": ("█", "green"),
    "frozen": ("▒", "bright_black"),
}
WIDEST = 100


# Plain output


def write(text: str) -> None:
    """Text to stdout, as it is."""
    sys.stdout.write(text)


def say(line: str) -> None:
    """A line to stderr; names in it are shown, never obeyed."""
    print(visible(line), file=sys.stderr, flush=True)


def visible(text: str) -> str:
    """Text whose lines are `printable`."""
    return "\n".join(map(printable, text.split("\n")))


class Terminal(Console):
    """A console on which names are shown, never obeyed: only styles of its own send escape sequences."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


# What a phase looks like


def draw(phase: Phase, count: int, width: int) -> Text:
    """The `count` partitions of a phase as one bar of `width` columns."""
    cut = phase.cut(count)
    edges = [round(index * width / count) for index in range(count + 1)]
    bar = Text()
    for index in range(count):
        mark, style = ROLES[phase.role(index)]
        columns = edges[index + 1] - edges[index]
        border = "│" if index + 1 == cut else " " if columns > 2 and index + 1 < count else ""
        bar.append(mark * (columns - len(border)), style).append(border[:columns], "bold")
    return bar


def describe(phase: Phase, plan: Plan) -> Text:
    """Student, cut and teacher in words, and what saves memory."""
    count = len(plan.partitions)
    cut = phase.cut(count)
    saving = f", {words}" if (words := plan.saving(phase)) else ""
    if cut is None:
        return Text(f"no cut: everything trains{saving}")

    def roles(members: range) -> Text:
        found = dict.fromkeys(phase.role(index) for index in members)
        return Text(" + ").join(Text(role, ROLES[role][1]) for role in found)

    middle = f" │ cut before {plan.partitions[cut].name} │ teacher "
    return Text.assemble("student ", roles(range(cut)), middle, roles(range(cut, count)), saving)


# Views of a run while it happens


@contextmanager
def observing(model: str, view: View) -> Iterator[Observer]:
    """An observer for a run: a live one only on a terminal, and for as long as the block lasts."""
    console = Terminal(stderr=True)
    # FORCE_COLOR makes rich take anything for a terminal, but a log cannot be redrawn.
    if view == "live" and console.is_terminal and not console.is_dumb_terminal and sys.stderr.isatty():
        live_view = LiveView(model, console)
        with live_view.live:
            yield live_view
    else:
        yield Observer() if view == "quiet" else PlainView(model)


@contextmanager
def checking() -> Iterator[Observer]:
    """An observer for checks: a progress bar on a terminal, otherwise a line for each model."""
    console = Terminal(stderr=True)
    if console.is_terminal and not console.is_dumb_terminal and sys.stderr.isatty():
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=console, transient=True) as progress:
            yield CheckBar(progress)
    else:
        yield CheckLines()


class CheckBar(Observer):
    """How many models are done; what failed stays above the bar."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task = progress.add_task("", total=None)

    def model_checked(self, record: CheckRecord | ForecastRecord, count: int) -> None:
        self.progress.update(self.task, total=count, advance=1, description=escape(record.model))
        if not record.passed:
            print_whole(self.progress.console, f"{record.model}: {record.verdict}")


class CheckLines(Observer):
    """One line for each model, for logs and pipes."""

    def __init__(self) -> None:
        self.done = 0

    def model_checked(self, record: CheckRecord | ForecastRecord, count: int) -> None:
        self.done += 1
        say(f"{self.done}/{count} {record.model}: {record.verdict}, {record.seconds:.1f} s")


def render_checks(records: Sequence[CheckRecord]) -> None:
    """A row for each model; below it what failed and what was kept whole, with the reasons."""
    console = Terminal(highlight=False)
    table = new_table("model", "verdict", ">ops", ">opaque", ">guards", ">cuts", ">partitions", ">seconds")
    for record in records:
        style = "green" if record.passed else "red"
        counts = (record.ops, len(record.opaque), record.guards, record.cuts, record.partitions)
        figures = ["-" if record.refusal else str(count) for count in counts]
        table.add_row(Text(record.model), Text(record.verdict, style), *figures, f"{record.seconds:.1f}")
    console.print(table)
    for record in records:
        if record.refusal:
            print_whole(console, f"{record.model}: {record.refusal}")
        for found, cause in ((record.differences, ""), (record.own_differences, ", and so do two plain models")):
            if found:
                more = len(found) - 3
                shown = "; ".join(found[:3]) + (f"; and {more} more" if more > 0 else "")
                print_whole(console, f"{record.model} differs{cause}: {shown}")
        reasons = {reason: path for path, reason in reversed(list(record.opaque.items()))}
        for reason, path in reversed(list(reasons.items())):
            alike = sum(other == reason for other in record.opaque.values()) - 1
            also = f" and {alike} more" if alike else ""
            print_whole(console, f"{record.model}: kept whole: {path}{also}, because {reason}")
    passed = sum(record.passed for record in records)
    console.print(f"{passed} of {len(records)} passed")


def render_forecasts(records: Sequence[ForecastRecord]) -> None:
    """A row for each phase of each model, forecast beside measurement; below the table by how much they differ."""
    console = Terminal(highlight=False)
    table = new_table("model", "trains", ">time", ">was", ">activations", ">were", ">peak", ">was")
    for record in records:
        for phase in record.phases:
            told, real = phase.forecast, phase.measured
            table.add_row(
                Text(record.model),
                f"{phase.start} to {phase.stop - 1}",
                *(f"{cost:.2f}" for cost in (told.step_cost, real.step_cost)),
                *(human(size, "B") for size in (told.activation_bytes, real.activation_bytes)),
                *(human(size, "B") for size in (told.peak_bytes, real.peak_bytes)),
            )
    console.print(table)
    print_whole(console, "Time is of a step, relative to one in which everything trains.\n")
    errors = [phase.errors for record in records for phase in record.phases]
    for name, noun in (("step_cost", "time"), ("activation_bytes", "activations"), ("peak_bytes", "peak")):
        if off := [abs(each[name]) for each in errors]:
            print_whole(console, f"{noun:12} off by {median(off):.1%} (median), {max(off):.1%} (worst)")
    for record in records:
        if record.refusal:
            print_whole(console, f"{record.model}: {record.refusal}")
    console.print(f"{sum(record.passed for record in records)} of {len(records)} passed")


def epoch_line(record: EpochRecord, epochs: int) -> str:
    """One epoch in one line."""
    return (
        f"epoch {record.epoch}/{epochs}: loss {record.train_loss:.4f}, "
        f"train {record.train_top1:.2f} %, test {record.eval_top1:.2f} %, "
        f"{record.train_seconds:.1f} s + {record.eval_seconds:.1f} s test, "
        f"{record.images_per_second:,.0f} images/s"
    )


class PlainView(Observer):
    """One line for each thing that happens, for logs and pipes."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.plan: Plan | None = None

    def run_started(self, *, folder: str, device: str, plan: Plan, train_images: int, test_images: int) -> None:
        self.plan = plan
        say(f"{self.model} on {device}, {train_images:,} images to train on and {test_images:,} to test")
        say(str(plan))
        if folder:
            say(f"run folder {folder}")

    def notice(self, sentence: str) -> None:
        say(sentence)

    def phase_started(self, index: int, phase: Phase) -> None:
        assert self.plan is not None
        say(
            f"phase {index + 1}/{len(self.plan.phases)}, {epochs_of(index, self.plan)}: "
            f"{describe(phase, self.plan).plain.replace('│', '|')}"
        )

    def step_done(self, record: StepRecord) -> None:
        assert self.plan is not None
        if record.step == record.steps:
            return  # the line of the epoch says it all
        say(
            f"epoch {record.epoch}/{self.plan.epochs} step {record.step}/{record.steps}: "
            f"loss {record.train_loss:.4f}, train {record.train_accuracy_pct:.2f} %, "
            f"{record.images_per_second:,.0f} images/s, {human(record.memory_bytes, 'B')}"
        )

    def epoch_done(self, record: EpochRecord) -> None:
        assert self.plan is not None
        say(epoch_line(record, self.plan.epochs))


class LiveView(Observer):
    """A panel that is redrawn in place; `live` shows it, and what is said in between stays above it."""

    def __init__(self, model: str, console: Console) -> None:
        self.model = model
        self.console = console
        self.began = time.monotonic()
        self.spinner = Spinner("dots", "getting model and data ready")
        self.device = self.folder = ""
        self.plan: Plan | None = None
        self.phase_index, self.phase = 0, Phase(start=0, stop=1, epochs=1)
        self.step: StepRecord | None = None
        self.epoch: EpochRecord | None = None
        self.live = Live(console=console, get_renderable=self.panel, refresh_per_second=4, transient=True)

    def run_started(self, *, folder: str, device: str, plan: Plan, train_images: int, test_images: int) -> None:
        self.folder, self.device, self.plan = folder, device, plan
        self.notice(f"{train_images:,} images to train on and {test_images:,} to test")

    def notice(self, sentence: str) -> None:
        self.console.print(Text(sentence))

    def phase_started(self, index: int, phase: Phase) -> None:
        self.phase_index, self.phase = index, phase

    def step_done(self, record: StepRecord) -> None:
        self.step = record

    def epoch_done(self, record: EpochRecord) -> None:
        assert self.plan is not None
        self.epoch = record
        self.notice(epoch_line(record, self.plan.epochs))

    def panel(self) -> Panel:
        """How things stand."""
        width = min(self.console.width, WIDEST)
        words = (self.model, self.plan.title if self.plan else "", self.device)
        return Panel(
            Group(*self._rows(self.plan, width - 4)) if self.plan else self.spinner,
            title=Text(" · ".join(filter(None, words))),
            subtitle=Text(self.folder, "dim") if self.folder else None,
            width=width,
        )

    def _rows(self, plan: Plan, width: int) -> Sequence[RenderableType]:
        phase, step = self.phase, self.step
        elapsed = time.strftime("%H:%M:%S", time.gmtime(time.monotonic() - self.began))
        head = Table.grid(expand=True)
        head.add_column()
        head.add_column(justify="right")
        phases = f"phase {self.phase_index + 1}/{len(plan.phases)}"
        head.add_row(f"{phases}, {epochs_of(self.phase_index, plan)}", elapsed)
        bar = Table.grid(expand=True, padding=(0, 1))
        bar.add_column()
        bar.add_column(ratio=1)
        bar.add_column(justify="right")
        if step and step.phase == self.phase_index:
            epoch, done, steps = step.epoch, step.step, step.steps
        else:
            epoch, done, steps = plan.first_epoch(self.phase_index) + 1, 0, step.steps if step else 1
        bar.add_row(f"epoch {epoch}/{plan.epochs}", ProgressBar(steps, done), f"{done}/{steps}")
        return head, draw(phase, len(plan.partitions), width), describe(phase, plan), bar, self._figures()

    def _figures(self) -> Table:
        step, epoch = self.step, self.epoch
        figures = {
            "loss": f"{step.train_loss:.4f}" if step else "",
            "train": f"{step.train_accuracy_pct:.2f} %" if step else "",
            "test": f"{epoch.eval_top1:.2f} %" if epoch else "",
            "images/s": f"{step.images_per_second:,.0f}" if step else "",
            "memory": human(step.memory_bytes, "B") if step else "",
        }
        table = Table.grid(expand=True)
        for _ in figures:
            table.add_column(ratio=1)
        table.add_row(*(Text.assemble((f"{name} ", "dim"), value or "-") for name, value in figures.items()))
        return table


# Results


def render_report(report: RunReport) -> None:
    """The closing tables of a run, to stdout."""
    console = Terminal()
    table = new_table("phase", "trains", "cut", ">epochs", ">seconds", ">test accuracy")
    for index, group in groupby(report.epochs, key=lambda record: record.phase):
        records = list(group)
        seconds = sum(record.train_seconds + record.eval_seconds for record in records)
        window = where(report.plan.phases[index], report.plan)
        accuracy = f"{records[-1].eval_top1:.2f} %"
        table.add_row(str(index + 1), *window, str(len(records)), f"{seconds:.1f}", accuracy)
    console.print(table, "")

    def known(name: str) -> list[Any]:
        return [value for record in report.epochs if (value := getattr(record, name)) is not None]

    joules = known("energy_joules")
    facts = Table.grid(padding=(0, 2))
    for name, fact in {
        "test accuracy": f"{report.accuracy_pct:.2f} % (last epoch)" if report.epochs else human(None),
        "total time": f"{report.total_seconds:.1f} s, of which setup {report.setup_seconds:.1f} s",
        "peak memory: process resident": human(max(known("peak_resident_bytes"), default=None), "B"),
        "peak memory: CUDA allocated": human(max(known("peak_allocated_bytes"), default=None), "B"),
        "peak memory: CUDA reserved": human(max(known("peak_reserved_bytes"), default=None), "B"),
        "peak memory: device (NVML)": human(max(known("device_bytes"), default=None), "B"),
        "cache: in memory": human(max(known("cache_resident_bytes"), default=None), "B"),
        "cache: in a file": human(max(known("cache_file_bytes"), default=None), "B"),
        "energy (NVML)": human(sum(joules) if joules else None, "J"),
    }.items():
        facts.add_row(name, Text(fact, "bold" if name == "test accuracy" else ""))
    console.print(facts)
    if report.folder:
        print_whole(console, f"\nrun folder: {report.folder}")


def render_diff(before: str, after: str, changes: Sequence[Change], *, stale: Sequence[str]) -> None:
    """What differs between two plan files, to stdout; `stale` are those of them whose figures belong to other cuts."""
    console = Terminal()
    table = new_table("", "before", "after")
    for change in changes:
        table.add_row(Text(change.what), _side(change.before), _side(change.after))
    print_whole(console, f"{before} -> {after}\n")
    if changes:
        console.print(table)
    else:
        print_whole(console, "The plans are the same.")
    for path in stale:
        print_whole(
            console,
            f"Partitions are not compared: the figures in {path} are not those of its cuts; "
            f"fxsplit inspect MODEL --plan {path} --save-plan {path} works them out",
        )


def _side(value: str | int | Mapping[str, int] | None) -> Text:
    """One side of a change; figures one a line."""
    if isinstance(value, Mapping):
        return Text("\n".join(_figure(name, figure) for name, figure in value.items()))
    return Text("-" if value is None else str(value))


def _figure(name: str, value: int) -> str:
    noun = {"macs": "MACs", "activation_bytes": "activations", "boundary_bytes": "boundary"}.get(name, name)
    return f"{human(value, 'B' * name.endswith('_bytes'))} {noun}"


def where(phase: Phase, plan: Plan) -> tuple[Text, Text]:
    """Which partitions train, and before which module the cut is."""
    count = len(plan.partitions)
    cut = phase.cut(count)
    window = f"{phase.start} to {phase.stop - 1}" if phase.stop - phase.start > 1 else str(phase.start)
    trains = "all" if phase.stop - phase.start == count else f"{window} of {count}"
    return Text(trains), Text("-" if cut is None else plan.partitions[cut].name)


def new_table(*headers: str) -> Table:
    """A table in which the columns of `>headers` are flush right."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for header in headers:
        right = header.startswith(">")
        table.add_column(header.lstrip(">"), justify="right" if right else "left", no_wrap=right, overflow="fold")
    return table


def print_whole(console: Console, line: str) -> None:
    """A line that may hold the user's words: no markup or emoji in it, and no break, so that it can be copied."""
    console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)
