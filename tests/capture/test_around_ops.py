"""What forward does around its ops is seen: the module that does it stays one op, the model itself is refused."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from fxsplit.capture.tracing import trace
from fxsplit.errors import TraceError
from tests.exact import Linears, With, assert_exact, executor_of, rows


class Inner(nn.Module):
    """A linear layer, BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)


class PutsIntoEvaluation(Inner):
    def forward(self, x: Any) -> Any:
        training = self.norm.training
        self.norm.eval()
        y = self.norm(self.one(x))
        self.norm.train(training)
        return y


class Freezes(Inner):
    def forward(self, x: Any) -> Any:
        self.one.requires_grad_(False)
        y = self.one(x)
        self.one.requires_grad_(True)
        return self.norm(y)


class HooksATensor(Inner):
    def forward(self, x: Any) -> Any:
        y = self.one(x)
        if self.training:
            y.register_hook(lambda gradient: gradient * 3)
        return y


class ForksTheGenerator(Inner):
    def forward(self, x: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            noise = torch.rand(4, 6)
        return self.one(x) + noise


class Shuffles(Inner):
    def forward(self, x: Any) -> Any:
        order = list(range(6))
        random.shuffle(order)
        return self.one(x)[:, order]


MODULES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "mode": (PutsIntoEvaluation, "calls train\\(\\) of a module"),
    "requires_grad": (Freezes, "calls requires_grad_\\(\\) of a module"),
    "hook": (HooksATensor, "calls register_hook\\(\\) of a tensor"),
    "fork_rng": (ForksTheGenerator, "calls fork_rng"),
    "shuffle": (Shuffles, "calls shuffle"),
}


@pytest.mark.parametrize("name", MODULES)
def test_the_module_stays_whole_and_the_model_is_refused(name: str) -> None:
    make, reason = MODULES[name]
    torch.manual_seed(0)
    found = assert_exact(With(make()), rows())
    assert list(found.opaque) == ["inner"]
    with pytest.raises(TraceError, match=reason):
        trace(make(), (rows(),))


class Iterates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count(1)

    def forward(self, x: Any) -> Any:
        return x * next(self.numbers)


class Queues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last: deque[int] = deque([1], maxlen=2)

    def forward(self, x: Any) -> Any:
        self.last.append(self.last[-1] + 1)
        return x * self.last[0]


@pytest.mark.parametrize("make", [Iterates, Queues])
def test_iterators_and_queues_go_on_from_call_to_call(make: Callable[[], nn.Module]) -> None:
    model, plain = With(make()), With(make())
    found = trace(model, (rows(),))
    assert list(found.opaque) == ["inner"]
    net = executor_of(found)
    for _ in range(3):
        assert torch.equal(net(rows()), plain(rows()))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:`torch.jit")
def test_scripted_modules_keep_their_mode() -> None:
    model = With(torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))))
    before = [module.training for module in model.modules()]
    net = executor_of(trace(model, (rows(),)))
    assert [module.training for module in model.modules()] == before
    plain = [net.train()(rows()), model.train()(rows())]
    assert torch.equal(*plain)


@pytest.mark.parametrize("name", ["_model", "_signature", "_stages", "_phase", "_freezing"])
def test_a_submodule_may_have_a_name_of_the_executors(name: str) -> None:
    class Model(Linears):
        def forward(self, x: Any) -> Any:
            return super().forward(self.get_submodule(name)(x))

    model = Model()
    model.add_module(name, nn.Linear(6, 6))
    net = executor_of(trace(model, (rows(),)))
    assert torch.equal(net(rows()), model(rows()))


class Summing(nn.Module):
    """Stays one op, since it branches on data."""

    def forward(self, x: torch.Tensor, numbers: Iterable[int]) -> torch.Tensor:
        return x * sum(numbers) if x.sum() < 1e6 else x


@pytest.mark.parametrize(
    "make",
    [lambda: map(int, "123"), lambda: iter([1, 2]), lambda: (i for i in (1, 2))],
    ids=["map", "list", "generator"],
)
def test_an_iterator_that_a_later_call_would_find_used_up_is_refused(make: Callable[[], Iterable[int]]) -> None:
    class HandsOver(Linears):
        def __init__(self) -> None:
            super().__init__()
            self.summing = Summing()

        def forward(self, x: Any) -> Any:
            return self.summing(self.a(x), make())

    with pytest.raises(TraceError, match="hands over an iterator"):
        trace(HandsOver(), (rows(),))
