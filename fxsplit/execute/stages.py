"""A partition made runnable: the ops of either mode as a Python function over the model's own modules.

    values [a, b] ──► stage(model, values) ──► values [c]

A stage holds code, no tensor: the same function serves any copy of the model.
"""

from __future__ import annotations

import importlib
import itertools
import linecache
import sys
import weakref
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._ops import OpOverload, OpOverloadPacket

from fxsplit.capture.tracing import Trace
from fxsplit.errors import PartitionError
from fxsplit.execute.passes import Pass, rewritten
from fxsplit.execute.source import NAME, source_of
from fxsplit.plan.partition import Partition

_serial = itertools.count()


class Code:
    """A generated function `(model, values) -> result` that can be pickled and copied. `values` is emptied.

    A list is handed over, rather than arguments, so that no caller's frame keeps a value alive that the function has
    already used up.
    """

    def __init__(self, source: str, objects: dict[str, Any], label: str) -> None:
        self._source, self._objects, self._label = source, objects, label
        file = f"<fxsplit {label} {next(_serial)}>"
        scope = dict(objects)
        exec(compile(source, file, "exec"), scope)
        # Tracebacks and debuggers show the generated lines, for as long as there is something to show.
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        weakref.finalize(self, linecache.cache.pop, file, None).atexit = False
        self._function: Callable[[nn.Module, list[Any]], Any] = scope[NAME]

    def __call__(self, model: nn.Module, values: list[Any]) -> Any:
        return self._function(model, values)

    def __reduce__(self) -> tuple[Any, ...]:
        objects = {name: _Reference.of(value) or value for name, value in self._objects.items()}
        return _restore, (self._source, objects, self._label)

    def compile(self, backend: str) -> None:
        """Hand the function to `torch.compile`."""
        self._function = torch.compile(self._function, backend=backend)


class _Reference(NamedTuple):
    """Where a function is found; several of torch's cannot be pickled."""

    module: str
    path: str

    @classmethod
    def of(cls, value: Any) -> _Reference | None:
        if isinstance(value, OpOverload | OpOverloadPacket):
            return cls("torch", f"ops.{value}")
        module, name = getattr(value, "__module__", None) or "", getattr(value, "__name__", None) or ""
        return cls(module, name) if vars(sys.modules.get(module, cls)).get(name) is value else None

    def resolve(self) -> Any:
        return attrgetter(self.path)(importlib.import_module(self.module))


def _restore(source: str, objects: dict[str, Any], label: str) -> Code:
    found = {name: value.resolve() if type(value) is _Reference else value for name, value in objects.items()}
    return Code(source, found, label)


class Stage:
    """A partition of a traced model, in training (True) and in evaluation (False), or in one of these `modes` alone.

    The modules that it calls are in the modes that its caller gave them. What it runs is rewritten by `passes`, which
    may change results by rounding; without any, it is what the model runs.
    """

    def __init__(
        self,
        trace: Trace,
        partition: Partition,
        *,
        is_last: bool,
        modes: Sequence[bool] = (True, False),
        passes: Sequence[Pass] = (),
    ) -> None:
        self.partition = partition
        self._codes = {
            training: code_of(
                rewritten(stage_graph(trace, partition, is_last=is_last, training=training), trace.model, passes),
                f"partition {partition.index} in {'training' if training else 'evaluation'}",
            )
            for training in modes
        }

    def __call__(self, model: nn.Module, values: list[Any], *, training: bool) -> Any:
        """Boundary values in, boundary values out; the last stage returns the model's own output."""
        return self._codes[training](model, values)

    def compile(self, backend: str) -> None:
        """Compile both modes, each when it first runs."""
        for code in self._codes.values():
            code.compile(backend)


def spans(partition: Partition) -> dict[bool, tuple[int, int]]:
    """The ops of a partition, [start, stop), in training (True) and in evaluation."""
    return {True: (partition.start, partition.stop), False: (partition.eval_start, partition.eval_stop)}


def stage_graph(trace: Trace, partition: Partition, *, is_last: bool, training: bool) -> fx.Graph:
    """The ops of a partition as a graph of its own, from the list of values that it reads to what it writes.

    Each of its ops has the Op that it is in its node's meta, as `op`.
    """
    program, span = trace.programs[training], spans(partition)[training]
    names = {
        **dict(zip((op.name for op in program.graph.ops), program.nodes, strict=True)),
        **dict(zip((value.name for value in program.graph.inputs), program.inputs, strict=True)),
    }
    graph = fx.Graph()
    values = graph.placeholder("values")
    # A value that this mode does not have is taken as well, and passed on as None.
    taken = {name: graph.call_method("pop", (values,)) for name in reversed(partition.reads)}
    made = {names[name]: node for name, node in taken.items() if name in names}

    def find(node: fx.Node) -> fx.Node:
        if node.op == "get_attr" and node not in made:
            made[node] = graph.create_node("get_attr", node.target)
        return made[node]

    for node, op in zip(program.nodes[slice(*span)], program.graph.ops[slice(*span)], strict=True):
        for source in node.all_input_nodes:
            find(source)
        made[node] = graph.node_copy(node, find)
        made[node].meta["op"] = op
    if is_last:
        graph.output(fx.node.map_arg(program.output.args[0], find))
    else:
        graph.output([made[names[name]] if name in names else None for name in partition.writes])
    return graph


def code_of(graph: fx.Graph, label: str) -> Code:
    """What a stage's graph says, as a function."""
    return Code(*source_of(graph), label)


def stages(trace: Trace, partitions: Sequence[Partition], *, passes: Sequence[Pass] = ()) -> tuple[Stage, ...]:
    """One stage a partition, sharing the modules of `trace.model`. Raises as `refuse_foreign` does."""
    refuse_foreign(trace, partitions)
    last = len(partitions) - 1
    return tuple(Stage(trace, partition, is_last=partition.index == last, passes=passes) for partition in partitions)


def refuse_foreign(trace: Trace, partitions: Sequence[Partition]) -> None:
    """Raise PartitionError when the partitions are not those of this trace."""
    ends = [0, *(partition.stop for partition in partitions)]
    if [partition.start for partition in partitions] != ends[:-1] or ends[-1] != len(trace.train):
        raise PartitionError(
            f"the partitions cover other ops than the {len(trace.train)} of this model; partition its own trace"
        )
