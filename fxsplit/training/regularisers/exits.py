"""Auxiliary exits: classifiers at the ends of the first partitions that train.

images ──► settled ──► trains ──┬──► trains ──┬──► trains ──► ... ──► scores
                              exit          exit

The loss of an exit reaches the partitions before it by a short way. An exit trains as long as its partition, is dropped
when that settles, and is no part of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxsplit.data.randomness import random_stream
from fxsplit.distribute.layout import divided_as
from fxsplit.execute.executor import Executor
from fxsplit.graph import Graph, Value
from fxsplit.plan.partition import Partition
from fxsplit.plan.schedule import Phase


class Exit(nn.Module):
    """Computes class scores (N, classes) from a partition's output, by global average pooling and a linear layer.

    Args:
        value: the value that is read, a floating-point row for each image.
        partition: writes that value.
        num_classes: how many scores there are.
    """

    def __init__(self, value: Value, partition: Partition, *, num_classes: int) -> None:
        super().__init__()
        shape = value.shape
        assert shape is not None
        channels = channel_dim(shape)
        self._position = partition.writes.index(value.name)
        self._pooled_dims = [dim for dim in range(1, len(shape)) if dim != channels]
        self.linear = nn.Linear(shape[channels], num_classes, dtype=getattr(torch, value.dtype))

    def forward(self, values: Sequence[Any]) -> Tensor:
        features = values[self._position]
        # For an empty list of dimensions torch would take the mean over all of them.
        scores: Tensor = self.linear(features.mean(self._pooled_dims) if self._pooled_dims else features)
        return scores


class Exits:
    """Holds the exits of a phase, at the ends of its first training partitions, and computes their losses.

    The last partition of the model has none, nor has one that delivers no floating-point row for each image. `modules`
    holds the exits by the index of their partition, for the optimizer.

    Args:
        graph: the model's ops in training.
        partitions: those of the plan.
        count: the most exits that a phase has.
        num_classes: how many scores each exit gives.
        weight: factor of each exit's loss, beside the model's own, which has 1.
        seed: first weights depend on it; torch's random state stays as it is.
        device: where exits are.
    """

    def __init__(
        self,
        graph: Graph,
        partitions: Sequence[Partition],
        *,
        count: int,
        num_classes: int,
        weight: float,
        seed: int,
        device: torch.device,
    ) -> None:
        self.modules = nn.ModuleDict()
        self._graph, self._partitions = graph, partitions
        self._count, self._num_classes, self._weight = count, num_classes, weight
        self._seed, self._device = seed, device
        # Partitions that can have no exit, and for which a notice has said so.
        self._refused: set[int] = set()

    def enter(self, phase: Phase, notice: Callable[[str], None]) -> None:
        """Keep the exits that the phase has too, drop the others, and make new ones.

        `notice` is called once for each partition that can have none.
        """
        before, self.modules = self.modules, nn.ModuleDict()
        for index in range(phase.start, min(phase.start + self._count, phase.stop, len(self._partitions) - 1)):
            name, value = str(index), features_of(self._graph, self._partitions[index])
            if value is not None:
                self.modules[name] = before[name] if name in before else self._new(index, value)
            elif index not in self._refused:
                self._refused.add(index)
                notice(
                    f"there is no exit after partition {self._partitions[index].name!r}, "
                    "because it delivers no floating-point row for each image"
                )

    def linears(self) -> list[nn.Linear]:
        """List the layers of the exits of this phase."""
        return [module.linear for module in self.modules.values() if isinstance(module, Exit)]

    @contextmanager
    def tapped(self, executor: Executor) -> Iterator[list[Tensor]]:
        """Inside, each forward pass of `executor` appends the class scores (B, classes) of every exit to the list."""
        scores: list[Tensor] = []

        def tap(index: int, values: Sequence[Any]) -> None:
            if str(index) in self.modules:
                scores.append(self.modules[str(index)](values))

        with executor.tapped(tap):
            yield scores

    def add_to(self, loss: Tensor, scores: Sequence[Tensor], labels: Tensor, *, smoothing: float) -> Tensor:
        """Return `loss` () plus the weighted cross-entropy of each of the exits' `scores` (B, classes).

        Labels are int64 (B,); `smoothing` is label smoothing, as for the model's own loss.
        """
        for each in scores:
            loss = loss + self._weight * F.cross_entropy(each, labels, label_smoothing=smoothing)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the weights of the exits, by the index of their partition."""
        return dict(self.modules.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; the same phase must have been entered."""
        now = self.modules.state_dict()
        self.modules.load_state_dict({name: divided_as(each, now[name]) for name, each in state.items()})

    def _new(self, index: int, value: Value) -> Exit:
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would change the random state of GPUs, too.
            torch.default_generator.manual_seed(int(random_stream("exit", self._seed, index).integers(2**32)))
            made = Exit(value, self._partitions[index], num_classes=self._num_classes)
        return made.to(self._device)


def features_of(graph: Graph, partition: Partition) -> Value | None:
    """Find the largest value with a floating-point row for each image that a partition computes and writes.

    Among equally large ones it is the last. Returns None if there is none.
    """
    ops = reversed(graph.ops[partition.start : partition.stop])
    rows = [
        value
        for value in (op.output for op in ops if op.name in partition.writes)
        if value.shape is not None
        and len(value.shape) > 1
        and value.shape[0] == graph.batch_size
        and getattr(torch, value.dtype).is_floating_point
    ]
    return max(rows, key=lambda value: value.bytes_per_sample, default=None)


def channel_dim(shape: Sequence[int]) -> int:
    """Guess the dimension of the channels: the last of tokens (N, T, C) and of square maps (N, H, H, C), else 1."""
    is_last = len(shape) == 3 or (len(shape) == 4 and shape[1] == shape[2] != shape[3])
    return len(shape) - 1 if is_last else 1
