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
from collections.abc import Callable, Container, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._ops import OpOverload, OpOverloadPacket

from fxsplit.capture.tracing import Program, Trace
from fxsplit.errors import PartitionError
from fxsplit.execute.passes import Pass, rewritten
from fxsplit.execute.source import NAME, source_of
from fxsplit.meta.evaluate import resolve
from fxsplit.objects.same import same_value
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
        # By the mode of the ops and the one whose output is returned.
        self._codes = {
            (training, returned): code_of(
                rewritten(
                    stage_graph(trace, partition, is_last=is_last, training=training, returned=returned),
                    trace.model,
                    passes,
                ),
                f"partition {partition.index} in {'training' if training else 'evaluation'}",
            )
            for training in modes
            for returned in ({training, True} if is_last and not _returns_alike(trace) else {training})
        }

    def __call__(self, model: nn.Module, values: list[Any], *, training: bool, returned: bool | None = None) -> Any:
        """Boundary values in, boundary values out; the last stage returns the model's own output.

        It is that of training if `returned` is true, in as far as what ran in evaluation has it; else of the same mode.
        """
        key = (training, training if returned is None else returned)
        return self._codes.get(key, self._codes[training, training])(model, values)

    def compile(self, backend: str) -> None:
        """Compile both modes, each when it first runs."""
        for code in self._codes.values():
            code.compile(backend)


def spans(partition: Partition) -> dict[bool, tuple[int, int]]:
    """The ops of a partition, [start, stop), in training (True) and in evaluation."""
    return {True: (partition.start, partition.stop), False: (partition.eval_start, partition.eval_stop)}


def stage_graph(
    trace: Trace, partition: Partition, *, is_last: bool, training: bool, returned: bool | None = None
) -> fx.Graph:
    """The ops of a partition as a graph of its own, from the list of values that it reads to what it writes.

    Each of its ops has the Op that it is in its node's meta, as `op`. The last one returns the model's output, perhaps
    that of the mode `returned`.
    """
    program, span = trace.programs[training], spans(partition)[training]
    names = _nodes_by_name(program)
    graph = fx.Graph()
    values = graph.placeholder("values")
    # What this mode does not have is taken as well, and passed on: a partition in the other mode may have made it.
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
    at_hand = taken | {name: made[node] for name, node in names.items() if node in made}
    if not is_last:
        graph.output([at_hand.get(name) for name in partition.writes])
    elif (training or returned) and not _returns_alike(trace):
        graph.output(_as_in_training(trace, graph, at_hand, taken.keys(), find))
    else:
        graph.output(fx.node.map_arg(program.output.args[0], find))
    return graph


def _nodes_by_name(program: Program) -> dict[str, fx.Node]:
    return {
        **dict(zip((op.name for op in program.graph.ops), program.nodes, strict=True)),
        **dict(zip((value.name for value in program.graph.inputs), program.inputs, strict=True)),
    }


def _as_in_training(
    trace: Trace,
    graph: fx.Graph,
    at_hand: Mapping[str, fx.Node],
    taken: Container[str],
    find: Callable[[fx.Node], fx.Node],
) -> Any:
    """What training returns, of the values `at_hand`, some of them `taken` from partitions in either mode.

    What nobody made in training is what evaluation returns in the same place: where a part in evaluation returns its
    features, these are the ones without dropout. Where evaluation returns none, it is None.
    """
    names = {node: name for program in trace.programs.values() for name, node in _nodes_by_name(program).items()}

    def value(ours: Any, theirs: Any) -> Any:
        if isinstance(ours, fx.Node):
            return of_nodes(ours, theirs if isinstance(theirs, fx.Node) else None)
        if isinstance(ours, dict):
            known = theirs if isinstance(theirs, dict) else {}
            return {key: value(item, known.get(key)) for key, item in ours.items()}
        if isinstance(ours, tuple | list):
            others = theirs if isinstance(theirs, tuple | list) and len(theirs) == len(ours) else [None] * len(ours)
            items = [value(*pair) for pair in zip(ours, others, strict=True)]
            return type(ours)(*items) if hasattr(ours, "_fields") else type(ours)(items)
        return ours

    def of_nodes(ours: fx.Node, theirs: fx.Node | None) -> fx.Node | None:
        if ours not in names:
            return find(ours)
        own = at_hand.get(names[ours])
        other = None if theirs is None else at_hand.get(names.get(theirs, ""))
        if theirs is None or own is other is not None or (own is not None and names[ours] not in taken):
            return own
        return graph.call_function(_if_made, (own, other))

    return value(*(trace.programs[mode].output.args[0] for mode in (True, False)))


def _if_made(value: Any, other: Any) -> Any:
    """Raises PartitionError when nobody made either: each lies in a partition that was in the other mode."""
    if value is None and other is None:
        raise PartitionError(
            "the model returns a value that it makes in training before a cut and in evaluation after it, so that in "
            "this phase no partition makes it; cut elsewhere"
        )
    return other if value is None else value


def _returns_alike(trace: Trace) -> bool:
    """Whether both modes return the same values in the same places."""
    outputs = []
    for program in trace.programs.values():
        names = {node: name for name, node in _nodes_by_name(program).items()}

        def name_of(leaf: Any, names: Mapping[fx.Node, str] = names) -> Any:
            return names.get(leaf, leaf.target) if isinstance(leaf, fx.Node) else leaf

        outputs.append(resolve(program.output.args[0], name_of))
    return same_value(*outputs)


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
