"""The folder of a run: recipe, plan, records and weights, each in a file that other tools can read."""

from __future__ import annotations

import csv
import re
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from fxsplit.errors import UsageError
from fxsplit.pages.page import report_page
from fxsplit.records import json_line, json_text
from fxsplit.report import EpochRecord, Inspection, RunReport

# timm's columns first, in its order, so that a program that reads its summaries reads ours.
FIRST = ("epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr")
COLUMNS = (*FIRST, *(field.name for field in fields(EpochRecord) if field.name not in FIRST))


class RunFolder:
    """Makes the folder of a run and writes its files.

        start     args.yaml, plan.json, env.json
        add       a line in summary.csv and in metrics.jsonl
        finish    model.safetensors, report.json, report.html

    Args:
        output: the folder in which the run gets its own.
        model: part of its name, as are schedule, seed and time.
        schedule: likewise.
        seed: likewise.
        experiment: its name, instead of that one.

    Raises UsageError when the folder of a named experiment already holds something, or cannot be made.
    """

    def __init__(self, output: str, *, model: str, schedule: str, seed: int, experiment: str | None) -> None:
        parent = Path(output).expanduser()
        name = experiment or f"{datetime.now():%Y%m%d-%H%M%S}-{_slug(model)}-{_slug(schedule)}-s{seed}"
        self.path = parent / name
        try:
            number = 1
            while self.path.exists() and any(self.path.iterdir()):
                if experiment:
                    raise UsageError(f"the folder {str(self.path)!r} already holds a run; name another --experiment")
                number += 1
                self.path = parent / f"{name}-{number}"
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"the run folder {str(self.path)!r} cannot be made: {error.strerror}; choose another --output"
            ) from error

    def start(self, *, args_yaml: str, plan_json: str, environment: dict[str, Any]) -> None:
        """Write what is known before the first epoch: recipe, plan, and what numbers depend on besides."""
        (self.path / "args.yaml").write_text(args_yaml, encoding="utf-8")
        (self.path / "plan.json").write_text(plan_json, encoding="utf-8")
        (self.path / "env.json").write_text(json_text(environment), encoding="utf-8")
        with (self.path / "summary.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(COLUMNS)

    def add(self, record: EpochRecord) -> None:
        """Write the record of an epoch."""
        values = asdict(record)
        with (self.path / "summary.csv").open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([values[column] for column in COLUMNS])
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json_line(values) + "\n")

    def finish(self, report: RunReport, inspection: Inspection, model: nn.Module) -> None:
        """Write the report and the weights, by the model's own names; tied parameters are there once."""
        safetensors.torch.save_model(model, str(self.path / "model.safetensors"))
        (self.path / "report.json").write_text(json_text(report.to_dict()), encoding="utf-8")
        (self.path / "report.html").write_text(report_page(report, inspection), encoding="utf-8")


def _slug(name: str) -> str:
    """Make a part of a folder's name: `timm:resnet18` -> `timm-resnet18`; of a path only the last part."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", name.rsplit("/", 1)[-1]).strip("-")
