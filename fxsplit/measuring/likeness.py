"""How far images lie from those that a pretrained network has learnt from, by what its BatchNorm remembers of these."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def divergence(model: nn.Module, norms: Sequence[_BatchNorm], images: Tensor) -> float | None:
    """Compare the mean and variance of what reaches `norms` with the running ones, in which training images live on.

    For each channel it is the divergence of Kullback and Leibler between the normal distributions that they describe:

        with m, v of these images, and M, V the running ones:    ((m - M)^2 / V + v / V - 1 - ln(v / V)) / 2

    It is 0 where they are the same. Channels that are hardly ever active have next to no variance, and values without
    bound; so the median of the channels counts, and then the mean over norms.

    Args:
        model: is run in evaluation, and stays as it is.
        norms: some of its modules, which keep statistics.
        images: float (B, C, H, W), on the model's device.

    Returns None if none of the norms is reached.
    """
    found: list[Tensor] = []

    def look(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        value = inputs[0].float()
        variance, mean = torch.var_mean(value, [0, *range(2, value.dim())], correction=0)
        known = norm.running_var + norm.eps
        ratio = (variance + norm.eps) / known
        found.append((((mean - norm.running_mean) ** 2 / known + ratio - 1 - ratio.log()) / 2).median())

    training = [module for module in model.modules() if module.training]
    handles = [norm.register_forward_pre_hook(look) for norm in norms]
    try:
        for module in training:
            module.training = False
        model(images)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return fmean(map(float, found)) if found else None
