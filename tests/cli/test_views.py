"""What is seen of a run while it goes on: in a log, and as a panel that keeps its height."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from fxsplit.plan.schedule import Phase, Plan
from fxsplit.report import EpochRecord, Observer, StepRecord
from fxsplit_cli import views

GROW, WINDOW, ALL = (
    Phase(start=0, stop=1, epochs=2),
    Phase(start=1, stop=2, epochs=2),
    Phase(start=0, stop=3, epochs=2),
)


def test_describes_a_phase(plan: Plan) -> None:
    cut = plan.partitions[1].name
    assert views.describe(ALL, plan).plain == "no cut: everything trains"
    assert views.describe(GROW, plan).plain == f"student 0 training │ cut before {cut} │ teacher 1-2 frozen"
    assert views.describe(WINDOW, plan).plain == f"student 0 settled │ cut before {cut} │ teacher 1 training + 2 frozen"
    saving = replace(ALL, recompute=1, micro_batches=2)
    words = f"recomputes up to {cut}, 2 micro-batches"
    assert views.describe(saving, plan).plain == f"no cut: everything trains, {words}"
    settled = replace(WINDOW, micro_batches=2)
    assert views.describe(settled, plan).plain.endswith(" │ teacher 1 training + 2 frozen, 2 micro-batches")


def drive(observer: Observer, plan: Plan, epochs: tuple[EpochRecord, ...]) -> None:
    """One step and one epoch of each phase, as a run would tell them."""
    observer.notice("a [red]notice")
    observer.run_started(folder="out/[b]x", device="cpu", plan=plan, train_images=1437, test_images=360)
    for index, phase in enumerate(plan.phases):
        observer.phase_started(index, phase)
        epoch = plan.first_epoch(index)
        observer.step_done(step(index, epoch + 1))
        observer.epoch_done(epochs[epoch])


def step(phase: int, epoch: int) -> StepRecord:
    """The record of step 5 of 12."""
    return StepRecord(
        phase=phase,
        epoch=epoch,
        step=5,
        steps=12,
        train_loss=0.5,
        train_accuracy_pct=75.0,
        images_per_second=2000.0,
        memory_bytes=3_000_000,
    )


@pytest.mark.parametrize("force_color", ["", "1"])
def test_plain_view_is_a_log(
    plan: Plan,
    epochs: tuple[EpochRecord, ...],
    force_color: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", force_color)
    with views.observing("paper:cnn", "live") as observer:
        drive(observer, plan, epochs)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"[^\n\x20-\x7e]", err) is None
    lines = err.splitlines()
    assert lines[:2] == [
        "a [red]notice",
        "paper:cnn on cpu, 1,437 images to train on and 360 to test",
    ]
    assert ". settled  # training  - frozen  | cut: student before it, teacher after it" in lines
    assert lines[-6:] == [
        f"phase 2/3, epochs 3 to 4: student 0-1 training | cut before {plan.partitions[2].name} | teacher 2 frozen",
        "epoch 3/6 step 5/12: loss 0.5000, train 75.00 %, 2,000 images/s, 3.0 MB",
        "epoch 3/6: loss 1.5000, train 62.00 %, test 52.00 %, 10.0 s + 1.5 s test, 1,234 images/s",
        "phase 3/3, epochs 5 to 6: no cut: everything trains",
        "epoch 5/6 step 5/12: loss 0.5000, train 75.00 %, 2,000 images/s, 3.0 MB",
        "epoch 5/6: loss 1.5000, train 64.00 %, test 54.00 %, 10.0 s + 1.5 s test, 1,234 images/s",
    ]


def test_quiet_says_nothing(plan: Plan, epochs: tuple[EpochRecord, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with views.observing("paper:cnn", "quiet") as observer:
        drive(observer, plan, epochs)
    assert capsys.readouterr() == ("", "")


def terminal(*, width: int = 80, **settings: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system="truecolor", **settings)


def shown(console: Console, view: views.LiveView) -> list[str]:
    with console.capture() as capture:
        console.print(view.panel())
    return capture.get().splitlines()


def spinner(console: Console, view: views.LiveView) -> str:
    """What the line before training says, without the spinner."""
    with console.capture() as capture:
        console.print(view.line(), end="")
    (line,) = plain(capture.get().splitlines())
    return line[2:].rstrip()


def plain(lines: list[str]) -> list[str]:
    return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]


def test_live_view_shows_where_the_run_is(plan: Plan, epochs: tuple[EpochRecord, ...]) -> None:
    console = terminal(no_color=True)
    view = views.LiveView("[red]:cnn", console)
    drive(view, plan, epochs)
    view.phase_started(1, plan.phases[1])
    assert re.search(r"epoch 3/6 [━ ]+│", plain(shown(console, view))[4])
    drive(view, plan, epochs)
    lines = plain(shown(console, view))
    assert "[red]:cnn · grow · cpu" in lines[0]
    assert "phase 3/3, epochs 5 to 6" in lines[1]
    assert "no cut: everything trains" in lines[3]
    assert re.search(r"epoch 5/6 .* 5/12", lines[4])
    # One epoch of 10 s and its test of 1.5 s; the clock runs on.
    assert re.search(r"whole run .* 10 s left", lines[5])
    assert re.search(r"loss 0.5000 +train 75.00 % +test 54.00 %", lines[6])
    assert re.search(r"images/s 2,000 +memory 3.0 MB", lines[7])


def test_live_view_says_what_takes_long(plan: Plan, epochs: tuple[EpochRecord, ...]) -> None:
    console = terminal(no_color=True)
    view = views.LiveView("[red]:cnn", console)
    assert spinner(console, view) == "[red]:cnn: loading torch"
    view.working("reading [b]digits")
    assert spinner(console, view) == "[red]:cnn: reading [b]digits"
    view.working("a" * 200)
    assert spinner(console, view).endswith("a…")
    drive(view, plan, epochs)
    view.step_done(replace(step(2, 5), step=12))
    assert re.search(r"epoch 5/6 .* testing", plain(shown(console, view))[4])
    view.epoch_done(epochs[4])
    assert re.search(r"epoch 5/6 .* 12/12", plain(shown(console, view))[4])
    view.phase_started(1, plan.phases[1])
    view.working("compiling")
    assert re.search(r"epoch 3/6 .* compiling", plain(shown(console, view))[4])
    view.step_done(step(1, 3))
    assert re.search(r"epoch 3/6 .* 5/12", plain(shown(console, view))[4])


def test_phases_stay_in_the_scrollback(plan: Plan, epochs: tuple[EpochRecord, ...]) -> None:
    console = terminal(no_color=True, width=120)
    with views.LiveView("paper:cnn", console) as view:
        drive(view, plan, epochs)
    written = "".join(plain([console.file.getvalue()]))  # type: ignore[attr-defined]
    cut = plan.partitions[2].name
    assert f"phase 2/3, epochs 3 to 4: student 0-1 training │ cut before {cut} │ teacher 2 frozen" in written
    assert "phase 3/3, epochs 5 to 6: no cut: everything trains" in written


@pytest.mark.parametrize("width", [40, 60, 80])
def test_figures_do_not_touch(plan: Plan, epochs: tuple[EpochRecord, ...], width: int) -> None:
    console = terminal(no_color=True, width=width)
    view = views.LiveView("paper:cnn", console)
    drive(view, plan, epochs)
    view.step_done(replace(step(2, 5), train_loss=12.3456, train_accuracy_pct=100.0, images_per_second=123456))
    text = "\n".join(plain(shown(console, view)))
    for figure in ("loss 12.3456", "train 100.00 %", "test 54.00 %", "images/s 123,456", "memory 3.0 MB"):
        assert re.search(rf"[│ ] {re.escape(figure)} ", text), text


@pytest.mark.parametrize("width", [40, 60, 100, 140])
def test_the_panel_keeps_its_size_and_leaves_room_for_an_echo(
    plan: Plan, epochs: tuple[EpochRecord, ...], width: int
) -> None:
    console = terminal(width=width, no_color=True)
    view = views.LiveView("a/rather/long/file.py:cnn", console)
    cut = replace(plan.partitions[1], name="a.very.long.path.to.the.module.before.which.the.cut.is")
    plan = replace(plan, partitions=(plan.partitions[0], cut, plan.partitions[2]))
    sizes = []

    def look() -> None:
        lines = plain(shown(console, view))
        sizes.append((len(lines), {len(line) for line in lines}))

    view.run_started(folder="", device="cpu", plan=plan, train_images=1437, test_images=360)
    assert len(spinner(console, view)) <= width - 4
    view.phase_started(0, replace(plan.phases[0], micro_batches=8))
    look()
    assert "images/s -" in "\n".join(plain(shown(console, view)))
    drive(view, plan, epochs)
    look()
    # A terminal writes ^C for an interruption, behind the panel.
    assert sizes == [(9 if width > 46 else 10, {min(width - 4, 100)})] * 2


def test_live_view_colours_roles_unless_told_not_to(plan: Plan, epochs: tuple[EpochRecord, ...]) -> None:
    for no_color in (False, True):
        console = terminal(no_color=no_color)
        view = views.LiveView("paper:cnn", console)
        drive(view, plan, epochs)
        view.phase_started(0, plan.phases[0])
        assert bool(re.search(r"\x1b\[32m█+", "\n".join(shown(console, view)))) is not no_color


def test_live_view_leaves_only_what_was_said(plan: Plan, epochs: tuple[EpochRecord, ...]) -> None:
    console = terminal()
    view = views.LiveView("paper:cnn", console)
    with view:
        drive(view, plan, epochs)
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert "a [red]notice" in written
    assert written.count("test 5") >= 3
    # The spinner, and the panel, each of which hides the cursor while it is there.
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 2
