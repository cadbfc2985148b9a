"""Simulates which bytes a training step holds when, walking through its ops forward and backward with sizes alone.

settled ops       no autograd: a value is freed after its last reader has run
training ops      what autograd saves for an op is freed by the backward of that op
recomputing ops   only what enters their segment is kept; the rest is computed again just before the segment's backward
gradients         that of a value lives from the backward of its last reader to that of the op which made the value
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from fxsplit.graph import Graph, Op, Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Describes how an op runs in a phase.

    Args:
        recorded: autograd records it.
        trains: the parameters of it that get gradients; `passes` are the values among its inputs that do.
        recomputes: start of the segment, or partition, with which it runs again in backward; None if it does not.
    """

    op: Op
    recorded: bool
    trains: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()
    recomputes: int | None = None


class Heap:
    """Counts blocks of memory, each freed when its last holder drops it: bytes `used` now, and their `peak`."""

    def __init__(self) -> None:
        self.used = self.peak = 0
        self._blocks: dict[object, tuple[int, int]] = {}

    def hold(self, block: object, size: int = 0) -> None:
        """Add a holder to a block; a new one is allocated with `size` bytes."""
        size, holds = self._blocks.get(block, (size, 0))
        self._blocks[block] = size, holds + 1
        if not holds:
            self.used += size
            self.peak = max(self.peak, self.used)

    def drop(self, block: object) -> None:
        """Take a holder from a block, and free it if that was the last."""
        size, holds = self._blocks.pop(block)
        if holds > 1:
            self._blocks[block] = size, holds - 1
        else:
            self.used -= size

    def borrow(self, size: int) -> None:
        """Allocate `size` bytes and free them at once."""
        self.peak = max(self.peak, self.used + size)

    def is_shared(self, block: object) -> bool:
        """Whether a block has several holders."""
        return self._blocks[block][1] > 1


def peak_bytes(
    steps: Sequence[Step],
    graph: Graph,
    *,
    batch_size: int,
    gradient_bytes: Mapping[str, int],
    adds: bool = False,
) -> int:
    """Simulate one step and return the most bytes that it holds at a time, in values, saved tensors and gradients.

    Args:
        steps: the ops of the phase in the order in which they run.
        graph: the train graph, for its inputs, which are the caller's and not counted, and its outputs.
        batch_size: samples of the (micro-)batch.
        gradient_bytes: size of the gradient of each parameter that trains, which lasts; 0 leaves it out.
        adds: the step adds its gradients to earlier ones, so that each is freed once it is complete.
    """
    walk = _Walk(steps, graph, batch_size, gradient_bytes, adds)
    walk.forward()
    walk.backward()
    return walk.heap.peak


