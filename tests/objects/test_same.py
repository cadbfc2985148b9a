"""Values and graphs are the same only if nothing in them differs."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

from fxsplit.capture.recording import same_nodes
from fxsplit.objects.same import same_value


@dataclass
class Point:
    x: float
    y: Any


@dataclass(frozen=True, slots=True)
class Slotted:
    x: Any


class Plain:
    def __init__(self, value: Any) -> None:
        self.value = value


class Own(dict[str, Any]):
    pass


DIFFERENT = {
    "number": (1, 2),
    "type of a number": (1, 1.0),
    "flag and number": (True, 1),
    "string": ("a", "b"),
    "dtype": (torch.float32, torch.float64),
    "tensor, one bit": (torch.ones(2000), torch.cat([torch.ones(1000), torch.tensor([1 + 2e-7]), torch.ones(999)])),
    "tensor, sign of zero": (torch.zeros(2), -torch.zeros(2)),
    "tensor, dtype": (torch.ones(2), torch.ones(2, dtype=torch.float64)),
    "tensor, shape": (torch.ones(2, 3), torch.ones(3, 2)),
    "sparse tensor": (torch.eye(3).to_sparse(), torch.ones(3, 3).to_sparse()),
    "array": (np.zeros(2000), np.array([0.0] * 1999 + [1.0])),
    "list": ([1, [2, 3]], [1, [2, 4]]),
    "length": ([1], [1, 2]),
    "kind of container": ([1], (1,)),
    "key": ({"a": 1}, {"b": 1}),
    "order of keys": ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    "own dict": (Own(a=torch.ones(2)), Own(a=torch.zeros(2))),
    "own dict and dict": (Own(a=1), {"a": 1}),
    "ordered dict": (OrderedDict(a=1), OrderedDict(a=2)),
    "user dict": (UserDict({"a": 1}), UserDict({"a": 2})),
    "dataclass": (Point(1.0, [torch.ones(2)]), Point(1.0, [torch.zeros(2)])),
    "slotted dataclass": (Slotted([1]), Slotted([2])),
    "attribute": (Plain(Plain(1)), Plain(Plain(2))),
    "set": ({1, 2}, {1, 3}),
    "slice": (slice(0, 2), slice(0, 3)),
    "module": (nn.Linear(2, 2), nn.Linear(2, 2)),
    "function": (lambda: 1, lambda: 1),
    "generator": ((each for each in [1]), (each for each in [1])),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_whatever_differs_is_different(name: str) -> None:
    one, other = DIFFERENT[name]
    assert not same_value(one, other)
    assert not same_value([0, {"in": one}], [0, {"in": other}])
    assert same_value([one, {"in": one}], [one, {"in": one}])


@pytest.mark.parametrize("name", [name for name in DIFFERENT if name not in ("module", "function", "generator")])
def test_copies_are_the_same(name: str) -> None:
    for value in DIFFERENT[name]:
        assert same_value(copy.deepcopy(value), value)


def test_not_a_number_is_the_same_as_itself_and_cycles_end() -> None:
    nan = torch.tensor([float("nan")])
    assert same_value([float("nan"), nan], [float("nan"), nan.clone()])
    first: list[Any] = [1]
    second: list[Any] = [1]
    first.append(first)
    second.append(second)
    assert same_value(first, second)


def _graph(factor: Any, *, method: str = "relu", swap: bool = False) -> fx.Graph:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    scaled = graph.call_function(torch.mul, (x, factor))
    made = graph.call_method(method, (scaled,))
    graph.output([(y, made) if swap else (made, y)])
    return graph


def _same(one: fx.Graph, other: fx.Graph) -> bool:
    return same_nodes(list(one.nodes), list(other.nodes))


def test_graphs_differ_in_constants_targets_and_order() -> None:
    assert _same(_graph(2.0), _graph(2.0))
    others = [_graph(1.5), _graph(torch.tensor(2.0)), _graph(2.0, method="tanh"), _graph(2.0, swap=True)]
    assert not any(_same(_graph(2.0), other) for other in others)
    longer = _graph(2.0)
    longer.call_function(torch.rand, (2,))
    assert not _same(_graph(2.0), longer)
    inside = _graph(2.0)
    next(node for node in inside.nodes if node.op == "call_method").meta["contexts"] = ("no_grad",)
    assert not _same(_graph(2.0), inside)
