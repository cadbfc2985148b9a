"""What is seen of a run or a check while it goes on, all of it on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fxsplit.pages.figures import epochs_of, human
from fxsplit.plan.schedule import Phase, Plan, Role
from fxsplit.report import CheckRecord, EpochRecord, ForecastRecord, Observer, StepRecord

from .terminal import ROLES, WIDEST, Terminal, draw, encodable, legend, print_whole, say

View = Literal["live", "plain", "quiet"]


@contextmanager
def observing(model: str, view: View) -> Iterator[Observer]:
    """Give an observer for a run: a live one only on a terminal, and for as long as the block lasts."""
    console = Terminal(stderr=True)
    if view == "live" and _can_be_redrawn(console):
        live_view = LiveView(model, console)
        with live_view.live:
            yield live_view
    else:
        yield Observer() if view == "quiet" else PlainView(model)


@contextmanager
def checking() -> Iterator[Observer]:
    """Give an observer for checks: a progress bar on a terminal, otherwise a line for each model."""
    console = Terminal(stderr=True)
    if _can_be_redrawn(console):
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=console, transient=True) as progress:
            yield CheckBar(progress)
    else:
        yield CheckLines()


def _can_be_redrawn(console: Console) -> bool:
    """FORCE_COLOR makes rich take anything for a terminal, but a log cannot be redrawn."""
    return console.is_terminal and not console.is_dumb_terminal and sys.stderr.isatty()


class Notices(Observer):
    """Writes only what was decided for the user."""

    def notice(self, sentence: str) -> None:
        say(sentence)


class CheckBar(Observer):
    """Shows how many models are done; what failed stays above the bar."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task = progress.add_task("", total=None)

    def model_checked(self, record: CheckRecord | ForecastRecord, count: int) -> None:
        self.progress.update(self.task, total=count, advance=1, description=escape(record.model))
        if not record.passed:
            print_whole(self.progress.console, f"{record.model}: {record.verdict}")


class CheckLines(Observer):
    """Writes one line for each model, for logs and pipes."""

    def __init__(self) -> None:
        self.done = 0

    def model_checked(self, record: CheckRecord | ForecastRecord, count: int) -> None:
        self.done += 1
        say(f"{self.done}/{count} {record.model}: {record.verdict}, {record.seconds:.1f} s")


