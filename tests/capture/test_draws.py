"""Nothing that is drawn, read from a clock or counted while tracing is burned in."""

from __future__ import annotations

import copy
import datetime
import functools
import itertools
import random
import secrets
import sys
import threading
import time
import uuid
from random import random as drawn_by_name
from time import perf_counter as clock_by_name
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fxsplit.capture.tracing import trace
from fxsplit.errors import GuardError, TraceError
from tests.exact import Linears, With, assert_exact, executor_of, rows

MODULE_RANDOM = random.Random(0)


class PythonNumber(Linears):
    def forward(self, x: Any) -> Any:
        return super().forward(x) * random.uniform(1, 2)


class NumpyNumber(Linears):
    def forward(self, x: Any) -> Any:
        return super().forward(x) * float_free(np.random.rand())


def float_free(number: Any) -> Any:
    return 1 + number


class TorchSeed(Linears):
    def forward(self, x: Any) -> Any:
        torch.manual_seed(5)
        return super().forward(x) + torch.rand(4, 1)


class PythonSeed(Linears):
    def forward(self, x: Any) -> Any:
        random.seed(5)
        return super().forward(x) * random.random()


@pytest.mark.parametrize("make", [PythonNumber, NumpyNumber, TorchSeed, PythonSeed])
def test_a_number_drawn_is_an_op(make: type[Linears]) -> None:
    found = assert_exact(make(), rows())
    assert not found.opaque


def test_numbers_differ_from_call_to_call_and_tracing_draws_none() -> None:
    model = PythonNumber()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    net = executor_of(trace(model, (rows(),)))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert not torch.equal(net(rows()), net(rows()))


class Branch(nn.Module):
    def forward(self, x: Any) -> Any:
        return x if x.sum() > 0 else -x


def test_to_try_a_module_on_numbers_draws_none_that_others_draw_later() -> None:
    model = nn.Sequential(Branch(), Linears())
    before = torch.get_rng_state()
    found = trace(model, (rows(),))
    assert "0" in found.opaque
    assert torch.equal(torch.get_rng_state(), before)


def test_functions_that_a_helper_has_imported_by_name() -> None:
    helper = ModuleType("a_helper_of_the_users")
    exec(
        "from random import random\nfrom torch import rand\ndef noise(x): return x * random() + rand(4, 1)",
        vars(helper),
    )
    sys.modules[helper.__name__] = helper
    try:

        class Model(Linears):
            def forward(self, x: Any) -> Any:
                return super().forward(helper.noise(x))

        assert_exact(Model(), rows())
    finally:
        del sys.modules[helper.__name__]


class LayerDrop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6)

    def forward(self, x: Any) -> Any:
        if self.training and random.random() < 0.5:
            return x
        return self.one(x)


def test_the_module_that_asks_stays_one_op() -> None:
    class Model(Linears):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(LayerDrop() for _ in range(3))

        def forward(self, x: Any) -> Any:
            for layer in self.layers:
                x = layer(x)
            return super().forward(x)

    found = assert_exact(Model(), rows())
    assert list(found.opaque) == ["layers.0", "layers.1", "layers.2"]
    assert "another one at each call" in found.opaque["layers.0"]
    net = executor_of(found).train()
    assert len({tuple(net(rows())[0].tolist()) for _ in range(40)}) > 2


class Generator(Linears):
    def __init__(self, generator: Any) -> None:
        super().__init__()
        self.generator = generator


class TorchGenerator(Generator):
    def forward(self, x: Any) -> Any:
        return super().forward(x) + torch.rand(4, 1, generator=self.generator)


def test_a_generator_of_torch_goes_on_where_it_stood() -> None:
    model = TorchGenerator(torch.Generator().manual_seed(1))
    state = model.generator.get_state()
    net = executor_of(trace(model, (rows(),)))
    assert torch.equal(model.generator.get_state(), state)
    ours = net(rows()), net(rows())
    model.generator.set_state(state)
    assert torch.equal(ours[0], model(rows()))
    assert torch.equal(ours[1], model(rows()))


@pytest.mark.parametrize("generator", [random.Random(1), np.random.default_rng(1), np.random.RandomState(1)])
def test_other_generators_of_a_module_keep_it_whole(generator: Any) -> None:
    class Noise(Generator):
        def forward(self, x: Any) -> Any:
            return super().forward(x) * float(self.generator.uniform(1, 2))

    class Model(Linears):
        def __init__(self) -> None:
            super().__init__()
            self.noise = Noise(generator)

        def forward(self, x: Any) -> Any:
            return self.noise(x) + super().forward(x)

    found = assert_exact(Model(), rows())
    assert list(found.opaque) == ["noise"]
    with pytest.raises(TraceError, match="'generator'"):
        trace(Noise(generator), (rows(),))


