"""The rest of a model's own forward is one op from the first statement on that goes another way each time."""

from __future__ import annotations

import copy
import functools
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxsplit
from fxsplit.capture.tracing import trace
from fxsplit.errors import TraceError
from fxsplit.objects.same import same_value
from tests.exact import Linears, assert_exact, executor_of, left_behind, rows


class Drawn(Linears):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.training and np.random.rand() < 0.5:
            return self.c(h)
        return self.c(self.b(h))


class Dropped(Linears):
    """Leaves layers out at random, as LayerDrop does."""

    def forward(self, x: Tensor, *, rate: float = 0.5) -> dict[str, Any]:
        h, used = self.a(x), 0
        for layer in [self.b, nn.functional.relu, self.b]:
            if self.training and random.random() < rate:
                continue
            used += 1
            h = layer(h)
        return {"logits": self.c(h), "used": used}


class OnData(Linears):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        text = """Lines of a text
stay what they are"""
        while h.abs().max() > 0.1:
            h = h / 2
        assert text.splitlines()[1] == "stay what they are"
        return self.c(h)


def closing_over(scale: float) -> nn.Module:
    class Closing(Linears):
        def twice(self, h: Tensor) -> Tensor:
            return 2 * h

        def forward(self, x: Tensor, offset: float = 1.0) -> tuple[Tensor, ...]:
            h = scale * self.a(x) + offset
            if bool(h.sum() > 0):
                return tuple(scale * super(Closing, self).forward(x) + offset for _ in range(2))
            return (self.c(self.twice(h)), *(self.c(h) + offset for _ in range(1)))

    return Closing()


class Inherited(Linears):
    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        if x.sum() > 0:
            return super().forward(x)
        return super().forward(-x)


@pytest.mark.parametrize(
    "make",
    [Drawn, Dropped, OnData, functools.partial(closing_over, 0.5), functools.partial(closing_over, -9.0), Inherited],
)
def test_the_rest_does_what_the_forward_does(make: Callable[[], nn.Module]) -> None:
    found = assert_exact(make(), rows())
    assert [key for key in found.opaque if key.startswith("forward from line ")]
    assert_exact(make(), rows(), count=len(found.train))


def test_each_call_draws_anew() -> None:
    model = Drawn()
    plain = copy.deepcopy(model)
    net = executor_of(trace(model, (rows(),)))
    np.random.seed(5)
    ours = [net(rows(3)) for _ in range(20)]
    np.random.seed(5)
    theirs = [plain(rows(3)) for _ in range(20)]
    assert all(map(torch.equal, ours, theirs))
    assert len({tuple(output.flatten().tolist()) for output in ours}) == 2


def test_the_rest_trains_behind_what_has_settled() -> None:
    model = Dropped()
    plain = copy.deepcopy(model)
    net = executor_of(trace(model, (rows(),)))
    net.enter(fxsplit.Phase(start=1, stop=2, epochs=1))
    plain.a.requires_grad_(False)
    ours, theirs = (left_behind(each.train(), (rows(),), {}) for each in (net, plain))
    ours["gradients"] = [parameter.grad for parameter in model.parameters()]
    assert same_value(ours, theirs)


def test_executors_with_a_rest_are_copied_and_pickled() -> None:
    net = executor_of(trace(Drawn(), (rows(),)))
    copies = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    expected = left_behind(net, (rows(),), {})
    assert all(same_value(left_behind(each, (rows(),), {}), expected) for each in copies)


class First(Linears):
    def forward(self, x: Tensor) -> Tensor:
        if random.random() < 0.5:
            x = -x
        return self.a(x)


class Decorated(Linears):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return h if random.random() < 0.5 else -h


class Keeping(Linears):
    def forward(self, x: Tensor) -> Tensor:
        h, sign = self.a(x), 1
        of_sign = lambda: sign * h  # noqa: E731
        if random.random() < 0.5:
            sign = -1
        return of_sign()


class Holding(Linears):
    def forward(self, x: Tensor) -> Tensor:
        self.held = self.a(x)
        if random.random() < 0.5:
            return self.held
        return -self.held


@pytest.mark.parametrize("make", [First, Decorated, Keeping, Holding])
def test_what_a_rest_cannot_be_made_of_is_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(TraceError, match=r"test_rest\.py:\d+ asks for bool\(\) of a number that is another one"):
        trace(make(), (rows(),))
