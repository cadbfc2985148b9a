"""What a partition keeps when it stops training: a mean of its weights, and BatchNorm statistics that fit them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from fxsplit.cuda.number import Number
from fxsplit.data.batch import Batch
from fxsplit.distribute.layout import divided_as
from fxsplit.distribute.processes import Processes
from fxsplit.execute.executor import Executor
from fxsplit.execute.forward import Forward
from fxsplit.objects.structure import is_divided
from fxsplit.plan.schedule import Plan
from fxsplit.training.regularisers.batchnorm import recalibrate

# With warm-up the share that is left after n steps is 1 - n ** -WARMUP_POWER at most, as in timm.
WARMUP_POWER = 2 / 3


class WeightAverage:
    """Keeps the running mean of each parameter, by name, over the values that were added.

    Source: Izmailov et al., Averaging weights leads to wider optima and better generalization, 2018, algorithm 1.

    Args:
        device: where steps are recorded, or None.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._means: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        # The weights of the values that are added now, by the parameters that share one.
        self._weights: dict[tuple[str, ...], Number] = {}

    @torch.no_grad()
    def count(self, parameters: Mapping[str, Tensor]) -> None:
        """Count one more value of each of `parameters`, for `add` to add."""
        for name, parameter in parameters.items():
            if name not in self._means:
                self._means[name], self._counts[name] = torch.zeros_like(parameter), 0
            self._counts[name] += 1
        for names in self._alike(parameters):
            self._weights.setdefault(names, Number(self._device)).set(1 / self._counts[names[0]])

    @torch.no_grad()
    def add(self, parameters: Mapping[str, Tensor]) -> None:
        """Add the present values of `parameters`, which were counted, to their means. It can be recorded."""
        for names in self._alike(parameters):
            _move(self._means, parameters, names, self._weights[names].value)

    def _alike(self, names: Iterable[str]) -> list[tuple[str, ...]]:
        """Group names by the number of values that their means are over."""
        return [tuple(group) for _, group in groupby(names, self._counts.__getitem__)]

    @torch.no_grad()
    def apply(self, parameters: Mapping[str, Tensor]) -> None:
        """Set those of `parameters` that have a mean to it, and forget the mean."""
        for name, parameter in parameters.items():
            if name in self._means:
                parameter.copy_(self._means.pop(name))
                del self._counts[name]

    @property
    def means(self) -> Mapping[str, Tensor]:
        """The means, by name."""
        return self._means

    def forget(self, names: Iterable[str]) -> None:
        """Drop the means of these parameters."""
        for name in names:
            self._means.pop(name, None)
            self._counts.pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        """Return the means, and the number of values that each is over."""
        return {"means": dict(self._means), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Load means that `state_dict` returned, of these `parameters`."""
        self._means = {name: divided_as(mean.clone(), parameters[name]) for name, mean in state["means"].items()}
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
        recorded: steps are recorded and replayed.
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
        recorded: bool = False,
    ) -> None:
        self.average, self._recalibrates = average, recalibrate
        self.midpoint_epoch = plan.epochs // 2 if midpoint and plan.epochs > 1 else None
        self._forward = forward
        self._parameters = named_parameters(forward.executor)
        self._plan, self._end_epochs, self._steps_per_epoch = plan, end_epochs(plan, 0), steps_per_epoch
        self._device = forward.device if recorded else None
        self._mean, self._midpoint_mean = WeightAverage(self._device), WeightAverage(self._device)
        self._steps = 0
        # What this step counts in: a mean, and the parameters that it is of.
        self._counted: list[tuple[WeightAverage, dict[str, Tensor]]] = []

    def enter(self, index: int) -> None:
        """Find the parameters that the model has in the phase of this index, which was entered, and when they stop."""
        self._parameters = named_parameters(self._forward.executor)
        self._end_epochs = end_epochs(self._plan, index)
        self._forget_early()

    def count_step(self, steps: int) -> Hashable:
        """Choose the means that a step counts in, the last of so many `steps` of the run; return which these are."""
        self._counted, self._steps = [], steps
        middle, chosen = self.midpoint_epoch or 0, []
        for index, (parameters, end) in enumerate(zip(self._parameters, self._end_epochs, strict=True)):
            in_mean = self._counts(steps, end)
            in_midpoint = steps <= middle * self._steps_per_epoch and self._counts(steps, middle)
            if self.average and (in_mean or in_midpoint):
                training = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
                means = [self._mean] * in_mean + [self._midpoint_mean] * in_midpoint
                self._counted += [(mean, training) for mean in means]
                chosen.append((index, in_mean, in_midpoint))
        for mean, training in self._counted:
            mean.count(training)
        return tuple(chosen)

    def add_weights(self) -> None:
        """Add the weights to the means that the step counts in. It can be recorded."""
        for mean, training in self._counted:
            mean.add(training)

    def _forget_early(self) -> None:
        """Drop means that would begin later now, since their partition stops later than it did."""
        for parameters, end in zip(self._parameters, self._end_epochs, strict=True):
            if not self._counts(self._steps, end):
                self._mean.forget(parameters)

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
            self._mean = WeightAverage(self._device)
        if self.average or self._recalibrates:
            recalibrate(self._forward, max(partitions, default=-1) + 1, batches)

    def _apply(self, mean: WeightAverage, partitions: Iterable[int]) -> None:
        for index in partitions:
            mean.apply(self._parameters[index])

    def copies(self) -> list[Mapping[str, Tensor]]:
        """List the means so far, by the model's names."""
        return [self._mean.means, self._midpoint_mean.means]

    def state_dict(self) -> dict[str, Any]:
        """Return the means so far, and the steps done."""
        means = {"mean": self._mean.state_dict(), "midpoint_mean": self._midpoint_mean.state_dict()}
        return {"steps": self._steps, **means}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned. Means that would begin later now, since the plan lasts longer, are dropped.

        They would hold weights from the midst of the training.
        """
        self._steps = state["steps"]
        parameters = {name: each for partition in self._parameters for name, each in partition.items()}
        self._mean.load_state_dict(state["mean"], parameters)
        self._midpoint_mean.load_state_dict(state["midpoint_mean"], parameters)
        self._forget_early()
        middle = (self.midpoint_epoch or 0) * self._steps_per_epoch
        for parameters in self._parameters:
            if not self._counts(min(self._steps, middle), self.midpoint_epoch or 0):
                self._midpoint_mean.forget(parameters)


class WeightEma:
    """Keeps the exponential moving average of what trains: parameters, and the buffers of their partitions.

        average = decay * average + (1 - decay) * value, after each step

    It is that of timm's ModelEmaV3, and begins with the first step. A partition that stops training takes its average,
    so what is settled is the same for the network that trains and for the averaged one.

    Args:
        executor: whose partitions train.
        decay: what of the average is left after a step, 0 to 1.
        warmup: let the decay grow from 0 at the beginning.
        device: where steps are recorded, or None.
    """

    def __init__(
        self, executor: Executor, *, decay: float, warmup: bool = False, device: torch.device | None = None
    ) -> None:
        self._executor, self._decay, self._has_warmup = executor, decay, warmup
        self._weight = Number(device)
        self._means: dict[str, Tensor] = {}

    @torch.no_grad()
    def enter(self) -> None:
        """Begin an average of what trains in the phase that was entered, where there is none yet."""
        for name, value in self._training(range(*self._executor.window)).items():
            if name not in self._means:
                self._means[name] = value.detach().clone()

    def _training(self, partitions: Iterable[int]) -> dict[str, Tensor]:
        """Return the parameters of partitions that the user did not freeze, and their buffers, by name."""
        executor = self._executor
        owned = {id(parameter) for index in partitions for parameter in executor.owned[index]}
        names = {name for index in partitions for name in executor.partitions[index].state}
        buffers = {name: buffer for name, buffer in executor.named_buffers() if name in names}
        return {name: each for name, each in executor.named_parameters() if id(each) in owned} | buffers

    def decay_at(self, step: int) -> float:
        """Return what of the average is left after the step with this number, from 1 on."""
        if step <= 1:
            return 0.0
        return min(self._decay, 1 - step**-WARMUP_POWER) if self._has_warmup else self._decay

    def count_step(self, step: int) -> None:
        """Set what `add` adds after the step with this number, from 1 on."""
        if not self._means:
            # All partitions had stopped training, and now a longer plan goes on.
            self.enter()
        self._weight.set(1 - self.decay_at(step))

    @torch.no_grad()
    def add(self) -> None:
        """Add the present values to the averages. It can be recorded."""
        now = self._present()
        floats = [name for name, value in now.items() if value.is_floating_point()]
        if floats:
            _move(self._means, now, floats, self._weight.value)
        for name in now.keys() - set(floats):
            self._means[name].copy_(now[name])

    def _present(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {**dict(self._executor.named_parameters()), **dict(self._executor.named_buffers())}
        return {name: state[name].detach() for name in self._means if name in state}

    @torch.no_grad()
    def settle(self, partitions: Iterable[int]) -> None:
        """Set partitions that stop training to their averages, which end here."""
        for name, value in self._training(partitions).items():
            if name in self._means:
                value.copy_(self._means.pop(name))

    def exchange(self, processes: Processes) -> None:
        """Set averages of buffers to their means over replicas; those of parameters are the same in all."""
        buffers = dict(self._executor.named_buffers())
        processes.replicas.mean([mean for name, mean in self._means.items() if name in buffers])

    def copies(self) -> list[Mapping[str, Tensor]]:
        """List the averages, by the model's names."""
        return [self._means]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averages; then it has its own values again, bit for bit."""
        now = self._present()
        own = {name: value.clone() for name, value in now.items()}
        _write(now, self._means)
        try:
            yield
        finally:
            _write(now, own)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages."""
        return {"means": dict(self._means)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load averages that `state_dict` returned; the same phase must have been entered."""
        self._means = {name: self._means[name] for name in state["means"]}
        _write(self._means, {name: divided_as(mean, self._means[name]) for name, mean in state["means"].items()})


def end_epochs(plan: Plan, index: int) -> list[int]:
    """Return by partition the epoch before which it stops training by the plan, as seen from phase `index`.

    One that thaws later stops when it settles. One that does not train in this phase has stopped when it last did, or
    before the run.
    """
    epochs, going = [0] * len(plan.partitions), set[int]()
    for number, phase in enumerate(plan.phases):
        training = set(range(phase.start, phase.stop))
        going = training if number <= index else going & training
        for partition in going:
            epochs[partition] = plan.first_epoch(number) + phase.epochs
    return epochs


def named_parameters(executor: Executor) -> list[dict[str, Tensor]]:
    """Return by partition the parameters that it owns, by the model's names; those that the user froze are left out."""
    names = {parameter: name for name, parameter in executor.named_parameters()}
    return [{names[parameter]: parameter for parameter in owned} for owned in executor.owned]


def _move(
    means: Mapping[str, Tensor], values: Mapping[str, Tensor], names: Sequence[str], weight: float | Tensor
) -> None:
    """Move means with these names by `weight` of the way towards the values; alike ones in one call."""
    for divided in (False, True):
        chosen = [name for name in names if is_divided(means[name]) is divided]
        if chosen:
            into, now = [means[name] for name in chosen], [values[name] for name in chosen]
            share = [weight.to(each.dtype) for each in into] if isinstance(weight, Tensor) else weight
            torch._foreach_lerp_(into, now, share)


@torch.no_grad()
def _write(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        into[name].copy_(value)
