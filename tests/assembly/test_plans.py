"""What is said of a plan when it is made."""

from __future__ import annotations

from pathlib import Path

import pytest

import fxsplit
from fxsplit.report import Observer


class Sentences(Observer):
    def __init__(self) -> None:
        self.found: list[str] = []

    def notice(self, sentence: str) -> None:
        self.found.append(sentence)


@pytest.mark.parametrize(
    ("epochs", "schedule", "says"), [(1, "settle", True), (4, "settle", False), (1, "grow", False)]
)
def test_a_run_in_which_nothing_settles_says_so(epochs: int, schedule: str, says: bool, tmp_path: Path) -> None:
    heard = Sentences()
    options = {"data": "synthetic", "img_size": 16, "device": "cpu", "output": str(tmp_path), "dry_run": True}
    fxsplit.train(fxsplit.RunSpec(model="paper:cnn", epochs=epochs, schedule=schedule, **options), heard)
    assert [
        each for each in heard.found if each.startswith("nothing settles in 1 epoch of 8 partitions")
    ] != [] or not says
    assert any("nothing settles" in each for each in heard.found) is says
