"""What a partition keeps when it stops training: the mean of its weights, and BatchNorm statistics that fit them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_swa_multi_avg_fn

from fxsplit.data.batch import Batch
from fxsplit.execute.executor import Executor
from fxsplit.execute.forward import Forward
from fxsplit.plan.schedule import Plan
from fxsplit.training.batchnorm import recalibrate


class WeightAverage:
    """Keeps the running mean of each parameter, by name, over the values that were added.

    Source: Izmailov et al., Averaging weights leads to wider optima and better generalization, 2018, algorithm 1.
    """

    def __init__(self) -> None:
        self._means: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._update = get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def add(self, parameters: Mapping[str, Tensor]) -> None:
        """Add the present values of `parameters` to their means."""
        for count, group in groupby(parameters, lambda name: self._counts.get(name, 0)):
            names = list(group)
            now = [parameters[name] for name in names]
            means = [self._means.setdefault(name, torch.zeros_like(parameters[name])) for name in names]
            self._update(means, now, count)
            self._counts.update(dict.fromkeys(names, count + 1))

    @torch.no_grad()
    def apply(self, parameters: Mapping[str, Tensor]) -> None:
        """Set those of `parameters` that have a mean to it, and forget the mean."""
        for name, parameter in parameters.items():
            if name in self._means:
                parameter.copy_(self._means.pop(name))
                del self._counts[name]

    def state_dict(self) -> dict[str, Any]:
        """Return the means, and the number of values that each is over."""
        return {"means": dict(self._means), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load means that `state_dict` returned."""
        self._means = {name: mean.clone() for name, mean in state["means"].items()}
        self._counts = dict(state["counts"])


class Endings:
    """Averages weights and recalibrates BatchNorm when a partition stops training.

    A partition that settles keeps the mean of its weights over the last `average` share of its own training
    (stochastic weight averaging, Izmailov et al. 2018). Averaged weights no longer fit the running statistics of
    BatchNorm, so these are estimated again from a few batches.

    Args:
        forward: what runs the batches of the recalibration.
        plan: when each partition stops.
        steps_per_epoch: optimizer steps in an epoch.
        average: share of a partition's steps that is averaged, 0 (off) to 1.
        recalibrate: also estimate statistics again where nothing was averaged.
        midpoint: in the middle of the run, before an epoch begins, all that trains is set to such a mean over the run
            so far, and trains on from there. A run of one epoch has no midpoint.
    """

    def __init__(
        self,
        forward: Forward,
        plan: Plan,
        *,
        steps_per_epoch: int,
        average: float = 0.0,
        recalibrate: bool = False,
        midpoint: bool = False,
    ) -> None:
        self.average, self._recalibrates = average, recalibrate
        self.midpoint_epoch = plan.epochs // 2 if midpoint and plan.epochs > 1 else None
        self._forward = forward
        self._parameters = named_parameters(forward.executor)
        self._end_epochs, self._steps_per_epoch = end_epochs(plan), steps_per_epoch
        self._mean, self._midpoint_mean = WeightAverage(), WeightAverage()

    def step_done(self, steps: int) -> None:
        """Add the weights to the means that this step counts in, the last of so many `steps` of the run."""
        if not self.average:
            return
        middle = self.midpoint_epoch or 0
        for parameters, end in zip(self._parameters, self._end_epochs, strict=True):
            training = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
            if self._counts(steps, end):
                self._mean.add(training)
            if steps <= middle * self._steps_per_epoch and self._counts(steps, middle):
                self._midpoint_mean.add(training)

    def _counts(self, steps: int, end: int) -> bool:
        """Tell whether a step is among the last `average` share of those before epoch `end`."""
        return steps > (1 - self.average) * end * self._steps_per_epoch

    def end(self, partitions: Sequence[int], batches: Iterable[Batch], *, at_midpoint: bool = False) -> None:
        """End the training of `partitions`: set them to their means and recalibrate BatchNorm.

        With `at_midpoint` all partitions that train are set to their midpoint means as well. Statistics are estimated
        from `batches`, which are read only if they are needed.
        """
        self._apply(self._mean, partitions)
        if at_midpoint:
            partitions = range(*self._forward.executor.window)
            self._apply(self._midpoint_mean, partitions)
            # Training goes on from other weights now, so those averaged so far count no more.
            self._mean = WeightAverage()
        if self.average or self._recalibrates:
            recalibrate(self._forward, max(partitions, default=-1) + 1, batches)

    def _apply(self, mean: WeightAverage, partitions: Iterable[int]) -> None:
        for index in partitions:
            mean.apply(self._parameters[index])

    def state_dict(self) -> dict[str, Any]:
        """Return the means so far."""
        return {"mean": self._mean.state_dict(), "midpoint_mean": self._midpoint_mean.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self._mean.load_state_dict(state["mean"])
        self._midpoint_mean.load_state_dict(state["midpoint_mean"])


def end_epochs(plan: Plan) -> list[int]:
    """Return by partition the epoch before which it stops training by the plan."""
    epochs = [0] * len(plan.partitions)
    for number, phase in enumerate(plan.phases):
        for index in range(phase.start, phase.stop):
            epochs[index] = plan.first_epoch(number) + phase.epochs
    return epochs


def named_parameters(executor: Executor) -> list[dict[str, Tensor]]:
    """Return by partition the parameters that it owns, by the model's names; those that the user froze are left out."""
    names = {parameter: name for name, parameter in executor.named_parameters()}
    return [{names[parameter]: parameter for parameter in owned} for owned in executor.owned]
