"""What a module holds besides tensors is compared, put back, and never burned into a graph."""

from __future__ import annotations

import array
import collections
import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxsplit
from fxsplit.errors import TraceError
from fxsplit.objects.contents import Contents
from fxsplit.objects.same import same_value
from tests.exact import executor_of, rows


class Slotted:
    __slots__ = ("calls", "unset")

    def __init__(self) -> None:
        self.calls = 0


class Mixed(Slotted):
    """Has slots and a `__dict__`, and can be called."""

    def __init__(self) -> None:
        super().__init__()
        self.more = 0

    def __call__(self) -> int:
        self.more += 1
        self.calls += 1
        return self.more


@dataclass(slots=True)
class SlottedData:
    calls: int = 0


class Reading(collections.OrderedDict[str, int]):
    """Can only be read by those who know how, as the activations of transformers."""

    def __getitem__(self, key: str) -> int:
        raise RuntimeError("not so")


def count_item(held: Any) -> Any:
    held[0] += 1
    return held[0]


def count_slot(held: Any) -> Any:
    held.calls += 1
    return held.calls


def count_key(held: Any) -> Any:
    held["calls"] = dict.get(held, "calls", 0) + 1
    return dict.get(held, "calls")


def count_in_chain(held: Any) -> Any:
    held["calls"] = held.get("calls", 0) + 1
    return held["calls"]


COUNTERS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "numpy": (lambda: np.zeros(3), count_item),
    "bytearray": (lambda: bytearray(1), count_item),
    "array": (lambda: array.array("i", [0]), count_item),
    "slots": (Slotted, count_slot),
    "slots of a dataclass": (SlottedData, count_slot),
    "slots and more": (Mixed, lambda held: held()),
    "Counter": (collections.Counter, count_key),
    "OrderedDict": (collections.OrderedDict, count_key),
    "own dict": (Reading, count_key),
    "ChainMap": (lambda: collections.ChainMap({}), count_in_chain),
    "deque": (lambda: collections.deque([0]), count_item),
    "nested": (lambda: [{"held": np.zeros(1)}], lambda held: count_item(held[0]["held"])),
}
ITERATORS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "cycle": (lambda: itertools.cycle([1, 2, 3]), next),
    "count": (lambda: itertools.count(1), next),
    "chain": (lambda: itertools.chain([1, 2], [3] * 100), next),
    "zip": (lambda: zip(range(1, 100), range(100), strict=False), lambda held: next(held)[0]),
}


class Counting(nn.Module):
    def __init__(self, held: Any, count: Callable[[Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.held, self.count = nn.Linear(6, 6), held, count

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) / float(self.count(self.held))


@pytest.mark.parametrize(("make", "count"), COUNTERS.values(), ids=COUNTERS)
def test_contents_are_compared_and_put_back(make: Callable[[], Any], count: Callable[[Any], Any]) -> None:
    model = Counting(make(), count)
    before, contents = copy.deepcopy(model.held), Contents(model)
    assert not contents.changed()
    first = count(model.held)
    assert contents.changed() == {"": "held"}
    contents.restore()
    assert not contents.changed()
    assert same_value(model.held, before)
    assert count(model.held) == first


@pytest.mark.parametrize(("make", "count"), (COUNTERS | ITERATORS).values(), ids=COUNTERS | ITERATORS)
def test_a_counter_keeps_its_module_one_op_and_counts_on(make: Callable[[], Any], count: Callable[[Any], Any]) -> None:
    def around() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 6), Counting(make(), count), nn.Linear(6, 6))

    plain, model = around(), around()
    found = fxsplit.trace(model, (rows(),))
    assert [op.name for op in found.train.ops] == ["0", "1", "2"]
    assert same_value(model[1].held, make())
    net = executor_of(found)
    for _ in range(3):
        assert torch.equal(net(rows()), plain(rows()))
    with pytest.raises(TraceError, match="'held'"):
        fxsplit.trace(Counting(make(), count), (rows(),))


def test_slots_that_were_not_set_are_empty_again() -> None:
    model = Counting(Slotted(), count_slot)
    contents = Contents(model)
    model.held.unset = 1
    assert contents.changed() == {"": "held"}
    contents.restore()
    assert not hasattr(model.held, "unset")
