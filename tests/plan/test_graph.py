"""The graph as pure data: what it refuses, what is live at a cut, and how a module is found."""

from __future__ import annotations

import re
import weakref
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxsplit.errors import PartitionError
from fxsplit.graph import Graph, Modes, Op, State, Value, cached_by_graphs
from tests.pairs import Pair


def value(name: str, shape: tuple[int, ...] | None = (2, 3)) -> Value:
    return Value(name=name, shape=shape, dtype="float32", bytes_per_sample=12)


def op(name: str, *reads: str, path: str = "", **fields: object) -> Op:
    return replace(
        Op(name=name, path=path, kind="function", target=name, reads=reads, output=value(name)),
        **fields,  # type: ignore[arg-type]
    )


def graph(*ops: Op, outputs: tuple[str, ...] | None = None, inputs: tuple[str, ...] = ("x",)) -> Graph:
    return Graph(
        batch_size=2,
        inputs=tuple(map(value, inputs)),
        ops=ops,
        outputs=(ops[-1].name,) if outputs is None else outputs,
    )


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    inputs = [f"x{index}" for index in range(draw(st.integers(1, 2)))]
    names = list(inputs)
    ops = []
    for index in range(draw(st.integers(1, 8))):
        ops.append(op(f"op{index}", *draw(st.lists(st.sampled_from(names), max_size=3))))
        names.append(f"op{index}")
    outputs = tuple(draw(st.lists(st.sampled_from(names), min_size=1, max_size=2)))
    return graph(*ops, outputs=outputs, inputs=tuple(inputs))


@given(graphs())
def test_a_boundary_is_what_is_written_before_a_cut_and_read_after_it(net: Graph) -> None:
    names = [value.name for value in net.inputs] + [op.name for op in net.ops]
    for cut in range(len(net) + 1):
        written = names[: len(net.inputs) + cut]
        needed = {name for op in net.ops[cut:] for name in op.reads} | set(net.outputs)
        assert net.boundaries[cut] == tuple(name for name in written if name in needed)


@given(graphs())
def test_each_half_runs_on_its_boundary_alone(net: Graph) -> None:
    def run(values: dict[str, str], ops: tuple[Op, ...]) -> dict[str, str]:
        for op in ops:
            values[op.name] = f"{op.name}({','.join(values[name] for name in op.reads)})"
        return values

    inputs = {value.name: value.name for value in net.inputs}
    whole = run(dict(inputs), net.ops)
    for cut in range(len(net) + 1):
        first = run(dict(inputs), net.ops[:cut])
        second = run({name: first[name] for name in net.boundaries[cut]}, net.ops[cut:])
        assert [second[name] for name in net.outputs] == [whole[name] for name in net.outputs]


def test_an_input_that_nobody_reads_is_in_no_boundary() -> None:
    net = graph(op("a", "x"), op("b", "a"), inputs=("x", "unused"))
    assert net.boundaries == (("x",), ("a",), ("b",))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: graph(op("a", "x"), op("a", "x")), "the name 'a' is used twice"),
        (lambda: graph(op("x", "x")), "the name 'x' is used twice"),
        (lambda: graph(op("a", "x"), inputs=("x", "x")), "the name 'x' is used twice"),
        (lambda: graph(op("a", "b"), op("b", "x")), "op 'a' reads 'b' before it is written"),
        (lambda: graph(op("a", "a")), "op 'a' reads 'a' before it is written"),
        (lambda: graph(op("a", "x"), outputs=("b",)), "the output 'b' is never written"),
        (lambda: replace(graph(op("a", "x")), batch_size=0), "the batch size must be at least 1"),
        (lambda: replace(op("a"), name="b"), "op 'b' delivers a value of another name, 'a'"),
        (lambda: value("a", (2, -1)), "value 'a' has a negative size"),
        (lambda: replace(value("a"), bytes_per_sample=-1), "value 'a' has a negative size"),
    ],
)
def test_what_cannot_be_constructed(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build()  # type: ignore[operator]


def test_a_value_has_its_own_storage_unless_it_shares_one() -> None:
    assert value("a").storage == "a"
    assert replace(value("b"), storage="a").storage == "a"


def test_elements_of_state() -> None:
    weight = State(name="w", shape=(4, 3, 2), dtype="float32", bytes=96, is_parameter=True)
    assert (weight.elements, replace(weight, shape=()).elements, replace(weight, shape=(0, 3)).elements) == (
        24,
        1,
        0,
    )


NESTED = graph(
    op("stem.conv", "x", path="stem.conv"),
    op("layer1.0.conv", "stem.conv", path="layer1.0.conv"),
    op("layer1.0:add", "layer1.0.conv", "stem.conv", path="layer1.0"),
    op("layer10.conv", "layer1.0:add", path="layer10.conv"),
)


@pytest.mark.parametrize(
    ("path", "index"), [("stem", 0), ("layer1", 1), ("layer1.0", 1), ("layer1.0.conv", 1), ("layer10", 3)]
)
def test_a_path_finds_the_first_op_in_its_module(path: str, index: int) -> None:
    assert NESTED.find(path) == index


@pytest.mark.parametrize(
    ("path", "hint"),
    [("layer2", "did you mean 'layer1'"), ("stem.con", "did you mean 'stem.conv'"), ("q", "'q'$")],
)
def test_an_unknown_path_is_answered_with_the_nearest(path: str, hint: str) -> None:
    with pytest.raises(PartitionError, match=hint):
        NESTED.find(path)


def test_the_digest_sees_structure_and_neither_costs_nor_the_batch() -> None:
    net = graph(op("a", "x"), op("b", "a", "x"))
    weight = State(name="w", shape=(2, 3), dtype="float32", bytes=24, is_parameter=True)
    assert re.fullmatch("[0-9a-f]{16}", net.digest())
    costly = op("a", "x", macs=9, activation_bytes=7, backward_macs=5, seconds=0.5, output=value("a", (64, 3)))
    other = replace(graph(costly, op("b", "a", "x")), batch_size=64, inputs=(value("x", (64, 9)),))
    assert net.digest() == other.digest()
    others = [
        graph(op("a", "x"), op("b", "x", "a")),
        graph(op("a", "x"), op("b", "a", "x", target="c")),
        graph(op("a", "x"), op("b", "a", "x", state=("w",))),
        replace(net, state=(weight,)),
        replace(net, state=(replace(weight, shape=(2, 4)),)),
        graph(op("a", "x"), op("b", "a", "x"), outputs=("a",)),
        graph(op("a", "x"), op("b", "a", "x"), inputs=("x", "y")),
    ]
    assert len({net.digest(), *(other.digest() for other in others)}) == 8


def test_what_follows_from_a_pair_is_worked_out_once_and_forgotten_with_its_graphs() -> None:
    worked: list[int] = []

    @cached_by_graphs
    def lengths(modes: Modes) -> list[int]:
        worked.append(len(modes.train))
        return [len(modes.train), len(modes.eval)]

    train, evaluation = graph(op("a", "x"), op("b", "a")), graph(op("a", "x"))
    assert lengths(Pair(train, evaluation)) is lengths(Pair(train, evaluation))
    assert lengths(Pair(evaluation, train)) is not lengths(Pair(train, evaluation))
    assert worked == [2, 1]
    gone = weakref.ref(evaluation)
    del evaluation
    assert gone() is None
    found = lengths.__closure__
    assert found is not None
    assert [cell.cell_contents for cell in found if isinstance(cell.cell_contents, dict)] == [{}]
