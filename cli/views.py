"""What is seen of a run or a check while it goes on, all of it on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fxsplit.pages.figures import epochs_of, human, roughly
from fxsplit.plan.forecast import Forecast
from fxsplit.plan.schedule import Phase, Plan, Role
from fxsplit.report import CheckRecord, EpochRecord, ForecastRecord, Observer, StepRecord

from .terminal import ROLES, WIDEST, Terminal, draw, encodable, legend, print_whole, say
from .time_left import TimeLeft

View = Literal["live", "plain", "quiet"]
# What goes on before anything else, and takes seconds.
LOADING = "loading torch"


class RunView(Observer):
    """Remembers what is said of a run when it starts, and shows nothing."""

    def __init__(self) -> None:
        self.folder = self.device = self.images = ""
        self.plan: Plan | None = None

    def run_started(self, *, folder: str, device: str, plan: Plan, train_images: int, test_images: int) -> None:
        self.folder, self.device, self.plan = folder, device, plan
        self.images = f"{train_images:,} images to train on and {test_images:,} to test"


@contextmanager
def observing(model: str, view: View) -> Iterator[RunView]:
    """Give an observer for a run: a live one only on a terminal, and for as long as the block lasts."""
    console = Terminal(stderr=True)
    if view == "live" and _can_be_redrawn(console):
        with LiveView(model, console) as live_view:
            yield live_view
    else:
        yield RunView() if view == "quiet" else PlainView(model)


@contextmanager
def checking() -> Iterator[Observer]:
    """Give an observer for checks: a progress bar on a terminal, otherwise a line for each model."""
    console = Terminal(stderr=True)
    if _can_be_redrawn(console):
        columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=console, transient=True) as progress:
            yield CheckBar(progress)
    else:
        yield CheckLines()


def _can_be_redrawn(console: Console) -> bool:
    """FORCE_COLOR makes rich take anything for a terminal, but a log cannot be redrawn."""
    return console.is_terminal and not console.is_dumb_terminal and sys.stderr.isatty()


class CheckBar(Observer):
    """Shows how many models are done; what failed stays above the bar."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task = progress.add_task(LOADING, total=None)

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


