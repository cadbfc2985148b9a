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
    "data": (
        norm,
        lambda held: held[0].weight.sum(),
        lambda held: setattr(held[0].weight, "data", torch.full((6,), 3.0)),
        r"held\[0\].weight.data' of the model was at 0x",
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


def test_a_module_in_a_list_is_read_anew_where_it_is_written_in_place() -> None:
    model = Reads(norm(), lambda held: held[0].weight)
    net = executor_of(fxsplit.trace(model, (rows(),)))
    with torch.no_grad():
        model.held[0].weight.mul_(3)
    net.train()
    assert torch.equal(net(rows()), model(rows()))


def test_a_module_that_refers_to_the_model_changes_nothing() -> None:
    model = Reads(types.SimpleNamespace(model=None), lambda held: 1.0 if held.model is None else 2.0)
    model.held.model = model
    net = executor_of(fxsplit.trace(model, (rows(),)))
    model.a.weight.data = torch.ones(6, 6)
    net.train()
    assert torch.equal(net(rows()), model(rows()))
