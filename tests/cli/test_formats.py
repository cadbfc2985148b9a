"""An inspection in every format: the right figures, and the user's words never mark-up."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from fxsplit.errors import UsageError
from fxsplit.plan.planfile import from_dict, read_file
from fxsplit.plan.scaling import ScaleForecast
from fxsplit.report import Inspection
from fxsplit_cli import formats


def shown(inspection: Inspection, name: str, capsys: pytest.CaptureFixture[str]) -> str:
    formats.show(inspection, name, None)
    out, err = capsys.readouterr()
    assert err == ""
    return out


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_fits_and_adds_up(
    inspection: Inspection,
    columns: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = shown(inspection, "table", capsys).splitlines()
    assert max(len(line) for line in lines if not line.startswith("Forecast")) <= columns
    cells = [re.split(r"  +", line.strip()) for line in lines]
    assert ["0", "[red]", "[red].1", "2", "5.0 k", "2.0 M", "3.0 kB", "512 B"] in cells
    assert ["1", "[red].2", "[red].3", "2", "5.0 k", "2.0 M", "3.0 kB", "2.0 kB"] in cells
    assert ["total", "6", "15.0 k", "6.0 M", "9.0 kB"] in cells
    assert inspection.forecast is not None
    second = inspection.forecast.phases[1]
    costs = [
        f"{second.step_cost:.2f}",
        *(f"{size / 1000:.1f} kB" for size in (second.activation_bytes, second.peak_bytes)),
    ]
    assert ["2", "██ ██│▒▒▒", "first 2 of 3", "[red].4", "2", *costs] in cells
    said = f"Forecast from shapes alone, batches of 2: the whole plan takes {inspection.forecast.time_ratio:.2f} of the"
    assert any(line.startswith(said) for line in lines)
    assert lines[0] == "file[bold].py:make, input 1 × 3 × 32 × 32"
    assert lines[-2:] == [
        "tied: op0.weight is also head.weight",
        "kept whole: block.norm, because it has hooks",
    ]


def test_a_narrow_table_leaves_out_what_it_implies(
    inspection: Inspection, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines = shown(inspection, "table", capsys).splitlines()
    assert all(len(line) <= 60 for line in lines if re.search(r"\S  +\S", line))
    cells = [re.split(r"  +", line.strip()) for line in lines]
    assert ["1", "[red].2", "2", "5.0 k", "2.0 M", "3.0 kB", "2.0 kB"] in cells
    assert [row[:3] for row in cells if len(row) == 6] == [
        ["phase", "trains", "epochs"],
        ["1", "first 1 of 3", "2"],
        ["2", "first 2 of 3", "2"],
        ["3", "all", "2"],
    ]


@pytest.mark.parametrize("name", ["table", "md", "html"])
def test_what_saves_memory_is_said(inspection: Inspection, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = inspection.plan.phases
    phases = (replace(first, micro_batches=4), second, replace(third, recompute=1, micro_batches=2))
    names = [part.name for part in inspection.partitions]
    assert "to save memory" not in shown(inspection, name, capsys)
    saving = replace(inspection, plan=replace(inspection.plan, phases=phases))
    out = shown(saving, name, capsys).replace("\\", "")
    assert out.count("to save memory") == 2
    assert "phase 1, to save memory: 4 micro-batches" in out
    assert f"phase 3, to save memory: recomputes up to {names[1]}, 2 micro-batches" in out


def test_without_a_forecast_none_is_shown(inspection: Inspection, capsys: pytest.CaptureFixture[str]) -> None:
    inspection = replace(inspection, forecast=None)
    for name in ("table", "md", "html"):
        assert "forecast" not in shown(inspection, name, capsys).lower()
    assert json.loads(shown(inspection, "json", capsys))["forecast"] is None


@pytest.mark.parametrize("columns", [80, 120])
def test_the_tree_has_costs_on_every_level(
    inspection: Inspection,
    columns: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = [line.rstrip() for line in shown(inspection, "tree", capsys).splitlines()]
    assert max(map(len, lines)) <= columns
    found = [re.sub(r"[│├└─ ]+", " ", line).strip() for line in lines]
    # Of two equal ops in a row the first is shown.
    assert found[:4] == [
        "file[bold].py:make 6.0 M █████ 15.0 k █████ 9.0 kB █████",
        "0 [red] 2.0 M █▋ 5.0 k █▋ 3.0 kB █▋",
        "2 x [red].op0 … op1 Linear 2.0 M █████ 5.0 k █████ 3.0 kB █████",
        "op0 Linear 1.0 M ██▌ 2.5 k ██▌ 1.5 kB ██▌",
    ]
    assert sum(line.startswith("2 x ") for line in found) == 3
    assert lines[-2:] == ["tied: op0.weight is also head.weight", "kept whole: block.norm, because it has hooks"]


def test_json(inspection: Inspection, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(shown(inspection, "json", capsys))
    assert data["totals"] == {"ops": 6, "parameters": 15_000, "macs": 6_000_000, "activation_bytes": 9000}
    assert from_dict(data["plan"], origin="stdout").recorded_plan() == inspection.plan
    # What `jq .plan` would print of it is a plan file.
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data["plan"]), encoding="utf-8")
    assert read_file(str(path)) == inspection.plan_file
    assert read_file(str(path)).plan(inspection) == inspection.plan
    assert data["scaling"] == []
    assert set(data) == {
        "scaling",
        "model",
        "input_shape",
        "graph_digest",
        "plan",
        "totals",
        "forecast",
        "uncounted",
        "tied",
        "opaque",
    }
    assert inspection.forecast is not None
    assert [phase["peak_bytes"] for phase in data["forecast"]["phases"]] == [
        phase.peak_bytes for phase in inspection.forecast.phases
    ]


def test_csv_has_a_row_for_each_op(inspection: Inspection, capsys: pytest.CaptureFixture[str]) -> None:
    rows = list(csv.DictReader(io.StringIO(shown(inspection, "csv", capsys))))
    assert tuple(rows[0]) == formats.CSV_COLUMNS
    assert [row["op"] for row in rows] == [op.name for op in inspection.train.ops]
    assert [row["partition"] for row in rows] == ["0", "0", "1", "1", "2", "2"]
    assert rows[1] == {
        "partition": "0", "op": "op1", "path": "[red].1", "class": "Linear", "kind": "module", "target": "Linear",
        "shape": "2x8", "dtype": "float32", "bytes_per_sample": "2048", "parameters": "2500", "macs": "1000000",
        "uncounted": "False", "backward_macs": "0", "activation_bytes": "1500", "seconds": "", "reads": "op0",
        "state": "op1.weight", "mutates": "",
    }  # fmt: skip


def test_markdown_has_two_tables(inspection: Inspection, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(replace(inspection, model="a|b`c"), "md", capsys)
    assert out.splitlines()[:5] == [
        "## `a\\|b'c`, input 1 × 3 × 32 × 32",
        "",
        "| # | from | ops | params | MACs | activations | boundary |",
        "|---|---|--:|--:|--:|--:|--:|",
        "| 0 | `[red]` | 2 | 5.0 k | 2.0 M | 3.0 kB | 512 B |",
    ]
    assert "| 2 | 3 to 4 | first 2 of 3 | `[red].4` | " in out
    tables = re.findall(r"(?:^\|.*\n)+", out, re.MULTILINE)
    assert [{line.replace("\\|", "").count("|") for line in table.splitlines()} for table in tables] == [{8}, {8}]
    assert out.endswith("- tied: op0.weight is also head.weight\n- kept whole: block.norm, because it has hooks\n")


def test_dot_has_a_cluster_for_each_partition(inspection: Inspection, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(inspection, "dot", capsys)
    assert out.count("subgraph cluster_") == 3
    assert '  "input x" -> "0.0" [label="512 B"];' in out
    assert '  "0.0" -> "1.0" [label="2.0 kB"];' in out
    assert '  "2.0" -> "output" [label="2.0 kB"];' in out
    assert out.count(" -> ") == 4


def test_names_are_no_dot(inspection: Inspection, capsys: pytest.CaptureFixture[str]) -> None:
    first, *others = inspection.partitions
    odd = replace(inspection.plan, partitions=(replace(first, name='a"; b\\'), *others))
    out = shown(replace(inspection, plan=odd), "dot", capsys)
    assert '    label="0: a\\"; b\\\\";' in out


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
def test_graphviz_reads_dot(inspection: Inspection, capsys: pytest.CaptureFixture[str]) -> None:
    first, *others = inspection.partitions
    odd = replace(inspection.plan, partitions=(replace(first, name='a"; b\\'), *others))
    out = shown(replace(inspection, plan=odd), "dot", capsys)
    done = subprocess.run(["dot", "-Tplain"], input=out, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert sum(line.startswith("node ") for line in done.stdout.splitlines()) == 5


@pytest.mark.parametrize("name", formats.FORMATS)
def test_every_format_can_be_a_file(
    name: str,
    inspection: Inspection,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    formats.show(inspection, name, str(tmp_path / "file"))
    assert capsys.readouterr().out == ""
    assert (tmp_path / "file").read_text(encoding="utf-8") == shown(inspection, name, capsys)


def test_a_file_that_cannot_be_written(inspection: Inspection, tmp_path: Path) -> None:
    path = str(tmp_path / "none" / "file")
    with pytest.raises(UsageError, match="cannot be written: No such file or directory; choose another --output"):
        formats.show(inspection, "json", path)


def test_what_several_devices_take_is_a_table(inspection: Inspection, capsys: pytest.CaptureFixture[str]) -> None:
    ways = (("ddp", 1, 8.0, 0), ("ddp", 2, 4.0, 1500), ("fsdp", 2, 3.2, 2500))
    found = tuple(
        ScaleForecast(
            kind=kind, devices=devices, step_seconds=seconds, idle_share=0.25, traffic_bytes=sent, peak_bytes=10**6,
            is_fastest=kind == "fsdp",
        )
        for kind, devices, seconds, sent in ways
    )  # fmt: skip
    lines = shown(replace(inspection, scaling=found), "table", capsys).splitlines()
    (row,) = [line.split() for line in lines if "fsdp" in line]
    assert row == ["2", "fsdp", "*", "3.2", "s", "2.50", "25%", "2.5", "kB", "1.0", "MB"]
    assert not any(" ddp " in line and "*" in line for line in lines)


@pytest.mark.parametrize("width", [40, 60, 80])
def test_what_several_devices_take_is_whole_in_narrow_terminals(
    width: int, inspection: Inspection, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    found = ScaleForecast(
        kind="ddp,pipeline", devices=4096, pipeline_devices=128, step_seconds=0.1234, idle_share=0.25,
        traffic_bytes=123_400_000, peak_bytes=123_400_000, is_fastest=True,
    )  # fmt: skip
    lines = shown(replace(inspection, scaling=(found,)), "table", capsys).splitlines()
    (row,) = (line for line in lines if "4096" in line)
    assert len(row) <= width
    assert row.rstrip().endswith("123.4 MB")
    assert "123.4 ms" in row
    # In a narrow one the name of the way goes on below.
    assert ("ddp,pipeline of 128 *" in row) == (width > 40)