class PlainView(RunView):
    """Writes one line of ASCII for each thing that happens, for logs and pipes."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model = model

    def run_started(self, *, folder: str, device: str, plan: Plan, train_images: int, test_images: int) -> None:
        super().run_started(folder=folder, device=device, plan=plan, train_images=train_images, test_images=test_images)
        say(f"{self.model} on {device}, {self.images}")
        say(str(plan))
        if is_cut(plan):
            say(encodable(legend().plain, "ascii"))
        if folder:
            say(f"run folder {folder}")

    def notice(self, sentence: str) -> None:
        say(sentence)

    def phase_started(self, index: int, phase: Phase) -> None:
        assert self.plan is not None
        say(encodable(phase_line(index, phase, self.plan).plain, "ascii"))

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


class LiveView(RunView):
    """Says below what is written what goes on, as a line with a spinner until training begins, then as a panel.

    ╭───────────────── paper:cnn · l2l · cpu ─────────────────╮
    │ phase 2/4, epochs 4 to 6                       00:01:12 │
    │ ░░░░░░░ ░░░░░░│███████ ████████ ███████ ███████         │
    │ student 0-1 settled │ cut before conv3 │ teacher 2-5 tr…│
    │ epoch 5/10  ━━━━━━━━━━━━━━━━╺━━━━━━━━━━━━━━━━━━━  90/157│
    │ whole run   ━━━━━━━━━━━╺━━━━━━━━━━━━━━━━━  2 min 05 left│
    │ loss 0.4821        train 84.10 %      test 81.30 %      │
    │ images/s 1,204     memory 812.0 MB                      │
    ╰─────────────────────────────────────────────────────────╯

    Each is redrawn in place and keeps its height, so that nothing of it is ever left behind. It is a context: at its
    end both are gone, and what was said stays.
    """

    # A terminal echoes ^C where the cursor is, behind the panel; at the edge it would begin a new line, and what
    # clears the panel would miss its first one.
    ECHO = len("^C^C")
    # Columns inside of the panel from which on three figures fit beside each other, else two.
    THREE = 46

    def __init__(self, model: str, console: Console) -> None:
        super().__init__()
        self.model = model
        self.console = console
        self.began = time.monotonic()
        self.what = LOADING
        self.is_training = False
        self.phase: Phase | None = None
        self.phase_index = 0
        self.step: StepRecord | None = None
        self.epoch: EpochRecord | None = None
        self.left: TimeLeft | None = None
        self.spinner = Spinner("line")
        self.live = self._live(self.line)

    def _live(self, draw: Callable[[], RenderableType]) -> Live:
        return Live(console=self.console, get_renderable=draw, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveView:
        # At once: what comes next may keep the thread that draws from running.
        self.live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.live.stop()

    def working(self, what: str) -> None:
        self.what = what

    def run_started(self, *, folder: str, device: str, plan: Plan, train_images: int, test_images: int) -> None:
        super().run_started(folder=folder, device=device, plan=plan, train_images=train_images, test_images=test_images)
        self.left = TimeLeft(plan, train_images=train_images, test_images=test_images)
        self.notice(self.images)
        if folder:
            print_whole(self.console, f"run folder {folder}")
        if is_cut(plan):
            self.console.print(legend())

    def forecast_made(self, forecast: Forecast) -> None:
        assert self.left is not None
        self.left.forecast_made(forecast)

    def notice(self, sentence: str) -> None:
        self.console.print(Text(sentence))

    def phase_started(self, index: int, phase: Phase) -> None:
        assert self.plan is not None
        assert self.left is not None
        self.phase_index, self.phase, self.what = index, phase, ""
        self.left.phase_started(index)
        self.console.print(phase_line(index, phase, self.plan))
        if self.live.is_started and not self.is_training:
            # Another height needs another display: one that grows while it is drawn leaves lines behind.
            self.live.stop()
            self.is_training, self.live = True, self._live(self.panel)
            self.live.start(refresh=True)

    def step_done(self, record: StepRecord) -> None:
        assert self.left is not None
        self.step, self.what = record, "testing" if record.step == record.steps else ""
        self.left.step_done(record)

    def epoch_done(self, record: EpochRecord) -> None:
        assert self.plan is not None
        assert self.left is not None
        self.epoch, self.what = record, ""
        self.left.epoch_done(record)
        self.notice(epoch_line(record, self.plan.epochs))

    def line(self) -> RenderableType:
        """Draw what goes on before training."""
        frame = self.spinner.render(self.console.get_time())
        words = Text.assemble(f"{frame} ", (self.model, "bold"), f": {self.what}", no_wrap=True, overflow="ellipsis")
        return Constrain(words, self.console.width - self.ECHO)

    def panel(self) -> Panel:
        """Draw how the training stands. Only once a phase has started."""
        assert self.plan is not None
        assert self.phase is not None
        width = min(self.console.width - self.ECHO, WIDEST)
        title = Text(" · ".join((self.model, self.plan.title, self.device)))
        # A longer one would widen the panel.
        title.truncate(max(width - 6, 1), overflow="ellipsis")
        return Panel(
            Group(*self._rows(self.plan, self.phase, width - 4)),
            title=title,
            width=width,
        )

    def _rows(self, plan: Plan, phase: Phase, width: int) -> list[RenderableType]:
        elapsed = time.strftime("%H:%M:%S", time.gmtime(time.monotonic() - self.began))
        head = Table.grid(expand=True, padding=(0, 1, 0, 0), pad_edge=False)
        head.add_column(no_wrap=True)
        head.add_column(justify="right", no_wrap=True)
        head.add_row(f"phase {self.phase_index + 1}/{len(plan.phases)}, {epochs_of(self.phase_index, plan)}", elapsed)
        words = describe(phase, plan)
        words.no_wrap, words.overflow = True, "ellipsis"
        return [head, draw(phase, len(plan.partitions), width), words, self._progress(plan), self._figures(width)]

    def _progress(self, plan: Plan) -> Table:
        """Two bars: of the epoch, and of the whole run."""
        assert self.left is not None
        step, seconds = self.step, self.left.seconds()
        if step and step.phase == self.phase_index:
            epoch, done, steps, where = step.epoch, step.step, step.steps, f"{step.step}/{step.steps}"
        else:
            epoch, done, steps, where = plan.first_epoch(self.phase_index) + 1, 0, 1, ""
        bars = Table.grid(expand=True, padding=(0, 1, 0, 0), pad_edge=False)
        bars.add_column(no_wrap=True)
        bars.add_column(ratio=1)
        bars.add_column(justify="right", no_wrap=True)
        bars.add_row(f"epoch {epoch}/{plan.epochs}", ProgressBar(steps, done), self.what or where)
        left = "" if seconds is None else f"{roughly(seconds)} left"
        bars.add_row("whole run", ProgressBar(1, self.left.share()), left)
        return bars

    def _figures(self, width: int) -> Table:
        """As many a row as fit."""
        step, epoch = self.step, self.epoch
        figures = {
            "loss": f"{step.train_loss:.4f}" if step else "",
            "train": f"{step.train_accuracy_pct:.2f} %" if step else "",
            "test": f"{epoch.eval_top1:.2f} %" if epoch else "",
            "images/s": f"{step.images_per_second:,.0f}" if step else "",
            "memory": human(step.memory_bytes, "B") if step else "",
        }
        cells = [Text.assemble((f"{name} ", "dim"), value or "-") for name, value in figures.items()]
        count = 3 if width >= self.THREE else 2
        table = Table.grid(expand=True, padding=(0, 1, 0, 0), pad_edge=False)
        for _ in range(count):
            table.add_column(ratio=1, no_wrap=True)
        for first in range(0, len(cells), count):
            table.add_row(*cells[first : first + count])
        return table


# What several views say


def phase_line(index: int, phase: Phase, plan: Plan) -> Text:
    """Tell in one line which phase begins."""
    begins = f"phase {index + 1}/{len(plan.phases)}, {epochs_of(index, plan)}"
    return Text.assemble((begins, "bold"), ": ", describe(phase, plan))


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


def epoch_line(record: EpochRecord, epochs: int) -> str:
    """Tell one epoch in one line."""
    return (
        f"epoch {record.epoch}/{epochs}: loss {record.train_loss:.4f}, "
        f"train {record.train_top1:.2f} %, test {record.eval_top1:.2f} %, "
        f"{record.train_seconds:.1f} s + {record.eval_seconds:.1f} s test, "
        f"{record.images_per_second:,.0f} images/s"
    )
