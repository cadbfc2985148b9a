"""When a training step holds which bytes: the ops of a phase walked forward and backward, holding nothing but sizes.

settled ops          no autograd: a value lives until it was read last
training ops         what autograd saves lives until the backward of the op that saves it
recomputing ops      what they read at their segment's start lives until then; the rest is made again for its backward
backward             the gradient of a value lives from its first reader's backward to that of the op which made it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from fxsplit.graph import Graph, Op, Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """An op where it runs in a phase.

    `recorded`: autograd records it. `trains`: parameters of it want gradients. `passes`: values that it reads do.
    `recomputes`: where the segment, or the partition, starts with which it runs again in backward, if it does.
    """

    op: Op
    recorded: bool
    trains: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()
    recomputes: int | None = None


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
    adds: bool = False,
) -> int:
    """The most that one step allocates and has not freed: values, what autograd saves, gradients.

    `gradient_bytes` are those of a parameter's gradient, which lasts; 0 leaves it out. Where the step `adds` to
    gradients that were there before, its own last until they are complete. Inputs are the caller's.
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
        # Backward comes to the last op that uses a parameter first, and to the first one last.
        self.begun_by, self.completed_by = dict(uses), dict(reversed(uses))
        self.share = batch_size / graph.batch_size
        self.values: dict[str, Value] = {value.name: value for value in graph.inputs}
        self.values |= {step.op.name: step.op.output for step in steps}
        self.last_read = {name: index for index, step in enumerate(steps) for name in step.op.reads}
        self.last_read |= dict.fromkeys(graph.outputs, len(steps))
        self.given = {value.storage for value in graph.inputs}
        self.gradients: dict[str, object] = {}
        self._serial = 0
        # Storages that were made again, and are other blocks than the first ones.
        self._again: frozenset[str] = frozenset()

    def size(self, name: str) -> int:
        return self.values[name].bytes_per_sample * self.batch_size if name in self.values else 0

    def forward(self) -> None:
        for index, step in enumerate(self.steps):
            if step.recomputes is not None and (not index or self.steps[index - 1].recomputes != step.recomputes):
                for name in self._given(step.recomputes):
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
        self.heap.borrow(round(op.forward_workspace_bytes * self.share))
        if step.recorded and keeps:
            self.heap.hold(("hidden", op.name), op.hidden_bytes * self.batch_size)
            for name in op.saves:
                self._hold(name)

    def backward(self) -> None:
        for name in self.graph.outputs:
            self._give(name, self._new(self.size(name)))
        for segment, steps in groupby(reversed(self.steps), lambda step: step.recomputes):
            if segment is not None:
                self._run_again(segment)
            for step in steps:
                if step.recorded:
                    self._backward_of(step)
            self._again = frozenset()
            if segment is not None:
                for name in self._given(segment):
                    self._drop(name)
                for name in self._overwritten(segment):
                    self.heap.drop(("copy", name))
                    self.heap.drop(("kept", name))

    def _run_again(self, segment: int) -> None:
        steps = self._steps_of(segment)
        last_read = {name: index for index, step in enumerate(steps) for name in step.op.reads}
        self._again = frozenset(step.op.name for step in steps)
        for name in self._overwritten(segment):
            self.heap.hold(("copy", name), self.size(name))
        for index, step in enumerate(steps):
            self._run(step, keeps=True)
            for name in {step.op.name, *step.op.reads} & self._again:
                if last_read.get(name, index) == index:
                    self._drop(name)

    def _steps_of(self, segment: int) -> list[Step]:
        return [step for step in self.steps if step.recomputes == segment]

    def _given(self, segment: int) -> list[str]:
        """What the ops of a recomputing segment read from before it, in order."""
        steps = self._steps_of(segment)
        made = {step.op.name for step in steps}
        return list(dict.fromkeys(name for step in steps for name in step.op.reads if name not in made))

    def _overwritten(self, segment: int) -> list[str]:
        """The inputs that a recomputing segment writes into: kept as they were, and copied to run again."""
        written = {self._storage(name) for step in self._steps_of(segment) for name in step.op.mutates}
        return sorted(written & self.given)

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
            if self.begun_by[name] == op.name:
                self.heap.hold(("gradient", name), self.gradient_bytes[name])
        self.heap.borrow(round(op.backward_workspace_bytes * self.share))
        if arrived is not None:
            self.heap.drop(arrived)
        for name in step.trains:
            if self.adds and self.completed_by[name] == op.name:
                self.heap.drop(("gradient", name))
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
        if (block := self._block(name)) is not None:
            self.heap.hold(block, self.size(self._storage(name)))

    def _drop(self, name: str) -> None:
        if (block := self._block(name)) is not None:
            self.heap.drop(block)

    def _storage(self, name: str) -> str:
        return self.values[name].storage if name in self.values else name

    def _block(self, name: str) -> object:
        storage = self._storage(name)
        if storage in self.given:
            return None
        return ("again", storage) if storage in self._again else storage


def _hands_on(op: Op, read: Value) -> bool:
    """Whether the gradient of `read` is that of the output, or a part of it, and needs no memory of its own.

    So it is with sums, joined values and views: they save nothing, and what they read is no larger.
    """
    return not op.saves and not op.hidden_bytes and read.bytes_per_sample <= op.output.bytes_per_sample
