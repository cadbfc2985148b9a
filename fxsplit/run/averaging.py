"""Weight averaging: in place of its last weights, a network takes the mean of those after its last steps."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import torch
from torch import Tensor
from torch.optim.swa_utils import get_swa_multi_avg_fn


class WeightAverage:
    """The running mean of parameters, each over as many moments as it was added at.

    Source: Izmailov et al., Averaging weights leads to wider optima and better generalization, 2018, algorithm 1.
    """

    def __init__(self) -> None:
        self._means: dict[Tensor, Tensor] = {}
        self._counts: dict[Tensor, int] = {}
        self._update = get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def add(self, parameters: Iterable[Tensor]) -> None:
        """Count their values in."""
        for count, found in groupby(parameters, lambda parameter: self._counts.get(parameter, 0)):
            same = list(found)
            means = [self._means.setdefault(parameter, torch.zeros_like(parameter)) for parameter in same]
            self._update(means, same, count)
            self._counts.update(dict.fromkeys(same, count + 1))

    @torch.no_grad()
    def apply(self, parameters: Iterable[Tensor]) -> None:
        """Give them their means, if they have any, and forget these."""
        for parameter in parameters:
            if parameter in self._means:
                parameter.copy_(self._means.pop(parameter))
                del self._counts[parameter]
