"""Cuts and partitions: legality against a simulated run, optimality against brute force, small models."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxsplit.errors import PartitionError, UsageError
from fxsplit.graph import Graph, Op, State, Value
from fxsplit.plan.cuts import Cut, cuts, unit_borders
from fxsplit.plan.partition import BALANCES, CUT_KINDS, Partition, most_partitions, partition, with_head
from tests.pairs import Pair, both


def value(name: str, **fields: object) -> Value:
    return replace(
        Value(name=name, shape=(1, 3), dtype="float32", bytes_per_sample=12),
        **fields,  # type: ignore[arg-type]
    )


def op(name: str, *reads: str, path: str | None = None, storage: str = "", size: int = 12, **fields: object) -> Op:
    return replace(
        Op(
            name=name,
            path=name if path is None else path,
            kind="function",
            target=name,
            reads=reads,
            output=value(name, storage=storage or name, bytes_per_sample=size),
        ),
        **fields,  # type: ignore[arg-type]
    )


def graph(ops: Iterable[Op], outputs: tuple[str, ...] = (), inputs: tuple[str, ...] = ("x",)) -> Graph:
    """Every state name ends in its size in bytes; a name that starts with p is a parameter of float32."""
    ops = tuple(ops)
    names = dict.fromkeys(name for op in ops for name in op.state)
    states = (
        State(
            name=name,
            shape=(int(name[1:]) // 4,),
            dtype="float32",
            bytes=int(name[1:]),
            is_parameter=name[0] == "p",
        )
        for name in names
    )
    return Graph(
        batch_size=1,
        inputs=tuple(map(value, inputs)),
        ops=ops,
        outputs=outputs or (ops[-1:] and (ops[-1].name,)) or inputs,
        state=tuple(states),
    )


def chain(*names: str, **fields: object) -> tuple[Op, ...]:
    return tuple(op(name, before, **fields) for before, name in pairwise(("x", *names)))


def legal(net: Graph, eval_graph: Graph | None = None) -> list[int]:
    return [cut.index for cut in cuts(Pair(net, eval_graph or net)) if cut.refusal is None]


def refusals(train: Graph, eval_graph: Graph) -> list[str | None]:
    return [cut.refusal for cut in cuts(Pair(train, eval_graph))]


# Which cuts are legal


@st.composite
def programs(draw: st.DrawFn) -> Graph:
    """Ops that compute, look at a part of an earlier value, or write into one."""
    storage = {"x": "x"}
    ops = []
    for index in range(draw(st.integers(2, 8))):
        name = f"op{index}"
        reads = draw(st.lists(st.sampled_from(sorted(storage)), min_size=1, max_size=2))
        act = draw(st.sampled_from(["compute", "compute", "view", "write"]))
        storage[name] = name if act == "compute" else storage[reads[0]]
        mutates = (reads[0],) if act == "write" else ()
        ops.append(op(name, *reads, storage=storage[name], mutates=mutates))
    return graph(ops, outputs=tuple(draw(st.lists(st.sampled_from(sorted(storage)), min_size=1, max_size=2))))


def run(net: Graph, ops: Iterable[Op], memory: dict[str, object], known: set[str]) -> dict[str, object]:
    """Run `ops` over a memory of storages, allowed to read the values in `known` only."""
    memory = dict(memory)
    known = set(known)
    for op in ops:
        assert known.issuperset(op.reads)
        storage = net.values[op.name].storage
        if op.mutates or storage == op.name:
            memory[storage] = (op.name, *(memory[net.values[name].storage] for name in op.reads))
        known.add(op.name)
    return memory


@given(programs())
def test_a_cut_is_legal_when_the_rest_leaves_its_boundary_as_it_was(net: Graph) -> None:
    whole = run(net, net.ops, {"x": "x"}, {"x"})
    for cut in cuts(both(net)):
        first = run(net, net.ops[: cut.index], {"x": "x"}, {"x"})
        storages = {net.values[name].storage for name in cut.boundary}
        handed_over = {storage: first[storage] for storage in storages}
        second = run(net, net.ops[cut.index :], handed_over, set(cut.boundary))
        assert all(second[net.values[name].storage] == whole[net.values[name].storage] for name in net.outputs)
        untouched = all(second[storage] == first[storage] for storage in storages)
        assert (cut.refusal is None) == untouched


@st.composite
def two_modes(draw: st.DrawFn) -> tuple[Graph, Graph]:
    """One list of ops, some of one mode only: the other mode reads what such an op reads in its place."""
    ops = [op("op0", "x")]
    modes = {"x": "both", "op0": "both"}
    for index in range(1, draw(st.integers(2, 9))):
        earlier = st.sampled_from(sorted(modes))
        ops.append(op(f"op{index}", *draw(st.lists(earlier, min_size=1, max_size=2))))
        modes[f"op{index}"] = draw(st.sampled_from(["both", "both", "train", "eval"]))
    first_read = {op.name: op.reads[0] for op in ops}

    def found(name: str, mode: str) -> str:
        return name if modes[name] in ("both", mode) else found(first_read[name], mode)

    def one(mode: str) -> Graph:
        mine = [op for op in ops if modes[op.name] in ("both", mode)]
        mine = [replace(op, reads=tuple(found(name, mode) for name in op.reads)) for op in mine]
        return graph(mine, outputs=(found(ops[-1].name, mode),))

    return one("train"), one("eval")


@given(two_modes())
def test_a_cut_is_legal_when_some_twin_has_all_that_both_modes_need(graphs: tuple[Graph, Graph]) -> None:
    train, eval_graph = graphs
    common = train.values.keys() & eval_graph.values.keys()

    def before(net: Graph, cut: int) -> set[str]:
        return {op.name for op in net.ops[:cut]} & common

    def needed(net: Graph, cut: int) -> set[str]:
        return {*net.boundaries[cut]} & {name for op in net.ops[cut:] for name in op.reads}

    for cut in cuts(Pair(train, eval_graph)):
        twins = [j for j in range(len(eval_graph) + 1) if before(eval_graph, j) == before(train, cut.index)]
        unions = {j: {*train.boundaries[cut.index], *eval_graph.boundaries[j]} for j in twins}
        assert set(cut.boundary) == unions[cut.eval_index]
        missed = [(needed(train, cut.index) | needed(eval_graph, j)) - common for j in twins]
        assert (cut.refusal is None) == (not all(missed))
        same = [j for j in twins if eval_graph.boundaries[j] == train.boundaries[cut.index]]
        assert not same or eval_graph.boundaries[cut.eval_index] == train.boundaries[cut.index]
    twins = [0, *(cut.eval_index for cut in cuts(Pair(train, eval_graph))), len(eval_graph)]
    assert twins == sorted(twins)


def test_a_cut_tells_where_it_is_and_what_passes() -> None:
    net = graph([op("a", "x", size=4), op("b", "a", size=20), op("c", "a", "b", path="block.c")])
    assert cuts(both(net)) == (
        Cut(
            index=1, eval_index=1, path="b", boundary=("a",), bytes_per_sample=4, single=True, refusal=None,
            natural=True,
        ),
        Cut(
            index=2, eval_index=2, path="block", boundary=("a", "b"), bytes_per_sample=24, single=False, refusal=None,
            natural=False,
        ),
    )  # fmt: skip


def test_a_partition_is_printed_in_a_line() -> None:
    net = graph([op("op0", "x", state=("p8",), macs=1200), op("op1", "op0"), op("op2", "op1", macs=5)])
    assert [str(part) for part in partition(both(net), at=["op2"])] == [
        "0: from op0, 2 ops, 2 parameters, 1,200 multiply-adds",
        "1: from op2, 1 op, 0 parameters, 5 multiply-adds",
    ]


def test_a_functional_dropout_of_training_is_passed_by() -> None:
    train = graph(chain("conv", "dropout", "fc"))
    eval_graph = graph(chain("conv", "fc"))
    before, after = cuts(Pair(train, eval_graph))
    assert (before.index, before.eval_index, before.boundary, before.refusal) == (1, 1, ("conv",), None)
    assert after.refusal == "the value 'dropout' exists only in training"
    assert refusals(eval_graph, train) == [None]


def test_of_several_twins_the_one_with_the_same_boundary() -> None:
    train = graph([op("a", "x"), op("b", "a"), op("c", "a", "b")])
    eval_graph = graph([op("a", "x"), op("peek", "x"), op("b", "a"), op("c", "a", "b")])
    assert [(cut.eval_index, cut.boundary) for cut in cuts(Pair(train, eval_graph))] == [
        (2, ("a",)),
        (3, ("a", "b")),
    ]


def test_without_such_a_twin_one_whose_boundary_training_has() -> None:
    train = graph([op("a", "x"), op("b", "a", "x")])
    eval_graph = graph([op("e", "x"), op("a", "x"), op("peek", "e"), op("b", "a")])
    (cut,) = cuts(Pair(train, eval_graph))
    assert (cut.eval_index, cut.boundary, cut.refusal) == (3, ("x", "a"), None)


def test_later_cuts_have_no_earlier_twin() -> None:
    train = graph([op("a", "x"), op("t", "x"), op("b", "a")], inputs=("x", "z"))
    eval_graph = graph([op("a", "x"), op("peek", "z"), op("b", "a", "x")], inputs=("x", "z"))
    # The second cut's boundary, a alone, is that of no twin; the first twin would do, but lies before `peek`.
    assert [(cut.eval_index, cut.boundary) for cut in cuts(Pair(train, eval_graph))] == [(2, ("x", "a"))] * 2


def test_a_value_that_only_evaluation_needs_later_is_passed_on_in_both() -> None:
    train = graph([op("a", "x"), op("b", "a"), op("c", "b")])
    eval_graph = graph([op("a", "x"), op("b", "a"), op("c", "b", "a")])
    assert [cut.boundary for cut in cuts(Pair(train, eval_graph))] == [("a",), ("a", "b")]
    assert legal(train, eval_graph) == [1, 2]


def test_a_value_that_only_evaluation_has_is_refused() -> None:
    train = graph([op("a", "x"), op("b", "a"), op("c", "b")])
    eval_graph = graph([op("a", "x"), op("e", "a"), op("b", "a"), op("c", "b", "e")])
    assert refusals(train, eval_graph) == [None, "the value 'e' exists only in evaluation"]


def test_between_ops_in_another_order_there_is_no_cut() -> None:
    train = graph([op("a", "x"), op("b", "a"), op("c", "a"), op("d", "b", "c"), op("e", "d")])
    eval_graph = graph([op("a", "x"), op("c", "a"), op("b", "a"), op("d", "b", "c"), op("e", "d")])
    assert refusals(train, eval_graph) == [
        None,
        "op 'b' runs before it in training, after it in evaluation",
        None,
        None,
    ]


def test_a_cut_before_an_op_that_writes_into_the_boundary_is_refused() -> None:
    net = graph([op("conv", "x"), op("relu", "conv", mutates=("conv",), storage="conv"), op("fc", "relu")])
    assert refusals(net, net) == ["op 'relu' writes in place into the value 'conv' after it", None]


def test_a_write_through_a_view_counts_and_in_either_mode() -> None:
    plain = graph([op("a", "x"), op("view", "a", storage="a"), op("relu", "view"), op("add", "a", "relu")])
    relu = replace(plain.ops[2], mutates=("view",), output=value("relu", storage="a"))
    writing = replace(plain, ops=(*plain.ops[:2], relu, plain.ops[3]))
    assert refusals(plain, plain) == [None, None, None]
    for pair in ((plain, writing), (writing, plain)):
        assert refusals(*pair) == [
            "op 'relu' writes in place into the value 'a' after it",
            "op 'relu' writes in place into the value 'a' after it",
            None,
        ]


def test_statistics_that_move_on_both_sides_forbid_the_cuts_between() -> None:
    def net(mutates: tuple[str, ...]) -> Graph:
        entered_twice = {"path": "bn", "state": ("p8", "b8"), "mutates": mutates}
        return graph(
            [
                op("a", "x"),
                op("bn", "a", **entered_twice),
                op("b", "bn"),
                op("bn@1", "b", **entered_twice),
                op("c", "bn@1"),
            ]
        )

    reason = "ops on both sides hold 'b8', and one of them changes it"
    assert refusals(net(("b8",)), net(())) == [None, reason, reason, None]
    assert refusals(net(()), net(())) == [None] * 4


def test_one_change_is_enough_when_the_other_side_reads() -> None:
    reads, writes = op("a", "x", state=("b8",)), op("c", "b", state=("b8",), mutates=("b8",))
    net = graph([reads, op("b", "a"), writes, op("d", "c")])
    assert [reason is None for reason in refusals(net, net)] == [False, False, True]
    first_writes = graph([replace(reads, mutates=("b8",)), op("b", "a"), replace(writes, mutates=()), op("d", "c")])
    assert [reason is None for reason in refusals(first_writes, first_writes)] == [False, False, True]


@pytest.mark.parametrize(("holder", "words"), [("bn.", "'bn'"), ("stem.bn.", "'stem.bn'"), ("", "the model itself")])
def test_no_cut_parts_ops_that_change_buffers_of_one_module(holder: str, words: str) -> None:
    """As a counter of batches and the statistics that they move; another module's buffers are another matter."""

    def net(last: str) -> Graph:
        changes = [(f"{holder}counter",), (f"{holder}mean", f"{holder}variance"), (last,)]
        ops = [*chain("a", "count", "between", "norm", "b", "last")]
        for index, names in zip((1, 3, 5), changes, strict=True):
            ops[index] = replace(ops[index], mutates=names)
        return graph(ops)

    reason = f"ops on both sides change buffers of {words}"
    eval_graph = graph(chain("a", "count", "between", "norm", "b", "last"))
    apart, together = net("other.mean"), net(f"{holder}scale")
    assert refusals(apart, eval_graph) == refusals(eval_graph, apart) == [None, reason, reason, None, None]
    assert refusals(together, eval_graph) == [None, reason, reason, reason, reason]


