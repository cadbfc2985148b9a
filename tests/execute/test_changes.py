"""What is changed in a model after tracing is followed, bit for bit, or refused by name."""

from __future__ import annotations

import copy
import functools
import operator
import pickle
import types
import unittest.mock
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from fxsplit.capture.tracing import trace
from fxsplit.errors import GuardError
from fxsplit.execute import changes
from fxsplit.execute.executor import Executor
from fxsplit.plan.partition import partition
from fxsplit.plan.schedule import Phase

pytestmark = pytest.mark.usefixtures("one_thread")


class Config:
    def __init__(self) -> None:
        self.scale, self.options = 2.0, {"shift": 1.0}


class Block(nn.Module):
    """Traced through; everything that it reads is a number of its own, of its class, or of what it holds."""

    power = 1.0
    calls = 0

    def __init__(self, features: int = 6) -> None:
        super().__init__()
        self.linear, self.drop, self.norm = nn.Linear(features, features), nn.Dropout(0.5), nn.LayerNorm(features)
        self.register_parameter("bias", None)
        self.gain = nn.Parameter(torch.ones(features))
        self.slope, self.sizes, self.config, self.unused = 0.1, [1.0, 2.0], Config(), "nothing"
        self.activation: Callable[..., Tensor] = F.leaky_relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.linear(x), self.slope) * self.sizes[1] + self.config.options["shift"]
        x = x * self.gain * self.config.scale**self.power
        if self.bias is not None:
            x = x + self.bias
        return self.norm(F.dropout(x, self.drop.p, self.training))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = Block(), Block(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))


def executor(model: nn.Module, at: str = "second", example: Tensor = X) -> Executor:
    captured = trace(model, (example,))
    return Executor(captured, partition(captured, at=[at]))


def computed(net: nn.Module, x: Tensor = X) -> list[Tensor]:
    """What a step gives: output and gradients in training, from one random state, and the output in evaluation."""
    net.zero_grad()
    torch.manual_seed(5)
    output = net.train()(x)
    output.square().sum().backward()
    gradients = [torch.zeros(()) if each.grad is None else each.grad.clone() for each in net.parameters()]
    with torch.no_grad():
        return [output.detach(), *gradients, net.eval()(x)]


