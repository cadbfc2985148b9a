"""The folder of a run: what was asked, planned, measured and learned, each in a file that other tools read."""

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

# timm's columns first, in its order, so that what reads its summaries reads ours.
FIRST = ("epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr")
COLUMNS = (*FIRST, *(field.name for field in fields(EpochRecord) if field.name not in FIRST))


class RunFolder:
    """`args.yaml`, `plan.json` and `env.json` when a run starts; a line an epoch in `summary.csv` and `metrics.jsonl`;
    `model.safetensors`, `report.json` and `report.html` at its end.

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
        (self.path / "args.yaml").write_text(args_yaml, encoding="utf-8")
        (self.path / "plan.json").write_text(plan_json, encoding="utf-8")
        (self.path / "env.json").write_text(json_text(environment), encoding="utf-8")
        with (self.path / "summary.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(COLUMNS)

    def add(self, record: EpochRecord) -> None:
        values = asdict(record)
        with (self.path / "summary.csv").open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([values[column] for column in COLUMNS])
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json_line(values) + "\n")

    def finish(self, report: RunReport, inspection: Inspection, model: nn.Module) -> None:
        """Weights under the model's own names; of tied parameters the file holds one."""
        safetensors.torch.save_model(model, str(self.path / "model.safetensors"))
        (self.path / "report.json").write_text(json_text(report.to_dict()), encoding="utf-8")
        (self.path / "report.html").write_text(report_page(report, inspection), encoding="utf-8")


def _slug(name: str) -> str:
    """`timm:resnet18` -> `timm-resnet18`; of a file only its name."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", name.rsplit("/", 1)[-1]).strip("-")
