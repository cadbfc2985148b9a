"""How long planning takes, and how it grows with the number of ops.

    python benchmarks/planning.py

The graphs are made here, without torch: residual blocks of 14 ops, every third of them a dense block of 24 layers that
all are read to its end, and a skip over some 400 ops, as in a U-Net. `live` is the mean number of values that cross a
cut; timm's densenet121 and swin_tiny have 10, its resnet50 has 2. The seconds are the best of `--repeat` rounds, each
on a fresh graph: all cuts alone, and all of planning, from the graph to its `--parts` partitions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from time import perf_counter
from typing import NamedTuple

import typer

from fxsplit.graph import Graph, Op, Value
from fxsplit.plan.cuts import cuts
from fxsplit.plan.partition import partition


def op(name: str, *reads: str, macs: int = 0, size: int = 4096) -> Op:
    """An op inside of the block that its name begins with."""
    output = Value(name=name, shape=(2, size // 8), dtype="float32", bytes_per_sample=size)
    return Op(name=name, path=name, kind="module", target="Module", reads=reads, output=output, macs=macs)


def chain(block: str, start: str) -> Iterator[Op]:
    """Thirteen ops in a row: a convolution, a normalization and an activation in turn, in two widths."""
    before = start
    for index in range(13):
        name = f"{block}.layers.{index}"
        yield op(name, before, macs=(index % 3 == 0) * (1000 + len(block) * index % 997), size=4096 + index % 2 * 2048)
        before = name


def dense(block: str, start: str) -> Iterator[Op]:
    """Twenty-four layers, each of which reads what all before it made."""
    features = [start]
    for index in range(24):
        joined, name = f"{block}.cat{index}", f"{block}.layers.{index}"
        yield op(joined, *features, size=4096 * len(features))
        yield op(name, joined, macs=2000 * len(features))
        features.append(name)
    yield op(f"{block}.cat", *features, size=4096 * len(features))
    yield op(f"{block}.squeeze", f"{block}.cat", macs=9000)


def endless() -> Iterator[Op]:
    """Block after block, for ever."""
    last, skip, made = "x", "x", 0
    for number in range(10**9):
        block = f"stages.{number // 40}.blocks.{number}"
        ops = list((dense if number % 3 == 2 else chain)(block, last))
        yield from ops
        joins = [last, skip] if made % 400 > 385 else [last]
        yield op(f"{block}.add", ops[-1].name, *joins)
        last, made = f"{block}.add", made + len(ops) + 1
        skip = last if len(joins) == 2 else skip


def network(length: int) -> Graph:
    """The first `length` ops of such a model."""
    ops = tuple(islice(endless(), length))
    x = Value(name="x", shape=(2, 512), dtype="float32", bytes_per_sample=4096)
    return Graph(batch_size=2, inputs=(x,), ops=ops, outputs=(ops[-1].name,))


class Pair(NamedTuple):
    """A model as its graphs in training and in evaluation."""

    train: Graph
    eval: Graph


def main(parts: int = 16, repeat: int = 3) -> None:
    print(f"{'ops':>7} {'live':>6} {'cuts':>9} {f'{parts} parts':>11} {'per op':>10}")
    divide = partial(partition, count=parts)
    for length in (1250, 2500, 5000, 10_000, 20_000, 40_000):
        finding = min(_seconds(cuts, Pair(network(length), network(length))) for _ in range(repeat))
        planning = min(_seconds(divide, Pair(network(length), network(length))) for _ in range(repeat))
        live = sum(map(len, network(length).boundaries)) / (length + 1)
        print(f"{length:7,} {live:6.1f} {finding:7.3f} s {planning:9.3f} s {1e6 * planning / length:7.1f} us")


def _seconds(function: Callable[..., object], *arguments: object) -> float:
    began = perf_counter()
    function(*arguments)
    return perf_counter() - began


if __name__ == "__main__":
    typer.run(main)
