"""The two graphs of a model, made by hand."""

from __future__ import annotations

from typing import NamedTuple

from fxsplit.graph import Graph


class Pair(NamedTuple):
    """A model as its graphs in training and in evaluation."""

    train: Graph
    eval: Graph


def both(graph: Graph) -> Pair:
    """A model that runs alike in both modes."""
    return Pair(graph, graph)
