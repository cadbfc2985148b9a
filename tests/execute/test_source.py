"""The function of a stage: names are data in it, regions hold in it, and it goes with its executor."""

from __future__ import annotations

import copy
import gc
import linecache
import pickle
import sys
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn

import fxsplit
from fxsplit.capture.contexts import Context
from fxsplit.capture.tracing import trace
from fxsplit.execute.code import code_of
from fxsplit.execute.executor import Executor
from fxsplit.execute.source import source_of
from fxsplit_cli.main import main
from tests.networks import ODD_NAMES, OddNames

NO_GRAD = Context(kind="grad", enabled=False)
AUTOCAST = Context(kind="autocast", enabled=True, device="cpu", dtype=torch.bfloat16, cache=True)


class Point(NamedTuple):
    x: Any
    y: Any


def stage(*ops: Callable[[fx.Graph, fx.Node], fx.Node]) -> fx.Graph:
    """The graph of a stage with one value, each op reading the one before."""
    graph = fx.Graph()
    node = graph.call_method("pop", (graph.placeholder("values"),))
    for make in ops:
        node = make(graph, node)
    graph.output([node])
    return graph


def call(function: Any, *args: Any, **kwargs: Any) -> Callable[[fx.Graph, fx.Node], fx.Node]:
    return lambda graph, node: graph.call_function(function, (node, *args), kwargs)


def entries() -> list[str]:
    return [name for name in linecache.cache if name.startswith("<fxsplit")]


@pytest.mark.parametrize(
    "argument",
    [
        *(
            None,
            True,
            -3,
            0.1,
            -0.0,
            float("inf"),
            1e300,
            2 + 1j,
            "a'b\\n\\",
            "\\ud800",
            torch.float16,
            torch.device("cpu"),
        ),
        *(
            [1, [2.5]],
            (),
            (1,),
            {"a'": {1: "b"}},
            slice(None, -1, 2),
            Point(1, (2,)),
            Ellipsis,
            range(3),
        ),
    ],
)
def test_arguments_arrive_as_they_are(argument: Any) -> None:
    seen: list[Any] = []

    def see(value: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend([*args, *kwargs.values()])
        return value

    code_of(stage(call(see, argument, **{"class": argument, "a b": argument})), "test")(nn.Module(), [1])
    assert len(seen) == 3
    for found in seen:
        assert type(found) is type(argument)
        assert repr(found) == repr(argument)


def test_no_name_is_code() -> None:
    model = OddNames()
    captured = trace(model, (torch.empty(2, 3, 8, 8),))
    net = Executor(captured, fxsplit.partition(captured, count=3))
    for code in net.stage_at(0)._codes.values():
        assert code._source.isascii()
    plain = copy.deepcopy(model)
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(net(images), plain(images))
    assert not hasattr(sys, "ran_from_a_name")


def test_a_replaced_module_is_followed() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    captured = trace(model, (torch.empty(2, 2),))
    net = Executor(captured, fxsplit.partition(captured, count=1))
    model[0][0] = nn.Linear(2, 2)
    x = torch.randn(3, 2)
    assert torch.equal(net(x), model(x))


def test_sources_leave_with_their_executor() -> None:
    gc.collect()
    before = set(entries())
    captured = trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), (torch.empty(2, 2),))
    nets = [Executor(captured, fxsplit.partition(captured, count=2))]
    nets += [copy.deepcopy(nets[0]), pickle.loads(pickle.dumps(nets[0]))]
    assert len(entries()) > len(before)
    nets.clear()
    gc.collect()
    assert set(entries()) == before


def test_a_traceback_shows_the_line_and_the_op() -> None:
    captured = trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), (torch.empty(2, 2),))
    net = Executor(captured, fxsplit.partition(captured, count=1))
    with pytest.raises(RuntimeError) as caught:
        net(torch.empty(2, 3))
    shown = "".join(traceback.format_tb(caught.value.__traceback__))
    assert "v2 = m0['0'](v1); v1 = None  # '0'" in shown


