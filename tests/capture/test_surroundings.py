"""Globals, class attributes, closures and caches: as they were after tracing, and alive when partitions run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsplit
from fxsplit.errors import TraceError
from fxsplit.objects.same import same_value
from tests.exact import assert_exact, executor_of, rows

CACHE: dict[Any, Any] = {}
NESTED: dict[str, dict[str, Any]] = {"tables": {}}
LOSSES: list[Tensor] = []
COUNT = 0
LAST: Any = None


class State:
    """A class that is no module, and an object of it that lies in a global."""

    calls = 0

    def __init__(self) -> None:
        self.table: Any = None

    def __call__(self, size: int) -> Tensor:
        if self.table is None:
            self.table = torch.ones(size).cumsum(0)
        result: Tensor = self.table
        return result


STATE = State()


@functools.lru_cache(None)
def unbounded(size: int) -> Tensor:
    return torch.ones(size).cumsum(0)


@functools.lru_cache(maxsize=4)
def bounded(size: int) -> Tensor:
    return torch.ones(size).cumsum(0)


@functools.lru_cache(None)
def noise(size: int) -> Tensor:
    return torch.randn(size)


def table(size: int) -> Tensor:
    if size not in CACHE:
        CACHE[size] = torch.ones(size).cumsum(0)
    result: Tensor = CACHE[size]
    return result


def attribute_counter() -> int:
    attribute_counter.calls += 1  # type: ignore[attr-defined]
    return attribute_counter.calls  # type: ignore[attr-defined, no-any-return]


def reset() -> None:
    global COUNT, LAST
    for each in (CACHE, LOSSES, NESTED["tables"], Loss.losses):
        each.clear()
    for cached in (unbounded, bounded, noise, CachedMethod.table):
        cached.cache_clear()
    COUNT, LAST, STATE.table, State.calls, Lazy.table, Last.last = 0, None, None, 0, None, None
    attribute_counter.calls = 0  # type: ignore[attr-defined]
    if "found" in vars(Named):
        del Named.found


def state() -> list[Any]:
    """All that lies around the models below."""
    return [
        *({**CACHE}, {**NESTED["tables"]}, [*LOSSES], [*Loss.losses], COUNT, LAST, STATE.table, State.calls),
        *(Lazy.table, Last.last, attribute_counter.calls, vars(Named).get("found")),  # type: ignore[attr-defined]
        *(cached.cache_info().currsize for cached in (unbounded, bounded, noise, CachedMethod.table)),
    ]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)


class Cached(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * unbounded(6) + bounded(x.shape[1])


class CachedNoise(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * noise(6)


class CachedMethod(Layer):
    @functools.lru_cache(None)  # noqa: B019
    def table(self, size: int) -> Tensor:
        return torch.ones(size).cumsum(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.table(6)


class InDict(Layer):
    def forward(self, x: Tensor) -> Tensor:
        if "table" not in CACHE:
            CACHE["table"] = torch.ones(6).cumsum(0)
        return self.linear(x) * CACHE["table"]


class InNestedDict(Layer):
    def forward(self, x: Tensor) -> Tensor:
        tables = NESTED["tables"]
        if 6 not in tables:
            tables[6] = torch.ones(6).cumsum(0)
        return self.linear(x) * tables[6]


class InObject(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * STATE(6)


class ByFunction(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * table(6)


class Lazy(Layer):
    table: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if Lazy.table is None:
            Lazy.table = torch.ones(6).cumsum(0)
        result: Tensor = self.linear(x) * Lazy.table
        return result


class Appends(Layer):
    """Keeps an auxiliary loss in a global list, as megablocks does."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.linear(x).softmax(-1)
        LOSSES.append(scores.mean(0).square().sum())
        return x * scores


class Assigns(Layer):
    def forward(self, x: Tensor) -> Tensor:
        global LAST
        LAST = self.linear(x)
        return LAST * 2


class Named(Layer):
    def forward(self, x: Tensor) -> Tensor:
        type(self).found = self.linear(x).detach()
        return x + 1


class Counts(Layer):
    def forward(self, x: Tensor) -> Tensor:
        global COUNT
        COUNT += 1
        return self.linear(x) / COUNT


class CountsInClass(Layer):
    def forward(self, x: Tensor) -> Tensor:
        State.calls += 1
        return self.linear(x) / State.calls


class CountsInFunction(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) / attribute_counter()


class CountsInDefault(Layer):
    def __init__(self) -> None:
        super().__init__()

        # A function of its own, so that each model has its own default.
        def scale(calls: list[int] = [0]) -> int:  # noqa: B006
            calls[0] += 1
            return calls[0]

        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) / self.scale()


class CountsInClosure(Layer):
    def __init__(self) -> None:
        super().__init__()
        calls = 0

        def scale() -> int:
            nonlocal calls
            calls += 1
            return calls

        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) / self.scale()


class BranchesLater(Layer):
    """Stays one op, since it branches on data after it has changed a global."""

    def forward(self, x: Tensor) -> Tensor:
        if "table" not in CACHE:
            CACHE["table"] = torch.ones(6).cumsum(0)
        LOSSES.append(x.mean())
        if x.sum() > 1e6:
            x = x + 1
        return self.linear(x) * CACHE["table"]


