"""Tiny runs of every kind, and what two of them are compared by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fxsplit.resuming import CHECKPOINTS
from fxsplit.saving.checkpoint import read_checkpoint

MODEL = """
import torch
from torch import nn


class Counts(nn.Module):
    '''What it has seen so far changes what it gives, and is no part of its state_dict.'''

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.seen.mul_(0.9).add_(x.detach().mean())
        return x * (1 + 0.1 * self.seen)


def small(num_classes):
    layers = []
    for index, (given, made) in enumerate([(3, 4), (4, 6), (6, 6), (6, 8)]):
        layers += [nn.Conv2d(given, made, 3, stride=2 - index % 2, padding=1), nn.BatchNorm2d(made), nn.ReLU()]
        layers += [nn.Dropout(0.1)] * (index == 2)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), Counts(), nn.Linear(8, num_classes))
"""

# All are deterministic, of 5 steps an epoch with a smaller last batch.
COMMON: dict[str, Any] = {
    "data": "synthetic", "img_size": 12, "train_limit": 68, "batch_size": 16, "epochs": 4, "device": "cpu",
    "deterministic": True, "log_interval": 1, "lr": 1e-2,
}  # fmt: skip
SETTLING: dict[str, Any] = {"schedule": "settle", "parts": 4, "settle_from": 0.25, "settle_until": 0.75}
KINDS: dict[str, dict[str, Any]] = {
    "standard": {"opt": "sgd", "sched": "cosine", "warmup_epochs": 1, "weight_decay": 1e-2, "clip_grad": 1.0},
    "float16": {"opt": "adamw", "amp": True, "amp_dtype": "float16", "channels_last": True},
    "window": {"schedule": "window", "parts": 4, "epochs_total": 4, "augment": "crop-flip"},
    "l2l": {
        "preset": "l2l",
        "settle_from": 0.25,
        "settle_until": 0.7,
        "cache": "disk",
        "memory_aim": 0.5,
        "soft_targets": 0.8,
        "soft_from": "mean",
        "average": 0.5,
        "channels_last": True,
        "epochs": 8,
    },
    "exits": {**SETTLING, "exits": 2, "cache": "ram", "soft_targets": 0.5, "average": 0.6, "anneal": 0.4},
    "veto": {
        **SETTLING,
        "veto": True,
        "cache": "disk",
        "recalibrate": True,
        "epochs": 6,
        "sched": "step",
        "decay_epochs": 3,
        "decay_rate": 1e-6,
    },
    "views": {**SETTLING, "augment": "crop-flip", "cache": "disk", "cache_views": 2, "epochs": 6, "opt": "momentum"},
    "policy": {"augment": "crop-flip", "aa": "rand-m9-mstd0.5", "reprob": 0.5, "workers": 1, "model_ema": True},
    "mixed": {
        **SETTLING,
        "augment": "resized-crop",
        "train_interpolation": "random",
        "mixup": 0.2,
        "cutmix": 1.0,
        "model_ema": True,
        "model_ema_decay": 0.9,
        "model_ema_warmup": True,
    },
    "alternate": {**SETTLING, "augment": "flip-alternate", "cache": "ram", "epochs": 6},
    "few": {**SETTLING, "cache": "ram", "train_batches_per_epoch": 3, "grad_accum_steps": 2, "average": 0.3},
    "finetune": {
        "preset": "finetune",
        "force": True,
        "parts": 3,
        "cache": "ram",
        "average": 0.4,
        "guard": 0.2,
        "epochs": 5,
    },
    "auto": {**SETTLING, "cache": "auto", "settled_dtype": "bfloat16", "opt": "adafactor"},
}

# What a clock or the state of the machine decides.
MEASURED = {
    "train_seconds", "eval_seconds", "images_per_second", "peak_resident_bytes", "peak_allocated_bytes",
    "peak_reserved_bytes", "device_bytes", "energy_joules", "train_energy_joules",
    "processor_seconds",
}  # fmt: skip


def model_in(folder: Path) -> str:
    """Write the model's file into a folder, and return its name."""
    file = folder / "small.py"
    file.write_text(MODEL, encoding="utf-8")
    return f"{file}:small"


def left_by(folder: Path) -> dict[str, Any]:
    """All that two runs which are the same leave alike: weights, records, and the state of the last checkpoint."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [{name: value for name, value in json.loads(line).items() if name not in MEASURED} for line in lines]
    last = read_checkpoint(max((folder / CHECKPOINTS).iterdir()))["state"]
    last["training"].pop("telemetry")
    rows = (folder / "summary.csv").read_text(encoding="utf-8").splitlines()
    return {
        "weights": load_file(folder / "model.safetensors"),
        "metrics": metrics,
        "epochs": [row.split(",")[0] for row in rows],
        "confusion": json.loads((folder / "report.json").read_text(encoding="utf-8"))["confusion"],
        "state": last,
    }


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two pieces of plain data with tensors differ."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        same = same and one.contiguous().view(-1).view(torch.uint8).equal(other.contiguous().view(-1).view(torch.uint8))
        return [] if same else [path]
    if isinstance(one, dict) and isinstance(other, dict):
        found = [f"{path}/{key}" for key in one.keys() ^ other.keys()]
        for key in one.keys() & other.keys():
            found += differences(one[key], other[key], f"{path}/{key}")
        return found
    if isinstance(one, list | tuple) and type(one) is type(other) and len(one) == len(other):
        return [
            each
            for index, pair in enumerate(zip(one, other, strict=True))
            for each in differences(*pair, f"{path}/{index}")
        ]
    return [] if one == other or (one != one and other != other) else [f"{path}: {one!r} and {other!r}"]
