"""Graph passes: functions that rewrite what a stage runs, for speed. None is the default: they may change rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import fx, nn

from fxsplit.execute.pointwise import pointwise_products

# Takes a stage's graph and the model whose modules it calls, and returns the rewritten graph, which may be the same. A
# node that replaces another takes over its meta. Reports name a pass by its `__name__`.
Pass = Callable[[fx.Graph, nn.Module], fx.Graph]

# What a run with a pass says of it.
EFFECTS: dict[Pass, str] = {
    pointwise_products: "1x1 convolutions run as matrix products: faster, and equal to the model within rounding",
}


def rewritten(graph: fx.Graph, model: nn.Module, passes: Sequence[Pass]) -> fx.Graph:
    """Let the passes rewrite a stage's graph, one after the other, and return it."""
    return reduce(lambda so_far, rewrite: rewrite(so_far, model), passes, graph)


def passes_for(device: torch.device, *, channels_last: bool) -> tuple[Pass, ...]:
    """Choose the passes that make a run faster: 1x1 convolutions as products, for channels-last images on a CPU."""
    return (pointwise_products,) if channels_last and device.type == "cpu" else ()


def effect_of(each: Pass) -> str:
    """Say what a pass changes, in a sentence for people: that of EFFECTS, or its own `effect`; else its name."""
    (name,) = names_of((each,))
    sentence = EFFECTS.get(each) or getattr(each, "effect", "")
    return sentence or f"graphs are rewritten by the pass {name}"


def names_of(passes: Sequence[Pass]) -> tuple[str, ...]:
    """Return the names of passes, as reports have them."""
    return tuple(getattr(each, "__name__", type(each).__name__) for each in passes)
