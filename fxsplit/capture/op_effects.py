"""Finds what single ops do besides returning a value: mix samples, move statistics, drop values, want gradients.

An op is given as a newly recorded node of torch.fx, with the `module` that it calls, if it calls one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.hooks import RemovableHandle

from fxsplit.capture.proxy import ValueProxy
from fxsplit.meta.evaluate import ImpureCall
from fxsplit.meta.known import is_known
from fxsplit.objects.hooks import is_torchs
from fxsplit.objects.structure import tensors_in

DROPOUTS = {
    *(torch.dropout, torch.feature_dropout, torch.alpha_dropout),
    *(functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d),
}

# Functions that update running statistics without raising the tensors' version: position and keyword of the running
# mean, the running variance and the flag that says whether those of the batch are used.
NORMS_WITH_STATISTICS: dict[Any, tuple[tuple[int, str], tuple[int, str], tuple[int, str]]] = {
    functional.batch_norm: ((1, "running_mean"), (2, "running_var"), (5, "training")),
    torch.batch_norm: ((3, "running_mean"), (4, "running_var"), (5, "training")),
    functional.instance_norm: ((1, "running_mean"), (2, "running_var"), (5, "use_input_stats")),
}

ALL_DIMS = None

# Ops along dimensions: by name, the position of the argument that gives the dimensions, and its default.
ALONG: dict[str, tuple[int, int | None]] = {
    **dict.fromkeys(("mean", "sum", "prod", "var", "std", "amax", "amin", "max", "min", "median"), (1, ALL_DIMS)),
    **dict.fromkeys(("argmax", "argmin", "all", "any", "logsumexp"), (1, ALL_DIMS)),
    **dict.fromkeys(("softmax", "log_softmax", "cumsum", "cumprod", "sort", "argsort", "flip"), (1, -1)),
    **dict.fromkeys(("topk", "kthvalue"), (2, -1)),
    "norm": (2, ALL_DIMS),
    "roll": (2, ALL_DIMS),
    "normalize": (2, 1),
}
NAMESPACES = (torch, functional, Tensor)


def moved_statistics(node: fx.Node, module: nn.Module | None) -> list[Tensor | fx.Node]:
    """List the running statistics that an op updates: tensors of the module, or nodes among a function's arguments."""
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
    """Whether the result of an op for one sample of the batch depends on the others."""
    if module is not None:
        return any(map(_norms_by_batch, module.modules()))
    if node.target in (functional.batch_norm, torch.batch_norm):
        return bool(_statistics(node)[2])
    return _is_along_samples(node, batch_size)


def _norms_by_batch(module: nn.Module) -> bool:
    """Whether it is a BatchNorm that now normalizes by the statistics of its batch."""
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def watch_norms(called: nn.Module) -> tuple[dict[str, torch.Size], list[RemovableHandle]]:
    """Record the input sizes of each BatchNorm in a module that uses batch statistics.

    Returns a dict that fills as the module runs, and the hooks to remove afterwards.
    """
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


def note_effects(
    node: fx.Node, module: nn.Module | None, value: Any, sizes: dict[str, torch.Size], *, batch_size: int
) -> None:
    """Note what an op does to the samples of the batch, and what it inherits from its inputs.

    `sizes` are those of the inputs of each BatchNorm in its module that uses batch statistics.
    """
    inputs = node.all_input_nodes
    node.meta["stand_in"] = node.meta["stand_in"] or any(each.meta.get("stand_in") for each in inputs)
    node.meta["drawn"] = isinstance(node.target, ImpureCall) or any(each.meta.get("drawn") for each in inputs)
    node.meta["known"] = is_known(node, value)
    node.meta["of_batch"] = any(each.op == "placeholder" or each.meta.get("of_batch") for each in inputs)
    node.meta["mixes_samples"] = mixes_samples(node, module, batch_size)
    if node.target in (nn.functional.batch_norm, torch.batch_norm) and node.meta["mixes_samples"]:
        sizes[""] = value.shape
    # At one value a channel from each sample, a batch of 1 has no variance.
    small = (name for name, size in sizes.items() if math.prod(size) <= size[1] * batch_size)
    if (name := next(small, None)) is not None:
        node.meta["single_value_norm"] = f"{node.meta['path']}.{name}".strip(".")
    node.meta["is_dropout"] = is_dropout(node, module)


def note_gradients(node: fx.Node, called: Any) -> None:
    """Note whether the result of an op wants a gradient, and whether it may do so in some calls alone.

    A user's module that stays one op may use its parameters, and what it is given, now and then.
    """
    inputs = node.all_input_nodes
    own = isinstance(called, nn.Module) and any(each.requires_grad for each in called.parameters())
    node.meta["wants"] = own or any(map(_node_wants, inputs))
    surely = any(_node_wants(each) and not each.meta.get("may_want") for each in inputs)
    surely = surely or (own and is_torchs(called))
    node.meta["may_want"] = node.meta["wants"] and not surely


def wants_gradient(argument: Any) -> bool:
    """Whether an argument is a tensor, perhaps a traced one, that wants a gradient, or would if they were enabled."""
    if type(argument) is ValueProxy:
        return isinstance(argument.value, Tensor) and _node_wants(argument.node)
    return isinstance(argument, Tensor) and argument.requires_grad


def is_unsure(argument: Any) -> bool:
    """Whether an argument wants a gradient in some calls alone."""
    return type(argument) is ValueProxy and argument.node.meta.get("may_want", False)


def _node_wants(node: fx.Node) -> bool:
    if "wants" in node.meta:
        return bool(node.meta["wants"])
    return any(tensor.requires_grad for tensor in tensors_in(node.meta["value"]))


def _statistics(node: fx.Node) -> tuple[Any, Any, Any]:
    """Read from a normalizing function its running mean and variance, and whether the batch's own are used."""
    positions = NORMS_WITH_STATISTICS.get(node.target, ())
    found = [node.args[at] if at < len(node.args) else node.kwargs.get(keyword) for at, keyword in positions]
    mean, variance, training = found or (None, None, False)
    return mean, variance, training


def _is_along_samples(node: fx.Node, batch_size: int) -> bool:
    """Whether an op reduces, sorts or shifts a tensor (batch_size, ...) along its first dimension.

    Known for the ops of torch in ALONG, which are told the dimension by an argument.
    """
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name not in ALONG or not (node.op == "call_method" or _is_torch(node.target, name)):
        return False
    position, default = ALONG[name]
    operand = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(operand, fx.Node) or not operand.meta.get("of_batch"):
        return False
    value = operand.meta["value"]
    if not isinstance(value, Tensor) or not value.dim() or value.shape[0] != batch_size:
        return False
    dim: Any = node.args[position] if position < len(node.args) else default
    for keyword in ("dim", "dims", "axis"):
        dim = node.kwargs.get(keyword, dim)
    if isinstance(dim, fx.Node):
        dim = dim.meta["value"]
    if isinstance(dim, Tensor):  # the other operand of max and min
        return False
    dims = range(value.dim()) if dim is ALL_DIMS else dim if isinstance(dim, tuple | list) else (dim,)
    return any(isinstance(each, int) and each % value.dim() == 0 for each in dims)


def _is_torch(target: Any, name: str) -> bool:
    return any(target is getattr(namespace, name, None) for namespace in NAMESPACES)
