"""Measures what the phases of a plan take, to compare a forecast with."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from fxsplit.execute.executor import Executor
from fxsplit.measuring import allocations
from fxsplit.measuring.meter import now
from fxsplit.plan.schedule import Phase, Plan
from fxsplit.report import PhaseMeasurement

WARMUP = 2


class Loss(Protocol):
    """Computes what micro-batch `index` of `count` adds to the mean loss of the batch."""

    def __call__(self, net: nn.Module, index: int, count: int, /) -> Tensor: ...


def measure_phases(
    executor: Executor,
    plan: Plan,
    loss: Loss,
    *,
    make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    steps: int = 5,
) -> tuple[PhaseMeasurement, ...]:
    """Measure each phase of `plan` by training a copy of `executor` in it, in turn with standard training.

    Phases that differ in nothing that a step depends on are measured once.

    Args:
        executor: stays as it is.
        plan: the phases.
        loss: of a batch, which must be the same at each call.
        make_optimizer: is given the parameters that train.
        steps: seconds are the median over so many steps.
    """
    everything = Phase(start=0, stop=len(plan.partitions), epochs=1)
    standard = _Arm(executor, everything, loss, make_optimizer)
    comparable = [replace(phase, epochs=1, fresh_optimizer=False) for phase in plan.phases]
    found: dict[Phase, PhaseMeasurement] = {}
    for phase in comparable:
        if phase not in found:
            is_standard = phase == everything
            arm = standard if is_standard else _Arm(executor, phase, loss, make_optimizer)
            pairs = [(standard.step(), arm.step()) for _ in range(WARMUP + steps)][WARMUP:]
            ratios = [arm_seconds / standard_seconds for standard_seconds, arm_seconds in pairs]
            activations, peak = arm.memory()
            found[phase] = PhaseMeasurement(
                # Ratios of neighbours in time: a machine that slows down for a while slows both.
                step_cost=1.0 if is_standard else statistics.median(ratios),
                step_seconds=statistics.median(arm_seconds for _, arm_seconds in pairs),
                activation_bytes=activations,
                peak_bytes=peak,
            )
    return tuple(found[phase] for phase in comparable)


def time_ratio(
    executor: Executor,
    plan: Plan,
    other: Plan,
    loss: Loss,
    *,
    make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    steps: int = 5,
) -> float:
    """Measure the time of a run by `plan`, relative to that of a run by `other` over the same partitions.

    The arguments are those of `measure_phases`.
    """

    def cost(plan: Plan) -> float:
        found = measure_phases(executor, plan, loss, make_optimizer=make_optimizer, steps=steps)
        return sum(phase.epochs * measured.step_cost for phase, measured in zip(plan.phases, found, strict=True))

    return cost(plan) / cost(other)


def update_seconds(
    parameters: Iterable[nn.Parameter],
    *,
    make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    steps: int = 5,
) -> float:
    """Measure the seconds of an optimizer's update of copies of all `parameters`: the median over `steps` updates."""
    copies = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    optimizer = make_optimizer(copies)
    for each in copies:
        each.grad = torch.randn_like(each)
    seconds = []
    for _ in range(WARMUP + steps):
        began = now(copies[0].device)
        optimizer.step()
        seconds.append(now(copies[0].device) - began)
    return statistics.median(seconds[WARMUP:])


class _Arm:
    """One side of the comparison: a copy of the executor in one phase, with an optimizer of its own."""

    def __init__(
        self,
        executor: Executor,
        phase: Phase,
        loss: Loss,
        make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    ) -> None:
        self._net = copy.deepcopy(executor).train()
        self._net.enter(phase)
        self._loss, self._micro_batches = loss, phase.micro_batches
        self._parameters = [parameter for parameter in self._net.parameters() if parameter.requires_grad]
        self._optimizer = make_optimizer(self._parameters)
        self._device = self._parameters[0].device

    def step(self) -> float:
        """Take a training step, and return its seconds."""
        began = now(self._device)
        self._optimizer.zero_grad()
        self._backward()
        self._optimizer.step()
        return now(self._device) - began

    def _backward(self) -> None:
        for index in range(self._micro_batches):
            self._loss(self._net, index, self._micro_batches).backward()  # type: ignore[no-untyped-call]

    def memory(self) -> tuple[int, int]:
        """Return the peak bytes of forward and backward without gradients of parameters, and those of everything."""
        self._optimizer.zero_grad()
        with allocations.recorded(self._device) as events:
            self._backward()
        lasting = [*self._net.parameters(), *self._net.buffers()]
        lasting += [leaf for leaf in pytree.tree_leaves(dict(self._optimizer.state)) if isinstance(leaf, Tensor)]
        held = sum(tensor.numel() * tensor.element_size() for tensor in lasting)
        activations = allocations.peak(events, without=allocations.survivors(events))
        return activations, held + allocations.peak(events)
