"""Weight averaging: in place of its last weights, a network takes the mean of those at the ends of its last epochs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class WeightAverage:
    """The running mean of parameters, each over as many epochs as it was added.

    Source: Izmailov et al., Averaging weights leads to wider optima and better generalization, 2018, algorithm 1.
    """

    def __init__(self) -> None:
        self._means: dict[Tensor, tuple[Tensor, int]] = {}

    @torch.no_grad()
    def add(self, parameters: Iterable[Tensor]) -> None:
        """Count their values in; parameters that are not among them are forgotten."""
        means = {}
        for parameter in parameters:
            mean, count = self._means.get(parameter, (torch.zeros_like(parameter), 0))
            means[parameter] = mean.lerp_(parameter, 1 / (count + 1)), count + 1
        self._means = means

    @torch.no_grad()
    def apply(self) -> None:
        """Give the parameters their means, and forget them."""
        for parameter, (mean, _) in self._means.items():
            parameter.copy_(mean)
        self._means = {}