def test_a_tied_weight_may_be_used_on_both_sides() -> None:
    net = graph(
        [
            op("embed", "x", state=("p40",)),
            op("block", "embed", state=("p8",)),
            op("head", "block", state=("p40",)),
        ]
    )
    assert legal(net) == [1, 2]
    first, last = partition(both(net), at=["head"])
    assert (first.state, last.state) == (("p40", "p8"), ())


def test_shared_memory_is_counted_once() -> None:
    net = graph(
        [
            op("a", "x", size=100),
            op("left", "a", storage="a", size=50),
            op("right", "a", storage="a", size=50),
            op("whole", "a", storage="a", size=100),
            op("wide", "a", storage="a", size=900),
            op("end", "left", "right", "whole", "wide", "x"),
        ]
    )
    assert [cut.bytes_per_sample for cut in cuts(both(net))] == [112, 112, 112, 112, 112]
    only_left = graph([op("a", "x", size=100), op("left", "a", storage="a", size=50), op("end", "left")])
    assert [cut.bytes_per_sample for cut in cuts(both(only_left))] == [100, 50]


def test_a_model_without_ops_cannot_be_cut() -> None:
    with pytest.raises(PartitionError, match="has no operations"):
        partition(both(graph([])), count=1)


# Partitions


def test_partitions_own_and_sum_up() -> None:
    train = graph(
        [
            op("stem.conv", "x", "mask", state=("p8",), macs=5, activation_bytes=1, size=7),
            op(
                "stem.bn",
                "stem.conv",
                state=("p4", "b16"),
                mutates=("b16",),
                macs=6,
                activation_bytes=2,
                size=9,
            ),
            op("drop", "stem.bn", macs=7, activation_bytes=4),
            op("fc", "drop", "mask", state=("p40", "p8"), macs=8, activation_bytes=8),
            op("aux", "fc", macs=9, activation_bytes=16),
        ],
        inputs=("x", "mask", "unused"),
        outputs=("fc", "aux"),
    )
    eval_graph = graph(
        [
            op("stem.conv", "x", "mask", state=("p8",)),
            op("stem.bn", "stem.conv", state=("p4", "b16")),
            op("fc", "stem.bn", "mask", state=("p40", "p8")),
        ],
        inputs=("x", "mask", "unused"),
    )
    first, second = partition(Pair(train, eval_graph), at=["drop"])
    assert first == Partition(
        index=0, name="stem", start=0, stop=2, eval_start=0, eval_stop=2,
        reads=("x", "mask"), writes=("mask", "stem.bn"), state=("p8", "p4", "b16"),
        parameters=3, state_bytes=28, macs=11, activation_bytes=3, boundary_bytes=24,
    )  # fmt: skip
    assert second == Partition(
        index=1, name="drop", start=2, stop=5, eval_start=2, eval_stop=3,
        reads=("mask", "stem.bn"), writes=("fc", "aux"), state=("p40",),
        parameters=10, state_bytes=40, macs=24, activation_bytes=28, boundary_bytes=21,
    )  # fmt: skip


