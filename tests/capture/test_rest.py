"""The rest of a model's own forward is one op from the first statement on that goes another way each time."""

from __future__ import annotations

import copy
import functools
import importlib
import pickle
import random
from collections.abc import Callable
from pathlib import Path
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


class Iterating(Linears):
    """A generator of layers, made before the branch, is used up by the first call."""

    def forward(self, x: Tensor) -> Tensor:
        h, layers = self.a(x), iter([self.b, nn.functional.relu])
        for layer in layers:
            if random.random() < 2:
                h = layer(h)
        return self.c(h)


class Tally:
    def __init__(self) -> None:
        self.count = 0


class Tallying(Linears):
    """What it counts with is another object in each call."""

    def forward(self, x: Tensor) -> Tensor:
        h, tally = self.a(x), Tally()
        if random.random() < 2 and not h.is_meta:
            tally.count += 1
        return self.c(h) * tally.count


class Seeded(Linears):
    """It draws from a generator that begins anew in each call."""

    def forward(self, x: Tensor) -> Tensor:
        h, own = self.a(x), random.Random(0)
        if random.random() < 2:
            h = h * own.random()
        return self.c(h)


class Aliasing(Linears):
    """A list has two names."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        found = [h]
        all_of_them = found
        if random.random() < 2 and not h.is_meta:
            found.append(self.b(h))
        return self.c(torch.stack(all_of_them).sum(0))


class Entering(Linears):
    """A context is open at the branch."""

    def forward(self, x: Tensor) -> Tensor:
        context = torch.autocast("cpu", torch.bfloat16)
        context.__enter__()
        h = self.a(x)
        if random.random() < 2:
            h = self.b(h)
        context.__exit__(None, None, None)
        return self.c(h.float())


class Counting(Linears):
    """It reads a number at its start that it sets at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 1

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * self.count
        if random.random() < 2 and not h.is_meta:
            self.count += 1
        return self.c(h)


class Renaming(Linears):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Linears()

    def forward(self, x: Tensor) -> Tensor:
        self = self.inner
        h = self.a(x)
        if random.random() < 2:
            h = self.b(h)
        return self.c(h)


@pytest.mark.parametrize(
    "make",
    [
        *(First, Decorated, Keeping, Holding, Iterating, Tallying, Seeded, Aliasing, Entering, Counting, Renaming),
    ],
)
def test_what_a_rest_cannot_be_made_of_is_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(TraceError, match=r"test_rest\.py:\d+ asks for bool\(\) of a number that is another one"):
        trace(make(), (rows(),))


class Averaging(Linears):
    """It keeps an average, as another tensor in each call, and reads it before the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        import math

        h = self.a(x) * self.average
        if random.random() < 2:
            self.average = self.average / 2 + h.detach().mean(0)
        return self.c(h * self.average) * math.pi


class Decaying(Linears):
    """It writes into a buffer that it reads before the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * self.scale.clone()
        if random.random() < 2:
            self.scale.mul_(0.5)
        return self.c(h * self.scale.clone())


class Defaults(Linears):
    def forward(self, x: Tensor, scale: float = sum(each for each in range(3)), *, shift: float = 1.0) -> Tensor:
        h = self.a(x) * scale
        return self.c(-h if random.random() < 0.5 else h) + shift * scale


@pytest.mark.parametrize("make", [Averaging, Decaying, Defaults])
@pytest.mark.parametrize("recompute", [0, 1])
def test_a_rest_leaves_all_that_the_forward_does(make: Callable[[], nn.Module], recompute: int) -> None:
    assert_exact(make(), rows())
    model = make()
    plain = copy.deepcopy(model)
    net = executor_of(trace(model, (rows(),)))
    net.enter(fxsplit.Phase(start=0, stop=2, epochs=1, recompute=recompute))
    for _ in range(2):
        ours, theirs = (left_behind(each.train(), (rows(),), {}) for each in (net, plain))
        assert same_value(ours, theirs)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    for each in (copied, plain):
        each.zero_grad()
    assert same_value(left_behind(copied, (rows(),), {}), left_behind(plain, (rows(),), {}))


class Configured(Linears):
    def __init__(self) -> None:
        super().__init__()
        self.tally = Tally()

    def forward(self, x: Tensor) -> Tensor:
        h, tally = self.a(x), self.tally
        if random.random() < 2:
            tally.count += 1
        return self.c(h) * tally.count


def test_tracing_a_rest_changes_no_object_of_the_model() -> None:
    model = Configured()
    with pytest.raises(TraceError):
        trace(model, (rows(),))
    assert model.tally.count == 0


def test_a_source_that_was_edited_since_is_not_taken_for_the_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = """
import random
from tests.exact import Linears


class Edited(Linears):
    def forward(self, x):
        h = self.a(x)
        if random.random() < 0.5:
            h = -h
        return self.c(h) * 2
"""
    file = tmp_path / "edited_since.py"
    file.write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    model = importlib.import_module("edited_since").Edited()
    assert trace(model, (rows(),)).opaque
    file.write_text(source.replace("* 2", "* 3"))
    with pytest.raises(TraceError):
        trace(model, (rows(),))
