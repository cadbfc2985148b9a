"""The outline of a network: the modules of each partition as a tree, with costs summed on every level.

    ops, in the order in which they run        blocks
    blocks.0.norm1                             blocks.0 ... blocks.5   x 6, opened on demand
    blocks.0.attn.qkv                            blocks.0
    blocks.0.attn:softmax                          norm1
    ...                                            attn
    blocks.5.mlp.fc2                                 qkv, softmax

A module that runs twice, with others in between, is there twice. A module with a single block in it is one line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from fxsplit.graph import Op
from fxsplit.plan.partition import owning_ops
from fxsplit.report import Inspection


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Holds the costs of a block: `macs` and `activation_bytes` are of one sample in training.

    A parameter counts where it is used first. `seconds` are of the traced batch, or None when an op was not measured.
    """

    ops: int
    parameters: int
    macs: int
    activation_bytes: int
    seconds: float | None

    @classmethod
    def sum(cls, costs: Iterable[Costs]) -> Costs:
        """Add up costs; seconds only if all of them were measured."""
        terms = list(costs)
        seconds = [term.seconds for term in terms if term.seconds is not None]
        return cls(
            ops=sum(term.ops for term in terms),
            parameters=sum(term.parameters for term in terms),
            macs=sum(term.macs for term in terms),
            activation_bytes=sum(term.activation_bytes for term in terms),
            seconds=sum(seconds) if len(seconds) == len(terms) else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A line of the outline: a module with the `blocks` in it, a single `op`, or a row of `count` equal blocks.

    `path` is the module's, or the name of the op; `name` is the same relative to the block around it. `what` is the
    class of the module, or what the op calls.
    """

    name: str
    path: str
    what: str
    costs: Costs
    op: Op | None = None
    blocks: tuple[Block, ...] = ()
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """The blocks of each partition. `parameters` has, by the name of an op, how many it is the first to use."""

    partitions: tuple[Block, ...]
    parameters: Mapping[str, int]

    @property
    def costs(self) -> Costs:
        """Those of the whole network."""
        return Costs.sum(partition.costs for partition in self.partitions)


def outline(inspection: Inspection) -> Outline:
    """Make the outline of an inspected model."""
    graph = inspection.train
    sizes = {
        state.name: state.elements for side in (inspection.eval, graph) for state in side.state if state.is_parameter
    }
    owned = dict.fromkeys((op.name for op in graph.ops), 0)
    for name, index in owning_ops(inspection).items():
        owned[graph.ops[index].name] += sizes.get(name, 0)
    return Outline(partitions=tuple(_partitions(inspection, owned)), parameters=owned)


def _partitions(inspection: Inspection, owned: Mapping[str, int]) -> Iterable[Block]:
    for partition in inspection.partitions:
        blocks = _blocks(inspection.train.ops[partition.span(training=True)], "", inspection.classes, owned)
        what = inspection.classes.get(partition.name, "")
        costs = Costs.sum(block.costs for block in blocks)
        yield Block(name=partition.name, path=partition.name, what=what, blocks=blocks, costs=costs)


def _blocks(ops: Sequence[Op], inside: str, classes: Mapping[str, str], owned: Mapping[str, int]) -> tuple[Block, ...]:
    """Make the blocks of ops that all lie in the module `inside`; equal neighbours become a row."""
    made = []
    for path, group in groupby(ops, key=lambda op: _child(op, inside)):
        if path is None:
            made += [_leaf(op, inside, classes, owned) for op in group]
        else:
            made.append(_module(path, inside, _blocks(list(group), path, classes, owned), classes))
    return tuple(
        _row(alike) if len(alike) > 1 else alike[0]
        for alike in (list(group) for _, group in groupby(made, key=lambda block: (_series(block), _structure(block))))
    )


def _child(op: Op, inside: str) -> str | None:
    """Find the path of the module directly in `inside` that the op lies in, or None if it lies in `inside` itself."""
    holder = op.path.rpartition(".")[0] if op.kind == "module" else op.path
    if holder == inside:
        return None
    prefix = f"{inside}." if inside else ""
    return prefix + holder.removeprefix(prefix).partition(".")[0]


def _leaf(op: Op, inside: str, classes: Mapping[str, str], owned: Mapping[str, int]) -> Block:
    called = op.target.rpartition(".")[2]
    costs = Costs(
        ops=1,
        parameters=owned[op.name],
        macs=op.macs,
        activation_bytes=op.activation_bytes,
        seconds=op.seconds,
    )
    what = classes.get(op.path, called) if op.kind == "module" else called
    return Block(name=op.name.removeprefix(inside).lstrip(".:"), path=op.name, what=what, costs=costs, op=op)


def _module(path: str, inside: str, blocks: tuple[Block, ...], classes: Mapping[str, str]) -> Block:
    name, what = path.removeprefix(f"{inside}."), classes.get(path, "")
    if len(blocks) > 1:
        costs = Costs.sum(block.costs for block in blocks)
        return Block(name=name, path=path, what=what, blocks=blocks, costs=costs)
    only = blocks[0]
    if only.op and only.op.kind != "module" and only.op.path == path:
        return replace(only, name=name, what=what or only.what)
    return replace(only, name=f"{name}.{only.name}")


def _row(alike: Sequence[Block]) -> Block:
    return Block(
        name=f"{alike[0].name} … {alike[-1].name}",
        path=f"{alike[0].path} … {alike[-1].path}",
        what=alike[0].what,
        blocks=tuple(alike),
        costs=Costs.sum(block.costs for block in alike),
        count=len(alike),
    )


def _series(block: Block) -> str:
    """Return the name without its numbers: `layer1` and `layer2` may share a row, `q_norm` and `k_norm` may not."""
    return re.sub(r"\d+", "#", block.name)


def _structure(block: Block) -> object:
    """Return what is equal for blocks that call the same under the same names, of whatever sizes.

    The layers of a DenseNet grow, and are still one row.
    """
    called = (block.op.kind, block.op.target) if block.op and block.op.kind != "module" else ()
    return block.what, called, block.count, tuple((inner.name, _structure(inner)) for inner in block.blocks)
