"""The tables of results: right figures, names as they are."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from fxsplit.plan.plandiff import Change
from fxsplit.report import CheckRecord, RunReport
from fxsplit_cli import tables


def test_report_shows_each_phase_and_the_last_epoch(report: RunReport, capsys: pytest.CaptureFixture[str]) -> None:
    folder = f"output/[red]{'long' * 30}"
    tables.report(replace(report, folder=folder))
    out, err = capsys.readouterr()
    assert err == ""
    cells = [re.split(r"  +", line.strip()) for line in out.splitlines()]
    plan = report.plan
    assert ["1", "first 1 of 3", plan.partitions[1].name, "2", "23.0", "150.0 mJ", "51.00 %"] in cells
    assert ["2", "first 2 of 3", plan.partitions[2].name, "2", "23.0", "350.0 mJ", "53.00 %"] in cells
    assert ["3", "all", "-", "2", "23.0", "550.0 mJ", "55.00 %"] in cells
    facts = {row[0]: row[1] for row in cells if len(row) == 2}
    assert facts == {
        "test accuracy": "55.00 % (last epoch)",
        "total time": "71.5 s after imports, of which setup 2.5 s",
        "peak memory: process resident": "1.0 GB",
        "energy (NVML)": "3.6 kJ",
    }
    assert out.endswith(f"run folder: {folder}\n")


def test_a_report_has_what_this_machine_can_tell(report: RunReport, capsys: pytest.CaptureFixture[str]) -> None:
    cached = (replace(report.epochs[0], cache_resident_bytes=0, cache_file_bytes=2_000_000, device_bytes=3_000_000),)
    tables.report(replace(report, epochs=cached))
    out = capsys.readouterr().out
    assert re.findall(r"(?m)^(?:cache|peak).*?: (\S.*?) {2,}(.*?) *$", out) == [
        ("process resident", "1.0 GB"), ("device (NVML)", "3.0 MB"), ("in memory", "0 B"), ("in a file", "2.0 MB"),
    ]  # fmt: skip


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_tables_fit_their_terminal(
    report: RunReport, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Narrow ones have fewer columns, and none is so narrow that it breaks words."""
    monkeypatch.setenv("COLUMNS", str(width))
    plain = tuple(replace(epoch, train_energy_joules=None) for epoch in report.epochs)
    tables.report(replace(report, folder="", epochs=plain))
    tables.checks([CheckRecord(model="paper:densenet", ops=142, cuts=141, partitions=4, seconds=1.0)])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= width
    header, _, first = lines[:3]
    assert re.split(r"  +", header.strip()) == {
        40: ["trains", "seconds", "test accuracy"],
        60: ["phase", "trains", "cut", "seconds", "test accuracy"],
    }.get(width, ["phase", "trains", "cut", "epochs", "seconds", "test accuracy"])
    assert re.match(r"1 +first 1 of 3 .* 51.00 %$", first)
    assert re.match(r"paper:densenet  captured .*1\.0$", lines[-2])


def test_a_report_shows_its_snapshot_ensemble(report: RunReport, capsys: pytest.CaptureFixture[str]) -> None:
    last = replace(report.epochs[-1], ensemble_top1=56.5)
    tables.report(replace(report, epochs=(*report.epochs[:-1], last)))
    assert re.search(r"test accuracy, snapshot ensemble +56\.50 %", capsys.readouterr().out)


def test_a_report_without_epochs_has_no_accuracy(report: RunReport, capsys: pytest.CaptureFixture[str]) -> None:
    tables.report(replace(report, epochs=(), folder=""))
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
    tables.diff("old.json", "new.json", changes, stale=["old.json"])
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
    tables.diff("old.json", "old.json", [], stale=[])
    assert capsys.readouterr().out == "old.json -> old.json\n\nThe plans are the same.\n"
