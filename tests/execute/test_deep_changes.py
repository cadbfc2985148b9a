"""What lies deep in a model's attributes, or in globals that its code names, and is changed after it was traced."""

from __future__ import annotations

import collections
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxsplit
from fxsplit.errors import GuardError
from tests.exact import executor_of, rows


@dataclass(slots=True)
class Slotted:
    scale: float = 1.0


class Reads(nn.Module):
    """Multiplies by what `read` finds in the module."""

    def __init__(self, held: Any, read: Callable[[Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.held, self.read = nn.Linear(6, 6), nn.Linear(6, 6), held, read

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) * self.read(self.held)


def norm() -> list[nn.Module]:
    return [nn.BatchNorm1d(6)]


REFUSED: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any], str]] = {
    "slots": (Slotted, lambda held: held.scale, lambda held: setattr(held, "scale", 3.0), "held.scale"),
    "array": (
        lambda: np.ones(2),
        lambda held: float(held[0]),
        lambda held: held.__setitem__(0, 3.0),
        "'held' of the model was another ndarray",
    ),
    "deque": (
        lambda: collections.deque([1.0, 3.0]),
        lambda held: held[0],
        lambda held: held.rotate(),
        r"held\[0\]' of the model was 1.0",
    ),
    "deep": (
        lambda: {"a": {"b": {"c": {"d": 1.0}}}},
        lambda held: held["a"]["b"]["c"]["d"],
        lambda held: held["a"]["b"]["c"].update(d=3.0),
        r"held\['a'\]\['b'\]\['c'\]\['d'\]",
    ),
    "long": (
        lambda: [1.0] * 500,
        lambda held: held[400],
        lambda held: held.__setitem__(400, 3.0),
        r"held\[400\]",
    ),
    "mode": (
        lambda: [nn.Dropout()],
        lambda held: 2.0 if held[0].training else 1.0,
        lambda held: held[0].eval(),
        r"held\[0\].training' of the model was True",
    ),
    "parameter": (
        norm,
        lambda held: held[0].weight,
        lambda held: setattr(held[0], "weight", nn.Parameter(torch.full((6,), 3.0))),
        r"held\[0\].weight",
    ),
    "state dict": (
        norm,
        lambda held: held[0].weight,
        lambda held: held[0].load_state_dict({**held[0].state_dict(), "weight": torch.rand(6)}, assign=True),
        r"held\[0\].weight",
    ),
}


@pytest.mark.parametrize(("make", "read", "change", "words"), REFUSED.values(), ids=REFUSED)
def test_a_change_deep_in_an_attribute_is_refused_by_name(
    make: Callable[[], Any], read: Callable[[Any], Any], change: Callable[[Any], Any], words: str
) -> None:
    model = Reads(make(), read)
    net = executor_of(fxsplit.trace(model, (rows(),)))
    net.eval()
    net.train()
    change(model.held)
    with pytest.raises(GuardError, match=words):
        net.train()


@torch.no_grad()
def tripled(weight: Tensor) -> None:
    weight.mul_(3)


def swapped(weight: Tensor) -> None:
    weight.data = torch.full((6,), 3.0)


@pytest.mark.parametrize(
    "read", [lambda held: held[0].weight, lambda held: held[0].weight.sum()], ids=["itself", "sum"]
)
@pytest.mark.parametrize("change", [tripled, swapped])
def test_a_module_in_a_list_is_read_anew(read: Callable[[Any], Any], change: Callable[[Tensor], None]) -> None:
    model = Reads(norm(), read)
    net = executor_of(fxsplit.trace(model, (rows(),)))
    before = net(rows())
    change(model.held[0].weight)
    net.train()
    assert torch.equal(net(rows()), model(rows()))
    assert not torch.equal(net(rows()), before)


def test_a_module_that_refers_to_the_model_changes_nothing() -> None:
    model = Reads(types.SimpleNamespace(model=None), lambda held: 1.0 if held.model is None else 2.0)
    model.held.model = model
    net = executor_of(fxsplit.trace(model, (rows(),)))
    model.a.weight.data = torch.ones(6, 6)
    net.train()
    assert torch.equal(net(rows()), model(rows()))


SCALE = 1.0
OPTIONS = {"scale": {"inner": 1.0}}
ARGUMENTS = types.SimpleNamespace(scale=1.0)
TENSOR = torch.ones(6)
TABLES: dict[int, Tensor] = {}
UNUSED = 1.0


class Settings:
    scale = 1.0


SLOTTED = Slotted()


def closure() -> tuple[Callable[[], float], Callable[[float], None]]:
    scale = 1.0

    def get() -> float:
        return scale

    def put(value: float) -> None:
        nonlocal scale
        scale = value

    return get, put


GET, PUT = closure()


def table(size: int) -> Tensor:
    if size not in TABLES:
        TABLES[size] = torch.ones(size).cumsum(0)
    return TABLES[size]


GLOBALS: dict[str, tuple[Callable[[Any], Any], str, Any, str]] = {
    "number": (lambda _: SCALE, "globals()['SCALE'] = value", 1.0, "the global 'SCALE' .* was 1.0 .* now 3.0"),
    "dict": (lambda _: OPTIONS["scale"]["inner"], "OPTIONS['scale']['inner'] = value", 1.0, "the global 'OPTIONS'"),
    "namespace": (lambda _: ARGUMENTS.scale, "ARGUMENTS.scale = value", 1.0, "the global 'ARGUMENTS'.scale"),
    "object": (lambda _: SLOTTED.scale, "SLOTTED.scale = value", 1.0, "the global 'SLOTTED'.scale"),
    "class": (lambda _: Settings.scale, "Settings.scale = value", 1.0, "'scale' of the class Settings"),
    "closure": (lambda _: GET(), "PUT(value)", 1.0, "the variable 'scale' of get"),
    "tensor": (lambda _: TENSOR, "globals()['TENSOR'] = value * torch.ones(6)", 1.0, "the global 'TENSOR'"),
}


@pytest.mark.parametrize(("read", "change", "before", "words"), GLOBALS.values(), ids=GLOBALS)
def test_a_change_of_a_global_that_the_code_names_is_refused_by_name(
    read: Callable[[Any], Any], change: str, before: Any, words: str
) -> None:
    model = Reads(None, read)
    net = executor_of(fxsplit.trace(model, (rows(),)))
    net.train()
    try:
        exec(change, globals(), {"value": 3.0})
        with pytest.raises(GuardError, match=words):
            net.train()
    finally:
        exec(change, globals(), {"value": before})
    if "TENSOR" not in change:
        net.train()
        assert torch.equal(net(rows()), model(rows()))


def test_a_change_of_a_global_that_the_code_does_not_name_is_no_concern(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Reads(None, lambda _: SCALE)
    found = fxsplit.trace(model, (rows(),))
    monkeypatch.setitem(globals(), "UNUSED", 2.0)
    assert not found.snapshot.differences(model)


def test_the_table_of_a_function_that_is_one_op_changes_nothing() -> None:
    TABLES.clear()
    model = Reads(None, lambda _: table(6))
    found = fxsplit.trace(model, (rows(),))
    net = executor_of(found)
    net(rows())
    assert TABLES
    assert not found.snapshot.differences(model)
    model.a.extra = 1
    net.train()
    assert torch.equal(net(rows()), model(rows()))
    TABLES.clear()