def test_state_that_evaluation_uses_first_is_owned_there() -> None:
    train = graph([op("a", "x"), op("b", "a"), op("c", "b", state=("p8",))])
    eval_graph = graph([op("a", "x", state=("p8", "p12")), op("b", "a"), op("c", "b")])
    assert [part.state for part in partition(Pair(train, eval_graph), count=3)] == [("p8", "p12"), (), ()]
    late = graph([op("a", "x"), op("b", "a"), op("c", "b", state=("p12",))])
    assert [part.state for part in partition(Pair(train, late), count=3)] == [(), (), ("p8", "p12")]


@given(two_modes(), st.data())
def test_partitions_cover_the_model_and_hand_over_what_they_say(
    graphs: tuple[Graph, Graph], data: st.DataObject
) -> None:
    train, eval_graph = graphs
    count = data.draw(st.integers(1, len(legal(train, eval_graph)) + 1))
    parts = partition(Pair(train, eval_graph), count=count)
    assert [part.index for part in parts] == list(range(count))
    assert (parts[0].start, parts[0].eval_start) == (0, 0)
    assert (parts[-1].stop, parts[-1].eval_stop) == (len(train), len(eval_graph))
    for earlier, later in pairwise(parts):
        assert (earlier.stop, earlier.eval_stop, earlier.writes) == (
            later.start,
            later.eval_start,
            later.reads,
        )
    assert set(parts[-1].writes) == {*train.outputs, *eval_graph.outputs}
    for net, spans in (
        (train, [(part.start, part.stop) for part in parts]),
        (eval_graph, [(part.eval_start, part.eval_stop) for part in parts]),
    ):
        for part, (start, stop) in zip(parts, spans, strict=True):
            held = {*part.reads}
            for each in net.ops[start:stop]:
                assert held.issuperset(each.reads)
                held.add(each.name)
            assert held.issuperset(set(part.writes) & net.values.keys())
    again = partition(Pair(train, eval_graph), at=[part.name for part in parts[1:]]) if count > 1 else parts
    assert again == parts


