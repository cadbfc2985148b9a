"""What a partition gets when its training ends: the mean of its weights, and BatchNorm statistics that suit them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.optim.swa_utils import get_swa_multi_avg_fn

from fxsplit.execute.executor import Executor
from fxsplit.plan.schedule import Plan
from fxsplit.training.batchnorm import norms_of, taken_anew


class WeightAverage:
    """The running mean of parameters, each over as many moments as it was added at.

    Source: Izmailov et al., Averaging weights leads to wider optima and better generalization, 2018, algorithm 1.
    """

    def __init__(self) -> None:
        self._means: dict[Tensor, Tensor] = {}
        self._counts: dict[Tensor, int] = {}
        self._update = get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def add(self, parameters: Iterable[Tensor]) -> None:
        """Count their values in."""
        for count, found in groupby(parameters, lambda parameter: self._counts.get(parameter, 0)):
            same = list(found)
            means = [self._means.setdefault(parameter, torch.zeros_like(parameter)) for parameter in same]
            self._update(means, same, count)
            self._counts.update(dict.fromkeys(same, count + 1))

    @torch.no_grad()
    def apply(self, parameters: Iterable[Tensor]) -> None:
        """Give them their means, if they have any, and forget these."""
        for parameter in parameters:
            if parameter in self._means:
                parameter.copy_(self._means.pop(parameter))
                del self._counts[parameter]


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
