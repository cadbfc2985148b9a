"""When a training step holds which bytes: the ops of a phase walked forward and backward, holding nothing but sizes.

settled ops          no autograd: a value lives until it was read last
training ops         what autograd saves lives until the backward of the op that saves it
backward             the gradient of a value lives from its first reader's backward to that of the op which made it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fxsplit.graph import Graph, Op, Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """An op where it runs in a phase.

    `recorded`: autograd records it. `trains`: parameters of it want gradients. `passes`: values that it reads do.
    """

    op: Op
    recorded: bool
    trains: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()


class Heap:
    """Blocks of memory, each freed when it is no longer held; `peak` is the most there ever was."""

    def __init__(self) -> None:
        self.used = self.peak = 0
        self._blocks: dict[object, tuple[int, int]] = {}

    def hold(self, block: object, size: int = 0) -> None:
        """Hold a block once more; a new one has `size`."""
        size, holds = self._blocks.get(block, (size, 0))
        self._blocks[block] = size, holds + 1
        if not holds:
            self.used += size
            self.peak = max(self.peak, self.used)

    def drop(self, block: object) -> None:
        """Hold it once less."""
        size, holds = self._blocks.pop(block)
        if holds > 1:
            self._blocks[block] = size, holds - 1
        else:
            self.used -= size

    def borrow(self, size: int) -> None:
        """Hold a block and drop it at once."""
        self.peak = max(self.peak, self.used + size)

    def is_shared(self, block: object) -> bool:
        return self._blocks[block][1] > 1


def peak_bytes(
    steps: Sequence[Step],
    graph: Graph,
    *,
    batch_size: int,
    gradient_bytes: Mapping[str, int],
) -> int:
    """The most that one step allocates and has not freed: values, what autograd saves, gradients.

    `gradient_bytes` are those of a parameter's gradient, which lasts; 0 leaves it out. Inputs are the caller's.
    """
    walk = _Walk(steps, graph, batch_size, gradient_bytes)
    walk.forward()
    walk.backward()
    return walk.heap.peak


class _Walk:
    def __init__(self, steps: Sequence[Step], graph: Graph, batch_size: int, gradient_bytes: Mapping[str, int]) -> None:
        self.heap = Heap()
        self.steps, self.graph, self.batch_size, self.gradient_bytes = steps, graph, batch_size, gradient_bytes
        self.share = batch_size / graph.batch_size
        self.values: dict[str, Value] = {value.name: value for value in graph.inputs}
        self.values |= {step.op.name: step.op.output for step in steps}
        self.last_read = {name: index for index, step in enumerate(steps) for name in step.op.reads}
        self.last_read |= dict.fromkeys(graph.outputs, len(steps))
        self.given = {value.storage for value in graph.inputs}
        self.gradients: dict[str, object] = {}
        self._serial = 0

    def size(self, name: str) -> int:
        return self.values[name].bytes_per_sample * self.batch_size if name in self.values else 0

    def forward(self) -> None:
        for index, step in enumerate(self.steps):
            op = step.op
            self._hold(op.name)
            self.heap.borrow(round(op.forward_workspace_bytes * self.share))
            if step.recorded:
                self.heap.hold(("hidden", op.name), op.hidden_bytes * self.batch_size)
                for name in op.saves:
                    self._hold(name)
            for name in {op.name, *op.reads}:
                if self.last_read.get(name, index) == index:
                    self._drop(name)

    def backward(self) -> None:
        for name in self.graph.outputs:
            self._give(name, self._new(self.size(name)))
        for step in reversed(self.steps):
            if step.recorded:
                self._backward_of(step)

    def _backward_of(self, step: Step) -> None:
        op = step.op
        arrived = self.gradients.pop(op.name, None)
        found: list[tuple[str, object]] = []
        for name in step.passes:
            if arrived is not None and _hands_on(op, self.values[name]):
                self.heap.hold(arrived)
                found.append((name, arrived))
            else:
                found.append((name, self._new(self.size(name))))
        for name in step.trains:
            self.heap.hold(("gradient", name), self.gradient_bytes[name])
        self.heap.borrow(round(op.backward_workspace_bytes * self.share))
        if arrived is not None:
            self.heap.drop(arrived)
        for name, block in found:
            self._give(name, block)
        for name in op.saves:
            self._drop(name)
        self.heap.drop(("hidden", op.name))

    def _give(self, name: str, block: object) -> None:
        """Add a gradient of a value to those that arrived before: in place where nobody else looks."""
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
        """The memory of a value, whichever value it belongs to in the mode of this phase."""
        if (storage := self._storage(name)) is not None:
            self.heap.hold(storage, self.size(storage))

    def _drop(self, name: str) -> None:
        if (storage := self._storage(name)) is not None:
            self.heap.drop(storage)

    def _storage(self, name: str) -> str | None:
        storage = self.values[name].storage if name in self.values else name
        return None if storage in self.given else storage


def _hands_on(op: Op, read: Value) -> bool:
    """Whether the gradient of `read` is that of the output, or a part of it, and needs no memory of its own.

    So it is with sums, joined values and views: they save nothing, and what they read is no larger.
    """
    return not op.saves and not op.hidden_bytes and read.bytes_per_sample <= op.output.bytes_per_sample
