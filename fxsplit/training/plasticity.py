"""Plasticity: how far the weights of each partition still move, to tell whether it would settle too early."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxsplit.distribute.layout import divided_as, whole
from fxsplit.distribute.processes import Processes

# A partition is quiet after QUIET_INTERVALS intervals in a row with less than QUIET_SHARE of its highest plasticity.
QUIET_SHARE = 0.1
QUIET_INTERVALS = 3


@dataclass
class _Movement:
    """Of a partition: its parameters, copies of them when the interval began, and how the intervals before it went."""

    parameters: Mapping[str, Tensor]
    before: dict[str, Tensor]
    highest: float = 0.0
    quiet_intervals: int = 0


class Plasticity:
    """Measures how far the weights of each partition move, and tells which partitions have become quiet.

    The plasticity of an interval is |theta' - theta| / |theta|, with the weights theta at its beginning and theta' at
    its end. Source of the rule: Wang et al., Egeria: efficient DNN training with knowledge-guided layer freezing, 2023,
    which compares activations where this compares weights.

    Args:
        parameters: those of each partition, by name.
        interval: optimizer steps in an interval, at least 1.
        keeps: tells by its name whether this process trains a parameter. In a pipeline each trains some, and is told by
            `exchange` what the others have measured.
    """

    def __init__(
        self,
        parameters: Sequence[Mapping[str, Tensor]],
        *,
        interval: int,
        keeps: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self._interval, self._steps, self._keeps = interval, 0, keeps
        self._partitions = [_Movement(each, _copies(each)) for each in parameters]

    def enter(self, parameters: Sequence[Mapping[str, Tensor]]) -> None:
        """Take the parameters that the model has in another phase: other objects, maybe, with the same numbers."""
        for partition, now in zip(self._partitions, parameters, strict=True):
            partition.parameters = now
            partition.before = {name: divided_as(each, now[name]) for name, each in partition.before.items()}

    def step_done(self) -> None:
        """Count an optimizer step; at the end of an interval measure how far each training partition has moved."""
        self._steps += 1
        if self._steps % self._interval:
            return
        for partition in self._partitions:
            if self._trains_here(partition):
                moved = _norm(now - partition.before[name] for name, now in partition.parameters.items())
                plasticity = moved / max(_norm(partition.before.values()), torch.finfo(torch.float32).tiny)
                partition.highest = max(partition.highest, plasticity)
                quiet = plasticity < QUIET_SHARE * partition.highest
                partition.quiet_intervals = partition.quiet_intervals + 1 if quiet else 0
                partition.before = _copies(partition.parameters)

    def _trains_here(self, partition: _Movement) -> bool:
        name, first = next(iter(partition.parameters.items()), ("", None))
        return first is not None and first.requires_grad and self._keeps(name)

    def exchange(self, processes: Processes) -> None:
        """Give all processes of a pipeline what those have measured that train a partition."""
        training = [each for each in self._partitions if any(now.requires_grad for now in each.parameters.values())]
        own = [(each.highest, each.quiet_intervals) if self._trains_here(each) else (0, 0) for each in training]
        found = processes.pipeline.sum(torch.tensor(own, dtype=torch.float64)).tolist()
        for partition, (highest, quiet_intervals) in zip(training, found, strict=True):
            partition.highest, partition.quiet_intervals = highest, int(quiet_intervals)

    def copies(self) -> list[Mapping[str, Tensor]]:
        """List the weights at the beginning of the interval, which lie with those who train them, by their names."""
        return [{name: each for partition in self._partitions for name, each in partition.before.items()}]

    def is_quiet(self, index: int) -> bool:
        """Tell whether partition `index` hardly moves any more, or has no parameters that could."""
        partition = self._partitions[index]
        return not partition.parameters or partition.quiet_intervals >= QUIET_INTERVALS

    def state_dict(self) -> dict[str, Any]:
        """Return the steps so far, and by partition the weights at the beginning of the interval and its history."""
        return {
            "steps": self._steps,
            "partitions": [
                {"before": dict(each.before), "highest": each.highest, "quiet_intervals": each.quiet_intervals}
                for each in self._partitions
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self._steps = state["steps"]
        for partition, saved in zip(self._partitions, state["partitions"], strict=True):
            partition.before = {
                name: divided_as(each.clone(), partition.parameters[name]) for name, each in saved["before"].items()
            }
            partition.highest, partition.quiet_intervals = saved["highest"], saved["quiet_intervals"]


def _copies(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@torch.no_grad()
def _norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.stack([whole(tensor.norm()) for tensor in tensors]).norm())
