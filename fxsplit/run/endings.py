"""What a partition gets when its training ends: the mean of its weights, and BatchNorm statistics that suit them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fxsplit.plan.schedule import Plan
from fxsplit.run.averaging import WeightAverage
from fxsplit.run.batchnorm import norms_of, taken_anew
from fxsplit.run.executor import Executor


class Endings:
    """Partitions end with their mean over the last `average` share of their steps; with `recalibrate`, or after
    averaging, BatchNorm statistics are taken anew.

    Before the epoch `gathering` all that train take such a mean, of the run so far, and then train on from it.

    `epochs` is by partition the epoch before which it stops training by the plan.
    """

    def __init__(
        self,
        executor: Executor,
        plan: Plan,
        *,
        steps_per_epoch: int,
        average: float,
        recalibrate: bool,
        gathering: int | None = None,
    ) -> None:
        self._executor, self._steps_per_epoch = executor, steps_per_epoch
        self._share, self._recalibrate = average, recalibrate
        self.gathering = gathering
        self._average, self._gathered = WeightAverage(), WeightAverage()
        self.epochs = [0] * len(plan.partitions)
        for number, phase in enumerate(plan.phases):
            for index in range(phase.start, phase.stop):
                self.epochs[index] = plan.first_epoch(number) + phase.epochs

    def step_done(self, steps: int) -> None:
        """Count the weights in of what has so much of its training behind it, after so many steps of the run."""
        if not self._share:
            return
        for parameters, end in zip(self._executor.owned, self.epochs, strict=True):
            if self._counts(steps, end):
                self._average.add(filter(_trains, parameters))
            if self.gathering is not None and self._counts(steps, self.gathering):
                self._gathered.add(filter(_trains, parameters))

    def _counts(self, steps: int, end: int) -> bool:
        return steps > (1 - self._share) * end * self._steps_per_epoch

    def finish(self, partitions: Sequence[int], forward: Callable[[int], None], *, gather: bool = False) -> None:
        """End the training of `partitions`; with `gather`, this is the gathering.

        `forward` runs batches up to a cut, in training.
        """
        self._average.apply(parameter for index in partitions for parameter in self._executor.owned[index])
        if gather:
            partitions = range(*self._executor.window)
            self._gathered.apply(parameter for index in partitions for parameter in self._executor.owned[index])
            self.gathering = None
            # What was counted so far is of weights that are no more.
            self._average = WeightAverage()
        if not (self._share or self._recalibrate):
            return
        stop = max(partitions, default=-1) + 1
        if norms := norms_of(self._executor, stop):
            with taken_anew(norms):
                forward(stop)


def _trains(parameter: Tensor) -> bool:
    return parameter.requires_grad