@pytest.mark.parametrize(
    "wrong", [{"start": 2, "stop": 2}, {"start": -1}, {"eval_start": 3, "eval_stop": 2}, {"eval_start": -1}]
)
def test_a_partition_holds_an_op(wrong: dict[str, int]) -> None:
    part = partition(both(graph(chain("a", "b"))), count=1)[0]
    with pytest.raises(ValueError, match="holds no operation"):
        replace(part, **wrong)  # type: ignore[arg-type]


# Cuts by path

ADD = "layer1.0:add"
NESTED = graph(
    [
        op("stem", "x"),
        op("layer1.0.conv", "stem"),
        op(ADD, "layer1.0.conv", "stem", path="layer1.0"),
        op("layer1.0:relu", ADD, path="layer1.0", mutates=(ADD,), storage=ADD),
        op("layer1.1.conv", "layer1.0:relu"),
        op("flatten", "layer1.1.conv", path=""),
        op("layer2", "flatten"),
        op("layer2@1", "layer2", path="layer2"),
    ]
)  # fmt: skip


@pytest.mark.parametrize(
    ("at", "starts", "names"),
    [
        (["layer1"], [0, 1], ["stem", "layer1"]),
        (["layer2", "layer1.1", "layer2"], [0, 4, 6], ["stem", "layer1.1", "layer2"]),
        (["layer1.0:add", "flatten"], [0, 2, 5], ["stem", "layer1.0:add", "flatten"]),
        (["layer2", "layer2@1"], [0, 6, 7], ["stem", "layer2", "layer2@1"]),
    ],
)
def test_cuts_by_path(at: list[str], starts: list[int], names: list[str]) -> None:
    parts = partition(both(NESTED), at=at)
    assert [part.start for part in parts] == starts
    assert [part.name for part in parts] == names


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("layer3", "no operation of the model lies in 'layer3'; did you mean 'layer2' or 'layer1'?"),
        (
            "q",
            "no operation of the model lies in 'q'; it can be cut before 'layer1' or 'layer1.0' or 'layer1.0.conv'",
        ),
        (
            "layer1.0:relu",
            "the model cannot be cut before 'layer1.0:relu': op 'layer1.0:relu' writes in place into the "
            "value 'layer1.0:add' after it; it can be cut before 'layer1.0:add' or 'layer1.1'",
        ),
        (
            "stem",
            "the model cannot be cut before 'stem': it holds the first operation of the model; "
            "it can be cut before 'layer1'",
        ),
    ],
)
def test_a_path_that_gives_no_cut(place: str, message: str) -> None:
    with pytest.raises(PartitionError, match=f"^{re.escape(message)}$"):
        partition(both(NESTED), at=["layer2", place])


