"""What single ops of torch do beside giving a value: mix the samples of a batch, move statistics, drop values.

An op is a node of torch.fx that was just recorded, with the `module` that it calls, if it calls one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.hooks import RemovableHandle

DROPOUTS = {
    *(torch.dropout, torch.feature_dropout, torch.alpha_dropout),
    *(functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d),
}

# These move running statistics without telling autograd's version counter: (statistics, position of `training`).
NORMS_WITH_STATISTICS: dict[Any, tuple[tuple[int, str], tuple[int, str], tuple[int, str]]] = {
    functional.batch_norm: ((1, "running_mean"), (2, "running_var"), (5, "training")),
    torch.batch_norm: ((3, "running_mean"), (4, "running_var"), (5, "training")),
    functional.instance_norm: ((1, "running_mean"), (2, "running_var"), (5, "use_input_stats")),
}

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


def moved_statistics(node: fx.Node, module: nn.Module | None) -> list[Tensor | fx.Node]:
    """The running statistics that an op moves: tensors of a module that it calls, or what a function was given."""
    if module is not None:
        return [
            tensor
            for inner in module.modules()
            if isinstance(inner, _NormBase) and inner.training
            for name, tensor in inner.named_buffers(recurse=False)
            if name in ("running_mean", "running_var")
        ]
    mean, variance, training = _statistics(node)
    return [statistic for statistic in (mean, variance) if training and isinstance(statistic, fx.Node)]


def mixes_samples(node: fx.Node, module: nn.Module | None, batch_size: int) -> bool:
    """Whether what an op gives for a sample of the batch depends on the others."""
    if module is not None:
        return any(map(_norms_by_batch, module.modules()))
    if node.target in (functional.batch_norm, torch.batch_norm):
        return bool(_statistics(node)[2])
    return _is_along_samples(node, batch_size)


def _norms_by_batch(module: nn.Module) -> bool:
    """Whether it is a BatchNorm that takes the statistics of its batch now."""
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def watch_norms(called: nn.Module) -> tuple[dict[str, torch.Size], list[RemovableHandle]]:
    """The sizes of what reaches each BatchNorm in a module that takes the statistics of its batch, once it has run."""
    sizes: dict[str, torch.Size] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _norm, given: sizes.update({name: given[0].shape})

    norms = [(name, module) for name, module in called.named_modules() if _norms_by_batch(module)]
    return sizes, [module.register_forward_pre_hook(note(name)) for name, module in norms]


def is_dropout(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether an op drops values at random."""
    if module is not None:
        return isinstance(module, _DropoutNd) and module.training and module.p > 0
    return node.target in DROPOUTS


def _statistics(node: fx.Node) -> tuple[Any, Any, Any]:
    """Of a function that normalizes: running mean, running variance and whether those of the batch are used."""
    positions = NORMS_WITH_STATISTICS.get(node.target, ())
    found = [node.args[at] if at < len(node.args) else node.kwargs.get(keyword) for at, keyword in positions]
    mean, variance, training = found or (None, None, False)
    return mean, variance, training


def _is_along_samples(node: fx.Node, batch_size: int) -> bool:
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
