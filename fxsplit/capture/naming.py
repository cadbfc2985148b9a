"""The names of ops: the user's own dotted names, the same for what both modes do."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from typing import Any

from torch import fx

from fxsplit.meta.rest import Rest, calls_method

NAMED = ("placeholder", "call_module", "call_function", "call_method")


def names_of(train: fx.Graph, evaluation: fx.Graph) -> dict[fx.Node, str]:
    """`layer1.0.conv1` for a module, `layer1.0:add` for a function inside `layer1.0`, `_1`, `_2` ... when repeated.

    What the two modes do alike is named alike: their ops are aligned as the lines of two texts are.
    """
    first, second = ([n for n in graph.nodes if n.op in NAMED] for graph in (train, evaluation))
    names: dict[fx.Node, str] = {}
    taken: set[str] = set()
    repeats: Counter[str] = Counter()

    def give(node: fx.Node) -> None:
        name = base = _base_name(node)
        while name in taken:
            repeats[base] += 1
            name = f"{base}_{repeats[base]}"
        taken.add(name)
        names[node] = name

    for node in first:
        give(node)
    names |= {theirs: names[ours] for ours, theirs in _aligned(first, second)}
    for node in second:
        if node not in names:
            give(node)
    return names


def _aligned(first: Sequence[fx.Node], second: Sequence[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Pairs that do the same to the same; and between these, pairs that do the same, where both have as many of them.

    Of two additions in training and one in evaluation nobody knows which of the two that one is.
    """
    mine, other = 0, 0
    for ours, theirs, length in _matching(first, second, _signature):
        between = _as_many(first[mine:ours], second[other:theirs])
        for start, twin, count in _matching(*between, _kind):
            yield from zip(between[0][start : start + count], between[1][twin : twin + count], strict=True)
        mine, other = ours + length, theirs + length
        yield from zip(first[ours:mine], second[theirs:other], strict=True)


def _as_many(first: Sequence[fx.Node], second: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Those of which both have as many of the same kind."""
    ours, theirs = (Counter(map(_kind, nodes)) for nodes in (first, second))
    return (
        [node for node in first if ours[_kind(node)] == theirs[_kind(node)]],
        [node for node in second if ours[_kind(node)] == theirs[_kind(node)]],
    )


def _matching(
    first: Sequence[fx.Node], second: Sequence[fx.Node], key: Callable[[fx.Node], Any]
) -> Sequence[tuple[int, int, int]]:
    mine, other = [key(node) for node in first], [key(node) for node in second]
    if mine == other:
        return [(0, 0, len(mine))]
    return SequenceMatcher(None, mine, other, autojunk=False).get_matching_blocks()


def _signature(node: fx.Node) -> Any:
    """What a node does, and to what."""
    return *_kind(node), tuple(_base_name(source) for source in node.all_input_nodes)


def _kind(node: fx.Node) -> Any:
    """What a node does."""
    return node.op, _base_name(node)


def _base_name(node: fx.Node) -> str:
    if node.op in ("placeholder", "call_module", "get_attr"):
        return str(node.target)
    called = node.target if isinstance(node.target, Rest) else method_of(node) or node.target
    name = called if isinstance(called, str) else getattr(called, "__name__", "call")
    return f"{node.meta['path']}:{name.rpartition('.')[2]}".removeprefix(":")


def method_of(node: fx.Node) -> str | None:
    """The dotted name of the model's own method that the node calls, or None."""
    return str(node.args[0].target) if calls_method(node.target) and isinstance(node.args[0], fx.Node) else None


def called_module(node: fx.Node) -> str | None:
    """The path of the module that the node calls, whole or by one of its methods; None if it calls none."""
    if node.op == "call_module":
        return str(node.target)
    method = method_of(node)
    return None if method is None else method.rpartition(".")[0]


def assigned_by(node: fx.Node) -> list[str]:
    """What the node puts another object in the place of: an attribute or a buffer of a module."""
    holder = node.args[0] if node.target is operator.setitem else None
    if not isinstance(holder, fx.Node) or holder.op != "get_attr":
        return []
    path = str(holder.target).rpartition(".")[0]
    return [f"{path}.{node.args[1]}".removeprefix(".")]