def same(ours: list[Tensor], plain: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def swap(model: Model, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


REFUSED: dict[str, tuple[Callable[[Model], Any], str]] = {
    "attribute": (
        lambda model: setattr(model.first, "slope", 0.2),
        "attribute 'slope' of 'first' was 0.1 when it was traced and is now 0.2, which changes what the model computes",
    ),
    "kind of a number": (lambda model: setattr(model.first, "slope", True), "'slope' of 'first' was 0.1 .* now True"),
    "item of a list": (
        lambda model: operator.setitem(model.second.sizes, 1, 3.0),
        r"attribute 'sizes\[1\]' of 'second' was 2.0 when it was traced and is now 3.0",
    ),
    "attribute of a config": (lambda model: setattr(model.second.config, "scale", 3.0), "'config.scale' of 'second'"),
    "dict in a config": (
        lambda model: model.second.config.options.update(shift=0.5),
        r"""config.options\['shift'\]\" of 'second' was 1.0 .* now 0.5""",
    ),
    "another config": (
        lambda model: setattr(model.first, "config", types.SimpleNamespace(scale=9.0, options={"shift": 1.0})),
        "attribute 'config' of 'first'",
    ),
    "function": (lambda model: setattr(model.first, "activation", F.celu), "'activation' of 'first' .* now celu"),
    "new attribute over that of the class": (
        lambda model: setattr(model.first, "power", 2.0),
        "attribute 'power' of 'first' was not set when it was traced and is now 2.0",
    ),
    "number of an inner module": (
        lambda model: setattr(model.first.drop, "p", 0.25),
        "attribute 'p' of 'first.drop' was 0.5 .* now 0.25",
    ),
    "forward of an instance": (
        lambda model: setattr(model.first, "forward", types.MethodType(lambda self, x: self.linear(x), model.first)),
        "attribute 'forward' of 'first'",
    ),
    "forward of the model": (
        lambda model: setattr(model, "forward", types.MethodType(lambda self, x: self.head(x), model)),
        "attribute 'forward' of the model",
    ),
    "parameter that was None": (
        lambda model: setattr(model.first, "bias", nn.Parameter(torch.ones(6))),
        "parameter 'bias' of 'first' was None when it was traced and is now 'first.bias' of shape",
    ),
    "module of another kind": (
        lambda model: swap(model, "first", nn.Linear(6, 6)),
        "the class of 'first' was Block when it was traced and is now Linear",
    ),
    "a module more": (
        lambda model: swap(model, "first.linear", nn.Sequential(nn.Linear(6, 6), nn.Tanh())),
        "'first.linear'",
    ),
    "parametrization": (
        lambda model: parametrize.register_parametrization(model.first, "gain", nn.Tanh()),
        "the class of 'first' was Block when it was traced and is now ParametrizedBlock",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("call", ["enter", "train", "eval"])
def test_a_change_that_matters_is_refused_by_name(name: str, call: str) -> None:
    change, words = REFUSED[name]
    model = Model()
    net = executor(model)
    calls: dict[str, Callable[[], Any]] = {
        "enter": lambda: net.enter(Phase(start=0, stop=1, epochs=1)),
        "train": net.train,
        "eval": net.eval,
    }
    calls[call]()
    change(model)
    with pytest.raises(GuardError, match=words):
        calls[call]()
    # Not only the first time.
    with pytest.raises(GuardError, match=words):
        calls[call]()


def doubled(module: nn.Linear, x: Tensor) -> Tensor:
    return 2 * F.linear(x, module.weight)


FOLLOWED: dict[str, Callable[[Model], Any]] = {
    "what nothing reads": lambda model: setattr(model.first, "unused", "something"),
    "a counter": lambda model: setattr(model, "steps", 7),
    "an equal number": lambda model: setattr(model.first, "slope", float("0.1")),
    "eps": lambda model: setattr(model.first.norm, "eps", 0.5),
    "weights written through data": lambda model: model.first.linear.weight.data.mul_(2),
    "new parameter": lambda model: setattr(model.first.linear, "weight", nn.Parameter(torch.ones(6, 6))),
    "assigned weights": lambda model: model.load_state_dict(
        {name: value + 1 for name, value in model.state_dict().items()}, assign=True
    ),
    "module of the same kind": lambda model: swap(model, "first.linear", nn.Linear(6, 6)),
    "called module of another kind": lambda model: swap(model, "first.norm", nn.RMSNorm(6)),
    "whole block": lambda model: swap(model, "second", Block()),
    "parametrization of a called module": lambda model: parametrizations.weight_norm(model.first.linear),
    "hook on a called module": lambda model: model.first.linear.register_forward_hook(lambda *given: 2 * given[2]),
    "forward of a called module": lambda model: setattr(
        model.first.linear, "forward", functools.partial(doubled, model.first.linear)
    ),
    "modules added and not called": lambda model: model.add_module("later", nn.Linear(2, 2)),
    "precision": lambda model: (model.double(), setattr(model.first, "unused", 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_change_that_can_be_followed_is(name: str) -> None:
    torch.manual_seed(1)
    model = Model()
    net = executor(model)
    net.train()
    FOLLOWED[name](model)
    x = X.double() if name == "precision" else X
    assert same(computed(net, x), computed(model, x))


def test_a_class_that_is_patched_is_refused() -> None:
    model = Model()
    net = executor(model)
    Block.calls += 1
    net.train()
    Block.power = 3.0
    try:
        with pytest.raises(GuardError, match=r"Block\.power of 'first' was 1.0 when it was traced and is now 3.0"):
            net.train()
    finally:
        Block.power = 1.0
    net.train()


def test_a_change_that_does_not_matter_is_looked_into_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    net = executor(model)
    traced: list[int] = []
    again = changes.trace_again
    monkeypatch.setattr(changes, "trace_again", lambda *given: traced.append(1) or again(*given))
    net.train()
    model.first.unused = "something"
    for _ in range(3):
        net.train()
        net.eval()
    assert len(traced) == 1
    model.first.unused = "nothing"
    net.train()
    model.first.unused = "something"
    net.train()
    assert len(traced) == 1
    model.first.unused = "something else"
    net.train()
    assert len(traced) == 2


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_what_was_traced_through_are_refused_at_the_next_call(kind: str) -> None:
    model = Model()
    net = executor(model)
    net(X)
    handle = getattr(model.second, f"register_{kind}_hook")(lambda *_: None)
    with pytest.raises(GuardError, match="'second' was given a hook after it was traced through"):
        net(X)
    handle.remove()
    net(X)


def test_a_hook_of_a_module_that_is_never_called_is_left_alone() -> None:
    """Such as the embedding of BART, which lends its weight to those that are called."""

    class Lends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.one.weight = self.shared.weight
            self.shared.register_forward_hook(lambda *_: pytest.fail("nobody calls it"))
            self.one.register_forward_hook(lambda *given: given[2] * 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x).relu())

    model = Lends()
    net = executor(model, at="two")
    assert torch.equal(net.train()(X), copy.deepcopy(model)(X))
    net.enter(Phase(start=1, stop=2, epochs=1))
    torch.testing.assert_close(net(X), model(X))


def test_a_broken_tie_is_refused_where_the_graph_goes_by_the_first_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(6, 6), nn.Linear(6, 6)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.embed(x), self.head.weight)

    model = Tied()
    net = executor(model, at="linear")
    net.train()
    model.head.weight = nn.Parameter(torch.ones(6, 6))
    with pytest.raises(GuardError, match="parameter 'weight' of 'head'"):
        net.train()


# Modes


def test_a_mode_changed_by_hand_is_honoured_where_modules_read_it_themselves() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    net = executor(model, at="3")
    plain = copy.deepcopy(model)
    for each in (net, plain):
        each.train()
    model[1].eval()
    plain[1].eval()
    torch.manual_seed(0)
    ours = net(X)
    torch.manual_seed(0)
    assert torch.equal(ours, plain(X))
    assert torch.equal(model[1].running_mean, torch.zeros(6))
    assert not model[1].training
    for each in (net, plain):
        each.eval()
    model[2].train()
    plain[2].train()
    torch.manual_seed(0)
    ours = net(X)
    torch.manual_seed(0)
    assert torch.equal(ours, plain(X))
    assert not torch.equal(ours, net(X))


@pytest.mark.parametrize("training", [True, False])
def test_a_mode_that_was_burned_in_is_refused_by_name_also_after_train(training: bool) -> None:
    model = Model()
    net = executor(model)
    net.train(training)
    net(X)
    model.second.train(not training)
    was, now = ("training", "evaluation") if training else ("evaluation", "training")
    words = f"the mode of 'second' was '{was}' when it was traced and is now '{now}', which changes .* 'second:dropout'"
    for _ in range(2):
        with pytest.raises(GuardError, match=words):
            net(X)
    model.second.train(training)
    net(X)


def test_the_models_own_train_is_called_and_modes_that_do_not_matter_are_looked_into_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self[1].eval()
            return self

    model = Frozen(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 3))
    net = executor(model, at="3")
    traced: list[int] = []
    again = changes.trace_again
    monkeypatch.setattr(changes, "trace_again", lambda *given: traced.append(1) or again(*given))
    before = model[1].running_mean.clone()
    net.train()(X)
    assert torch.equal(model[1].running_mean, before)
    assert net.training
    assert model[0].training
    assert not model[1].training
    assert not traced
    for _ in range(2):
        net.train()
        model[2].eval()
        net(X)
        net(X)
    assert len(traced) == 1
    model.eval()
    assert not net.training
    net.training = True
    assert model.training


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_follow_their_own_model(copy_of: Callable[[Executor], Executor]) -> None:
    model = Model()
    net = executor(model)
    other = copy_of(net)
    assert same(computed(other), computed(net))
    model.first.slope = 0.5
    other.train()
    assert same(computed(other), computed(copy_of(other)))
    other.second.slope = 0.5
    net.get_submodule("first").slope = 0.1
    net.train()
    with pytest.raises(GuardError, match="'slope' of 'second'"):
        other.train()


class Tabulates(nn.Module):
    """Makes a table at its first call, of the size of what it is given."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if len(self.table) != x.shape[1]:
            self.table = torch.arange(float(x.shape[1]))
        return x + self.table if x.sum() != 0 else x


def test_a_table_that_a_whole_module_makes_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(6, 6), Tabulates(), nn.Linear(6, 3))
    plain = copy.deepcopy(model)
    x = torch.randn(4, 6)
    found = trace(model, (x,))
    assert list(found.opaque) == ["1"]
    net = Executor(found, partition(found, count=2))
    for mode in (True, False, True):
        assert torch.equal(net.train(mode)(x), plain.train(mode)(x))


class CountsItsCalls(nn.Module):
    """Stays one op, since it branches on data; others read its scale and the gain inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.count_of_calls, self.table = 2.0, 0, {"gain": 3.0}
        self.inside = nn.Linear(6, 6)
        self.outside = Scaled()

    def forward(self, x: Tensor) -> Tensor:
        self.count_of_calls += 1
        return self.outside(self.inside(x)) if x.sum() < 1e9 else x


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depth_of_it = 1.5

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def depth_of(module: nn.Module) -> float:
    """Read by a function beside the classes."""
    return module.outside.depth_of_it


class ReadsOthers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.whole = CountsItsCalls()

    def forward(self, x: Tensor) -> Tensor:
        y = self.whole(x) * self.whole.scale * getattr(self.whole, "table")["gain"]  # noqa: B009
        return y * depth_of(self.whole)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda whole: setattr(whole, "scale", 4.0), "'scale' of 'whole'"),
        (lambda whole: whole.table.update(gain=4.0), "gain.* of 'whole'"),
        (lambda whole: setattr(whole.outside, "depth_of_it", 4.0), "'depth_of_it' of 'whole.outside'"),
    ],
)
def test_what_others_read_of_a_module_that_stays_one_op_is_watched(change: Any, name: str) -> None:
    model = ReadsOthers()
    captured = trace(model, (torch.zeros(2, 6),))
    assert list(captured.opaque) == ["whole"]
    net = Executor(captured, partition(captured, count=2))
    x = torch.randn(2, 6)
    for mode in (True, False):
        net.train(mode)(x)
    with unittest.mock.patch.object(
        changes, "trace_again", side_effect=AssertionError("its count is its own business")
    ):
        net.train()
    assert model.whole.count_of_calls == 2
    before = copy.deepcopy(model.whole)
    change(model.whole)
    with pytest.raises(GuardError, match=name):
        net.train()
    model.whole.scale, model.whole.table, model.whole.outside.depth_of_it = before.scale, before.table, 1.5
    net.train()
