"""What each op of a captured model takes on a device: seconds, and the memory that its kernels borrow.

One training step after the other runs op by op. Forward is measured between ops, backward between the moments at which
the gradients of their outputs are complete:

    forward   op 0 ─┬─ op 1 ─┬─ op 2 ─┬─ ...      backward  ... ─┬─ op 2 ─┬─ op 1 ─┬─ op 0
                   now      now      now                        now      now      now

So memory is as full, and caches are as cold, as they are in training.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import Node

from fxsplit.capture import allocations
from fxsplit.capture.allocations import Event
from fxsplit.capture.meta import tensors_in
from fxsplit.capture.tracing import Program, Trace
from fxsplit.errors import TraceError

WARMUP = 2
FORWARD, BACKWARD = "forward", "backward"

# An op in one of the two directions; the name of its node is empty where none runs.
Moment = tuple[str, str]


def measure(
    trace: Trace,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    device: torch.device | str = "cpu",
    steps: int = 5,
) -> Trace:
    """The same trace, its ops with seconds (the median of `steps` steps) and workspace bytes as measured on `device`.

    In the train graph they are those of a training step, in the eval graph of a forward without autograd. A copy of
    the model runs; the model stays as it is. Where `args` hold another number of samples than the trace, figures are
    in proportion. Raises TraceError when the model has no weights, and GuardError when `args` take another path than
    the traced one.
    """
    device = torch.device(device)
    if any(tensor.is_meta for tensor in (*trace.model.parameters(), *trace.model.buffers())):
        raise TraceError("a model on the meta device has no weights to measure it with; build it on another device")
    given = trace.signature.tensors(args, kwargs or {})
    model = copy.deepcopy(trace.model).to(device)
    inputs = [tensor.detach().to(device, copy=True) for tensor in given]
    samples = next((len(tensor) for tensor in inputs if tensor.dim()), 1)
    runners = {training: OpRunner(model, program) for training, program in trace.programs.items()}
    clocks = {training: Clock(device) for training in runners}
    programs = {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for program in trace.programs.values():
            program.guards.check(given)
        for step in range(WARMUP + steps):
            # In turn, so that whatever else the machine does falls on both.
            for training, runner in runners.items():
                runner.step(inputs, training, clocks[training] if step >= WARMUP else _pass)
        for training, runner in runners.items():
            with allocations.recorded(device) as events:
                runner.step(inputs, training, lambda moment: allocations.mark(":".join(moment)))
            program = trace.programs[training]
            share = program.graph.batch_size / samples
            programs[training] = _annotated(program, clocks[training].seconds, _workspaces(events), share)
    return replace(trace, programs=programs)


def _pass(_moment: Moment) -> None:
    """Measure nothing."""


def _annotated(
    program: Program, seconds: Mapping[Moment, list[float]], workspaces: Mapping[Moment, int], share: float
) -> Program:
    ops = []
    for op, node in zip(program.graph.ops, program.nodes, strict=True):
        forward, backward = (
            share * statistics.median(seconds.get((way, node.name), [0.0])) for way in (FORWARD, BACKWARD)
        )
        borrowed = (round(share * workspaces.get((way, node.name), 0)) for way in (FORWARD, BACKWARD))
        ops.append(
            replace(
                op,
                seconds=forward + backward,
                forward_seconds=forward,
                forward_workspace_bytes=next(borrowed),
                backward_workspace_bytes=next(borrowed),
            )
        )
    return replace(program, graph=replace(program.graph, ops=tuple(ops)))


def _workspaces(events: Sequence[Event]) -> dict[Moment, int]:
    """The most that each op held beyond what was there before it and what is left of it afterwards."""
    found: dict[Moment, int] = {}
    marks = [position for position, event in enumerate(events) if event.mark]
    for position, end in zip(marks, [*marks[1:], len(events)], strict=True):
        way, _, name = events[position].mark.partition(":")
        inside = events[position + 1 : end]
        left = sum(inside[survivor].size for survivor in allocations.survivors(inside))
        found[way, name] = max(allocations.peak(inside) - left, 0)
    return found


class Clock:
    """Called at each moment; sums up the `seconds` from one to the next, once a step."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[Moment, list[float]] = defaultdict(list)
        self._device = device
        self._moment, self._began = (FORWARD, ""), 0.0

    def __call__(self, moment: Moment) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        ended = time.perf_counter()
        self.seconds[self._moment].append(ended - self._began)
        self._moment, self._began = moment, time.perf_counter()


class OpRunner(fx.Interpreter):
    """Runs steps of a model op by op, and calls back whenever another op begins, in either direction."""

    def __init__(self, model: nn.Module, program: Program) -> None:
        super().__init__(model, graph=program.output.graph)

    def step(self, inputs: Sequence[Tensor], training: bool, begins: Callable[[Moment], None]) -> None:
        """A forward; in training also the backward, from random gradients of the outputs."""
        self.module.train(training)
        self._begins = begins
        self._hooked: set[Node] = set()
        with torch.set_grad_enabled(training):
            made = [tensor for tensor in tensors_in(self.run(*inputs)) if tensor.requires_grad]
        directions = [torch.randn_like(tensor) for tensor in made]
        if made:
            torch.autograd.backward(made, directions)
            begins((BACKWARD, ""))
        for parameter in self.module.parameters():
            parameter.grad = None
        # What a step leaves behind would be freed in the midst of the next one.
        self.env.clear()
        self._hooked.clear()

    def run_node(self, n: fx.Node) -> Any:
        """One op of the forward."""
        self._begins((FORWARD, n.name))
        value = super().run_node(n)
        self._begins((FORWARD, ""))
        for tensor in tensors_in(value):
            # What an op merely hands on belongs to the op that made it.
            if tensor.grad_fn is not None and tensor.grad_fn not in self._hooked:
                self._hooked.add(tensor.grad_fn)
                tensor.grad_fn.register_prehook(lambda _gradients, name=n.name: self._begins((BACKWARD, name)))
        return value
