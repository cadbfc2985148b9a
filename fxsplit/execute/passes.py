"""Graph passes: rewritings of what a stage runs, for speed. None by default, since they change results by rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import fx, nn

from fxsplit.execute.pointwise import pointwise_products

# Takes a stage's graph and the model whose modules it calls; its `__name__` is what a run's report calls it. It may
# change the graph in place. The `op` in a node's meta goes over to the node in its place.
Pass = Callable[[fx.Graph, nn.Module], fx.Graph]


def rewritten(graph: fx.Graph, model: nn.Module, passes: Sequence[Pass]) -> fx.Graph:
    """Let each of the passes rewrite a stage's graph, one after the other."""
    return reduce(lambda so_far, rewrite: rewrite(so_far, model), passes, graph)


def passes_for(device: torch.device, *, channels_last: bool) -> tuple[Pass, ...]:
    """The passes that make a run faster: products for the pointwise convolutions of channels-last images on a CPU."""
    return (pointwise_products,) if channels_last and device.type == "cpu" else ()


def names_of(passes: Sequence[Pass]) -> tuple[str, ...]:
    """What the report of a run calls them."""
    return tuple(getattr(each, "__name__", type(each).__name__) for each in passes)
