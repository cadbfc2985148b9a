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
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import Node

from fxsplit.capture.contexts import contexts_of, opened
from fxsplit.capture.tracing import Program, Trace
from fxsplit.errors import TraceError
from fxsplit.execute.folding import fold
from fxsplit.execute.passes import Pass, rewritten
from fxsplit.execute.prefix import may_be_relaid, takes_any_layout
from fxsplit.execute.stages import stage_graph
from fxsplit.measuring import allocations
from fxsplit.measuring.allocations import Event
from fxsplit.objects.structure import tensors_in
from fxsplit.plan.partition import partition

WARMUP = 2
FORWARD, BACKWARD = "forward", "backward"

# An op in one of the two directions; its name is empty where none runs.
Moment = tuple[str, str]
# How ops run. Settled ones are folded.
Kind = Literal["training", "evaluation", "settled"]


def measure(
    trace: Trace,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    device: torch.device | str = "cpu",
    steps: int = 5,
    passes: Sequence[Pass] = (),
) -> Trace:
    """The same trace, its ops with seconds (the median of `steps` steps) and workspace bytes as measured on `device`.

    In the train graph they are those of a training step, in the eval graph of a forward without autograd, as the model
    is and as it is when it is settled; with `passes`, as an executor with these runs it. A copy of the model runs; the
    model stays as it is. Where `args` hold another number of samples than the trace, figures are in proportion. Raises
    TraceError when the model has no weights, and GuardError when `args` take another path than the traced one.
    """
    device = torch.device(device)
    if any(tensor.is_meta for tensor in (*trace.model.parameters(), *trace.model.buffers())):
        raise TraceError("a model on the meta device has no weights to measure it with; build it on another device")
    given = trace.signature.tensors(args, kwargs or {})
    model = copy.deepcopy(trace.model).to(device)
    inputs = [tensor.detach().to(device, copy=True) for tensor in given]
    samples = next((len(tensor) for tensor in inputs if tensor.dim()), 1)
    runners = _runners(trace, model, inputs, passes)
    clocks = {kind: Clock(device) for kind in runners}
    workspaces = {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for program in trace.programs.values():
            program.guards.check(given)
        for step in range(WARMUP + steps):
            # In turn, so that whatever else the machine does falls on all.
            for kind, runner in runners.items():
                runner.step(clocks[kind] if step >= WARMUP else _pass)
        for kind, runner in runners.items():
            with allocations.recorded(device) as events:
                runner.step(lambda moment: allocations.mark(":".join(moment)))
            workspaces[kind] = _workspaces(events)
    programs = {}
    for training, program in trace.programs.items():
        kinds: tuple[Kind, ...] = ("training",) if training else ("evaluation", "settled")
        figures = [Figures(clocks[kind].seconds, workspaces[kind]) for kind in kinds]
        programs[training] = _annotated(program, figures, program.graph.batch_size / samples)
    return replace(trace, programs=programs)


def _runners(trace: Trace, model: nn.Module, inputs: Sequence[Tensor], passes: Sequence[Pass]) -> dict[Kind, OpRunner]:
    copied = replace(trace, model=model)
    (whole,) = partition(trace, count=1)
    read = [inputs[trace.signature.names.index(name)] for name in whole.reads]
    runners = {}
    kinds: tuple[tuple[Kind, bool], ...] = (("training", True), ("evaluation", False))
    for kind, training in kinds:
        graph = rewritten(stage_graph(copied, whole, is_last=True, training=training), model, passes)
        runners[kind] = OpRunner(model, graph, [read], training=training)
    graph = stage_graph(copied, whole, is_last=True, training=False)
    folds, _ = fold(graph, model)
    relaid = takes_any_layout(graph, model) and all(map(may_be_relaid, inputs))
    modules = dict(model.named_modules(remove_duplicate=False))
    layout = torch.channels_last if relaid else torch.preserve_format
    weights = [each.tensors(modules, layout) for each in folds]
    runners["settled"] = OpRunner(model, graph, [[*read, weights]], training=False)
    return runners


def _pass(_moment: Moment) -> None:
    """Measure nothing."""


def _annotated(program: Program, figures: Sequence[Figures], share: float) -> Program:
    """The program with the figures of its own mode, and in evaluation those of the settled model."""
    ops = []
    for op in program.graph.ops:
        (forward, backward), (borrowed, borrowed_back) = figures[0].of(op.name, share)
        op = replace(
            op,
            seconds=forward + backward,
            forward_seconds=forward,
            forward_workspace_bytes=borrowed,
            backward_workspace_bytes=borrowed_back,
        )
        for settled in figures[1:]:
            (forward, _), (borrowed, _) = settled.of(op.name, share)
            op = replace(op, settled_seconds=forward, settled_workspace_bytes=borrowed)
        ops.append(op)
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


class Figures(NamedTuple):
    """What the ops of one way to run them took."""

    seconds: Mapping[Moment, list[float]]
    workspaces: Mapping[Moment, int]

    def of(self, name: str, share: float) -> tuple[tuple[float, float], tuple[int, int]]:
        """Seconds and workspace bytes of an op, forward and backward, for a `share` of the batch."""
        forward, backward = (
            (share * statistics.median(self.seconds.get((way, name), [0.0])), self.workspaces.get((way, name), 0))
            for way in (FORWARD, BACKWARD)
        )
        return (forward[0], backward[0]), (round(share * forward[1]), round(share * backward[1]))


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
    """Runs steps of a stage's `graph` op by op, and calls back whenever another op begins, in either direction.

    `given` are the arguments of the graph.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, given: Sequence[Any], *, training: bool) -> None:
        super().__init__(model, graph=graph)
        self._names = {node: node.meta["op"].name for node in graph.nodes if "op" in node.meta}
        self._given, self._training = given, training

    def step(self, begins: Callable[[Moment], None]) -> None:
        """A forward; in training also the backward, from random gradients of the outputs."""
        self.module.train(self._training)
        self._begins = begins
        self._hooked: set[Node] = set()
        # A stage empties the list that it is given.
        given = [list(each) if isinstance(each, list) else each for each in self._given]
        with torch.set_grad_enabled(self._training):
            made = [tensor for tensor in tensors_in(self.run(*given)) if tensor.requires_grad]
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
        name = self._names.get(n, "")
        with opened(contexts_of(n)):
            self._begins((FORWARD, name))
            value = super().run_node(n)
            self._begins((FORWARD, ""))
        for tensor in tensors_in(value):
            # What an op merely hands on belongs to the op that made it.
            if tensor.grad_fn is not None and tensor.grad_fn not in self._hooked:
                self._hooked.add(tensor.grad_fn)
                tensor.grad_fn.register_prehook(lambda _gradients, name=name: self._begins((BACKWARD, name)))
        return value
