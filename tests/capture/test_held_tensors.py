"""Tensors of the model that forward reaches by no attribute: by `parameters()`, a state dict, a list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxsplit.capture.tracing import trace
from fxsplit.errors import TraceError
from tests.exact import Linears, assert_exact, rows


class Pair(nn.Module):
    """A query and a key, as in contrastive learning, and a buffer and a tensor in a list."""

    def __init__(self, step: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.query, self.key, self.step = nn.Linear(6, 6), nn.Linear(6, 6), step
        self.register_buffer("scale", torch.ones(6))
        self.shifts = [torch.ones(6)]

    def forward(self, x: Tensor) -> Any:
        return self.step(self, x)


@torch.no_grad()
def moved(model: Any) -> None:
    for query, key in zip(model.query.parameters(), model.key.parameters(), strict=True):
        key.mul_(0.9).add_(query, alpha=0.1)


@torch.no_grad()
def moved_at_once(model: Any) -> None:
    torch._foreach_lerp_(list(model.key.parameters()), list(model.query.parameters()), 0.1)


def loaded(model: Any) -> None:
    model.key.load_state_dict(model.query.state_dict())


def scaled(model: Any) -> None:
    for buffer in model.buffers():
        buffer.mul_(0.9)


def shifted(model: Any) -> None:
    model.shifts[0].mul_(0.9)


@pytest.mark.parametrize("change", [moved, moved_at_once, loaded, scaled, shifted])
@pytest.mark.parametrize("inside", [False, True])
def test_what_forward_writes_into_them_is_recorded(change: Callable[[Any], None], inside: bool) -> None:
    def step(model: Any, x: Tensor) -> Tensor:
        change(model)
        return model.query(x) * model.scale + model.key(x).detach() + model.shifts[0]

    model = Pair(step)
    assert not assert_exact(nn.Sequential(nn.Linear(6, 6), model) if inside else model, rows()).opaque


def test_a_method_that_replaces_their_data_is_one_op() -> None:
    class Momentum(Pair):
        @torch.no_grad()
        def moves(self) -> None:
            for query, key in zip(self.query.parameters(), self.key.parameters(), strict=True):
                key.data = key.data * 0.9 + query.data * 0.1

    def step(model: Any, x: Tensor) -> Tensor:
        model.moves()
        return model.query(x) + model.key(x).detach()

    found = assert_exact(Momentum(step), rows())
    assert "moves" in found.opaque
    with pytest.raises(TraceError, match="sets 'data' of a tensor of the model"):
        trace(Pair(lambda model, x: [setattr(each, "data", each.data) for each in model.parameters()] or x), (rows(),))


def test_what_is_computed_from_them_has_gradients() -> None:
    def step(model: Any, x: Tensor) -> Tensor:
        return model.query(x).sum() + sum(each.square().sum() for each in model.parameters())

    assert_exact(Pair(step), rows())


def test_a_module_called_with_other_weights_stays_one_op_with_what_is_around_it() -> None:
    def step(model: Any, x: Tensor) -> Any:
        weights = {name: 2 * each for name, each in model.key.named_parameters()}
        return torch.func.functional_call(model.query, weights, (x,))

    assert list(assert_exact(nn.Sequential(nn.Linear(6, 6), Pair(step)), rows()).opaque) == ["1"]
    with pytest.raises(TraceError, match=r"with another value as its 'query\.weight'"):
        trace(Pair(step), (rows(),))


QUESTIONS: dict[str, Callable[[Any, Tensor], float]] = {
    "set": lambda _, x: 2.0 if x.shape[1] in {6, 12} else 1.0,
    "dict": lambda _, x: {6: 2.0}.get(x.shape[1], 1.0),
    "dtype": lambda _, x: {torch.float32: 2.0}.get(x.dtype, 1.0),
    "sizes": lambda _, x: {(4, 6): 2.0}.get(tuple(x.shape), 1.0),
    "attribute": lambda model, x: getattr(model, f"factor{x.shape[1]}", 1.0),
    "text": lambda _, x: 2.0 if str(x.shape[1]) == "6" else 1.0,
    "format": lambda _, x: 2.0 if f"{x.shape[1]:>3}" == "  6" else 1.0,
    "device": lambda _, x: 2.0 if str(x.device) == "cpu" else 1.0,
    "type": lambda _, x: 2.0 if x.type() == "torch.FloatTensor" else 1.0,
}
UNSEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "dtype": lambda x: x * 2.0 if x.dtype is torch.float32 else x + 1.0,
    "layout": lambda x: x * 2.0 if x.layout is torch.strided else x + 1.0,
    "type": lambda x: x * 2.0 if type(x) is Tensor else x + 1.0,
    "types": lambda x: x * 2.0 if type(x) in (Tensor, nn.Parameter) else x + 1.0,
    "same": lambda x: x * 2.0 if x.float() is x else x + 1.0,
}


class Asks(Linears):
    factor6 = 2.0

    def __init__(self, question: Callable[[Any, Tensor], float]) -> None:
        super().__init__()
        self.question = question

    def forward(self, x: Any) -> Any:
        return super().forward(x * self.question(self, x))


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
def test_numbers_names_and_types_can_be_looked_up(question: Callable[[Any, Tensor], float]) -> None:
    assert question(Asks(question), rows()) == 2.0
    assert not assert_exact(Asks(question), rows()).opaque


@pytest.mark.parametrize("ask", UNSEEN.values(), ids=UNSEEN)
def test_a_forward_that_compares_identities_stays_one_op(ask: Callable[[Tensor], Tensor]) -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ask(x)

    found = assert_exact(nn.Sequential(nn.Linear(6, 6), Inner(), nn.Linear(6, 6)), rows())
    assert "compares identities or types" in found.opaque["1"]
