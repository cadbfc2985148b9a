"""The tree of modules: nothing lost, nothing counted twice, and only equal blocks in one row."""

from __future__ import annotations

import pytest

import fxsplit
from fxsplit.graph import Graph, Op, OpKind, State, Value
from fxsplit.pages.outline import Block, outline
from fxsplit.plan.partition import partition
from fxsplit.plan.schedule import schedule
from fxsplit.report import Inspection
from fxsplit.spec import RunSpec
from tests.pairs import both


def inspected(*ops: tuple[str, str], count: int = 1, classes: dict[str, str] | None = None) -> Inspection:
    """Ops in a row, each by its name and its target, or by its path if its name has no `:`."""
    names = ["x", *(name for name, _ in ops)]
    made = []
    for index, (name, target) in enumerate(ops):
        path, _, called = name.partition(":")
        kind: OpKind = "function" if called else "module"
        made.append(
            Op(
                name=name,
                path=path,
                kind=kind,
                target=target,
                reads=(names[index],),
                output=Value(name=name, shape=(1, 8), dtype="float32", bytes_per_sample=32),
                state=(f"{path}.weight",),
                macs=2**index,
                activation_bytes=3 * 2**index,
            )
        )
    weights = {name: None for op in made for name in op.state}
    graph = Graph(
        batch_size=1,
        inputs=(Value(name="x", shape=(1, 8), dtype="float32", bytes_per_sample=32),),
        ops=tuple(made),
        outputs=(names[-1],),
        state=tuple(
            State(name=name, shape=(2**index,), dtype="float32", bytes=4, is_parameter=True)
            for index, name in enumerate(weights)
        ),
    )
    plan = schedule("standard", partitions=partition(both(graph), count=count), epochs=1)
    return Inspection(
        model="m",
        input_shape=(1, 8),
        train=graph,
        eval=graph,
        classes=classes or {},
        plan=plan,
        tied={},
        opaque={},
    )


def drawn(block: Block) -> object:
    """Names and numbers of blocks, nested."""
    name = f"{block.name} x {block.count}" if block.count > 1 else block.name
    return (name, *map(drawn, block.blocks)) if block.blocks else name


def tree(inspection: Inspection) -> list[object]:
    return [drawn(block) for partition in outline(inspection).partitions for block in partition.blocks]


def test_ops_lie_in_their_modules() -> None:
    found = tree(inspected(("stem", ""), ("body.a", ""), ("body.b.c", ""), ("body.b.d", ""), ("body:add", "add")))
    assert found == ["stem", ("body", "a", ("b", "c", "d"), "add")]


def test_a_module_with_one_thing_in_it_is_one_line() -> None:
    inspection = inspected(
        ("a.b.c", ""), ("d.e:gelu", "torch.gelu"), classes={"a.b.c": "Linear", "d.e": "Activation", "a": "Outer"}
    )
    assert [(block.name, block.what) for block in outline(inspection).partitions[0].blocks] == [
        ("a.b.c", "Linear"),
        ("d.e", "Activation"),
    ]


def test_equal_neighbours_are_told_once() -> None:
    ops = [(f"blocks.{index}.{name}", "") for index in range(3) for name in ("norm", "fc")]
    assert tree(inspected(*ops)) == [("blocks.0 … 2 x 3", *((str(index), "norm", "fc") for index in range(3)))]


@pytest.mark.parametrize(
    "second",
    [
        [("net.1.fc", ""), ("net.1:add", "add")],  # another op
        [("net.1.fc", ""), ("net.1:mul", "mul"), ("net.1:mul_1", "mul")],  # one more
        [("net.1.fc1", ""), ("net.1:mul", "mul")],  # another name
        [("net.1:mul", "mul"), ("net.1.fc", "")],  # another order
    ],
)
def test_blocks_that_differ_are_told_apart(second: list[tuple[str, str]]) -> None:
    first = [("net.0.fc", ""), ("net.0:mul", "mul")]
    assert [block.count for block in outline(inspected(*first, *second)).partitions[0].blocks[0].blocks] == [1, 1]


def test_blocks_of_another_class_are_told_apart() -> None:
    ops = [("net.0", ""), ("net.1", ""), ("net.2", "")]
    inspection = inspected(*ops, classes={"net.0": "Linear", "net.1": "Linear", "net.2": "Identity"})
    assert tree(inspection) == [("net", ("0 … 1 x 2", "0", "1"), "2")]


def test_modules_of_one_class_that_call_different_functions_are_told_apart() -> None:
    inspection = inspected(
        ("net.0:gelu", "gelu"), ("net.1:relu", "relu"), classes={"net.0": "Activation", "net.1": "Activation"}
    )
    assert tree(inspection) == [("net", "0", "1")]


def test_names_that_say_what_they_are_for_stay() -> None:
    assert tree(inspected(("attn.q_norm", ""), ("attn.k_norm", ""))) == [("attn", "q_norm", "k_norm")]


def test_a_module_that_runs_twice_is_there_twice_and_owns_its_parameters_once() -> None:
    inspection = inspected(("a:mul", "mul"), ("b:mul", "mul"), ("a:add", "add"))
    blocks = outline(inspection).partitions[0].blocks
    assert [(block.name, block.costs.parameters) for block in blocks] == [("a", 1), ("b", 2), ("a", 0)]


def sums(block: Block) -> None:
    if block.blocks:
        for name in ("ops", "parameters", "macs", "activation_bytes"):
            assert getattr(block.costs, name) == sum(getattr(inner.costs, name) for inner in block.blocks)
    for inner in block.blocks:
        sums(inner)


def test_a_cut_divides_a_row_of_equal_blocks() -> None:
    inspection = inspected(*((f"net.{index}", "") for index in range(4)), count=2)
    # The last of the ops weighs more than all others together.
    assert [drawn(block) for block in outline(inspection).partitions] == [
        ("net", ("net.0 … 2 x 3", "0", "1", "2")),
        ("net.3", "net.3"),
    ]


@pytest.mark.parametrize(
    ("model", "longest_row"),
    [("timm:resnet18", 2), ("timm:densenet121", 24), ("timm:vit_tiny_patch16_224", 6), ("timm:efficientnet_b0", 3)],
)
def test_costs_add_up_on_every_level(model: str, longest_row: int) -> None:
    inspection = fxsplit.inspect(RunSpec(model=model, parts=2))
    found = outline(inspection)
    for block, part in zip(found.partitions, inspection.partitions, strict=True):
        sums(block)
        costs = block.costs
        assert (costs.ops, costs.parameters, costs.macs, costs.activation_bytes, costs.seconds) == (
            part.stop - part.start, part.parameters, part.macs, part.activation_bytes, None,
        )  # fmt: skip
    assert sum(found.parameters.values()) == found.costs.parameters
    # The layers of a dense block grow, and are one row.
    assert max(count for block in found.partitions for count in counts(block)) == longest_row


def counts(block: Block) -> list[int]:
    return [block.count, *(count for inner in block.blocks for count in counts(inner))]
