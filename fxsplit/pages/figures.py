"""Writes figures as people read them."""

from __future__ import annotations

from fxsplit.plan.forecast import Forecast
from fxsplit.plan.schedule import Plan


def human(number: float | None, unit: str = "") -> str:
    """Write a figure as `1.5 GB`, `25.6 M` or `512`; None is "not available", never 0."""
    if number is None:
        return "not available"
    prefixes = iter(("", "k", "M", "G", "T"))
    prefix = next(prefixes)
    while abs(number) >= 999.95:
        number, prefix = number / 1000, next(prefixes, "P")
    digits = 1 if prefix or number % 1 else 0
    return f"{number:.{digits}f} {prefix}{unit}".rstrip()


def duration(seconds: float | None) -> str:
    """Write seconds as `1 h 02 min`, `3 min 05 s`, `12.3 s` or `4.5 ms`; None is "not available"."""
    if seconds is None:
        return "not available"
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {rest:02} s"


def millijoules(joules: float | None) -> str:
    """Write what an image takes, `12.5 mJ`; None is "not available"."""
    return "not available" if joules is None else f"{1000 * joules:.1f} mJ"


def shape(sizes: tuple[int, ...]) -> str:
    """Write a shape as `64 × 3 × 32 × 32`; a tensor without dimensions is a "scalar"."""
    return " × ".join(map(str, sizes)) or "scalar"


def trains(start: int, stop: int, count: int) -> str:
    """Write which of `count` partitions [start, stop) are, such as `all`, `first 2 of 4` and `last 3 of 4`.

    Those in the middle are counted from 1: `2 to 3 of 4`, or `number 2 of 4`.
    """
    if stop - start == count:
        return "all"
    if start == 0:
        return f"first {stop} of {count}"
    if stop == count:
        return f"last {stop - start} of {count}"
    return f"number {stop} of {count}" if stop - start == 1 else f"{start + 1} to {stop} of {count}"


def epochs_of(index: int, plan: Plan) -> str:
    """Write the epochs of phase `index`, counted from 1."""
    first = plan.first_epoch(index) + 1
    last = first + plan.phases[index].epochs - 1
    return f"epochs {first} to {last}" if last > first else f"epoch {first}"


def in_words(forecast: Forecast) -> str:
    """Write what a whole plan costs beside standard training, and how that was worked out."""
    basis = "from shapes alone" if forecast.standard.step_seconds is None else "from ops measured one by one"
    return (
        f"Forecast {basis}, batches of {forecast.batch_size}: the whole plan takes {forecast.time_ratio:.2f} of the "
        f"time of standard training and {forecast.peak_ratio:.2f} of its peak memory."
    )
