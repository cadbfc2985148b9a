"""Keeps the state of a run the same in all its processes, where a step leaves a part of it to each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from fxsplit.distribute.processes import Processes
from fxsplit.execute.forward import Engine
from fxsplit.objects.structure import is_divided

# State of a trainer that a process has for itself, or that has just been added up over all.
OWN = ("telemetry", "accuracy")


class Exchanging(Protocol):
    """Something of which each process has a part, since each has seen other images."""

    def exchange(self, processes: Processes) -> None:
        """Give all processes the parts of the others."""
        ...


class Copying(Protocol):
    """Something that keeps averages of weights as they train, or weights of earlier steps."""

    def copies(self) -> Sequence[Mapping[str, Tensor]]:
        """List what it keeps, each by the names of the model."""
        ...


class Concord:
    """Restores and checks that all processes of a run have the same state.

    Where each takes a part of every batch, gradients, and so weights and optimizers, are the same in all by themselves.
    The statistics of BatchNorm, and soft targets, come from the images that each process has seen. Where a partition
    is trained by one process of a pipeline, all of that is its own until it tells the others; the state of the
    optimizer stays there. With a single process nothing is done.

    Args:
        processes: those of the run.
        engine: knows which process of a pipeline trains what. Partitions that do not train do not change.
        parts: what else differs between processes that have seen other images; None for what the run does not have.
        copies: what keeps averages, or earlier weights; None likewise.
    """

    def __init__(
        self,
        processes: Processes,
        engine: Engine,
        parts: Sequence[Exchanging | None],
        copies: Sequence[Copying | None] = (),
    ) -> None:
        self._processes, self._engine, self._executor = processes, engine, engine.executor
        self._parts = [part for part in parts if part is not None]
        self._copies = [part for part in copies if part is not None]

    def restore(self, *, of_first: bool = False) -> None:
        """Give all processes the state of the model, and of its copies, that the steps have left.

        With `of_first` it is what the first process of each pipeline has, which has done something by itself.
        """
        if self._processes.count == 1:
            return
        homes = self._engine.homes
        if homes is not None and of_first:
            homes = [0] * len(homes)
        if self._processes.replicas.count > 1:
            self._average()
        for part in self._parts:
            part.exchange(self._processes)
        if homes is not None:
            self._tell(homes)

    def _average(self) -> None:
        """Average buffers over replicas.

        Running means are linear in what they are means of: it makes no difference to them how often they are averaged.
        """
        training = self._executor.partitions[slice(*self._executor.window)]
        names = dict.fromkeys(name for partition in training for name in partition.state)
        buffers = dict(self._executor.named_buffers())
        # In a pipeline, those that are not of this process are overwritten then.
        self._processes.replicas.mean([buffers[name] for name in names if name in buffers])

    def _tell(self, homes: Sequence[int]) -> None:
        """Send weights, buffers and copies of each partition that trains from its home through the pipeline."""
        state = [self._model(), *(each for part in self._copies for each in part.copies())]
        for index in range(*self._executor.window):
            names = self._executor.partitions[index].state
            tensors = [each[name] for each in state for name in names if name in each]
            self._processes.pipeline.broadcast(tensors, source=homes[index])

    def _model(self) -> dict[str, Tensor]:
        return {**dict(self._executor.named_parameters()), **dict(self._executor.named_buffers())}

    def check(self, training: Mapping[str, Callable[[], Mapping[str, Any]]]) -> None:
        """Raise FxsplitError, which names a tensor, where a process has other weights or state of training.

        What is in one process alone, as a part of a tensor or as state of an optimizer, cannot differ. `training` has
        what returns the state of each part of the trainer.
        """
        if self._processes.count == 1:
            return
        own = OWN if self._engine.homes is None else (*OWN, "optimizer")
        shared = {name: state() for name, state in training.items() if name not in own}
        state = {**self._model(), **dict(_tensors(shared))}
        self._processes.refuse_drifted({name: each for name, each in state.items() if not is_divided(each)})


def _tensors(state: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """List the tensors in nested plain data, by their paths."""
    if isinstance(state, Tensor):
        yield path, state
    items = state.items() if isinstance(state, Mapping) else enumerate(state) if isinstance(state, list | tuple) else ()
    for key, value in items:
        yield from _tensors(value, f"{path}/{key}".lstrip("/"))
