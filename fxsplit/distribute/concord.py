"""Keeps the state of a run the same in all its processes, where a step leaves a part of it to each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from fxsplit.distribute.processes import Processes
from fxsplit.execute.executor import Executor
from fxsplit.objects.structure import is_divided

# State of a trainer that a process has for itself, or that has just been added up over all.
OWN = ("telemetry", "accuracy")


class Exchanging(Protocol):
    """Something of which each process has a part."""

    def exchange(self, processes: Processes) -> None:
        """Give all processes the parts of the others."""
        ...


class Concord:
    """Restores and checks that all processes of a run have the same state.

    Gradients, and so weights and optimizers, are the same in all by themselves. The statistics of BatchNorm, and soft
    targets, come from the images that each process has seen. With a single process nothing is done.

    Args:
        processes: those of the run.
        executor: its buffers are averaged: those of partitions that train. Others do not change.
        parts: what else differs between processes; None for what the run does not have.
    """

    def __init__(self, processes: Processes, executor: Executor, parts: Sequence[Exchanging | None]) -> None:
        self._processes, self._executor = processes, executor
        self._parts = [part for part in parts if part is not None]

    def restore(self) -> None:
        """Average buffers, and exchange soft targets and averages of buffers.

        Running means are linear in what they are means of: it makes no difference to them how often they are averaged.
        """
        if self._processes.count == 1:
            return
        training = self._executor.partitions[slice(*self._executor.window)]
        names = dict.fromkeys(name for partition in training for name in partition.state)
        buffers = dict(self._executor.named_buffers())
        self._processes.mean([buffers[name] for name in names if name in buffers])
        for part in self._parts:
            part.exchange(self._processes)

    def check(self, training: Callable[[], Mapping[str, Any]]) -> None:
        """Raise FxsplitError, which names a tensor, where a process has other weights or state of training.

        What is divided, of which each part is in one process alone, cannot differ. `training` returns the state of the
        trainer.
        """
        if self._processes.count == 1:
            return
        shared = {name: state for name, state in training().items() if name not in OWN}
        model = {**dict(self._executor.named_parameters()), **dict(self._executor.named_buffers())}
        state = {**model, **dict(_tensors(shared))}
        self._processes.refuse_drifted({name: each for name, each in state.items() if not is_divided(each)})


def _tensors(state: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """List the tensors in nested plain data, by their paths."""
    if isinstance(state, Tensor):
        yield path, state
    items = state.items() if isinstance(state, Mapping) else enumerate(state) if isinstance(state, list | tuple) else ()
    for key, value in items:
        yield from _tensors(value, f"{path}/{key}".lstrip("/"))
