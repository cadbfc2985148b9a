"""Plasticity: how far the weights of each partition still move, to tell when settling it would come too early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A partition is quiet after so many windows in a row in which it moves less than this share of its fastest one.
QUIET_SHARE = 0.1
QUIET_WINDOWS = 3


@dataclass
class _Movement:
    """Of one partition: where its weights were when the window began, and what the windows before have shown."""

    parameters: Sequence[Tensor]
    before: list[Tensor]
    fastest: float = 0.0
    quiet_windows: int = 0


class Plasticity:
    """Watches the `parameters` of each partition over windows of `window` optimizer steps.

    The plasticity of a window is |theta' - theta| / |theta|, from its first step to its last.
    Source of the rule: Wang et al., Egeria: efficient DNN training with knowledge-guided layer freezing, 2023, which
    compares activations where this compares weights.
    """

    def __init__(self, parameters: Sequence[Sequence[Tensor]], *, window: int) -> None:
        self._window, self._steps = window, 0
        self._partitions = [_Movement(each, _copies(each)) for each in parameters]

    def step_done(self) -> None:
        """Count an optimizer step; at the end of a window see how far every partition moved that trains."""
        self._steps += 1
        if self._steps % self._window:
            return
        for partition in self._partitions:
            if partition.parameters and partition.parameters[0].requires_grad:
                moved = _norm([now - then for now, then in zip(partition.parameters, partition.before, strict=True)])
                plasticity = moved / max(_norm(partition.before), torch.finfo(torch.float32).tiny)
                partition.fastest = max(partition.fastest, plasticity)
                quiet = plasticity < QUIET_SHARE * partition.fastest
                partition.quiet_windows = partition.quiet_windows + 1 if quiet else 0
                partition.before = _copies(partition.parameters)

    def is_quiet(self, index: int) -> bool:
        """Whether partition `index` has nothing to learn any more, or nothing to learn with."""
        partition = self._partitions[index]
        return not partition.parameters or partition.quiet_windows >= QUIET_WINDOWS


def _copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors]).norm())
