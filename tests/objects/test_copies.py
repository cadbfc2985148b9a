"""Tracing copies what can be copied, shares the rest, and leaves the model as it was, in any thread."""

from __future__ import annotations

import builtins
import random
import threading
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn

from fxsplit.capture.tracing import trace
from fxsplit.errors import TraceError
from fxsplit.objects.same import same_value
from tests.exact import Linears, assert_exact, executor_of, rows


class Holds(Linears):
    """Holds what no copy can be made of."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.file = open(__file__, encoding="utf-8")  # noqa: SIM115
        self.items = (item for item in range(3))
        self.nested = {"locks": [threading.RLock()], "numbers": [1, 2]}
        self.lambdas = [lambda x: x * 2]

    def forward(self, x: Any) -> Any:
        with self.lock:
            return super().forward(self.lambdas[0](x))


def test_locks_files_and_generators_are_shared() -> None:
    model = Holds()
    before = dict(vars(model))
    net = executor_of(trace(model, (rows(),)))
    assert torch.equal(net(rows()), model(rows()))
    assert list(vars(model)) == list(before)
    assert all(vars(model)[name] is value for name, value in before.items())
    assert not model.lock.locked()
    assert model.nested["numbers"] == [1, 2]
    model.file.close()


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weights_with_a_history() -> None:
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))
    net = executor_of(trace(model, (rows(),)))
    assert torch.equal(net(rows()), model(rows()))
    pruned = Linears()
    torch.nn.utils.prune.l1_unstructured(pruned.b, "weight", 0.5)
    net = executor_of(trace(pruned, (rows(),)))
    assert torch.equal(net(rows()), pruned(rows()))


def test_features_kept_from_an_earlier_call() -> None:
    class Keeps(Linears):
        def forward(self, x: Any) -> Any:
            self.features = self.a(x)
            return self.c(self.b(self.features).relu())

    model = Keeps()
    model(rows())
    net = executor_of(trace(model, (rows(),)))
    assert torch.equal(net(rows() + 1), model(rows() + 1))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:`torch.jit", "ignore:The .grad attribute of a Tensor")
def test_scripted_and_compiled_functions_are_one_op() -> None:
    scripted = torch.jit.script(_double)
    compiled = torch.compile(_double, backend="eager")
    for function, name in ((scripted, "_double"), (compiled, "_double")):

        class Model(Linears):
            def forward(self, x: Any) -> Any:
                return self.c(self.double(self.b(self.a(x))))

        model = Model()
        model.double = function
        found = trace(model, (rows(),))
        assert [op.name.rpartition(":")[2] for op in found.train.ops] == ["a", "b", name, "c"]
        assert torch.equal(executor_of(found)(rows()), model(rows()))


def _double(x: Tensor) -> Tensor:
    return x * 2


def test_a_module_of_torch_as_the_root_is_one_op() -> None:
    assert_exact(nn.LSTM(6, 8, batch_first=True), torch.randn(2, 5, 6), count=1)


def test_packed_sequences() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 8, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            lengths = torch.full((len(x),), x.shape[1])
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
            output, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
            return output

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reader, self.head = Reader(), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.head(self.reader(x)[:, -1])
            return scores

    assert_exact(Model(), torch.randn(4, 5, 6))


def test_a_model_made_and_traced_in_inference_mode() -> None:
    with torch.inference_mode():
        model = Linears()
        net = executor_of(trace(model, (rows(),)))
        assert torch.equal(net(rows()), model(rows()))


def test_an_error_names_the_users_line_and_no_library() -> None:
    class Model(Linears):
        def forward(self, x: Any) -> Any:
            return sorted([super().forward(x).sum(), x.sum()])[0]

    with pytest.raises(TraceError, match=r"test_copies\.py:\d+ branches on data"):
        trace(Model(), (rows(),))


def _patched() -> tuple[Any, ...]:
    return (
        *(torch.zeros, torch.rand, torch.manual_seed, torch.is_grad_enabled, random.random, builtins.isinstance),
        *(torch.no_grad.__enter__, torch.autocast.__exit__, torch.set_grad_enabled.__init__),
        *(nn.Module.__call__, nn.Module.__getattr__, torch.jit.ScriptFunction.__call__),
        vars(torch.autograd.Function)["apply"],
    )


def test_an_exception_leaves_nothing_patched() -> None:
    class Model(Linears):
        def forward(self, _: Any) -> Any:
            torch.set_grad_enabled(False)
            raise KeyboardInterrupt

    before = _patched()
    with pytest.raises(KeyboardInterrupt):
        trace(Model(), (rows(),))
    assert all(one == other for one, other in zip(_patched(), before, strict=True))
    assert torch.is_grad_enabled()


def test_two_threads_trace_and_a_third_uses_torch() -> None:
    before = _patched()
    errors: list[BaseException] = []
    digests: set[str] = set()
    done = threading.Event()

    def traces() -> None:
        try:
            for _ in range(2):
                digests.add(trace(Linears(), (rows(),)).train.digest())
        except BaseException as error:
            errors.append(error)

    def uses() -> None:
        model = Linears()
        expected = model(rows())
        try:
            while not done.is_set():
                assert torch.equal(model(rows()), expected)
                assert type(torch.zeros(2)) is Tensor
                assert type(random.random()) is float
                with torch.no_grad():
                    assert not torch.is_grad_enabled()
        except BaseException as error:
            errors.append(error)

    beside = threading.Thread(target=uses)
    threads = [threading.Thread(target=traces) for _ in range(2)]
    for thread in (beside, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    beside.join()
    assert not errors
    assert digests == {trace(Linears(), (rows(),)).train.digest()}
    assert all(one == other for one, other in zip(_patched(), before, strict=True))


def test_the_model_and_the_random_states_are_left_as_they_were() -> None:
    model = Linears()
    model.history = [torch.ones(2)]  # type: ignore[assignment]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = torch.get_rng_state(), random.getstate()
    trace(model, (rows(),))
    assert same_value((torch.get_rng_state(), random.getstate()), before)
    assert same_value(dict(model.state_dict()), state)
    assert same_value(model.history, [torch.ones(2)])