class _Walk:
    def __init__(
        self, steps: Sequence[Step], graph: Graph, batch_size: int, gradient_bytes: Mapping[str, int], adds: bool
    ) -> None:
        self.heap = Heap()
        self.steps, self.graph, self.batch_size, self.gradient_bytes = steps, graph, batch_size, gradient_bytes
        self.adds = adds
        uses = [(name, step.op.name) for step in steps if step.recorded for name in step.trains]
        # Backward runs from the last op to the first: the last user of a parameter allocates its gradient.
        self.begun_by, self.completed_by = dict(uses), dict(reversed(uses))
        self.scale = batch_size / graph.batch_size
        self.values: dict[str, Value] = {value.name: value for value in graph.inputs}
        self.values |= {step.op.name: step.op.output for step in steps}
        self.last_read = {name: index for index, step in enumerate(steps) for name in step.op.reads}
        self.last_read |= dict.fromkeys(graph.outputs, len(steps))
        self.input_storages = {value.storage for value in graph.inputs}
        self.gradients: dict[str, object] = {}
        self._serial = 0
        # Storages that are computed for the second time: other blocks than at first.
        self._recomputed: frozenset[str] = frozenset()

    def size(self, name: str) -> int:
        return self.values[name].bytes_per_sample * self.batch_size if name in self.values else 0

    def forward(self) -> None:
        for index, step in enumerate(self.steps):
            if step.recomputes is not None and (not index or self.steps[index - 1].recomputes != step.recomputes):
                for name in self._entering(step.recomputes):
                    self._hold(name)
                for name in self._overwritten(step.recomputes):
                    self.heap.hold(("kept", name), self.size(name))
            self._run(step, keeps=step.recomputes is None)
            for name in {step.op.name, *step.op.reads}:
                if self.last_read.get(name, index) == index:
                    self._drop(name)

    def _run(self, step: Step, *, keeps: bool) -> None:
        op = step.op
        self._hold(op.name)
        self.heap.borrow(round(op.forward_workspace_bytes * self.scale))
        if step.recorded and keeps:
            self.heap.hold(("hidden", op.name), op.hidden_bytes * self.batch_size)
            for name in op.saves:
                self._hold(name)

    def backward(self) -> None:
        for name in self.graph.outputs:
            self._give(name, self._new(self.size(name)))
        for segment, steps in groupby(reversed(self.steps), lambda step: step.recomputes):
            if segment is not None:
                self._recompute(segment)
            for step in steps:
                if step.recorded:
                    self._backward_of(step)
            if segment is not None:
                for name in self._entering(segment):
                    self._drop(name)
                for name in self._overwritten(segment):
                    self.heap.drop(("copy", name))
                    self.heap.drop(("kept", name))

    def _recompute(self, segment: int) -> None:
        steps = self._steps_of(segment)
        last_read = {name: index for index, step in enumerate(steps) for name in step.op.reads}
        self._recomputed = frozenset(step.op.name for step in steps)
        for name in self._overwritten(segment):
            self.heap.hold(("copy", name), self.size(name))
        for index, step in enumerate(steps):
            self._run(step, keeps=True)
            for name in {step.op.name, *step.op.reads} & self._recomputed:
                if last_read.get(name, index) == index:
                    self._drop(name)

    def _steps_of(self, segment: int) -> list[Step]:
        return [step for step in self.steps if step.recomputes == segment]

    def _entering(self, segment: int) -> list[str]:
        """List the values that enter a recomputing segment, in the order in which they are read."""
        steps = self._steps_of(segment)
        made = {step.op.name for step in steps}
        return list(dict.fromkeys(name for step in steps for name in step.op.reads if name not in made))

    def _overwritten(self, segment: int) -> list[str]:
        """List the model inputs that a recomputing segment writes into: kept as they were, and copied to run again."""
        written = {self._storage(name) for step in self._steps_of(segment) for name in step.op.mutates}
        return sorted(written & self.input_storages)

    def _backward_of(self, step: Step) -> None:
        op = step.op
        output_gradient = self.gradients.pop(op.name, None)
        input_gradients: list[tuple[str, object]] = []
        for name in step.passes:
            if output_gradient is not None and _hands_on(op, self.values[name]):
                self.heap.hold(output_gradient)
                input_gradients.append((name, output_gradient))
            else:
                input_gradients.append((name, self._new(self.size(name))))
        for name in step.trains:
            if self.begun_by[name] == op.name:
                self.heap.hold(("gradient", name), self.gradient_bytes[name])
        self.heap.borrow(round(op.backward_workspace_bytes * self.scale))
        if output_gradient is not None:
            self.heap.drop(output_gradient)
        for name in step.trains:
            if self.adds and self.completed_by[name] == op.name:
                self.heap.drop(("gradient", name))
        for name, block in input_gradients:
            self._give(name, block)
        for name in op.saves:
            self._drop(name)
        self.heap.drop(("hidden", op.name))

    def _give(self, name: str, block: object) -> None:
        """Add a gradient of a value to those that arrived before, in place unless another value shares that block."""
        before = self.gradients.get(name)
        if before is None:
            self.gradients[name] = block
            return
        if self.heap.is_shared(before):
            self.gradients[name] = self._new(self.size(name))
            self.heap.drop(before)
        self.heap.drop(block)

    def _new(self, size: int) -> object:
        self._serial += 1
        self.heap.hold(self._serial, size)
        return self._serial

    def _hold(self, name: str) -> None:
        """Add a holder to the memory of a value, which may be that of another value whose storage it shares."""
        if (block := self._block(name)) is not None:
            self.heap.hold(block, self.size(self._storage(name)))

    def _drop(self, name: str) -> None:
        if (block := self._block(name)) is not None:
            self.heap.drop(block)

    def _storage(self, name: str) -> str:
        return self.values[name].storage if name in self.values else name

    def _block(self, name: str) -> object:
        storage = self._storage(name)
        if storage in self.input_storages:
            return None
        return ("recomputed", storage) if storage in self._recomputed else storage


def _hands_on(op: Op, read: Value) -> bool:
    """Whether the gradient of the input `read` is that of the output, or a part of it, and needs no memory of its own.

    So it is in sums, concatenations and views: ops that save nothing, with inputs no larger than the output.
    """
    return not op.saves and not op.hidden_bytes and read.bytes_per_sample <= op.output.bytes_per_sample
