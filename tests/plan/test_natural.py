"""Natural cuts: each clause of their definition on a small graph that shows it."""

from __future__ import annotations

from dataclasses import replace

from fxsplit.graph import Graph, Op, Value
from fxsplit.plan.cuts import cuts
from tests.pairs import both


def op(name: str, *reads: str, size: int, macs: int = 0, path: str = "", join: bool = False) -> Op:
    return Op(
        name=name,
        path=path or name,
        kind="function" if join else "module",
        target=name,
        reads=reads,
        output=Value(name=name, shape=(1, size), dtype="uint8", bytes_per_sample=size),
        macs=macs,
    )


def graph(*ops: Op) -> Graph:
    x = Value(name="x", shape=(1, 1000), dtype="uint8", bytes_per_sample=1000)
    return Graph(batch_size=1, inputs=(x,), ops=ops, outputs=(ops[-1].name,))


def line(*ops: tuple[str, int, int]) -> Graph:
    """Ops in a row: name, multiply-adds, size of the value."""
    names = ["x", *(name for name, _, _ in ops)]
    return graph(
        *(op(name, before, size=size, macs=macs) for (name, macs, size), before in zip(ops, names, strict=False))
    )


def natural(net: Graph) -> list[str]:
    """The next op of each natural cut."""
    return [net.ops[cut.index].name for cut in cuts(both(net)) if cut.natural]


def test_a_convolution_stays_with_its_normalization_and_pooling() -> None:
    net = line(
        ("conv1", 9, 800), ("norm1", 0, 800), ("pool1", 0, 200),
        ("conv2", 9, 400), ("norm2", 0, 400), ("pool2", 0, 100),
        ("conv3", 9, 200), ("norm3", 0, 200),
        ("conv4", 9, 200), ("pool4", 0, 50), ("flatten", 0, 50),
        ("fc", 9, 10),
    )  # fmt: skip
    assert natural(net) == ["conv2", "conv3", "fc"]


def test_a_pooling_is_natural_even_where_the_sizes_fall_on() -> None:
    falling = line(("a", 9, 400), ("pool", 0, 200), ("b", 9, 200), ("c", 9, 100), ("d", 9, 50), ("e", 9, 10))
    assert natural(falling) == ["b", "e"]
    strided = replace(falling, ops=tuple(replace(op, macs=9) for op in falling.ops))
    assert natural(strided) == ["e"]


def test_minima_lie_below_both_their_sides() -> None:
    net = line(("a", 1, 300), ("b", 1, 100), ("c", 1, 300), ("d", 1, 200), ("e", 1, 100), ("f", 1, 400), ("g", 1, 1))
    assert natural(net) == ["c", "f"]


def test_a_plateau_is_a_minimum_only_as_a_whole() -> None:
    low = [("low1", 1, 100), ("low2", 1, 104), ("low3", 1, 108)]
    assert natural(line(("first", 1, 300), *low, ("last", 1, 300), ("end", 1, 1))) == ["low2", "low3", "last"]
    assert natural(line(("first", 1, 300), *low, ("last", 1, 50), ("end", 1, 1))) == ["end"]


def test_of_a_plateau_the_borders_of_outer_modules() -> None:
    names = ("first", "block.a", "block.b", "next", "end")
    sizes = (300, 100, 100, 300, 1)
    assert natural(line(*((name, 1, size) for name, size in zip(names, sizes, strict=True)))) == ["next"]


def test_the_border_of_a_module_comes_before_an_op_in_it() -> None:
    """The number that the block's first op takes from a shape crosses beside the tensor."""
    number = Value(name="b2:size", shape=None, dtype="int")
    size = Op(name="b2:size", path="b2", kind="function", target="size", reads=("pool",), output=number)
    net = graph(
        op("conv", "x", size=400, macs=9),
        op("pool", "conv", size=100),
        size,
        op("b2:view", "pool", "b2:size", size=100, path="b2"),
        op("b2:conv", "b2:view", size=300, macs=9, path="b2"),
        op("end", "b2:conv", size=1, macs=9),
    )
    assert natural(net) == ["b2:size"]
    assert [cut.path for cut in cuts(both(net)) if cut.natural] == ["b2"]


