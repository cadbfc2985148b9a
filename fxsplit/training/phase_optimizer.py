"""The optimizer of a phase and its learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxsplit.cuda.number import Number
from fxsplit.execute.executor import Executor
from fxsplit.execute.forward import Engine
from fxsplit.plan.schedule import Plan
from fxsplit.training.optimizers import (
    anneal,
    complete_momenta,
    load_named_state,
    named_state,
    parameters_of,
    split_by_end,
)
from fxsplit.training.regularisers.endings import end_epochs
from fxsplit.training.regularisers.exits import Exits


class MakeOptimizer(Protocol):
    """Makes an optimizer over the parameters of the model that train now and those of further `modules`."""

    def __call__(self, *modules: nn.Module) -> Optimizer: ...


class Scheduler(Protocol):
    """Sets the learning rate from the number of optimizer steps done."""

    def step_update(self, num_updates: int) -> None: ...


class MakeScheduler(Protocol):
    """Makes a scheduler of the whole run's learning rate, for the optimizer of one phase."""

    def __call__(self, optimizer: Optimizer, *, steps_per_epoch: int) -> Scheduler: ...


class PhaseOptimizer:
    """Makes a new optimizer and scheduler for each phase, over the parameters that train in it.

    Both are also made in the constructor, so that unknown names and impossible values are refused before a run writes
    anything.

    Args:
        executor: its parameters are trained.
        plan: the phases, and when each partition stops training.
        make_optimizer: called once a phase.
        make_scheduler: called once a phase.
        steps_per_epoch: optimizer steps in an epoch.
        exits: their parameters train beside the model's.
        annealing: share of the run over which the learning rate of a partition falls to zero before it stops training,
            0 (off) to 1.
        device: where steps are recorded, which read the learning rates there; None leaves these on the host.
        engine: knows of which parameters this process keeps the optimizer's state; None for all.

    Raises UsageError when one of the two cannot be made.
    """

    def __init__(
        self,
        executor: Executor,
        plan: Plan,
        *,
        make_optimizer: MakeOptimizer,
        make_scheduler: MakeScheduler,
        steps_per_epoch: int,
        exits: Exits | None = None,
        annealing: float = 0.0,
        device: torch.device | None = None,
        engine: Engine | None = None,
    ) -> None:
        self._executor, self._exits, self._steps_per_epoch = executor, exits, steps_per_epoch
        self._make_optimizer, self._make_scheduler = make_optimizer, make_scheduler
        self._plan, self._end_epochs = plan, end_epochs(plan, 0)
        self._annealing_steps = annealing * (plan.epochs * steps_per_epoch)
        self._device = device
        self._engine = engine or Engine(executor)
        self._make({})

    def enter(self, index: int) -> None:
        """Make optimizer and scheduler over what trains in the phase of this index, which was entered.

        Parameters that trained before keep their optimizer state. A phase with `fresh_optimizer` begins without any.
        """
        self._end_epochs = end_epochs(self._plan, index)
        self._remake({} if self._plan.phases[index].fresh_optimizer else self.optimizer.state)

    def move(self) -> None:
        """Move the optimizer's state to the processes that train its parameters now."""
        self._remake(self.optimizer.state)

    def _remake(self, before: Mapping[Tensor, Any]) -> None:
        named = {self._named[parameter]: state for parameter, state in before.items()}
        self._make(self._engine.gathered(named, self._engine.keeps))

    def _make(self, before: Mapping[str, Any]) -> None:
        """Make both. What trained `before` keeps its state, by name: its parameters may be other objects now."""
        modules = [] if self._exits is None else [self._exits.modules]
        self.optimizer = self._make_optimizer(*modules)
        self._named = self._names()
        for parameter in parameters_of(self.optimizer):
            if state := before.get(self._named[parameter]):
                self.optimizer.state[parameter] = state
        complete_momenta(self.optimizer)
        self._keep_own()
        if self._annealing_steps:
            split_by_end(self.optimizer, self._ends())
        self._scheduler = self._make_scheduler(self.optimizer, steps_per_epoch=self._steps_per_epoch)
        self._rates = [Number(self._device) for _ in self.optimizer.param_groups]

    def _ends(self) -> dict[Tensor, int]:
        """Return the step at which each parameter stops training by the plan. An exit stops with its partition."""
        partitions = [list(parameters) for parameters in self._executor.owned]
        for index, each in self._exits.modules.items() if self._exits else ():
            partitions[int(index)] += each.parameters()
        return {
            parameter: end * self._steps_per_epoch
            for parameters, end in zip(partitions, self._end_epochs, strict=True)
            for parameter in parameters
        }

    def set_rate(self, step: int) -> None:
        """Set the learning rate of each group for the optimizer step number `step` of the run, from 0."""
        if self._annealing_steps:
            anneal(self.optimizer, step, steps=self._annealing_steps)
        self._scheduler.step_update(step)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            rate.set(group["lr"])
            group["lr"] = rate.value

    @property
    def rate(self) -> float:
        """The highest learning rate of all groups."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    @property
    def parameters(self) -> int:
        """How many numbers train, those of exits included."""
        return sum(parameter.numel() for parameter in parameters_of(self.optimizer))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer, with parameters by name. Schedulers are functions of the step alone."""
        found = named_state(self.optimizer, self._names())
        return {"optimizer": {**found, "state": self._engine.gathered(found["state"])}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; the same phase must have been entered."""
        saved = state["optimizer"]
        own = {name: each for name, each in saved["state"].items() if self._engine.keeps(name)}
        load_named_state(self.optimizer, {**saved, "state": own}, self._names())

    def _keep_own(self) -> None:
        """Drop the state of parameters that other processes train."""
        for parameter in list(self.optimizer.state):
            if not self._engine.keeps(self._named[parameter]):
                del self.optimizer.state[parameter]

    def _names(self) -> dict[Tensor, str]:
        names: dict[Tensor, str] = {parameter: name for name, parameter in self._executor.named_parameters()}
        if self._exits is not None:
            # No parameter of the model is called so: its names have no colon unless somebody registers one by hand.
            names |= {parameter: f"exit:{name}" for name, parameter in self._exits.modules.named_parameters()}
        return names
