"""Weight averaging: in place of its last weights, a network takes the mean of those at the ends of its last epochs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class WeightAverage:
    """The running mean of parameters, each over as many epochs as it was added in.

    Source: Izmailov et al., Averaging weights leads to wider optima and better generalization, 2018, algorithm 1.
    """

    def __init__(self) -> None:
        self._means: dict[Tensor, tuple[Tensor, int]] = {}

    @torch.no_grad()
    def add(self, parameters: Iterable[Tensor]) -> None:
        """Count their values in."""
        for parameter in parameters:
            mean, count = self._means.get(parameter, (torch.zeros_like(parameter), 0))
            self._means[parameter] = mean.lerp_(parameter, 1 / (count + 1)), count + 1

    @torch.no_grad()
    def apply(self, parameters: Iterable[Tensor]) -> None:
        """Give them their means, if they have any, and forget these."""
        for parameter in parameters:
            if parameter in self._means:
                mean, _ = self._means.pop(parameter)
                parameter.copy_(mean)