class Loss(Layer):
    losses: list[Tensor] = []  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e6:
            x = x + 1
        Loss.losses.clear()
        Loss.losses.append(self.linear(x).mean())
        return x


class ReadsLoss(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + sum(Loss.losses)


class Last(Layer):
    last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e6:
            x = x + 1
        Last.last = self.linear(x).mean()
        return x


class ReadsLast(Layer):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x) + Last.last
        return result


def around(*inner: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), *inner, nn.Linear(6, 6))


def assert_alive(make: Callable[[], nn.Module]) -> fxsplit.Trace:
    """Tracing leaves everything alone, and partitions leave behind what the plain model does, in several calls."""
    outputs, states = [], []
    for traced in (False, True):
        reset()
        torch.manual_seed(0)
        model = net = make()
        if traced:
            before = state()
            found = fxsplit.trace(model, (rows(),))
            assert same_value(state(), before)
            net = executor_of(found)
        outputs.append([net(rows()) for _ in range(3)])
        states.append(state())
    assert same_value(outputs[0], outputs[1])
    assert same_value(states[0][:-4], states[1][:-4])
    assert isinstance(model(rows()), Tensor)
    reset()
    return found


CHANGING = [
    *(InDict, InNestedDict, InObject, ByFunction, Lazy, Appends, Assigns, Named, Counts, CountsInClass),
    *(CountsInFunction, CountsInDefault, CountsInClosure, BranchesLater, CachedNoise),
]


@pytest.mark.parametrize("kind", CHANGING)
def test_a_module_that_changes_what_is_around_it_stays_one_op(kind: type[Layer]) -> None:
    found = assert_alive(lambda: around(kind()))
    assert [op.name for op in found.train.ops] == ["0", "1", "2"]


@pytest.mark.parametrize("kind", [Cached, CachedMethod])
def test_functions_that_cache_are_traced_through_without_the_cache(kind: type[Layer]) -> None:
    found = assert_alive(lambda: around(kind()))
    assert not found.opaque
    assert "1.linear" in [op.name for op in found.train.ops]
    assert_alive(kind)


def test_a_warm_cache_serves_both() -> None:
    model = around(Cached(), ByFunction())
    reset()
    expected = model(rows())
    net = executor_of(fxsplit.trace(model, (rows(),)))
    assert torch.equal(net(rows()), expected)
    assert torch.equal(model(rows()), expected)
    reset()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (InDict, "the global 'CACHE'"),
        (Lazy, "'table' of the class Lazy"),
        (Appends, "the global 'LOSSES'"),
        (Assigns, "the global 'LAST'"),
        (CountsInClass, "'calls' of the class State"),
    ],
)
def test_a_model_that_does_so_itself_is_refused(kind: type[Layer], words: str) -> None:
    reset()
    before = state()
    model = kind()
    with pytest.raises(TraceError, match=f"its forward changes {words}"):
        fxsplit.trace(model, (rows(),))
    assert same_value(state(), before)
    assert isinstance(model(rows()), Tensor)
    reset()


def test_in_a_model_s_own_forward_the_function_that_does_so_is_one_op() -> None:
    found = assert_alive(ByFunction)
    assert [op.name for op in found.train.ops] == ["linear", "table", "mul"]


@pytest.mark.parametrize("pair", [(Loss, ReadsLoss), (Last, ReadsLast)])
def test_what_reads_what_one_op_leaves_around_is_one_op(pair: tuple[type[Layer], type[Layer]]) -> None:
    found = assert_alive(lambda: around(*(kind() for kind in pair)))
    assert [op.name for op in found.train.ops] == ["0", "1", "2", "3"]


@torch.fx.wrap
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def test_a_function_that_torch_fx_wraps_is_no_change_around_the_model() -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.clamp(-3, 3) if x.abs().max() > 3 else x

    class Doubles(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return doubled(x)

    model = nn.Sequential(Branches(), nn.Linear(6, 6), Doubles(), nn.Linear(6, 3))
    assert list(assert_exact(model, rows()).opaque) == ["0"]


def test_a_trace_that_fails_leaves_everything_alone() -> None:
    class Fails(Layer):
        def forward(self, x: Tensor) -> Tensor:
            CACHE["x"] = self.linear(x)
            LOSSES.append(unbounded(6) * x)
            raise RuntimeError("no way")

    reset()
    before = state()
    with pytest.raises(TraceError, match="no way"):
        fxsplit.trace(around(Fails()), (rows(),))
    assert same_value(state(), before)
    reset()


def test_a_model_that_changes_its_arguments_leaves_everything_alone() -> None:
    class Given(Layer):
        def forward(self, x: Tensor, seen: list[int]) -> Tensor:
            seen.append(1)
            LOSSES.append(x)
            return x

    reset()
    with pytest.raises(TraceError, match="it changes what it is given"):
        fxsplit.trace(Given(), (rows(), []))
    assert not LOSSES


def test_a_closure_and_a_default_have_their_numbers_again() -> None:
    for kind in (CountsInClosure, CountsInDefault):
        model = around(kind())
        fxsplit.trace(model, (rows(),))
        assert model[1].scale() == 1