def test_every_wrong_path_is_told_at_once() -> None:
    with pytest.raises(PartitionError) as caught:
        partition(both(NESTED), at=["layer3", "layer2", "stem", "layer3"])
    assert str(caught.value) == (
        "no operation of the model lies in 'layer3'; did you mean 'layer2' or 'layer1'?; "
        "the model cannot be cut before 'stem': it holds the first operation of the model; "
        "it can be cut before 'layer1'"
    )


def test_a_path_of_a_model_that_cannot_be_cut() -> None:
    net = graph([op("a", "x"), op("b", "a", mutates=("a",), storage="a")])
    with pytest.raises(PartitionError, match="none of its cuts is legal"):
        partition(both(net), at=["b"])


@pytest.mark.parametrize("how", [{}, {"count": 2, "at": ["layer2"]}])
def test_either_a_count_or_paths(how: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="and not both"):
        partition(both(NESTED), **how)  # type: ignore[arg-type]


# Cuts by count


@st.composite
def networks(draw: st.DrawFn) -> Graph:
    """Chains with skips, in which some values are numbers and some writes are in place."""
    number = st.sampled_from([0, 1, 19, 20, 21, 100, 104, 105, 106])
    ops = []
    names = ["x"]
    for index in range(draw(st.integers(1, 9))):
        skip = draw(st.sampled_from(names[-3:]))
        made = op(
            f"op{index}",
            names[-1],
            skip,
            size=draw(number),
            state=tuple(draw(st.lists(st.sampled_from(["p4", "p8", "p20", "b40"]), max_size=2))),
            macs=draw(number),
            activation_bytes=draw(number),
            seconds=draw(number) / 1000,
            mutates=(skip,) if draw(st.integers(0, 9)) == 0 else (),
        )
        if draw(st.integers(0, 5)) == 0:
            made = replace(made, output=value(made.name, shape=None, bytes_per_sample=draw(st.sampled_from([0, 9]))))
        ops.append(made)
        names.append(made.name)
    return graph(ops)


