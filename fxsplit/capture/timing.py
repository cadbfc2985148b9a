"""How long each op of a captured model takes on a device: one training step at a time, op by op, in one process.

Forward is timed between ops, backward between the moments at which the gradients of their outputs are complete:

    forward   op 0 ─┬─ op 1 ─┬─ op 2 ─┬─ ...      backward  ... ─┬─ op 2 ─┬─ op 1 ─┬─ op 0
                  clock    clock    clock                      clock    clock    clock

So memory is as full, and caches as cold, as they are in training.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import Node

from fxsplit.capture.costs import tensors_in
from fxsplit.capture.tracing import Program, Trace
from fxsplit.errors import TraceError

WARMUP = 2


def measure_seconds(
    trace: Trace,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    device: torch.device | str = "cpu",
    steps: int = 5,
) -> Trace:
    """The same trace, its ops with the median `seconds` and `forward_seconds` of `steps` steps on `device`.

    In the train graph they are those of a training step, in the eval graph of a forward without autograd, with 0 for
    backward. A copy of the model runs; the model stays as it is. Where `args` hold another number of samples than the
    trace, seconds are in proportion. Raises TraceError when the model has no weights, and GuardError when `args` take
    another path than the traced one.
    """
    device = torch.device(device)
    if any(tensor.is_meta for tensor in (*trace.model.parameters(), *trace.model.buffers())):
        raise TraceError("the seconds of a model on the meta device cannot be measured; build it with weights")
    given = trace.signature.tensors(args, kwargs or {})
    model = copy.deepcopy(trace.model).to(device)
    inputs = [tensor.detach().to(device, copy=True) for tensor in given]
    samples = next((len(tensor) for tensor in inputs if tensor.dim()), 1)
    programs = {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for training, program in trace.programs.items():
            program.guards.check(given)
            clock = OpClock(model.train(training), program, device)
            for step in range(WARMUP + steps):
                clock.step(inputs)
                if step < WARMUP:
                    clock.forget()
            programs[training] = _timed(program, clock, program.graph.batch_size / samples)
    return replace(trace, programs=programs)


def _timed(program: Program, clock: OpClock, share: float) -> Program:
    ops = []
    for op, node in zip(program.graph.ops, program.nodes, strict=True):
        forward = share * statistics.median(clock.forward[node.name])
        backward = share * statistics.median(clock.backward.get(node.name, [0.0]))
        ops.append(replace(op, seconds=forward + backward, forward_seconds=forward))
    return replace(program, graph=replace(program.graph, ops=tuple(ops)))


class OpClock(fx.Interpreter):
    """Runs steps of a model; `forward` and `backward` hold the seconds of each, by the names of the nodes."""

    def __init__(self, model: nn.Module, program: Program, device: torch.device) -> None:
        super().__init__(model, graph=program.output.graph)
        self.training, self.device = model.training, device
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.forward: dict[str, list[float]] = defaultdict(list)
        self.backward: dict[str, list[float]] = defaultdict(list)

    def step(self, inputs: Sequence[Tensor]) -> None:
        """One forward; in training also its backward, from random gradients of the outputs."""
        self._hooked: set[Node] = set()
        with torch.set_grad_enabled(self.training):
            made = [tensor for tensor in tensors_in(self.run(*inputs)) if tensor.requires_grad]
        if not made:
            return
        directions = [torch.randn_like(tensor) for tensor in made]
        self._spent: dict[str, float] = defaultdict(float)
        self._runs, self._began = "", self._now()
        torch.autograd.backward(made, directions)
        self._switch("")
        for name, seconds in self._spent.items():
            self.backward[name].append(seconds)
        for parameter in self.module.parameters():
            parameter.grad = None

    def run_node(self, n: fx.Node) -> Any:
        began = self._now()
        value = super().run_node(n)
        self.forward[n.name].append(self._now() - began)
        for tensor in tensors_in(value):
            # What an op merely hands on keeps the op that made it.
            if tensor.grad_fn is not None and tensor.grad_fn not in self._hooked:
                self._hooked.add(tensor.grad_fn)
                tensor.grad_fn.register_prehook(lambda _gradients, name=n.name: self._switch(name))
        return value

    def _switch(self, name: str) -> None:
        """From now on the backward of another op runs."""
        moment = self._now()
        self._spent[self._runs] += moment - self._began
        self._runs, self._began = name, moment

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