def test_dropout_stays_with_what_goes_on_to_train() -> None:
    net = line(
        ("conv1", 9, 800), ("pool1", 0, 200), ("drop1", 0, 200), ("flat1", 0, 200), ("conv2", 9, 400), ("fc", 9, 10)
    )  # fmt: skip
    assert natural(net) == ["conv2"]
    dropping = replace(net, ops=tuple(replace(op, is_dropout=op.name == "drop1") for op in net.ops))
    assert natural(dropping) == ["drop1"]


def test_sizes_within_a_tenth_are_the_same() -> None:
    def before_head(size: int) -> list[str]:
        return natural(line(("patches", 9, 1000), ("token", 0, size), ("head", 9, 4000), ("end", 9, 1)))

    assert before_head(1100) == ["head"]
    assert before_head(1101) == ["token"]


def test_residual_blocks_are_not_cut_inside() -> None:
    net = graph(
        op("conv", "x", size=100, macs=9),
        op("b1.conv1", "conv", size=50, macs=9),
        op("b1.conv2", "b1.conv1", size=100, macs=9),
        op("b1:add", "b1.conv2", "conv", size=100, path="b1", join=True),
        op("b2.conv1", "b1:add", size=50, macs=9),
        op("b2.conv2", "b2.conv1", size=100, macs=9),
        op("b2:add", "b2.conv2", "b1:add", size=100, path="b2", join=True),
        op("head", "b2:add", size=10, macs=9),
    )
    assert natural(net) == ["b1.conv1", "b2.conv1", "head"]


def test_a_block_that_joins_twice_is_not_cut_between() -> None:
    def transformer(prefix: str) -> Graph:
        ops = [op("embed", "x", size=100, macs=9)]
        for block in ("b1", "b2"):
            for half in ("attention", "mlp"):
                path, start = f"{prefix}{block}", ops[-1].name
                ops.append(op(f"{path}.{half}", start, size=100, macs=9))
                ops.append(op(f"{path}:{half}_add", start, f"{path}.{half}", size=100, path=path, join=True))
        return graph(*ops, op("head", ops[-1].name, size=10, macs=9))

    net = transformer("blocks.")
    assert natural(net) == ["blocks.b1.attention", "blocks.b2.attention", "head"]
    # The model itself is no block: where all is written into its own forward, its additions do not rule out cuts.
    flat = replace(net, ops=tuple(replace(op, path="") if op.kind == "function" else op for op in net.ops))
    assert natural(flat) == [
        "blocks.b1.attention", "blocks.b1.mlp", "blocks.b2.attention", "blocks.b2.mlp", "head",
    ]  # fmt: skip


def test_dense_blocks_are_left_at_the_transition() -> None:
    net = graph(
        op("stem", "x", size=100, macs=9),
        op("dense.cat1", "stem", size=100),
        op("dense.conv1", "dense.cat1", size=40, macs=9),
        op("dense.cat2", "stem", "dense.conv1", size=140),
        op("dense.conv2", "dense.cat2", size=40, macs=9),
        op("dense.cat", "stem", "dense.conv1", "dense.conv2", size=180),
        op("transition.norm", "dense.cat", size=180),
        op("transition.conv", "transition.norm", size=90, macs=9),
        op("transition.pool", "transition.conv", size=22),
        op("next.conv", "transition.pool", size=50, macs=9),
        op("head", "next.conv", size=10, macs=9),
    )
    assert natural(net) == ["dense.cat1", "next.conv"]


def test_an_illegal_cut_is_not_natural() -> None:
    net = line(("a", 9, 400), ("pool", 0, 100), ("b", 9, 300), ("c", 9, 1))
    assert natural(net) == ["b"]
    overwriting = replace(net, ops=(*net.ops[:2], replace(net.ops[2], mutates=("pool",)), *net.ops[3:]))
    assert natural(overwriting) == ["c"]


def test_before_the_first_and_after_the_last_multiplication_there_is_nothing_to_divide() -> None:
    net = line(("permute", 0, 10), ("a", 9, 400), ("pool", 0, 100), ("b", 9, 400), ("softmax", 0, 1), ("log", 0, 1))
    assert natural(net) == ["b"]
    assert natural(line(("only", 9, 1))) == []
