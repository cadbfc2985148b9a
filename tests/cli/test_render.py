"""What is drawn, said and shown: right figures, the user's words no control characters in a log."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from fxsplit_cli import render
from rich.console import Console

from fxsplit.plan.plandiff import Change
from fxsplit.plan.schedule import Phase, Plan
from fxsplit.report import EpochRecord, Observer, RunReport, StepRecord

GROW, WINDOW, ALL = (
    Phase(start=0, stop=1, epochs=2),
    Phase(start=1, stop=2, epochs=2),
    Phase(start=0, stop=3, epochs=2),
)


@pytest.mark.parametrize(
    ("phase", "bar"),
    [
        (ALL, "███ ███ ████"),
        (GROW, "███│▒▒▒ ▒▒▒▒"),
        (WINDOW, "░░░│███ ▒▒▒▒"),
        (Phase(start=2, stop=3, epochs=2), "░░░ ░░░│████"),
    ],
)
def test_draws_a_phase(phase: Phase, bar: str) -> None:
    assert render.draw(phase, 3, 12).plain == bar


@pytest.mark.parametrize(("count", "width"), [(1, 20), (3, 20), (7, 20), (20, 20), (50, 20)])
def test_a_drawing_has_its_width(count: int, width: int) -> None:
    for start in range(count):
        bar = render.draw(Phase(start=start, stop=count, epochs=1), count, width).plain
        assert len(bar) == width


def test_describes_a_phase(plan: Plan) -> None:
    cut = plan.partitions[1].name
    assert render.describe(ALL, plan).plain == "no cut: everything trains"
    assert render.describe(GROW, plan).plain == f"student training │ cut before {cut} │ teacher frozen"
    assert render.describe(WINDOW, plan).plain == f"student settled │ cut before {cut} │ teacher training + frozen"
    saving = replace(ALL, recompute=1, micro_batches=2)
    words = f"recomputes up to {cut}, 2 micro-batches"
    assert render.describe(saving, plan).plain == f"no cut: everything trains, {words}"
    settled = replace(WINDOW, micro_batches=2)
    assert render.describe(settled, plan).plain.endswith(" │ teacher training + frozen, 2 micro-batches")


def test_report_shows_each_phase_and_the_last_epoch(report: RunReport, capsys: pytest.CaptureFixture[str]) -> None:
    folder = f"output/[red]{'long' * 30}"
    render.render_report(replace(report, folder=folder))
    out, err = capsys.readouterr()
    assert err == ""
    cells = [re.split(r"  +", line.strip()) for line in out.splitlines()]
    plan = report.plan
    assert ["1", "0 of 3", plan.partitions[1].name, "2", "23.0", "51.00 %"] in cells
    assert ["2", "0 to 1 of 3", plan.partitions[2].name, "2", "23.0", "53.00 %"] in cells
    assert ["3", "all", "-", "2", "23.0", "55.00 %"] in cells
    facts = {row[0]: row[1] for row in cells if len(row) == 2}
    assert facts == {
        "test accuracy": "55.00 % (last epoch)",
        "total time": "71.5 s, of which setup 2.5 s",
        "peak memory: process resident": "1.0 GB",
        "peak memory: CUDA allocated": "not available",
        "peak memory: CUDA reserved": "not available",
        "peak memory: device (NVML)": "not available",
        "cache: in memory": "not available",
        "cache: in a file": "not available",
        "energy (NVML)": "3.6 kJ",
    }
    assert out.endswith(f"run folder: {folder}\n")


def test_a_report_without_epochs_has_no_accuracy(report: RunReport, capsys: pytest.CaptureFixture[str]) -> None:
    render.render_report(replace(report, epochs=(), folder=""))
    out = capsys.readouterr().out
    assert re.search(r"test accuracy +not available", out)
    assert "run folder" not in out


def test_a_comparison_of_plans_fits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    figures = {"ops": 3, "macs": 2_000_000, "activation_bytes": 1500}
    changes = [
        Change(what="cut", before="[red]", after=None),
        Change(what="partition [red]", before=figures, after={**figures, "ops": 4}),
        Change(what="epochs", before=6, after=12),
    ]
    render.render_diff("old.json", "new.json", changes, stale=["old.json"])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert [re.split(r"  +", line) for line in lines[4:-1]] == [
        ["cut", "[red]", "-"],
        ["partition [red]", "3 ops", "4 ops"],
        ["", "2.0 M MACs", "2.0 M MACs"],
        ["", "1.5 kB activations", "1.5 kB activations"],
        ["epochs", "6", "12"],
    ]
    assert lines[0] == "old.json -> new.json"
    assert lines[-1].endswith("fxsplit inspect MODEL --plan old.json --save-plan old.json works them out")
    render.render_diff("old.json", "old.json", [], stale=[])
    assert capsys.readouterr().out == "old.json -> old.json\n\nThe plans are the same.\n"


def drive(observer: Observer, plan: Plan, epochs: tuple[EpochRecord, ...]) -> None:
    """One step and one epoch of each phase, as a run would tell them."""
    observer.notice("a [red]notice")
    observer.run_started(folder="out/[b]x", device="cpu", plan=plan, train_images=1437, test_images=360)
    for index, phase in enumerate(plan.phases):
        observer.phase_started(index, phase)
        epoch = plan.first_epoch(index)
        observer.step_done(
            StepRecord(
                phase=index,
                epoch=epoch + 1,
                step=5,
                steps=12,
                train_loss=0.5,
                train_accuracy_pct=75.0,
                images_per_second=2000.0,
                memory_bytes=3_000_000,
            )
        )
        observer.epoch_done(epochs[epoch])


@pytest.mark.parametrize("force_color", ["", "1"])
def test_plain_view_is_a_log(
    plan: Plan,
    epochs: tuple[EpochRecord, ...],
    force_color: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", force_color)
    with render.observing("paper:cnn", "live") as observer:
        drive(observer, plan, epochs)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"[^\n\x20-\x7e]", err) is None
    lines = err.splitlines()
    assert lines[:2] == [
        "a [red]notice",
        "paper:cnn on cpu, 1,437 images to train on and 360 to test",
    ]
    assert lines[-6:] == [
        f"phase 2/3, epochs 3 to 4: student training | cut before {plan.partitions[2].name} | teacher frozen",
        "epoch 3/6 step 5/12: loss 0.5000, train 75.00 %, 2,000 images/s, 3.0 MB",
        "epoch 3/6: loss 1.5000, train 62.00 %, test 52.00 %, 10.0 s + 1.5 s test, 1,234 images/s",
        "phase 3/3, epochs 5 to 6: no cut: everything trains",
        "epoch 5/6 step 5/12: loss 0.5000, train 75.00 %, 2,000 images/s, 3.0 MB",
        "epoch 5/6: loss 1.5000, train 64.00 %, test 54.00 %, 10.0 s + 1.5 s test, 1,234 images/s",
    ]


def test_quiet_says_nothing(plan: Plan, epochs: tuple[EpochRecord, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with render.observing("paper:cnn", "quiet") as observer:
        drive(observer, plan, epochs)
    assert capsys.readouterr() == ("", "")


def terminal(**settings: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=80, color_system="truecolor", **settings)


def shown(console: Console, view: render.LiveView) -> str:
    with console.capture() as capture:
        console.print(view.panel())
    return capture.get()


def test_live_view_shows_where_the_run_is(plan: Plan, epochs: tuple[EpochRecord, ...]) -> None:
    console = terminal(no_color=True)
    view = render.LiveView("[red]:cnn", console)
    assert "getting model and data ready" in shown(console, view)
    drive(view, plan, epochs)
    view.phase_started(1, plan.phases[1])
    between = re.sub(r"\x1b\[[0-9;]*m", "", shown(console, view))
    assert "epoch 3/6" in between
    assert "0/12" in between
    drive(view, plan, epochs)
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown(console, view))
    lines = text.splitlines()
    assert {len(line) for line in lines} == {80}
    assert "[red]:cnn · grow · cpu" in lines[0]
    assert "phase 3/3, epochs 5 to 6" in lines[1]
    assert "no cut: everything trains" in lines[3]
    assert re.search(r"epoch 5/6 .* 5/12", lines[4])
    assert re.search(r"loss 0.5000 +train 75.00 % +test 54.00 % +images/s 2,000 +memory 3.0 MB", lines[5])
    assert "out/[b]x" in lines[-1]


def test_live_view_colours_roles_unless_told_not_to(plan: Plan, epochs: tuple[EpochRecord, ...]) -> None:
    for no_color in (False, True):
        console = terminal(no_color=no_color)
        view = render.LiveView("paper:cnn", console)
        drive(view, plan, epochs)
        view.phase_started(0, plan.phases[0])
        assert bool(re.search(r"\x1b\[32m█+", shown(console, view))) is not no_color


def test_live_view_leaves_only_what_was_said(plan: Plan, epochs: tuple[EpochRecord, ...]) -> None:
    console = terminal()
    view = render.LiveView("paper:cnn", console)
    with view.live:
        drive(view, plan, epochs)
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert "a [red]notice" in written
    assert written.count("test 5") >= 3
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1
