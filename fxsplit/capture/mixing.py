"""Whether an op takes the samples of a batch together, along the first dimension of a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

WHOLE = None

# Ops along dimensions: by name, the position of the argument that says which, and which they are without it (all of
# them: WHOLE).
ALONG: dict[str, tuple[int, int | None]] = {
    **dict.fromkeys(("mean", "sum", "prod", "var", "std", "amax", "amin", "max", "min", "median"), (1, WHOLE)),
    **dict.fromkeys(("argmax", "argmin", "all", "any", "logsumexp"), (1, WHOLE)),
    **dict.fromkeys(("softmax", "log_softmax", "cumsum", "cumprod", "sort", "argsort", "flip"), (1, -1)),
    **dict.fromkeys(("topk", "kthvalue"), (2, -1)),
    "norm": (2, WHOLE),
    "roll": (2, WHOLE),
    "normalize": (2, 1),
}
PLACES = (torch, functional, Tensor)


def is_along_samples(node: fx.Node, batch_size: int) -> bool:
    """Whether an op reduces, sorts or shifts a value (batch_size, ...) of the batch along that first dimension.

    Only ops of torch that say so by their arguments are known.
    """
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name not in ALONG or not (node.op == "call_method" or _is_torch(node.target, name)):
        return False
    position, default = ALONG[name]
    source = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(source, fx.Node) or not source.meta.get("of_batch"):
        return False
    value = source.meta["value"]
    if not isinstance(value, Tensor) or not value.dim() or value.shape[0] != batch_size:
        return False
    wanted: Any = node.args[position] if position < len(node.args) else default
    for keyword in ("dim", "dims", "axis"):
        wanted = node.kwargs.get(keyword, wanted)
    if isinstance(wanted, fx.Node):
        wanted = wanted.meta["value"]
    if isinstance(wanted, Tensor):  # the other operand of max and min
        return False
    dims = range(value.dim()) if wanted is WHOLE else wanted if isinstance(wanted, tuple | list) else (wanted,)
    return any(isinstance(dim, int) and dim % value.dim() == 0 for dim in dims)


def _is_torch(target: Any, name: str) -> bool:
    return any(target is getattr(place, name, None) for place in PLACES)
