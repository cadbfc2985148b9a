"""Measures each op of a captured model on a device: its seconds, and its workspace, the memory that its kernels borrow.

Whole training steps run, op by op. The clock is read between ops in forward, and in backward whenever the gradients of
an op's outputs are complete:

    forward   op 0 ─┬─ op 1 ─┬─ op 2 ─┬─ ...      backward  ... ─┬─ op 2 ─┬─ op 1 ─┬─ op 0
                   now      now      now                        now      now      now

An op alone would find an empty memory and its input in the processor's caches. Here both are as they are in training.
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

from fxsplit.arguments import require_call, require_whole
from fxsplit.capture.contexts import contexts_of, opened
from fxsplit.capture.tracing import Program, Trace, require_trace
from fxsplit.errors import TraceError, UsageError, reason
from fxsplit.execute.passes import Pass, rewritten
from fxsplit.execute.settled.folding import fold
from fxsplit.execute.settled.fusing import DEVICES, Kernel, fuse
from fxsplit.execute.settled.prefix import Weights, may_be_relaid, takes_any_layout
from fxsplit.execute.stages import stage_graph
from fxsplit.measuring import allocations
from fxsplit.measuring.allocations import Event
from fxsplit.objects.structure import tensors_in
from fxsplit.plan.partition import partition

WARMUP = 2
FORWARD, BACKWARD = "forward", "backward"

# What runs from now on: a direction and the name of an op, which is empty between ops.
Moment = tuple[str, str]
# The way in which ops run. Settled ones are folded, or run together with what follows them.
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
    """Measure every op of a model, and return the trace with seconds and workspace bytes in its ops.

    Ops of the train graph have the figures of a training step. Ops of the eval graph have those of a forward without
    autograd, both as the model is and as it is when it is settled. A copy of the model runs; the model stays as it is.

    Args:
        trace: of the model, which has weights.
        args: the inputs to run on. If they hold another number of samples than the trace, figures are scaled.
        kwargs: likewise.
        device: where the copy runs.
        steps: seconds are the median over so many steps.
        passes: graph passes, as those of the executor that will run the model.

    Raises TraceError when the model has no weights, GuardError when `args` take another path than the traced one, and
    UsageError when torch cannot use the device, or an argument is wrong.
    """
    require_trace(trace)
    require_call(args, kwargs)
    require_whole(1, steps=steps)
    device = _usable(device)
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
        for training, program in trace.programs.items():
            with torch.set_grad_enabled(training):
                program.guards.check(given)
        for step in range(WARMUP + steps):
            # In turn, so that whatever else the machine does slows all of them alike.
            for kind, runner in runners.items():
                runner.step(clocks[kind] if step >= WARMUP else _ignore)
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


def _usable(device: torch.device | str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except Exception as error:  # each device is missing in its own way
        raise UsageError(
            f"device is {str(device)!r}, which torch cannot use here ({reason(error)}); give one that it can, such as "
            "'cpu'"
        ) from error


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
    runners["settled"] = OpRunner(model, graph, [[*read, _settled(graph, model, inputs)]], training=False)
    return runners


def _settled(graph: fx.Graph, model: nn.Module, inputs: Sequence[Tensor]) -> Weights:
    """Rewrite a graph as that of a settled partition on the device of the inputs; return what it then takes."""
    modules = dict(model.named_modules(remove_duplicate=False))
    device = DEVICES.get(inputs[0].device.type) if inputs else None
    if device is not None:
        return [Kernel(site, modules, device, {}) for site in fuse(graph, model)[0]]
    folds, _ = fold(graph, model)
    relaid = takes_any_layout(graph, model) and all(map(may_be_relaid, inputs))
    layout = torch.channels_last if relaid else torch.preserve_format
    return [each.tensors(modules, layout) for each in folds]


def _ignore(_moment: Moment) -> None:
    """Measure nothing: the step is a warm-up."""


def _annotated(program: Program, figures: Sequence[Figures], scale: float) -> Program:
    """Give ops their figures: the first are those of the program's mode, further ones those of the settled model."""
    ops = []
    for op in program.graph.ops:
        (forward, backward), (workspace, backward_workspace) = figures[0].of(op.name, scale)
        op = replace(
            op,
            seconds=forward + backward,
            forward_seconds=forward,
            forward_workspace_bytes=workspace,
            backward_workspace_bytes=backward_workspace,
        )
        for settled in figures[1:]:
            (forward, _), (workspace, _) = settled.of(op.name, scale)
            op = replace(op, settled_seconds=forward, settled_workspace_bytes=workspace)
        ops.append(op)
    return replace(program, graph=replace(program.graph, ops=tuple(ops)))


