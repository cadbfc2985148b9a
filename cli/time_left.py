"""Estimates how long a run still takes, from what was measured so far and from the forecast of what is to come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise

from fxsplit.plan.forecast import Forecast
from fxsplit.plan.schedule import Plan
from fxsplit.report import EpochRecord, StepRecord

# A test goes forward only; training an image also goes back, which takes twice as long.
TEST_COST = 1 / 3


class TimeLeft:
    """Estimates the rest of a run.

    An epoch of a phase takes as long as the last one of that phase. Epochs of a phase to come take as much less, or
    more, than those of the phase before as the forecast says, so that a plan whose last phases are cheap is not
    expected to go on at the pace of the first.

        phase 1, measured 10 s     phase 2, forecast 0.5 of phase 1     phase 3, forecast 0.3
        ├─ done ─┼─ 4 s left ─┤    ├───────────── 5 s ────────────┤     ├─────── 3 s ───────┤

    Args:
        plan: that of the run.
        train_images: images of an epoch.
        test_images: images of a test.
        clock: gives seconds.
    """

    def __init__(
        self, plan: Plan, *, train_images: int, test_images: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._edges = tuple(accumulate((phase.epochs for phase in plan.phases), initial=0))
        self._clock = clock
        self._train_images, self._test_share = train_images, TEST_COST * test_images / train_images
        self._costs = [1.0] * len(plan.phases)
        # Seconds of the last epoch of each phase, and of the last test.
        self._trained: dict[int, float] = {}
        self._tested: float | None = None
        # Where the run was when it was last heard of: phase, epochs done, share of the next that is trained.
        self._phase, self._epochs, self._share = 0, 0, 0.0
        self._heard = clock()

    def forecast_made(self, forecast: Forecast) -> None:
        """Take over how the phases compare."""
        self._costs = [phase.step_cost or 1.0 for phase in forecast.phases]

    def phase_started(self, index: int) -> None:
        """Note the phase; a run that goes on may begin with a later one."""
        self._phase = index
        self._epochs = max(self._epochs, self._edges[index])

    def step_done(self, record: StepRecord) -> None:
        """Note where the run is; the first epoch of all also says how fast it is."""
        self._heard = self._clock()
        self._phase, self._epochs, self._share = record.phase, record.epoch - 1, record.step / record.steps
        if self._tested is None and record.images_per_second:
            self._trained[record.phase] = self._train_images / record.images_per_second

    def epoch_done(self, record: EpochRecord) -> None:
        """Note what an epoch and its test took."""
        self._heard = self._clock()
        self._phase, self._epochs, self._share = record.phase, record.epoch, 0.0
        self._trained[record.phase], self._tested = record.train_seconds, record.eval_seconds

    def seconds(self) -> float | None:
        """Return how long the run still takes; None before anything was measured."""
        if not self._trained:
            return None
        return max(0.0, self._rest() - (self._clock() - self._heard))

    def share(self) -> float:
        """Return how much of the run is done, from 0 to 1."""
        done = sum(self._of_phases(0, self._epochs)) + self._share * self._train(self._phase)
        whole = done + self._rest()
        return done / whole if whole else 0.0

    def _rest(self) -> float:
        left = sum(self._of_phases(self._epochs, self._edges[-1]))
        return left - self._share * self._train(self._phase)

    def _of_phases(self, start: int, stop: int) -> Iterator[float]:
        """Estimate what the epochs from `start` to `stop` take, phase by phase."""
        for phase, (first, end) in enumerate(pairwise(self._edges)):
            if (epochs := min(stop, end) - max(start, first)) > 0:
                train = self._train(phase)
                yield epochs * (train + (train * self._test_share if self._tested is None else self._tested))

    def _train(self, phase: int) -> float:
        """Estimate the seconds of training an epoch of a phase, on the scale of its nearest phase that was measured."""
        if phase in self._trained:
            return self._trained[phase]
        if not self._trained:
            return self._costs[phase]
        before = [index for index in self._trained if index < phase]
        known = max(before) if before else min(self._trained)
        return self._trained[known] * self._costs[phase] / self._costs[known]
