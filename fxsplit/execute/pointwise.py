"""1x1 convolutions as matrix products where these are faster: on a CPU, of float32 images in channels_last.

    (N, C, H, W) in channels_last  =  N*H*W rows of C numbers, without a copy;  rows @ weight.T  =  the same sums

The results differ from those of the convolution by rounding, so a stage does this only with the pass
`pointwise_products`. A settled partition always does: it is folded, and so equal only within rounding anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxsplit.capture.naming import called_module
from fxsplit.errors import CheckError
from fxsplit.objects.hooks import is_untouched

_held_to_convolutions = ContextVar("held_to_convolutions", default=False)


def conv2d(images: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """Compute a pointwise convolution as F.conv2d does: images (N, C, H, W), weight (filters, C, 1, 1)."""
    return as_product(images, weight, bias) if _is_faster(images) else F.conv2d(images, weight, bias, **options)


def convolved(module: nn.Conv2d, images: Tensor) -> Tensor:
    """Compute what the module of a pointwise convolution computes; the module itself is called if it has hooks."""
    if _is_faster(images) and is_untouched(module, nn.Conv2d):
        if _held_to_convolutions.get():
            return _held_to_convolution(module, images)
        return as_product(images, module.weight, module.bias)
    result: Tensor = module(images)
    return result


@contextmanager
def held_to_convolutions() -> Iterator[None]:
    """Inside, compute each product beside its convolution, compare the two, and go on with the convolution's result.

    So what runs inside equals the model bit for bit. A product that differs by more than any order of summation can
    explain raises CheckError. A sum of n products, in whatever order, is off by at most n * u / (1 - n * u) of the sum
    of their absolute values, where u is half the distance from 1 to the next number; two such sums differ by at most
    twice that (Higham, Accuracy and stability of numerical algorithms, 2002, section 3.1).
    """
    token = _held_to_convolutions.set(True)
    try:
        yield
    finally:
        _held_to_convolutions.reset(token)


def _held_to_convolution(module: nn.Conv2d, images: Tensor) -> Tensor:
    result: Tensor = module(images)
    with torch.no_grad():
        terms = module.in_channels + (module.bias is not None)
        rounding = terms * torch.finfo(images.dtype).eps / 2
        sizes = [None if each is None else each.abs() for each in (images, module.weight, module.bias)]
        # The sum of absolute values is itself rounded by as much, hence the square.
        bound = 2 * rounding / (1 - rounding) ** 2 * as_product(*sizes)  # type: ignore[arg-type]
        product = as_product(images, module.weight, module.bias)
        # Where neither result is finite, there is nothing to compare, and the first condition is false.
        wrong = ((product - result).abs() > bound) | (product.isfinite() != result.isfinite())
        if wrong.any():
            raise CheckError(
                f"as a matrix product, {module} gives numbers that differ from the convolution's by "
                f"{(product - result)[wrong].abs().max().item():.2g}, which rounding cannot explain; run without "
                "--channels-last"
            )
    return result


def as_product(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a pointwise convolution as a matrix product."""
    return F.linear(images.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def _is_faster(images: Tensor) -> bool:
    return (
        images.device.type == "cpu"
        and images.dtype is torch.float32
        and images.dim() == 4
        and images.permute(0, 2, 3, 1).is_contiguous()
        and not images.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
    )


def is_pointwise(weight: Tensor, *, stride: Any = 1, padding: Any = 0, groups: Any = 1, **_: Any) -> bool:
    """Tell whether a convolution with these arguments of F.conv2d computes each pixel from the same pixel alone."""
    return (
        weight.shape[2:] == (1, 1) and stride in (1, (1, 1)) and padding in (0, (0, 0), "valid", "same") and groups == 1
    )


def _is_module_pointwise(module: nn.Conv2d) -> bool:
    return is_pointwise(module.weight, stride=module.stride, padding=module.padding, groups=module.groups)


def pointwise_products(graph: fx.Graph, model: nn.Module) -> fx.Graph:
    """Replace pointwise convolutions in a stage's graph by `convolved`, in place, and return the graph."""
    for node in list(graph.nodes):
        path = called_module(node)
        if path is None:
            continue
        module = model.get_submodule(path)
        if type(module) is nn.Conv2d and _is_module_pointwise(module):
            with graph.inserting_before(node):
                called = graph.create_node("get_attr", path)
                product = graph.call_function(convolved, (called, *node.args), dict(node.kwargs))
            product.meta.update(node.meta)
            node.replace_all_uses_with(product)
            graph.erase_node(node)
    return graph
