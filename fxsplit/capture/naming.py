"""Names ops by the user's dotted module paths, with one name for what both modes do."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from typing import Any

from torch import fx

from fxsplit.meta.rest import Rest, calls_method
from fxsplit.objects.structure import ATOMS, tensors_in

NAMED = ("placeholder", "call_module", "call_function", "call_method")


def names_of(train: fx.Graph, evaluation: fx.Graph) -> dict[fx.Node, str]:
    """Name the nodes of both graphs.

    `layer1.0.conv1` is a module, `layer1.0:add` a function inside `layer1.0`; repeated names get `_1`, `_2`, and so on.
    Ops that both modes have get the same name: the two sequences are aligned as the lines of two texts are in a diff.
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
    names |= {partner: names[node] for node, partner in _aligned(first, second)}
    for node in second:
        if node not in names:
            give(node)
    return names


def _aligned(first: Sequence[fx.Node], second: Sequence[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield pairs of nodes with the same op, inputs and inputs of these; between those, pairs with the same op alone.

    The latter only where both sides have equally many of that op: of two additions in training and one in evaluation
    it is not known which of the two the one is.
    """
    end, partner_end = 0, 0
    for start, partner, length in _matching(first, second, _signature):
        gap, partner_gap = _equally_many(first[end:start], second[partner_end:partner])
        for at, partner_at, count in _matching(gap, partner_gap, _kind):
            yield from zip(gap[at : at + count], partner_gap[partner_at : partner_at + count], strict=True)
        end, partner_end = start + length, partner + length
        yield from zip(first[start:end], second[partner:partner_end], strict=True)


def _equally_many(first: Sequence[fx.Node], second: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Keep the nodes of those kinds of which both sides have equally many."""
    counts, others = (Counter(map(_kind, nodes)) for nodes in (first, second))
    return (
        [node for node in first if counts[_kind(node)] == others[_kind(node)]],
        [node for node in second if counts[_kind(node)] == others[_kind(node)]],
    )


def _matching(
    first: Sequence[fx.Node], second: Sequence[fx.Node], key: Callable[[fx.Node], Any]
) -> Sequence[tuple[int, int, int]]:
    """Find equal runs of two sequences, compared by `key`: the start in each, and the length."""
    keys, others = [key(node) for node in first], [key(node) for node in second]
    if keys == others:
        return [(0, 0, len(keys))]
    return SequenceMatcher(None, keys, others, autojunk=False).get_matching_blocks()


def _signature(node: fx.Node) -> Any:
    """Describe the op of a node, its inputs and theirs: of two sums one may be of a product as well as the other."""
    inputs = ((_base_name(each), *map(_base_name, each.all_input_nodes)) for each in node.all_input_nodes)
    return *_kind(node), *inputs


def _kind(node: fx.Node) -> Any:
    """Describe the op of a node; of one that gives no tensor, with the numbers and names that it is given.

    `x + 1` in training may well be `x + 2` in evaluation, but `x.shape[0]` is not `x.shape[1]`, nor `x.dtype`.
    """
    given: list[Any] = []
    if not tensors_in(node.meta["value"]):
        fx.node.map_aggregate((node.args, node.kwargs), given.append)
    return node.op, _base_name(node), *(each for each in given if type(each) in ATOMS)


def _base_name(node: fx.Node) -> str:
    if node.op in ("placeholder", "call_module", "get_attr"):
        return str(node.target)
    called = node.target if isinstance(node.target, Rest) else method_of(node) or node.target
    name = called if isinstance(called, str) else getattr(called, "__name__", "call")
    return f"{node.meta['path']}:{name.rpartition('.')[2]}".removeprefix(":")


def method_of(node: fx.Node) -> str | None:
    """Return the dotted name of the model's own method that the node calls, or None."""
    return str(node.args[0].target) if calls_method(node.target) and isinstance(node.args[0], fx.Node) else None


def called_module(node: fx.Node) -> str | None:
    """Return the path of the module that the node calls, or of whose methods it calls one; None if there is none."""
    if node.op == "call_module":
        return str(node.target)
    method = method_of(node)
    return None if method is None else method.rpartition(".")[0]


def assigned_by(node: fx.Node) -> list[str]:
    """List the attribute or buffer of a module that the node sets to another object, if it does."""
    holder = node.args[0] if node.target is operator.setitem else None
    if not isinstance(holder, fx.Node) or holder.op != "get_attr":
        return []
    path = str(holder.target).rpartition(".")[0]
    return [f"{path}.{node.args[1]}".removeprefix(".")]
