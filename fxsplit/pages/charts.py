"""Series of figures as SVG paths.

A path lies in a box one unit wide for each figure and one unit high, and is stretched to the size of the page:

    1 ┌──┐     ┌──        steps: figure i from i to i + 1
      │  └──┐  │
    0 ┴─────┴──┴──        line: figure i at i + 1/2
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite


def steps(figures: Sequence[float], most: float) -> str:
    """The area under a staircase; `most` reaches the top."""
    scale = 1 / most if most else 0.0
    stairs = "".join(f"V{_short(1 - figure * scale)}H{index}" for index, figure in enumerate(figures, start=1))
    return f"M0 1{stairs}V1Z"


def line(figures: Sequence[float], least: float, most: float) -> str:
    """A curve between `least`, at the bottom, and `most`. It is broken where a figure is not finite."""
    scale = 1 / (most - least) if most > least else 0.0
    path, is_drawn = "", False
    for index, figure in enumerate(figures):
        if isfinite(figure):
            y = _short(1 - (figure - least) * scale) if scale else "0.5"
            # Of no length, but with round ends: a figure alone is a dot.
            path += f"L{index + 0.5} {y}" if is_drawn else f"M{index + 0.5} {y}h0"
        is_drawn = isfinite(figure)
    return path


def bounds(figures: Iterable[float]) -> tuple[float, float] | None:
    """The least and the most of the finite figures, or None where there are none."""
    finite = [figure for figure in figures if isfinite(figure)]
    return (min(finite), max(finite)) if finite else None


def _short(number: float) -> str:
    return f"{number:.4f}".rstrip("0").rstrip(".")