def weight(part: Partition, net: Graph, balance: str) -> int:
    if balance == "macs":
        return part.macs
    if balance == "activations":
        return part.activation_bytes
    if balance == "seconds":
        return sum(round(1e9 * (op.seconds or 0)) for op in net.ops[part.start : part.stop])
    return sum(state.bytes for state in net.state if state.name in part.state and state.is_parameter)


@given(networks(), st.sampled_from(BALANCES), st.sampled_from(CUT_KINDS), st.data())
def test_of_all_divisions_the_best(net: Graph, balance: str, by: str, data: st.DataObject) -> None:
    units = {op.path: data.draw(st.sampled_from("AB")) for op in net.ops}
    others = [after.name for before, after in pairwise(net.ops) if units[before.path] != units[after.path]]
    allowed = [cut for cut in cuts(both(net)) if cut.refusal is None]
    if by != "op":
        allowed = [cut for cut in allowed if (cut.natural if by == "natural" else cut.path in others)]
    assert most_partitions(both(net), by=by, units=units) == len(allowed) + 1
    count = data.draw(st.integers(1, len(allowed) + 1))

    def weights(parts: tuple[Partition, ...]) -> list[int]:
        found = [weight(part, net, balance) for part in parts]
        return found if any(found) else [part.stop - part.start for part in parts]

    def idle(parts: tuple[Partition, ...]) -> int:
        return weights(parts).count(0)

    def flaws(parts: tuple[Partition, ...]) -> tuple[int, int, int, int]:
        chosen = [cut for cut in allowed if cut.index in [part.start for part in parts[1:]]]
        several = sum(not is_single(cut, net) for cut in chosen)
        unnatural = sum(not cut.natural for cut in chosen)
        return several, unnatural, max(weights(parts)), sum(part.boundary_bytes for part in parts[1:])

    every = [
        partition(both(net), at=[cut.path for cut in way]) if way else partition(both(net), count=1)
        for way in combinations(allowed, count - 1)
    ]
    optimum = min(max(weights(parts)) for parts in every)
    fewest = min(map(idle, every))
    near = [parts for parts in every if idle(parts) == fewest and 100 * max(weights(parts)) <= 105 * optimum]
    found = partition(both(net), count=count, balance=balance, by=by, units=units)
    assert found in every
    assert found in near
    assert flaws(found) == min(map(flaws, near))


def is_single(cut: Cut, net: Graph) -> bool:
    values = [net.values[name] for name in cut.boundary]
    carriers = [value for value in values if value.shape is not None or value.bytes_per_sample]
    return len(carriers) == 1 and carriers[0].shape is not None


@pytest.mark.parametrize(("over", "start"), [(5, 3), (6, 2)])
def test_a_cut_at_a_single_tensor_may_cost_five_percent(over: int, start: int) -> None:
    """Inside of the residual block two tensors cross, and both partitions weigh 100."""
    net = graph(
        [
            op("a", "x", macs=60),
            op("b", "a", macs=40),
            op("add", "a", "b", macs=over),
            op("c", "add", macs=100 - over),
        ]
    )
    assert [part.start for part in partition(both(net), count=2)] == [0, start]


@pytest.mark.parametrize(("over", "start"), [(5, 2), (6, 1)])
def test_a_natural_cut_may_cost_five_percent(over: int, start: int) -> None:
    net = graph(
        [
            op("wide", "x", size=80, macs=100),
            op("narrow", "wide", size=20, macs=over),
            op("wider", "narrow", size=80, macs=100 - over),
        ]
    )
    assert [cut.natural for cut in cuts(both(net))] == [False, True]
    assert [part.start for part in partition(both(net), count=2)] == [0, start]


def test_few_cuts_at_several_tensors_go_before_many_natural_ones() -> None:
    net = graph(
        [
            op("a", "x", size=400, macs=100),
            op("b", "a", size=10, macs=100),
            op("add", "a", "b", size=40, macs=100),
            op("c", "add", size=4, macs=50),
            op("d", "c", size=40, macs=50),
        ]
    )
    assert [(cut.single, cut.natural) for cut in cuts(both(net))] == [
        (True, False), (False, False), (True, False), (True, True),
    ]  # fmt: skip
    assert [part.start for part in partition(both(net), count=3)] == [0, 1, 3]