def _workspaces(events: Sequence[Event]) -> dict[Moment, int]:
    """Return the most that each op allocated at a time, without what it leaves allocated."""
    found: dict[Moment, int] = {}
    marks = [position for position, event in enumerate(events) if event.mark]
    for position, end in zip(marks, [*marks[1:], len(events)], strict=True):
        direction, _, name = events[position].mark.partition(":")
        inside = events[position + 1 : end]
        left = sum(inside[survivor].size for survivor in allocations.survivors(inside))
        found[direction, name] = max(allocations.peak(inside) - left, 0)
    return found


class Figures(NamedTuple):
    """Holds what ops took in one way of running them: seconds of each step, and workspace bytes."""

    seconds: Mapping[Moment, list[float]]
    workspaces: Mapping[Moment, int]

    def of(self, name: str, scale: float) -> tuple[tuple[float, float], tuple[int, int]]:
        """Return an op's median seconds and its workspace bytes, each (forward, backward), times `scale`."""
        moments = (FORWARD, name), (BACKWARD, name)
        seconds = [scale * statistics.median(self.seconds.get(moment, [0.0])) for moment in moments]
        workspaces = [round(scale * self.workspaces.get(moment, 0)) for moment in moments]
        return (seconds[0], seconds[1]), (workspaces[0], workspaces[1])


class Clock:
    """Is called at each moment, and keeps the `seconds` until the next one."""

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
    """Runs steps of a stage's graph op by op, and calls a function whenever another op begins, in either direction.

    Args:
        model: its modules are called.
        graph: as `stage_graph` makes it.
        given: the arguments of the graph.
        training: run in training, with a backward; else in evaluation.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, given: Sequence[Any], *, training: bool) -> None:
        super().__init__(model, graph=graph)
        self._names = {node: node.meta["op"].name for node in graph.nodes if "op" in node.meta}
        self._given, self._training = given, training

    def step(self, begins: Callable[[Moment], None]) -> None:
        """Run a forward, and in training a backward from random gradients of the outputs.

        `begins` is called with each moment.
        """
        self.module.train(self._training)
        self._begins = begins
        self._hooked: set[Node] = set()
        # A stage empties the list that it is given.
        given = [list(each) if isinstance(each, list) else each for each in self._given]
        with torch.set_grad_enabled(self._training):
            made = [tensor for tensor in tensors_in(self.run(*given)) if tensor.requires_grad]
        gradients = [torch.randn_like(tensor) for tensor in made]
        if made:
            torch.autograd.backward(made, gradients)
            begins((BACKWARD, ""))
        for parameter in self.module.parameters():
            parameter.grad = None
        # What a step leaves behind would be freed in the midst of the next one.
        self.env.clear()
        self._hooked.clear()

    def run_node(self, n: fx.Node) -> Any:
        """Run an op forward, and hook the backward of what it delivers."""
        name = self._names.get(n, "")
        with opened(contexts_of(n)):
            self._begins((FORWARD, name))
            value = super().run_node(n)
            self._begins((FORWARD, ""))
        for tensor in tensors_in(value):
            # A value that an op merely passes on has the hook of the op that made it.
            if tensor.grad_fn is not None and tensor.grad_fn not in self._hooked:
                self._hooked.add(tensor.grad_fn)
                tensor.grad_fn.register_prehook(lambda _gradients, name=name: self._begins((BACKWARD, name)))
        return value