class PlainView(Observer):
    """Writes one line of ASCII for each thing that happens, for logs and pipes."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.plan: Plan | None = None

    def run_started(self, *, folder: str, device: str, plan: Plan, train_images: int, test_images: int) -> None:
        self.plan = plan
        say(f"{self.model} on {device}, {image_counts(train_images, test_images)}")
        say(str(plan))
        if is_cut(plan):
            say(encodable(legend().plain, "ascii"))
        if folder:
            say(f"run folder {folder}")

    def notice(self, sentence: str) -> None:
        say(sentence)

    def phase_started(self, index: int, phase: Phase) -> None:
        assert self.plan is not None
        words = encodable(describe(phase, self.plan).plain, "ascii")
        say(f"phase {index + 1}/{len(self.plan.phases)}, {epochs_of(index, self.plan)}: {words}")

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
    """Shows a panel that is redrawn in place, always of the same height; what is said meanwhile stays above it.

    ╭───────────────── paper:cnn · l2l · cpu ─────────────────╮
    │ phase 2/4, epochs 4 to 6                       00:01:12 │
    │ ░░░░░░░ ░░░░░░│███████ ████████ ███████ ███████         │
    │ student 0-1 settled │ cut before conv3 │ teacher 2-5 tr…│
    │ epoch 5/10  ━━━━━━━━━━━━━━━━╺━━━━━━━━━━━━━━━━━━━  90/157│
    │ loss 0.4821        train 84.10 %      test 81.30 %      │
    │ images/s 1,204     memory 812.0 MB                      │
    ╰─────────────────────────────────────────────────────────╯
    """

    HEIGHT = 8
    # A terminal echoes ^C where the cursor is, behind the panel; at the edge it would begin a new line, and what
    # clears the panel would miss its first one.
    ECHO = len("^C^C")

    def __init__(self, model: str, console: Console) -> None:
        self.model = model
        self.console = console
        self.began = time.monotonic()
        self.spinner = Spinner("line", "getting model and data ready")
        self.device = ""
        self.plan: Plan | None = None
        self.phase: Phase | None = None
        self.phase_index = 0
        self.step: StepRecord | None = None
        self.epoch: EpochRecord | None = None
        self.live = Live(console=console, get_renderable=self.panel, refresh_per_second=4, transient=True)

    def run_started(self, *, folder: str, device: str, plan: Plan, train_images: int, test_images: int) -> None:
        self.device, self.plan = device, plan
        self.notice(image_counts(train_images, test_images))
        if folder:
            self.notice(f"run folder {folder}")
        if is_cut(plan):
            self.console.print(legend())

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
        """Draw how things stand."""
        width = min(self.console.width - self.ECHO, WIDEST)
        words = (self.model, self.plan.title if self.plan else "", self.device)
        return Panel(
            Group(*self._rows(self.plan, self.phase, width - 4)) if self.plan and self.phase else self.spinner,
            title=Text(" · ".join(filter(None, words))),
            width=width,
            height=self.HEIGHT,
        )

    def _rows(self, plan: Plan, phase: Phase, width: int) -> list[RenderableType]:
        elapsed = time.strftime("%H:%M:%S", time.gmtime(time.monotonic() - self.began))
        head = Table.grid(expand=True)
        head.add_column(no_wrap=True)
        head.add_column(justify="right")
        head.add_row(f"phase {self.phase_index + 1}/{len(plan.phases)}, {epochs_of(self.phase_index, plan)}", elapsed)
        words = describe(phase, plan)
        words.no_wrap, words.overflow = True, "ellipsis"
        return [head, draw(phase, len(plan.partitions), width), words, self._progress(plan), self._figures()]

    def _progress(self, plan: Plan) -> Table:
        step = self.step
        if step and step.phase == self.phase_index:
            epoch, done, steps = step.epoch, step.step, step.steps
        else:
            epoch, done, steps = plan.first_epoch(self.phase_index) + 1, 0, step.steps if step else 1
        bar = Table.grid(expand=True, padding=(0, 1))
        bar.add_column()
        bar.add_column(ratio=1)
        bar.add_column(justify="right")
        bar.add_row(f"epoch {epoch}/{plan.epochs}", ProgressBar(steps, done), f"{done}/{steps}")
        return bar

    def _figures(self) -> Table:
        """Two rows of three, so that they fit in 60 columns."""
        step, epoch = self.step, self.epoch
        figures = {
            "loss": f"{step.train_loss:.4f}" if step else "",
            "train": f"{step.train_accuracy_pct:.2f} %" if step else "",
            "test": f"{epoch.eval_top1:.2f} %" if epoch else "",
            "images/s": f"{step.images_per_second:,.0f}" if step else "",
            "memory": human(step.memory_bytes, "B") if step else "",
        }
        cells = [Text.assemble((f"{name} ", "dim"), value or "-") for name, value in figures.items()]
        table = Table.grid(expand=True)
        for _ in range(3):
            table.add_column(ratio=1, no_wrap=True)
        table.add_row(*cells[:3])
        table.add_row(*cells[3:])
        return table


# What several views say


def describe(phase: Phase, plan: Plan) -> Text:
    """Say what student and teacher do, where the cut between them is, and what saves memory."""
    count = len(plan.partitions)
    cut = phase.cut(count)
    saving = f", {words}" if (words := plan.saving(phase)) else ""
    if cut is None:
        return Text(f"no cut: everything trains{saving}")

    def roles(first: int, stop: int) -> Text:
        members: dict[Role, list[int]] = {}
        for index in range(first, stop):
            members.setdefault(phase.role(index), []).append(index)
        return Text(" + ").join(Text(f"{_span(found)} {role}", ROLES[role][1]) for role, found in members.items())

    middle = f" │ cut before {plan.partitions[cut].name} │ teacher "
    return Text.assemble("student ", roles(0, cut), middle, roles(cut, count), saving)


def _span(indices: list[int]) -> str:
    return str(indices[0]) if len(indices) == 1 else f"{indices[0]}-{indices[-1]}"


def is_cut(plan: Plan) -> bool:
    """Say whether any phase has a student and a teacher."""
    return any(phase.cut(len(plan.partitions)) is not None for phase in plan.phases)


def image_counts(train: int, test: int) -> str:
    """Say how many images there are."""
    return f"{train:,} images to train on and {test:,} to test"


def epoch_line(record: EpochRecord, epochs: int) -> str:
    """Tell one epoch in one line."""
    return (
        f"epoch {record.epoch}/{epochs}: loss {record.train_loss:.4f}, "
        f"train {record.train_top1:.2f} %, test {record.eval_top1:.2f} %, "
        f"{record.train_seconds:.1f} s + {record.eval_seconds:.1f} s test, "
        f"{record.images_per_second:,.0f} images/s"
    )
