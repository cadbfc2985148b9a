"""What a generated function uses is found once, and followed wherever the model keeps something else since."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fxsplit
from fxsplit.execute.executor import Executor
from fxsplit.models import registry

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    """Traced through: its tensors are a parameter, a buffer and a plain attribute, and one module lies within two."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(6))
        self.register_buffer("shift", torch.rand(6))
        self.table = torch.rand(6)
        self.inner = nn.Sequential(nn.Sequential(nn.Linear(6, 6)))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.gain + self.shift * self.table


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = Block(), Block(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))


def executor(model: nn.Module) -> Executor:
    trace = fxsplit.trace(model, (X,))
    return Executor(trace, fxsplit.partition(trace, at=["second"]))


def load(model: Model) -> None:
    state = {name: torch.rand_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def swap(model: Model) -> None:
    for parameter in model.parameters():
        parameter.data = torch.rand_like(parameter)


def as_buffer(model: Model) -> None:
    value = model.first.gain.detach() * 2
    del model.first.gain
    model.first.register_buffer("gain", value)


CHANGES: dict[str, Callable[[Model], Any]] = {
    "a parameter": lambda model: setattr(model.first, "gain", nn.Parameter(torch.rand(6))),
    "a buffer": lambda model: setattr(model.first, "shift", torch.rand(6)),
    "a plain tensor": lambda model: setattr(model.second, "table", torch.rand(6)),
    "a module": lambda model: setattr(model.second.inner[0], "0", nn.Linear(6, 6)),
    "a module around it": lambda model: setattr(model.second.inner, "0", nn.Sequential(nn.Linear(6, 6))),
    "a whole block": lambda model: setattr(model, "first", copy.deepcopy(model.second)),
    "data": swap,
    "assigned state": load,
    "a parameter that becomes a buffer": as_buffer,
    "parametrized": lambda model: parametrize.register_parametrization(model.first, "gain", nn.Tanh()),
    "other numbers": lambda model: model.double(),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("copy_of", [lambda net: net, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_what_the_model_has_now_is_used(name: str, copy_of: Callable[[Executor], Executor]) -> None:
    """At the next call already, where the executor need not say whether the model still computes the same."""
    original = executor(Model())
    first = original(X)
    net = copy_of(original)
    assert torch.equal(net(X), first)
    CHANGES[name](net._model)
    x = X.to(next(net.parameters()).dtype)
    expected = net._model(x)
    assert torch.equal(net(x), expected)
    if net is not original:
        assert torch.equal(original(X), first)
        assert not torch.equal(expected.float(), first) or name in {"other numbers"}


def test_tensors_may_be_given_in_place_of_parameters() -> None:
    net = executor(Model())
    given = {name: torch.rand_like(value) for name, value in net.named_parameters()}
    first = net(X)
    expected = torch.func.functional_call(net._model, given, (X,))
    assert torch.equal(torch.func.functional_call(net, given, (X,)), expected)
    assert torch.equal(net(X), first)


def calls(run: Callable[[], object]) -> tuple[int, int, int]:
    """Count the calls of functions, those of nn.Module.__getattr__, and those of the latter by generated code."""
    counts = [0, 0, 0]

    def count(frame: FrameType, event: str, _argument: Any) -> None:
        counts[0] += event in {"call", "c_call"}
        if event == "call" and frame.f_code is nn.Module.__getattr__.__code__:
            counts[1] += 1
            counts[2] += frame.f_back is not None and frame.f_back.f_code.co_filename.startswith("<fxsplit")

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return counts[0], counts[1], counts[2]


@pytest.mark.parametrize("name", ["timm:densenet121", "timm:resnet18", "timm:vit_tiny_patch16_224"])
@pytest.mark.parametrize("training", [True, False])
def test_a_forward_costs_the_host_no_more_than_that_of_the_model(name: str, training: bool) -> None:
    """In calls of functions, which is what a host has to do where kernels have nothing to compute."""
    shape = (3, 224, 224) if "vit" in name else (3, 32, 32)
    plain = registry.build(name, num_classes=10, img_size=shape[-1])
    trace = fxsplit.trace(copy.deepcopy(plain), (torch.empty(2, *shape),))
    net = Executor(trace, fxsplit.partition(trace, count=8))
    plain.train(training)
    net.train(training)
    nothing = torch.empty(0, *shape)
    # The first call finds what later calls use.
    net(nothing)
    (all_of_plain, lookups_of_plain, _), (ours, lookups, own) = (calls(lambda m=m: m(nothing)) for m in (plain, net))
    assert own == 0
    assert lookups < lookups_of_plain
    assert ours <= all_of_plain