def test_a_generator_beside_the_model_is_refused_by_name_and_left_as_it_was() -> None:
    class OfTheFile(Linears):
        def forward(self, x: Any) -> Any:
            return super().forward(x) * MODULE_RANDOM.random()

    own = random.Random(0)

    class OfTheClosure(Linears):
        def forward(self, x: Any) -> Any:
            return super().forward(x) * own.random()

    for generator, model, name in (
        (MODULE_RANDOM, OfTheFile(), "MODULE_RANDOM"),
        (own, OfTheClosure(), "own"),
    ):
        state = generator.getstate()
        with pytest.raises(TraceError, match=name):
            trace(model, (rows(),))
        assert generator.getstate() == state


def test_a_clock_is_read_at_each_call() -> None:
    class Timed(Linears):
        elapsed = 0.0

        def forward(self, x: Any) -> Any:
            began = time.perf_counter()
            y = super().forward(x)
            self.elapsed = time.perf_counter() - began
            return y

    model = Timed()
    net = executor_of(trace(model, (rows(),)))
    seen = set()
    for _ in range(3):
        net(rows())
        seen.add(model.elapsed)
    assert len(seen) == 3
    assert 0.0 not in seen


class Counts(nn.Module):
    """Counts its calls in an object that it holds, and multiplies by the count."""

    def __init__(self) -> None:
        super().__init__()
        self.state = SimpleNamespace(calls=0)

    def forward(self, x: Any) -> Any:
        self.state.calls += 1
        return x * self.state.calls


class Logs(nn.Module):
    """Keeps what it saw in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(self, x: Any) -> Any:
        self.seen.append(x.detach())
        return x * 2


class Fills(nn.Module):
    """Makes a table at the first call, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[int, Any] = {}

    def forward(self, x: Any) -> Any:
        if len(x.shape) not in self.tables:
            self.tables[len(x.shape)] = 3.0
        return x * self.tables[len(x.shape)]


class Settles(nn.Module):
    """Finds out from its first input what it is for, and asks no more."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(problem=None)

    def forward(self, x: Any) -> Any:
        if self.config.problem is None:
            self.config.problem = "regression" if x.dtype == torch.float32 and x.shape[1] > 2 else "classes"
        return x * 2 if self.config.problem == "regression" else x


def test_what_is_found_out_once_and_for_all_is_looked_through_in_the_model_itself_too() -> None:
    for model in (Settles(), With(Settles())):
        found = trace(model, (rows(),))
        assert not found.opaque
        assert torch.equal(executor_of(found, 1)(rows()), copy.deepcopy(model)(rows()))
        with pytest.raises(GuardError, match="takes another path"):
            executor_of(found, 1)(rows().double())


@pytest.mark.parametrize(("make", "name"), [(Counts, "state"), (Logs, "seen")])
def test_what_changes_in_objects_and_lists_keeps_the_module_whole(make: type[nn.Module], name: str) -> None:
    found = assert_exact(With(make()), rows())
    assert list(found.opaque) == ["inner"]
    assert f"changes '{name}'" in found.opaque["inner"]
    with pytest.raises(TraceError, match=f"changes '{name}'"):
        trace(make(), (rows(),))


def test_a_list_is_appended_to_at_each_call_and_by_tracing_never() -> None:
    model = With(Logs())
    net = executor_of(trace(model, (rows(),)))
    assert model.inner.seen == []
    net(rows())
    net(rows() + 1)
    assert [torch.equal(seen, rows() + number) for number, seen in enumerate(model.inner.seen)] == [True, True]


def test_the_calls_of_tracing_are_not_counted() -> None:
    class Tires(nn.Module):
        """Gives less from its third call on."""

        def __init__(self) -> None:
            super().__init__()
            self.calls: list[int] = []

        def forward(self, x: Any) -> Any:
            self.calls.append(1)
            return x if len(self.calls) < 3 else x[:, :2]

    found = trace(nn.Sequential(Tires(), nn.Linear(6, 3)), (rows(),))
    assert list(found.opaque) == ["0"]
    assert [op.output.shape for op in found.train.ops] == [(4, 6), (4, 3)]


def test_a_table_made_once_is_looked_through() -> None:
    model = With(Fills())
    found = assert_exact(model, rows())
    assert not found.opaque
    assert model.inner.tables == {}


COUNTER = itertools.count(1)


def _held(draw: Any) -> dict[str, type[nn.Module]]:
    """Modules that call what they hold, each held in another way."""
    table = {"draw": draw, "partial": functools.partial(draw)}

    class Closure(nn.Module):
        def forward(self, x: Any) -> Any:
            return x * draw()

    class Default(nn.Module):
        def forward(self, x: Any, draw: Any = draw) -> Any:
            return x * draw()

    class OfTheClass(nn.Module):
        draw = staticmethod(table["draw"])

        def forward(self, x: Any) -> Any:
            return x * self.draw()

    class InADict(nn.Module):
        def forward(self, x: Any) -> Any:
            return x * table["draw"]()

    class Partial(nn.Module):
        # From Python 3.14 on a partial that a class holds is a method.
        draw = staticmethod(table["partial"])

        def forward(self, x: Any) -> Any:
            return x * self.draw()

    return {each.__name__: each for each in (Closure, Default, OfTheClass, InADict, Partial)}


@pytest.fixture
def no_other_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generators are watched where no other thread could draw; tests before may have left one, as tqdm's monitor."""
    monkeypatch.setattr(threading, "active_count", lambda: 1)


