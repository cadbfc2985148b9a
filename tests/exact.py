"""What a test asks of a traced model: that it leaves behind what the plain model does, bit for bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from fxsplit.capture.tracing import Trace, trace
from fxsplit.execute.executor import Executor
from fxsplit.objects.same import same_value
from fxsplit.objects.structure import tensors_in
from fxsplit.plan.partition import partition


class Linears(nn.Module):
    """Three linear layers of 6, 8, 8 and 3 features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        return self.c(self.b(self.a(x)).relu())


class With(Linears):
    """Linears behind another module, which takes and gives 6 features."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Any) -> Any:
        return super().forward(self.inner(x))


def rows(count: int = 4) -> torch.Tensor:
    """What Linears takes, float32 (count, 6)."""
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(0))


def executor_of(found: Trace, count: int = 2) -> Executor:
    return Executor(found, partition(found, count=count))


def assert_same_state(model: nn.Module, reference: nn.Module) -> None:
    """Hold parameters and buffers of two models against each other: the same names in one order, and numbers."""
    for (key, value), (reference_key, expected) in zip(
        model.state_dict().items(), reference.state_dict().items(), strict=True
    ):
        assert key == reference_key
        assert torch.equal(value, expected), key


def left_behind(net: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All that a call leaves behind: output, gradients, buffers, attributes of numbers, random states."""
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    args, kwargs = copy.deepcopy((args, kwargs))
    output = net(*args, **kwargs)
    leaves = [leaf for leaf in tensors_in(output) if leaf.requires_grad]
    if leaves:
        with torch.enable_grad():
            weighed = [(leaf * torch.linspace(-1, 2, leaf.numel()).view_as(leaf)).sum() for leaf in leaves]
            torch.stack(weighed).sum().backward()
    return {
        "output": output,
        "gradients": [parameter.grad for parameter in net.parameters()],
        "buffers": [buffer.clone() for buffer in net.buffers()],
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()),
    }


def assert_exact(model: nn.Module, *args: Any, count: int = 2, **kwargs: Any) -> Trace:
    """Trace it, run it beside a copy, in training and in evaluation, and compare all that is left behind."""
    plain = copy.deepcopy(model)
    found = trace(model, args, kwargs)
    net = executor_of(found, count)
    for training in (True, False):
        results = []
        for each in (net, plain):
            each.zero_grad()
            each.train(training)
            with torch.set_grad_enabled(training):
                results.append(left_behind(each, args, kwargs))
        for name in results[0]:
            assert same_value(results[0][name], results[1][name]), f"{name} differs, training: {training}"
    return found
