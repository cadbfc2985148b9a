"""Equal time and equal work: how many epochs an arm gets so that it takes what the arm that is tried took."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from fxsplit.comparing.runs import time_of
from fxsplit.comparison import RunFigures


def fitted_epochs(match: str, own: Sequence[RunFigures], tried: Sequence[RunFigures], *, on_cpu: bool) -> int:
    """Return the epochs in which an arm takes the time, or the work, of the runs `tried`; at least 1.

    Args:
        match: "time" or "work".
        own: its runs, whose epochs are taken as equally costly; what is spent before the first stays as it is.
        tried: those of the other arm.
        on_cpu: where they ran.
    """
    if match == "work":
        wanted = fmean(run.multiply_adds or 0 for run in tried)
        return max(1, round(wanted / fmean((run.multiply_adds or 0) / run.epochs for run in own)))
    wanted = fmean(time_of(run, on_cpu) for run in tried)
    besides = fmean(run.setup_seconds for run in own)
    each = fmean((time_of(run, on_cpu) - run.setup_seconds) / run.epochs for run in own)
    return max(1, round((wanted - besides) / each))