def test_dense_blocks_are_cut_within() -> None:
    """Every layer reads what all before it in its block made, so that single tensors pass between the blocks alone."""
    ops: list[Op] = []
    last = "x"
    for number in range(3):
        features = [last]
        for layer in range(8):
            ops.append(op(f"block{number}.layer{layer}", *features, macs=10 + layer))
            features.append(ops[-1].name)
        ops += [op(f"block{number}.cat", *features), op(f"pool{number}", f"block{number}.cat")]
        last = ops[-1].name
    ops.append(op("head", last, macs=1))
    net = graph(ops)
    macs = [part.macs for part in partition(both(net), count=6)]
    assert macs == [60, 48, 60, 48, 60, 49]


def test_no_partition_is_without_work_while_there_is_work_for_it() -> None:
    # The two cuts around `b` are the cheapest.
    sizes, weights = (8, 8, 80, 8, 8), (100, 0, 10, 10, 0)
    before = ("x", *"abcd")
    net = graph(
        op(name, read, size=size, macs=macs)
        for name, read, size, macs in zip("abcde", before, sizes, weights, strict=True)
    )
    for count in (2, 3):
        assert 0 not in [part.macs for part in partition(both(net), count=count)]
    assert [part.macs for part in partition(both(net), count=4)].count(0) == 1
    assert [part.macs for part in partition(both(net), count=5)] == [100, 0, 10, 10, 0]


def test_numbers_may_cross_beside_the_tensor_but_no_tuple_of_tensors() -> None:
    sizes = op("sizes", "a", macs=1, output=value("sizes", shape=None, bytes_per_sample=0))
    halves = op("halves", "b", macs=9, output=value("halves", shape=None, bytes_per_sample=12))
    net = graph([op("a", "x", macs=1), sizes, op("b", "a", "sizes", macs=1), halves, op("c", "halves", macs=9)])
    assert [cut.single for cut in cuts(both(net))] == [True, True, True, False]


def test_without_any_weight_the_number_of_ops_counts() -> None:
    net = graph(chain(*"abcdef", seconds=0.0))
    for balance in BALANCES:
        assert [part.start for part in partition(both(net), count=3, balance=balance)] == [0, 2, 4]


def test_equal_balances_are_decided_by_the_bytes_that_cross() -> None:
    sizes = (8, 2, 5, 8, 1)
    net = graph(
        [
            replace(each, output=value(each.name, bytes_per_sample=size))
            for each, size in zip(chain(*"abcde"), sizes, strict=True)
        ]
    )
    # Two partitions of at most three ops: after b or after c.
    assert [part.start for part in partition(both(net), count=2)] == [0, 2]


def test_each_balance_cuts_elsewhere() -> None:
    net = graph(
        [
            op("a", "x", macs=9, activation_bytes=1, state=("p4",), seconds=0.0),
            op("b", "a", macs=4, activation_bytes=1, state=("p8", "b400"), seconds=3e-9),
            op("c", "b", macs=4, activation_bytes=1, state=("p4",), seconds=4e-9),
            op("d", "c", macs=1, activation_bytes=9, state=("p400",), seconds=8e-9),
            op("e", "d", macs=1, activation_bytes=9, state=("p404",), seconds=0.0),
        ]
    )
    starts = {balance: partition(both(net), count=2, balance=balance)[1].start for balance in BALANCES}
    assert starts == {"macs": 1, "params": 4, "activations": 4, "seconds": 3}
    with pytest.raises(UsageError, match="not by 'mac'; did you mean 'macs'"):
        partition(both(net), count=2, balance="mac")


def test_seconds_that_nobody_measured_balance_nothing() -> None:
    net = graph([op("a", "x", seconds=0.5), *(op(name, before) for before, name in pairwise("abc"))])
    with pytest.raises(UsageError, match="because 2 of 3 ops, such as 'b', have none; time them"):
        partition(both(net), count=2, balance="seconds")


# Cuts by natural places and by units

BLOCKS = graph(
    [
        op("stem", "x"),
        op("act", "stem", path=""),
        op("layer1.0.conv", "act"),
        op("layer1.0:add", "layer1.0.conv", "act", path="layer1.0"),
        op("layer1.1.act", "layer1.0:add"),
        op("layer1.1.conv", "layer1.1.act"),
        op("flatten", "layer1.1.conv", path=""),
        op("head", "flatten"),
    ]
)
UNITS = {"stem": "0", "layer1": "unused", "layer1.0": "1", "layer1.1": "2", "head": "3"}


