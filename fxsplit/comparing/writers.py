"""Writes a comparison as JSON, CSV, Markdown and HTML."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from fxsplit.comparison import Comparison, RunFigures, Table
from fxsplit.errors import UsageError
from fxsplit.pages.comparison_page import BUDGETS, comparison_page, notes, spread
from fxsplit.pages.figures import human
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
