"""Modules that stay one op leave something in themselves, and traced code reads it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsplit
from fxsplit.errors import TraceError
from tests.exact import assert_exact, executor_of, rows


class Router(nn.Module):
    """Stays one op, since it branches on data; keeps an auxiliary loss, as a mixture of experts does."""

    def __init__(self, before: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.losses: list[Tensor] = []
        self.calls = 0
        if before is not MISSING:
            self.loss = before

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e6:
            x = x + 1
        self.loss = self.linear(x).square().mean()
        self.losses.clear()
        self.losses.append(self.loss)
        self.calls += 1
        return x + self.linear(x)


MISSING = object()
BEFORE = {"number": 0.0, "none": None, "tensor": torch.zeros(()), "nothing": MISSING}


class Block(nn.Module):
    def __init__(self, before: Any, read: str) -> None:
        super().__init__()
        self.router, self.read = Router(before), read

    def forward(self, x: Tensor) -> Tensor:
        x = self.router(x)
        return x + {"loss": lambda: self.router.loss, "losses": lambda: sum(self.router.losses)}[self.read]()


class ReadsBefore(nn.Module):
    """Reads what the call before left."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.router(x * self.router.calls)


def around(block: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), block, nn.Linear(6, 6))


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
@pytest.mark.parametrize("read", ["loss", "losses"])
def test_a_module_that_reads_it_stays_one_op(before: Any, read: str) -> None:
    found = assert_exact(around(Block(before, read)), rows(), count=3)
    assert [op.name for op in found.train.ops] == ["0", "1", "2"]


def test_a_module_that_reads_what_the_last_call_left_stays_one_op() -> None:
    trace = fxsplit.trace(around(ReadsBefore()), (rows(),))
    assert "1" in trace.opaque
    assert "1.router" not in trace.opaque


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
@pytest.mark.parametrize("read", ["loss", "losses"])
def test_a_model_that_reads_it_itself_is_refused(before: Any, read: str) -> None:
    model = Block(before, read)
    with pytest.raises(TraceError, match="that is one op"):
        fxsplit.trace(model, (rows(),))
    assert vars(model.router).get("loss", MISSING) is before
    assert not model.router.losses
    assert not model.router.calls


def test_a_router_that_nobody_reads_stays_one_op_among_others() -> None:
    trace = fxsplit.trace(around(nn.Sequential(nn.Linear(6, 6), Router(0.0))), (rows(),))
    assert [op.name for op in trace.train.ops] == ["0", "1.0", "1.1", "2"]


class PassesOn(nn.Module):
    """Gives what its router left to whoever called it, and does nothing with it."""

    def __init__(self, before: Any) -> None:
        super().__init__()
        self.router = Router(before)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        return self.router(x), self.router.loss


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
@pytest.mark.parametrize("use", [lambda loss: loss, lambda loss: 2.0 * loss], ids=["passed on", "used"])
def test_a_module_that_passes_it_on_stays_one_op(before: Any, use: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = PassesOn(before), PassesOn(before)

        def forward(self, x: Tensor) -> Any:
            x, loss = self.first(x)
            x, other = self.last(x)
            return x, use(loss), use(other)

    assert set(assert_exact(Model(), rows()).opaque) == {"first", "last"}


def test_what_is_set_once_is_no_hindrance() -> None:
    class SetOnce(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "ready"):
                self.ready = True
            return 2 * x

    assert_exact(around(SetOnce()), rows())


def test_a_module_that_takes_gradients_itself_stays_one_op() -> None:
    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                given = x if x.requires_grad else x.detach().requires_grad_()
                energy = self.linear(given).square().sum()
                (gradient,) = torch.autograd.grad(energy, given, create_graph=True)
            return x - gradient

    assert list(assert_exact(around(Energy()), rows()).opaque) == ["1"]


def test_a_write_of_a_module_that_is_one_op_is_seen() -> None:
    class Adds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.abs().sum() < 1e6:
                x.add_(1)
            return x

    found = assert_exact(nn.Sequential(nn.Linear(6, 6), Adds(), nn.Linear(6, 6)), rows())
    assert found.train.ops[1].mutates == ("0",)


def test_a_mode_set_by_hand_before_tracing_is_that_of_the_trace() -> None:
    class Doubles(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x if self.training else x

    model = around(Doubles())
    model[1].eval()
    net = executor_of(fxsplit.trace(model, (rows(),)))
    assert torch.equal(net(rows()), model(rows()))


def test_a_model_with_a_call_of_its_own_is_refused() -> None:
    class Calls(nn.Linear):
        def __call__(self, x: Tensor) -> Any:
            return 2 * super().__call__(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def __call__(self, x: Tensor) -> Any:
            return 2 * super().__call__(x)

        def forward(self, x: Tensor) -> Any:
            return self.linear(x)

    with pytest.raises(TraceError, match="a __call__ of its own"):
        fxsplit.trace(Model(), (rows(),))
    assert_exact(nn.Sequential(nn.Linear(6, 6), Calls(6, 6)), rows())
