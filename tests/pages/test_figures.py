"""Figures as people read them."""

from __future__ import annotations

import pytest

from fxsplit.pages import figures


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (None, "B", "not available"),
        (0, "B", "0 B"),
        (999, "B", "999 B"),
        (1000, "B", "1.0 kB"),
        (999_999, "B", "1.0 MB"),
        (25_557_032, "", "25.6 M"),
        (512, "", "512"),
        (1234.5, "J", "1.2 kJ"),
        (0.5, "J", "0.5 J"),
    ],
)
def test_human_figures(number: float | None, unit: str, text: str) -> None:
    assert figures.human(number, unit) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "not available"),
        (0.00449, "4.5 ms"),
        (12.34, "12.3 s"),
        (59.94, "59.9 s"),
        (59.97, "1 min 00 s"),
        (185.4, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (3720, "1 h 02 min"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert figures.duration(seconds) == text


def test_shapes() -> None:
    assert figures.shape((64, 3, 8)) == "64 × 3 × 8"
    assert figures.shape(()) == "scalar"


def test_partitions_that_train() -> None:
    windows = [(start, stop) for start in range(4) for stop in range(start + 1, 5)]
    assert [figures.trains(*window, 4) for window in windows] == [
        "first 1 of 4", "first 2 of 4", "first 3 of 4", "all",
        "number 2 of 4", "2 to 3 of 4", "last 3 of 4",
        "number 3 of 4", "last 2 of 4",
        "last 1 of 4",
    ]  # fmt: skip