def test_only_borders_of_units_are_cut_by_block() -> None:
    """An op outside of all units goes with what comes before it, or with the first unit."""
    assert unit_borders(BLOCKS, UNITS) == {2, 4, 7}
    assert unit_borders(BLOCKS, {path: name for path, name in UNITS.items() if path != "stem"}) == {4, 7}
    assert unit_borders(BLOCKS, {"layer1": "a", "head": "a"}) == set()
    assert unit_borders(BLOCKS, {}) == set()
    assert [part.name for part in partition(both(BLOCKS), count=4, by="block", units=UNITS)] == [
        "stem", "layer1", "layer1.1", "head",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            {"by": "block", "units": UNITS},
            "5 partitions need 4 cuts and the model has 3 at the borders of its blocks; ask for at most 4 partitions, "
            "or cut by op",
        ),
        (
            {"by": "natural"},
            "5 partitions need 4 cuts and the model has 2 natural ones; ask for at most 3 partitions, or cut by op",
        ),
    ],
)
def test_too_few_places_of_the_wanted_sort(how: dict[str, Any], message: str) -> None:
    net = replace(
        BLOCKS, ops=tuple(replace(op, macs=op.name in ("stem", "layer1.0.conv", "head")) for op in BLOCKS.ops)
    )
    with pytest.raises(PartitionError, match=f"^{re.escape(message)}$"):
        partition(both(net), count=5, **how)


def test_an_unknown_sort_of_place() -> None:
    with pytest.raises(UsageError, match="cut by op, natural, block, not by 'blocks'; did you mean 'block'"):
        partition(both(BLOCKS), count=2, by="blocks")


def test_one_partition_is_the_whole_model() -> None:
    (whole,) = partition(both(NESTED), count=1)
    assert (whole.start, whole.stop, whole.reads, whole.writes) == (0, 8, ("x",), ("layer2@1",))


def test_too_many_partitions() -> None:
    with pytest.raises(
        PartitionError, match="8 partitions need 7 cuts and the model has 6 legal ones; ask for at most 7"
    ):
        partition(both(NESTED), count=8)
    assert len(partition(both(NESTED), count=7)) == 7
    with pytest.raises(UsageError, match="count is 0, but must be a whole number, at least 1"):
        partition(both(NESTED), count=0)


# The head


def starts(net: Pair, count: int) -> list[str]:
    return [part.name for part in with_head(net, partition(net, count=count))]


def test_the_head_becomes_a_partition_at_its_smallest_boundary() -> None:
    """Between the last two ops with parameters the pooling leaves least, and the flattening as little."""
    body = op("body", "x", state=("p8",))
    rest = (
        op("pool", "body", size=4),
        op("flat", "pool", size=4),
        op("head", "flat", state=("p4",)),
        op("out", "head"),
    )
    net = both(graph((body, *rest), outputs=("out",)))
    assert starts(net, 1) == ["body", "head"]
    assert [part.stop - part.start for part in with_head(net, partition(net, count=1))] == [3, 2]


def test_a_head_that_is_a_partition_already_stays_one() -> None:
    net = both(graph((op("body", "x", state=("p8",), macs=1), op("head", "body", state=("p4",), macs=1)), ("head",)))
    assert starts(net, 2) == ["body", "head"]
    assert with_head(net, partition(net, count=2)) == partition(net, count=2)


def test_without_a_legal_cut_before_it_the_head_stays_where_it_is() -> None:
    body, write = op("body", "x", state=("p8",)), op("write", "body", mutates=("body",), state=("p4",))
    net = both(graph((body, write, op("out", "body")), ("out",)))
    assert with_head(net, partition(net, count=1)) == partition(net, count=1)


@pytest.mark.parametrize("states", [((), ()), (("p8",), ()), ((), ("p8",))])
def test_a_model_with_one_op_with_parameters_or_none_keeps_its_partitions(states: tuple[tuple[str, ...], ...]) -> None:
    first, second = states
    net = both(graph((op("a", "x", state=first), op("b", "a", state=second)), ("b",)))
    found = with_head(net, partition(net, count=1))
    assert [part.parameters for part in found if part.parameters] == [2] * any(states)
    assert found[-1].parameters or not second


def test_a_module_inside_of_one_operation_is_told_from_one_that_is_not_there(graph: Graph) -> None:
    """As where the rest of a forward is one op, or a module is kept whole: its parts are known by their parameters."""
    ops = [replace(op, state=("block.conv.weight",)) if op.name == "op2" else op for op in graph.ops]
    net = both(replace(graph, ops=tuple(ops), state=(*graph.state, replace(graph.state[0], name="block.conv.weight"))))
    with pytest.raises(
        PartitionError, match=r"before 'block\.conv': it is a part of 'op2', which is one operation; it can"
    ):
        partition(net, at=["block.conv"])
    with pytest.raises(PartitionError, match=r"no operation of the model lies in 'block\.co'"):
        partition(net, at=["block.co"])
