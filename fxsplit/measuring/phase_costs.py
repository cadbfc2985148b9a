"""What the phases of a plan really take: the figures to hold a forecast against."""

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
    """What one of the `parts` of a batch adds to the mean loss of the batch."""

    def __call__(self, net: nn.Module, part: int, parts: int, /) -> Tensor: ...


def measure_phases(
    executor: Executor,
    plan: Plan,
    loss: Loss,
    *,
    make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    steps: int = 5,
) -> tuple[PhaseMeasurement, ...]:
    """Train a copy of `executor` in each phase of `plan`, and `standard` in turn with it, step by step.

    The batch is always the same. Seconds are medians. Equal phases are measured once.
    """
    whole = Phase(start=0, stop=len(plan.partitions), epochs=1)
    standard = _Arm(executor, whole, loss, make_optimizer)
    alike = [replace(phase, epochs=1, fresh_optimizer=False) for phase in plan.phases]
    found: dict[Phase, PhaseMeasurement] = {}
    for phase in alike:
        if phase not in found:
            is_standard = phase == whole
            arm = standard if is_standard else _Arm(executor, phase, loss, make_optimizer)
            pairs = [(standard.step(), arm.step()) for _ in range(WARMUP + steps)][WARMUP:]
            activations, peak = arm.memory()
            found[phase] = PhaseMeasurement(
                # Of neighbours: a machine that slows down for a while slows both.
                step_cost=1.0 if is_standard else statistics.median(mine / its for its, mine in pairs),
                step_seconds=statistics.median(mine for _, mine in pairs),
                activation_bytes=activations,
                peak_bytes=peak,
            )
    return tuple(found[phase] for phase in alike)


def update_seconds(
    parameters: Iterable[nn.Parameter],
    *,
    make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    steps: int = 5,
) -> float:
    """What an optimizer's update of copies of all `parameters` takes: the median of `steps`."""
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
    """A copy of the executor in one phase, with an optimizer of its own."""

    def __init__(
        self,
        executor: Executor,
        phase: Phase,
        loss: Loss,
        make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    ) -> None:
        self._net = copy.deepcopy(executor).train()
        self._net.enter(phase)
        self._loss, self._parts = loss, phase.micro_batches
        self._parameters = [parameter for parameter in self._net.parameters() if parameter.requires_grad]
        self._optimizer = make_optimizer(self._parameters)
        self._device = self._parameters[0].device

    def step(self) -> float:
        """One step; its seconds."""
        began = now(self._device)
        self._optimizer.zero_grad()
        self._backward()
        self._optimizer.step()
        return now(self._device) - began

    def _backward(self) -> None:
        for part in range(self._parts):
            self._loss(self._net, part, self._parts).backward()  # type: ignore[no-untyped-call]

    def memory(self) -> tuple[int, int]:
        """Peak bytes of forward and backward without gradients of parameters, and of everything."""
        self._optimizer.zero_grad()
        with allocations.recorded(self._device) as events:
            self._backward()
        lasting = [*self._net.parameters(), *self._net.buffers()]
        lasting += [leaf for leaf in pytree.tree_leaves(dict(self._optimizer.state)) if isinstance(leaf, Tensor)]
        held = sum(tensor.numel() * tensor.element_size() for tensor in lasting)
        activations = allocations.peak(events, without=allocations.survivors(events))
        return activations, held + allocations.peak(events)