def _stays_whole(make: type[nn.Module], reason: str) -> None:
    """The module alone is refused, and in a model it stays one op; tracing draws nothing."""
    alone, model = make(), With(make())
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with pytest.raises(TraceError, match=reason):
        trace(alone, (rows(),))
    found = trace(model, (rows(),))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert list(found.opaque) == ["inner"]
    assert reason in found.opaque["inner"]


@pytest.mark.usefixtures("no_other_thread")
@pytest.mark.parametrize("name", list(_held(drawn_by_name)))
def test_a_function_that_draws_is_seen_however_it_is_held(name: str) -> None:
    _stays_whole(_held(drawn_by_name)[name], "draws from the generator 'random'")
    _stays_whole(_held(np.random.rand)[name], "draws from the generator 'numpy.random'")
    assert_exact(With(_held(drawn_by_name)[name]()), rows())


@pytest.mark.parametrize("name", list(_held(drawn_by_name)))
@pytest.mark.parametrize(
    "read", [clock_by_name, lambda: next(COUNTER), lambda: random.Random().random(), secrets.SystemRandom().random]
)
def test_a_number_that_is_another_one_at_each_call_is_seen_however_it_is_come_by(name: str, read: Any) -> None:
    _stays_whole(_held(read)[name], "another one at each call")


@pytest.mark.usefixtures("no_other_thread")
def test_draws_into_tensors_that_are_no_values_of_the_graph_are_seen() -> None:
    class Legacy(nn.Module):
        def forward(self, x: Any) -> Any:
            return x * torch.FloatTensor(4, 1).uniform_()

    class Dropped(nn.Module):
        def forward(self, x: Any) -> Any:
            return x * nn.functional.dropout(torch.FloatTensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), training=True)

    for make in (Legacy, Dropped):
        _stays_whole(make, "draws from the generator 'torch'")
        assert_exact(With(make()), rows())


def test_a_generator_made_in_forward_begins_anew_in_each_call() -> None:
    class Fresh(nn.Module):
        def forward(self, x: Any) -> Any:
            return x + torch.rand(4, 1, generator=torch.Generator().manual_seed(3))

    class Unseeded(nn.Module):
        def forward(self, x: Any) -> Any:
            return x * float(np.random.default_rng().random())

    class Seeded(nn.Module):
        def forward(self, x: Any) -> Any:
            return x * float(np.random.default_rng(3).random())

    _stays_whole(Fresh, "another one at each call")
    net = executor_of(trace(With(Fresh()), (rows(),)))
    assert torch.equal(net(rows()), net(rows()))
    _stays_whole(Unseeded, "without a seed")
    assert not assert_exact(With(Seeded()), rows()).opaque


def test_what_is_drawn_in_training_alone_is_seen() -> None:
    ticks = itertools.count(1)

    class Noisy(nn.Module):
        def forward(self, x: Any) -> Any:
            return x - next(ticks) if self.training else x

    _stays_whole(Noisy, "another one at each call")


def _microseconds() -> Any:
    return datetime.datetime.now().microsecond / 1e6


@pytest.mark.parametrize(
    "read",
    [
        _microseconds,
        lambda: datetime.datetime.now(datetime.UTC).timestamp() % 1,
        lambda: uuid.uuid4().int % 2**16,
        lambda: secrets.randbelow(2**16),
        lambda: time.thread_time() * 1e4,
    ],
)
def test_clocks_and_the_systems_numbers_are_ops(read: Any) -> None:
    class Reads(Linears):
        def forward(self, x: Any) -> Any:
            return super().forward(x) * read()

    found = trace(Reads(), (rows(),))
    net = executor_of(found)
    assert not found.opaque
    assert len({tuple(net(rows()).flatten().tolist()) for _ in range(5)}) > 1


def test_a_clock_that_ticks_seldom_is_an_op_too() -> None:
    """Two recordings in one day know nothing of it."""

    class Daily(Linears):
        def forward(self, x: Any) -> Any:
            assert isinstance(datetime.date(2020, 1, 2), datetime.date)
            assert issubclass(datetime.datetime, datetime.date)
            day = datetime.date.today()
            return super().forward(x) * (day.day + datetime.date(2020, 1, 2).day + time.localtime().tm_mon)

    found = assert_exact(Daily(), rows())
    assert [op.target for op in found.train.ops if "today" in op.target or "localtime" in op.target] == [
        "datetime.date.today",
        "time.localtime",
    ]
    assert type(datetime.datetime.now()) is datetime.datetime
    assert type(datetime.datetime) is type


def test_another_thread_may_draw_while_a_model_is_traced() -> None:
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            random.random()
            torch.rand(1)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        found = [trace(Linears(), (rows(),)) for _ in range(5)]
    finally:
        stop.set()
        thread.join()
    assert not any(each.opaque for each in found)
