"""A comparison of real runs that is interrupted at five places and started again: its tables are those without."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
# What a clock or the state of the machine decides.
MEASURED = {
    "seconds", "processor_seconds", "setup_seconds", "resident_bytes", "device_bytes", "energy_joules",
    "images_per_second", "folder", "memory_bytes",
}  # fmt: skip
WORDS = ["paper:cnn", "--arms", "standard,l2l", "--seeds", "2", "--img-size", "16", "--train-limit", "128"]
WORDS += ["--epochs", "4", "--batch-size", "16", "--device", "cpu"]
# The run that goes on, and of how many epochs it has left records, when the signal comes.
PLACES = [
    ("standard@4-s0", 0, signal.SIGINT),
    ("standard@4-s0", 2, signal.SIGTERM),
    ("l2l@4-s0", 1, signal.SIGINT),
    ("l2l@4-s1", 3, signal.SIGTERM),
    ("standard@4-s1", 1, signal.SIGINT),
]


def started(folder: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "fxsplit", "compare", *WORDS, "-o", str(folder)]
    # Where tests run in the background of a shell, SIGINT is ignored, also by what they start.
    return subprocess.Popen(
        words, cwd=ROOT, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    )


def wait_for(folder: Path, epochs: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until a run has begun, and has left records of so many epochs."""
    path = folder / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < epochs:
        assert process.poll() is None
        time.sleep(0.01)


def tables(folder: Path) -> Any:
    def kept(data: Any) -> Any:
        if isinstance(data, dict):
            return {name: kept(value) for name, value in data.items() if name not in MEASURED}
        return [kept(each) for each in data] if isinstance(data, list) else data

    (table,) = json.loads((folder / "compare.json").read_text(encoding="utf-8"))["tables"]
    differences = [each for each in table["differences"] if each["quantity"] == "accuracy"]
    arms = [
        {name: kept(arm[name]) for name in ("arm", "epochs", "runs", "accuracy", "ensemble")} for arm in table["arms"]
    ]
    return arms, differences


@pytest.mark.slow
def test_interrupted_at_five_places_the_tables_are_the_same(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert started(whole).wait() == 0
    for name, epochs, number in PLACES:
        process = started(broken)
        wait_for(broken / "runs" / "paper-cnn" / name, epochs, process)
        process.send_signal(number)
        assert process.wait() == (130 if number == signal.SIGINT else 143)
    assert started(broken).wait() == 0
    assert tables(broken) == tables(whole)
