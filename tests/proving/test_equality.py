"""Equality by structure and bits: what is alike, and what only looks so."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from fxsplit.proving.equality import differences, leaves

BIG = torch.zeros(2000, 6)
OTHER_BIG = BIG.clone()
OTHER_BIG[5:-5] += 1  # between the rows that repr shows


@dataclass
class Record:
    x: Any
    y: Any = 1


@dataclass
class OtherRecord(Record):
    pass


class Pair(NamedTuple):
    x: Any
    y: Any


class AlwaysEqual:
    def __init__(self, x: Any) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "the same"


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x: Any) -> None:
        self.x = x


class Inputs(dict[str, Any]):
    pass


class Own(Tensor):
    pass


def ones(value: float = 1.0) -> Tensor:
    return torch.full((2, 3), value)


UNEQUAL: dict[str, tuple[Any, Any]] = {
    "one number": (ones(), ones() + torch.eye(2, 3) * 1e-7),
    "sign of zero": (ones(0.0), ones(-0.0)),
    "type of numbers": (ones(), ones().double()),
    "shape": (ones(), ones().T),
    "what repr leaves out": (BIG, OTHER_BIG),
    "tape": (ones(), ones().requires_grad_()),
    "class of tensor": (ones(), ones().as_subclass(Own)),
    "parameter": (ones(), nn.Parameter(ones(), requires_grad=False)),
    "nothing": (None, ones()),
    "missing": ((ones(),), (ones(), None)),
    "tuple and list": ((ones(),), [ones()]),
    "named tuple": ((1, 2), Pair(1, 2)),
    "dict and its own class": ({"x": 1}, Inputs(x=1)),
    "own class of dict": (Inputs(x=1), Inputs(x=2)),
    "order of keys": ({"x": 1, "y": 2}, {"y": 2, "x": 1}),
    "key": ({"x": 1}, {"y": 1}),
    "tensor in UserDict": (UserDict(x=BIG), UserDict(x=OTHER_BIG)),
    "ordered dict": (OrderedDict(x=1), {"x": 1}),
    "class of record": (Record(1), OtherRecord(1)),
    "field of record": (Record(ones()), Record(ones(2.0))),
    "attribute that == denies": (AlwaysEqual(1), AlwaysEqual(2)),
    "slot": (Slotted(ones()), Slotted(ones(2.0))),
    "number and flag": (1, True),
    "number and float": (1, 1.0),
    "negative zero": (0.0, -0.0),
    "set": ({1, 2}, {1, 3}),
    "array": (np.zeros(3), np.zeros(3, dtype=np.float32)),
    "item of array": (np.zeros(3), np.eye(3)[0]),
    "sparse": (ones().to_sparse(), ones(2.0).to_sparse()),
    "packed": (pack_sequence([ones()]), pack_sequence([ones(2.0)])),
    "type": (int, float),
    "string": ("a", "b"),
    "slice": (slice(0, 1), slice(0, 2)),
}
EQUAL: dict[str, tuple[Any, Any]] = {
    "not-a-number": (ones(torch.nan), ones(torch.nan)),
    "float not-a-number": (float("nan"), float("nan")),
    "strides": (ones().T, ones().T.contiguous()),
    "record": (Record(ones()), Record(ones())),
    "own class of dict": (Inputs(x=ones()), Inputs(x=ones())),
    "set": ({2, 1}, {1, 2}),
    "complex": (ones().to(torch.complex64).conj(), ones().to(torch.complex64).conj().resolve_conj()),
    "packed": (pack_sequence([ones()]), pack_sequence([ones()])),
    "sparse": (ones().to_sparse(), ones().to_sparse()),
    "slice": (slice(0, 1), slice(0, 1)),
    "generator": (torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)),
    "empty": (torch.empty(0, 3), torch.empty(0, 3)),
}


@pytest.mark.parametrize("name", UNEQUAL)
def test_what_is_not_equal(name: str) -> None:
    one, other = UNEQUAL[name]
    for pair in ((one, other), (other, one), ({"in": [one]}, {"in": [other]})):
        expected, found = (leaves(each, "value") for each in pair)
        assert differences(expected, found)
        assert not differences(expected, expected)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_sparse_rows() -> None:
    expected, same, found = (leaves(ones(value).to_sparse_csr(), "value") for value in (1, 1, 2))
    assert [each.name for each in differences(expected, found)] == ["value.values"]
    assert not differences(expected, same)


@pytest.mark.parametrize("name", EQUAL)
def test_what_is_equal(name: str) -> None:
    expected, found = (leaves(each, "value") for each in EQUAL[name])
    assert expected
    assert not differences(expected, found)


def test_differences_are_named_and_sized() -> None:
    one = {"logits": ones(), "states": [ones(), ones()], "n": 1}
    other = {"logits": ones(), "states": [ones(), ones(1.5)], "n": 2}
    found = differences(leaves(one, "output"), leaves(other, "output"))
    assert [str(each) for each in found] == [
        "output['states'][1] (by 0.5 at most)",
        "output['n'] (another value)",
    ]
    assert [each.size for each in found] == [0.5, float("inf")]


def test_leaves_are_of_the_moment() -> None:
    value = ones()
    before = leaves(value, "value")
    value += 1
    assert differences(before, leaves(value, "value"))


def test_what_holds_itself_ends() -> None:
    ring: list[Any] = [ones()]
    ring.append(ring)
    assert leaves(ring, "ring")["ring[1]"].value == "the same as ring"


def test_classes_made_by_a_function_are_the_same_class() -> None:
    def make() -> Any:
        class Local:
            x = 1

        return Local()

    assert not differences(leaves(make(), "value"), leaves(make(), "value"))
