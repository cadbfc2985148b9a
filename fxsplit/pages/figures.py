"""Writes figures as people read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import floor, isfinite, log10

from fxsplit.comparison import Estimate
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


def roughly(seconds: float) -> str:
    """Write seconds that are not known exactly: `2 h 10 min`, `12 min`, `3 min 20 s`, `40 s`, `under 5 s`."""
    if seconds < 5:
        return "under 5 s"
    step = 5 if seconds < 60 else 10 if seconds < 600 else 60 if seconds < 7200 else 600
    return _brief_duration(round(seconds / step) * step)


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
    return epochs(plan.first_epoch(index), plan.phases[index].epochs)


def epochs(first: int, count: int) -> str:
    """Write which epochs these are, `epochs 3 to 5` or `epoch 3`, of which the `first` counts from 0."""
    return f"epochs {first + 1} to {first + count}" if count > 1 else f"epoch {first + 1}"


def in_words(forecast: Forecast) -> str:
    """Write what a whole plan costs beside standard training, and how that was worked out."""
    basis = "from shapes alone" if forecast.standard.step_seconds is None else "from ops measured one by one"
    return (
        f"Forecast {basis}, batches of {forecast.batch_size}: the whole plan takes {forecast.time_ratio:.2f} of the "
        f"time of standard training and {forecast.peak_ratio:.2f} of its peak memory."
    )


# Units of axes


def _brief_duration(seconds: float) -> str:
    """Write round seconds as `20 s`, `5 min`, `2 h` or `1 h 30 min`."""
    if abs(seconds) < 60:
        return f"{seconds:g} s"
    return duration(seconds).removesuffix(" 00 s").removesuffix(" 00 min")


def _brief_bytes(number: float) -> str:
    return human(number, "B").replace(".0 ", " ")


# Round steps of seconds from a second on.
CLOCK = (
    1,
    2,
    5,
    10,
    15,
    30,
    *(60 * step for step in (1, 2, 5, 10, 15, 30)),
    *(3600 * step for step in (1, 2, 3, 6, 12)),
)
DAY = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Says how figures of a kind are written: in full by `write`, and by `brief` where they are round.

    `is_whole` says that there are none between whole numbers, `is_time` that they are seconds.
    """

    write: Callable[[float], str]
    brief: Callable[[float], str]
    is_whole: bool = False
    is_time: bool = False

    def step(self, least: float) -> float:
        """Return the first round step that is at least this: 1, 2 or 5, times a power of ten; of seconds, as clocks."""
        if self.is_time and least > 1:
            return next((step for step in CLOCK if step >= least), None) or DAY * self._decimal(least / DAY)
        return max(1.0, self._decimal(least)) if self.is_whole else self._decimal(least)

    @staticmethod
    def _decimal(least: float) -> float:
        exponent = floor(log10(least))
        return next(step * 10.0**exponent for step in (1, 2, 5, 10) if step * 10.0**exponent >= least * (1 - 1e-9))


NUMBER = Unit(write="{:.4g}".format, brief="{:g}".format)
COUNT = Unit(write="{:g}".format, brief="{:g}".format, is_whole=True)
PERCENT = Unit(write="{:.2f} %".format, brief="{:g} %".format)
SECONDS = Unit(write=duration, brief=_brief_duration, is_time=True)
ENERGY = Unit(write=millijoules, brief=lambda joules: f"{1000 * joules:g} mJ")
BYTES = Unit(write=lambda number: human(number, "B"), brief=_brief_bytes)


def spread(estimate: Estimate | None, digits: int) -> str:
    """Write a mean and half of its 95 % interval."""
    if estimate is None:
        return "-"
    half = (estimate.high - estimate.low) / 2
    return f"{estimate.mean:.{digits}f}" + (f" ± {half:.{digits}f}" if isfinite(half) else "")