def test_functions_of_torch_are_pickled_by_name() -> None:
    functions = [
        *(torch.relu, nn.functional.max_pool2d, nn.functional.gelu, torch.ops.aten.add.Tensor, torch.ops.aten.relu),
        *(getattr, torch.Tensor.add, nn.functional.softmax),
    ]
    code = code_of(stage(lambda graph, node: graph.call_function(max, (node, *functions), {"key": id})), "test")
    copied = pickle.loads(pickle.dumps(code))
    assert all(any(each is function for each in copied._objects.values()) for function in functions)


def test_values_are_freed_with_their_last_use() -> None:
    values: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def step(value: Tensor) -> Tensor:
        values.append(weakref.ref(value))
        alive.append(sum(each() is not None for each in values))
        return value + 1

    code_of(stage(*[call(step)] * 3), "test")(nn.Module(), [torch.ones(3)])
    assert alive == [1, 1, 1]


def in_contexts(function: Any, *contexts: Context) -> Callable[[fx.Graph, fx.Node], fx.Node]:
    def make(graph: fx.Graph, node: fx.Node) -> fx.Node:
        made = graph.call_function(function, (node,))
        made.meta.update(op=type("Named", (), {"name": "op"}), contexts=contexts)
        return made

    return make


def test_ops_run_in_their_contexts_and_a_region_is_opened_once() -> None:
    seen: list[tuple[bool, bool]] = []

    def see(value: Tensor) -> Tensor:
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return value

    again = Context(kind="grad", enabled=False)
    graph = stage(
        in_contexts(see),
        in_contexts(see, AUTOCAST),
        in_contexts(see, AUTOCAST, NO_GRAD),
        call(see),
        in_contexts(see, AUTOCAST),
        in_contexts(see, NO_GRAD),
        in_contexts(see, again),
    )
    source, _ = source_of(graph, bound=True)
    # Autocast stays open around the inner region; an equal region that is opened anew is another one.
    assert source.count("with ") == 4
    code_of(graph, "test")(nn.Module(), [torch.ones(1)])
    inside, both, without = (True, True), (False, True), (False, False)
    assert seen == [(True, False), inside, both, both, inside, without, without]


MODEL = f"""
from torch import nn

class Model(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.odd = nn.ModuleDict({{name: nn.Conv2d(3, 3, 1) for name in {ODD_NAMES!r}}})
        self.head = nn.Linear(3, num_classes)

    def forward(self, x):
        for conv in self.odd.values():
            x = conv(x).relu()
        return self.head(x.mean((2, 3)))
"""


@pytest.fixture
def odd(tmp_path: Path) -> str:
    (tmp_path / "odd.py").write_text(MODEL, encoding="utf-8")
    return f"{tmp_path}/odd.py:Model"


@pytest.mark.parametrize("name", ["table", "tree", "json", "csv", "md", "dot", "html"])
def test_odd_names_are_shown_and_never_obeyed(name: str, odd: str, capsys: pytest.CaptureFixture[str]) -> None:
    cuts = ["--at", "odd.\x1b]0;title\x07\x1b[31m,odd.\u202e"]
    assert main(["inspect", odd, "--img-size", "8", *cuts, "--l2l", "--epochs", "8", "--format", name]) == 0
    out, err = capsys.readouterr()
    assert all(line.isprintable() for line in (out + err).split("\n"))
    assert r"\u202e" in out
    assert r"\x1b]0;" in out or name == "json"


def test_a_run_and_a_check_of_a_model_with_odd_names(
    odd: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", "synthetic", "--img-size", "8", "--train-limit", "8", "-b", "4", "--device", "cpu"]
    run = ["--parts", "4", "--by", "op", "--l2l", "--epochs", "4", "--output", str(tmp_path / "runs")]
    assert main(["train", odd, *data, *run]) == 0
    assert main(["check", odd, "--img-size", "8"]) == 0
    out, err = capsys.readouterr()
    assert all(line.isprintable() for line in (out + err).split("\n"))
    assert not hasattr(sys, "ran_from_a_name")
