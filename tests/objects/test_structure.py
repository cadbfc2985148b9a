"""Containers and objects of any class, at the door, between modules and at the end."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fxsplit
from fxsplit.capture.tracing import trace
from fxsplit.errors import GuardError, TraceError
from fxsplit.objects.same import same_value
from fxsplit.objects.structure import leaves_of, map_tensors, tensors_in
from tests.exact import Linears, assert_exact, executor_of, rows


class OwnDict(dict[str, Any]):
    pass


class OwnList(list[Any]):
    pass


class Point(NamedTuple):
    x: Any
    y: Any


@dataclass(frozen=True, slots=True)
class Slotted:
    x: Any
    factor: int = 2


class Plain:
    def __init__(self, x: Any) -> None:
        self.x, self.factor = x, 2.0


class OnlySlots:
    __slots__ = ("x",)

    def __init__(self, x: Any) -> None:
        self.x = x


CONTAINERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "own dict": (lambda x: OwnDict(x=x), lambda given: given["x"]),
    "own list": (lambda x: OwnList([x]), lambda given: given[0]),
    "user dict": (lambda x: UserDict(x=x), lambda given: given["x"]),
    "ordered dict": (lambda x: OrderedDict(x=x), lambda given: given["x"]),
    "default dict": (lambda x: defaultdict(list, x=x), lambda given: given["x"]),
    "deque": (lambda x: deque([x]), lambda given: given[0]),
    "named tuple": (lambda x: Point(x, [x]), lambda given: given.x + given.y[0]),
    "slotted dataclass": (Slotted, lambda given: given.x * given.factor),
    "object": (Plain, lambda given: given.x * given.factor),
    "slots": (OnlySlots, lambda given: given.x),
    "namespace": (lambda x: SimpleNamespace(x=x), lambda given: given.x),
    "nested": (lambda x: {"a": [Plain(x), (x, {"b": x})]}, lambda given: given["a"][0].x + given["a"][1][1]["b"]),
}


class Opens(Linears):
    """Takes a container apart, with `read`."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        super().__init__()
        self.read = read

    def forward(self, given: Any) -> Any:
        return super().forward(self.read(given))


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_at_the_door_is_what_it_is_and_never_a_constant(name: str) -> None:
    make, read = CONTAINERS[name]
    assert_exact(Opens(read), make(rows()))
    model = Opens(read).eval()
    net = executor_of(trace(model, (make(rows()),))).eval()
    other = rows() + 1
    assert torch.equal(net(make(other)), model(make(other)))
    with pytest.raises(GuardError, match="was traced with"):
        net(rows())


@pytest.mark.parametrize("name", [name for name in CONTAINERS if name != "nested"])
def test_a_container_between_modules_and_at_the_end(name: str) -> None:
    make, read = CONTAINERS[name]

    class Packs(Linears):
        def forward(self, x: Any) -> Any:
            return make(super().forward(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packs, self.last = Packs(), nn.Linear(3, 3)

        def forward(self, x: Any) -> Any:
            return make(self.last(read(self.packs(x))))

    found = assert_exact(Model(), rows())
    assert not found.opaque
    assert type(executor_of(found)(rows())) is type(make(rows()))


def test_an_object_is_changed_on_its_way() -> None:
    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(6, 6)

        def forward(self, given: Plain) -> Plain:
            given.x = self.one(given.x)
            given.factor *= 2
            return given

    class Model(Linears):
        def __init__(self) -> None:
            super().__init__()
            self.doubles = Doubles()

        def forward(self, x: Any) -> Any:
            given = self.doubles(Plain(x))
            return super().forward(given.x * given.factor)

    assert_exact(Model(), rows())


def test_a_list_that_a_whole_module_would_append_to_is_refused() -> None:
    class Asks(nn.Module):
        def forward(self, x: Any, kept: list[Any]) -> Any:
            kept.append(x if x.sum() > 0 else -x)
            return x

    class Model(Linears):
        def __init__(self) -> None:
            super().__init__()
            self.asks = Asks()

        def forward(self, x: Any) -> Any:
            kept: list[Any] = []
            self.asks(x, kept)
            return super().forward(x) + len(kept)

    with pytest.raises(TraceError, match="changes what it is given"):
        trace(Model(), (rows(),))


def test_sparse_tensors() -> None:
    class Model(Linears):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x.to_dense())

    assert_exact(Model(), rows().to_sparse())


def test_constants_are_told_apart_by_every_element_not_by_how_they_print() -> None:
    class Model(Linears):
        def forward(self, x: Any, table: Any) -> Any:
            return super().forward(x) * table.sizes[50]

    model = Model()
    first, second = (SimpleNamespace(sizes=[1] * 50 + [number] + [1] * 50) for number in (1, 2))
    net = executor_of(trace(model, (rows(), first)))
    assert torch.equal(net(rows(), SimpleNamespace(sizes=[1] * 101)), model(rows(), first))
    with pytest.raises(GuardError, match="was traced with"):
        net(rows(), second)


def test_what_an_object_holds_twice_stays_one() -> None:
    class Twice(OwnDict):
        """Has each item as an attribute too, as the outputs of transformers have."""

        def __setitem__(self, key: str, value: Any) -> None:
            super().__setitem__(key, value)
            vars(self)[key] = value

    held = Twice()
    held["x"] = rows()
    assert len(tensors_in(held)) == 1
    assert [name for name, leaf in leaves_of(held, "given") if isinstance(leaf, Tensor)] == ["given.x"]
    changed = map_tensors(torch.neg, held)
    assert changed.x is changed["x"]
    assert same_value(changed.x, -held.x)
    assert not same_value(changed, held)


def test_the_outputs_of_transformers_keep_their_class() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    model = transformers.ViTForImageClassification(config)
    assert_exact(model, pixel_values=torch.randn(2, 3, 32, 32), output_hidden_states=True)


def test_gpt2_with_its_cache_and_labels() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32, bos_token_id=1, eos_token_id=1
    )
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    ids = torch.randint(50, (2, 8))
    found = assert_exact(model, input_ids=ids, labels=ids)
    assert not found.opaque
    net = fxsplit.Executor(found, fxsplit.partition(found, count=3)).eval()
    ours, plain = (each(input_ids=ids, labels=ids).past_key_values for each in (net, model.eval()))
    assert ours.get_seq_length() == plain.get_seq_length() == 8


def test_an_argument_that_forward_changes_is_refused() -> None:
    class Pops(Linears):
        def forward(self, batch: Any) -> Any:
            return super().forward(batch.pop("x"))

    class Appends(Linears):
        def forward(self, x: Any, seen: Any) -> Any:
            seen.x.append(self.a(x))
            return super().forward(x)

    with pytest.raises(TraceError, match="it changes what it is given"):
        trace(Pops(), ({"x": rows()},))
    with pytest.raises(TraceError, match="it changes what it is given"):
        trace(Appends(), (rows(), Plain([])))
