"""Synchronised BatchNorm: in training it takes its statistics from the images of all processes.

    process 0   x ──► count, mean, variance ─┐
                                             ├─ gathered ──► those of the whole batch ──► (x - mean) / deviation
    process 1   x ──► count, mean, variance ─┘

torch's SyncBatchNorm runs on GPUs alone. This one also leaves out images that count for nothing, which a process runs
where a batch has none for it. Source of the way in which variances are put together: Chan et al., Updating formulae and
a pairwise algorithm for computing sample variances, 1979.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, distributed, fx, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fxsplit.capture.naming import called_module
from fxsplit.errors import UsageError
from fxsplit.objects.hooks import is_untouched

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class SyncNorms:
    """Is a graph pass: BatchNorm that trains takes its statistics from all processes while `counting` is not None.

    `counting` says whether the images that this process runs now count. It must be set, alike or not, in all processes
    before each forward pass in training, and stay until its backward pass is done. With None, as at first, results are
    those of torch's BatchNorm, bit for bit.

    The pass raises UsageError where BatchNorm is out of its reach: in an op that stands for a whole module.
    """

    __name__ = "synchronised_norms"
    effect = "BatchNorm takes its statistics from the images of all processes"

    def __init__(self) -> None:
        self.counting: bool | None = None

    def __call__(self, graph: fx.Graph, model: nn.Module) -> fx.Graph:
        for node in list(graph.nodes):
            if node.target is F.batch_norm:
                if _arguments(node)["training"] is not False:
                    node.target = self.batch_norm
            elif (path := called_module(node)) is not None:
                self._replace(graph, node, path, model.get_submodule(path))
        return graph

    def _replace(self, graph: fx.Graph, node: fx.Node, path: str, module: nn.Module) -> None:
        if not any(isinstance(each, _BatchNorm) for each in module.modules()):
            return
        if not any(is_untouched(module, kind) for kind in NORMS):
            raise UsageError(
                f"BatchNorm in {path!r} cannot be synchronised, because {type(module).__name__} is traced as one op or "
                "has hooks; leave out --sync-bn"
            )
        with graph.inserting_before(node):
            norm = graph.call_function(self.normalized, (graph.create_node("get_attr", path), *node.args), node.kwargs)
        norm.meta.update(node.meta)
        node.replace_all_uses_with(norm)
        graph.erase_node(node)

    def normalized(self, norm: _BatchNorm, images: Tensor) -> Tensor:
        """Compute what the module does, and move its running statistics on."""
        if self.counting is None or not norm.training:
            result: Tensor = norm(images)
            return result
        share = norm.momentum or 0.0
        if norm.track_running_stats and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if norm.momentum is None:
                share = 1 / float(norm.num_batches_tracked)
        tracked = (norm.running_mean, norm.running_var) if norm.track_running_stats else (None, None)
        return self.batch_norm(images, *tracked, norm.weight, norm.bias, True, share, norm.eps)

    def batch_norm(
        self,
        images: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """Compute what F.batch_norm does, for images (B, C, ...) of which each process has a part."""
        if self.counting is None or not training:
            return F.batch_norm(images, running_mean, running_var, weight, bias, training, momentum, eps)
        with torch.no_grad():
            mean, variance, count = _statistics(images, self.counting)
            if running_mean is not None and running_var is not None:
                unbiased = variance * (count / (count - 1).clamp(min=1))
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
                running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        normalized: Tensor = _Normalized.apply(images, mean, (variance + eps).rsqrt(), count, self.counting)
        if weight is not None:
            normalized = normalized * _by_channel(weight.to(normalized.dtype), images)
        if bias is not None:
            normalized = normalized + _by_channel(bias.to(normalized.dtype), images)
        return normalized.to(images.dtype)


class _Normalized(torch.autograd.Function):
    """Subtracts means from images, and multiplies by the inverse of their deviations; both depend on all images."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, mean: Tensor, inverse: Tensor, count: Tensor, counting: bool) -> Tensor:
        normalized = (images.to(mean.dtype) - _by_channel(mean, images)) * _by_channel(inverse, images)
        ctx.save_for_backward(normalized, inverse, count)
        ctx.counting, ctx.dtype = counting, images.dtype
        return normalized

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        normalized, inverse, count = ctx.saved_tensors
        dims = _all_but_channels(gradient)
        sums = torch.stack((gradient.sum(dims), (gradient * normalized).sum(dims)))
        distributed.all_reduce(sums)
        if ctx.counting:  # else the statistics do not depend on these images
            first, second = (_by_channel(each, gradient) for each in sums / count)
            gradient = gradient - first - normalized * second
        return (gradient * _by_channel(inverse, gradient)).to(ctx.dtype), None, None, None, None


def _statistics(images: Tensor, counting: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean (C,), variance (C,) and number () of the values of each channel, over all processes."""
    exact = images if images.dtype is torch.float64 else images.float()
    variance, mean = torch.var_mean(exact, _all_but_channels(images), correction=0)
    values = images.numel() // images.shape[1] if counting else 0
    own = torch.cat((mean, variance, mean.new_tensor([values])))
    found = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(found, own)
    means, variances, counts = torch.split(torch.stack(found), [len(mean), len(mean), 1], dim=1)
    count = counts.sum()
    shares = counts / count
    mean = (shares * means).sum(0)
    return mean, (shares * (variances + (means - mean).square())).sum(0), count


def _all_but_channels(images: Tensor) -> list[int]:
    return [dim for dim in range(images.dim()) if dim != 1]


def _by_channel(values: Tensor, images: Tensor) -> Tensor:
    """View values (C,) so that they go with images (B, C, ...)."""
    return values.view(1, -1, *[1] * (images.dim() - 2))


def _arguments(node: fx.Node) -> dict[str, Any]:
    given = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
    given.apply_defaults()
    return given.arguments
