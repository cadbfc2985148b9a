"""Writes a comparison as JSON, CSV, Markdown and HTML."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path

from fxsplit.comparison import BUDGETS, Comparison, ComparisonSpec, RunFigures, Table
from fxsplit.errors import UsageError, shown_path
from fxsplit.pages.comparison_page import comparison_page, notes
from fxsplit.pages.figures import human, spread
from fxsplit.paths import expanded
from fxsplit.records import json_text
from fxsplit.saving.files import write_whole

# Of a run, what is a column of the CSV: all but its moments.
COLUMNS = tuple(item.name for item in fields(RunFigures) if item.name != "moments")


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write the files of a comparison into its folder. Raises UsageError when they cannot be written."""
    texts = {
        "json": json_text(comparison.to_dict()),
        "csv": _csv(comparison),
        "md": markdown(comparison),
        "html": comparison_page(comparison),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for ending, text in texts.items():
            write_whole(folder / f"{comparison.name}.{ending}", text)
    except OSError as error:
        raise UsageError(f"the folder {str(folder)!r} cannot be written: {error.strerror}") from error


def refuse_others(spec: ComparisonSpec, folders: Iterable[str]) -> None:
    """Raise UsageError when the folder of a comparison has tables under its name that compare other runs.

    Args:
        spec: names the tables; without models they are of finished runs, and replace none that did their own.
        folders: those of the runs, of equal epochs or each as it is, that are to be compared.
    """
    path = expanded(spec.output) / f"{spec.name}.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        tables = [table for table in before["tables"] if table["match"] in ("epochs", "off")]
        compared = [run["folder"] for table in tables for arm in table["arms"] for run in arm["runs"]]
        is_own = bool(before["looks"])
    except OSError:
        return  # there is none, or writing it will say what is wrong
    except (ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{shown_path(path)} is no comparison, and is not replaced; choose another --name") from error
    kept = set(map(_arm_of, folders))
    others = [each for each in compared if _arm_of(each) not in kept]
    if others:
        fault = f"compares other runs, such as {shown_path(others[0])}"
    elif is_own and not spec.models:
        fault = "is of a comparison that did its runs itself"
    else:
        return
    raise UsageError(f"{shown_path(path)} {fault}, and is not replaced; choose another --name or --output")


def _arm_of(folder: str) -> tuple[str, str]:
    """Tell the folder of a run from those of other models and arms; it may have been named from elsewhere."""
    path = Path(folder)
    return path.parent.name, re.sub(r"-s\d+$", "", path.name)


def _csv(comparison: Comparison) -> str:
    """Write a row for each run of each table."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "match", "arm", *COLUMNS])
    for table in comparison.tables:
        for arm in table.arms:
            for run in arm.runs:
                writer.writerow([table.model, table.match, arm.arm, *(getattr(run, name) for name in COLUMNS)])
    return text.getvalue()


def markdown(comparison: Comparison) -> str:
    """Write tables and verdicts as Markdown."""
    return "\n".join([f"# {comparison.name}", "", *_lines(comparison)]) + "\n"


def _lines(comparison: Comparison) -> Iterator[str]:
    for table in comparison.tables:
        yield from (f"## {table.model}, {BUDGETS[table.match]}", "")
        heads = ["arm", "epochs", "seeds", "test accuracy, %", "by seed", "snapshot ensemble, %", comparison.time]
        heads += [comparison.memory, "multiply-adds", "energy"]
        rows = [[str(cell) for cell in row] for row in _rows(table)]
        for cells in (heads, ["---"] * len(heads), *rows):
            yield f"| {' | '.join(cells)} |"
        yield ""
        yield from (f"- {difference.sentence}" for difference in table.differences)
        yield ""
        if table.unequal:
            yield from ("**Not equal in all runs:**", "")
            yield from (f"- {sentence}" for sentence in table.unequal)
            yield ""
    yield from notes(comparison)


def _rows(table: Table) -> Iterator[list[str]]:
    for arm in table.arms:
        yield [
            arm.arm,
            str(arm.epochs),
            str(len(arm.runs)),
            spread(arm.accuracy, 2),
            " ".join(f"{run.accuracy_pct:.2f}" for run in arm.runs),
            spread(arm.ensemble, 2),
            spread(arm.time, 1),
            human(arm.memory.mean, "B"),
            human(arm.multiply_adds.mean if arm.multiply_adds else None),
            human(arm.energy.mean if arm.energy else None, "J"),
        ]
