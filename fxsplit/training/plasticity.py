"""Plasticity: how far the weights of each partition still move, to tell when settling it would come too early."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# A partition is quiet after so many intervals in a row in which it moves less than this share of its fastest one.
QUIET_SHARE = 0.1
QUIET_INTERVALS = 3


@dataclass
class _Movement:
    """Of one partition: where its weights were when the interval began, and what the intervals before have shown."""

    parameters: Mapping[str, Tensor]
    before: dict[str, Tensor]
    fastest: float = 0.0
    quiet_intervals: int = 0


class Plasticity:
    """Watches how far the weights of each partition move, and tells which have become quiet.

    The plasticity of an interval is |theta' - theta| / |theta|, from its first step to its last.
    Source of the rule: Wang et al., Egeria: efficient DNN training with knowledge-guided layer freezing, 2023, which
    compares activations where this compares weights.

    Args:
        parameters: those of each partition, by name.
        interval: optimizer steps in a interval.
    """

    def __init__(self, parameters: Sequence[Mapping[str, Tensor]], *, interval: int) -> None:
        self._interval, self._steps = interval, 0
        self._partitions = [_Movement(each, _copies(each)) for each in parameters]

    def step_done(self) -> None:
        """Count an optimizer step; at the end of an interval see how far every partition moved that trains."""
        self._steps += 1
        if self._steps % self._interval:
            return
        for partition in self._partitions:
            first = next(iter(partition.parameters.values()), None)
            if first is not None and first.requires_grad:
                moved = _norm(now - partition.before[name] for name, now in partition.parameters.items())
                plasticity = moved / max(_norm(partition.before.values()), torch.finfo(torch.float32).tiny)
                partition.fastest = max(partition.fastest, plasticity)
                quiet = plasticity < QUIET_SHARE * partition.fastest
                partition.quiet_intervals = partition.quiet_intervals + 1 if quiet else 0
                partition.before = _copies(partition.parameters)

    def is_quiet(self, index: int) -> bool:
        """Tell whether partition `index` has nothing to learn any more, or nothing to learn with."""
        partition = self._partitions[index]
        return not partition.parameters or partition.quiet_intervals >= QUIET_INTERVALS

    def state_dict(self) -> dict[str, Any]:
        """Return the steps so far, and by partition where its weights were and what the intervals have shown."""
        return {
            "steps": self._steps,
            "partitions": [
                {"before": dict(each.before), "fastest": each.fastest, "quiet_intervals": each.quiet_intervals}
                for each in self._partitions
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._steps = state["steps"]
        for partition, saved in zip(self._partitions, state["partitions"], strict=True):
            partition.before = _copies(saved["before"])
            partition.fastest, partition.quiet_intervals = saved["fastest"], saved["quiet_intervals"]


def _copies(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@torch.no_grad()
def _norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors]).norm())
