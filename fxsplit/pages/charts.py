"""Draws series of figures as SVG paths.

A path fills a box one unit wide for each figure and one unit high, which the page stretches to its size:

    1 ┌──┐     ┌──        steps: figure i from i to i + 1
      │  └──┐  │
    0 ┴─────┴──┴──        line: figure i at i + 1/2
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite


def steps(figures: Sequence[float], most: float) -> str:
    """Draw the area under a staircase; a figure of `most` reaches the top."""
    scale = 1 / most if most else 0.0
    stairs = "".join(f"V{_short(1 - figure * scale)}H{index}" for index, figure in enumerate(figures, start=1))
    return f"M0 1{stairs}V1Z"


def line(figures: Sequence[float], least: float, most: float) -> str:
    """Draw a curve, with `least` at the bottom and `most` at the top. It is broken where a figure is not finite."""
    scale = 1 / (most - least) if most > least else 0.0
    path, is_drawn = "", False
    for index, figure in enumerate(figures):
        if isfinite(figure):
            y = _short(1 - (figure - least) * scale) if scale else "0.5"
            # A line of no length has round ends, so that a figure without neighbours is seen as a dot.
            path += f"L{index + 0.5} {y}" if is_drawn else f"M{index + 0.5} {y}h0"
        is_drawn = isfinite(figure)
    return path


def bounds(figures: Iterable[float]) -> tuple[float, float] | None:
    """Return the least and the most of the finite figures, or None if there are none."""
    finite = [figure for figure in figures if isfinite(figure)]
    return (min(finite), max(finite)) if finite else None


def _short(number: float) -> str:
    return f"{number:.4f}".rstrip("0").rstrip(".")
