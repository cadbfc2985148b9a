"""A partition made runnable: a module that runs the ops of either mode, as a function over the model's own modules.

    values [a, b] ──► stage(values) ──► values [c]

Its code holds no tensor: the same function serves any copy of the model.
"""

from __future__ import annotations

import importlib
import itertools
import linecache
import sys
import weakref
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload, OpOverloadPacket

from fxsplit.capture.naming import called_module
from fxsplit.capture.tracing import Program, Trace
from fxsplit.errors import PartitionError
from fxsplit.execute.ownership import ops_of
from fxsplit.execute.passes import Pass, rewritten
from fxsplit.execute.source import NAME, source_of
from fxsplit.graph import EVALUATION, TRAINING
from fxsplit.meta.evaluate import resolve
from fxsplit.objects.same import same_value
from fxsplit.plan.partition import Partition

# Of torch.compile: a name, or a function of its own kind.
Backend = str | Callable[..., Any]

_serial = itertools.count()


class Code:
    """A generated function `(model, values) -> result` that can be pickled and copied. `values` is emptied.

    A list is handed over, rather than arguments, so that no caller's frame keeps a value alive that the function has
    already used up. With a `backend` of torch.compile it is compiled when it first runs.
    """

    def __init__(self, source: str, objects: dict[str, Any], label: str, backend: Backend | None = None) -> None:
        self._source, self._objects, self._label, self._backend = source, objects, label, backend
        file = f"<fxsplit {label} {next(_serial)}>"
        scope = dict(objects)
        exec(compile(source, file, "exec"), scope)
        # Tracebacks and debuggers show the generated lines, for as long as there is something to show.
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        weakref.finalize(self, linecache.cache.pop, file, None).atexit = False
        self._function: Callable[[nn.Module, list[Any]], Any] = scope[NAME]
        if backend is not None:
            self._function = torch.compile(self._function, backend=backend)

    def __call__(self, model: nn.Module, values: list[Any]) -> Any:
        return self._function(model, values)

    def __reduce__(self) -> tuple[Any, ...]:
        objects = {name: _Reference.of(value) or value for name, value in self._objects.items()}
        return _restore, (self._source, objects, self._label, self._backend)


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


def _restore(source: str, objects: dict[str, Any], label: str, backend: Backend | None) -> Code:
    found = {name: value.resolve() if type(value) is _Reference else value for name, value in objects.items()}
    return Code(source, found, label, backend)


class Stage(nn.Module):
    """A partition as a module: the list of values at its start in, the list of those at its end out.

    The last stage returns the model's own output. The list that comes in is emptied, so that a value is freed as soon
    as it was read last: a hook that wants one takes it before forward.

    A stage shares the modules, parameters and buffers that its ops use, under the model's own names, so
    `parameters()`, `state_dict()` and FSDP2 see its part of the model. It runs over the model itself, whose modules it
    calls in the modes in which they are; `training` only says which of the two graphs runs. What it runs is rewritten
    by `passes`, which may change results by rounding, and compiled by a `backend` of torch.compile, if there is one,
    when it first runs. Without them it is what the model runs. A stage in `modes` of one mode alone cannot run in the
    other.
    """

    partition: Partition
    _model: nn.Module

    def __init__(
        self,
        trace: Trace,
        partition: Partition,
        *,
        is_last: bool,
        modes: Sequence[bool] = (TRAINING, EVALUATION),
        passes: Sequence[Pass] = (),
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
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
                backend,
            )
            for training in modes
            for returned in ({training, True} if is_last and not _returns_alike(trace) else {training})
        }
        self._uses = tuple(dict.fromkeys(_paths(trace, partition)))
        self.arrange(trace.model)

    def forward(self, values: list[Any], training: bool | None = None, returned: bool | None = None) -> Any:
        """What the partition makes of the values at its start, in its own mode unless `training` says another.

        The last one returns the model's output of that mode; or if `returned` is true, that of training, in as far as
        what ran in evaluation has it.
        """
        mode = self.training if training is None else training
        key = (mode, mode if returned is None else returned)
        return self._codes.get(key, self._codes[mode, mode])(self._model, values)

    def arrange(self, model: nn.Module) -> None:
        """Share what the model has now, and run over it."""
        # Not registered: the stage holds a part of the model, not the model.
        vars(self)["_model"] = model
        for held in (self._modules, self._parameters, self._buffers):
            held.clear()
        for path in self._uses:
            _adopt(self, model, path)


def _paths(trace: Trace, partition: Partition) -> Iterator[str]:
    """What the ops of a partition use of the model: modules first, then tensors."""
    nodes = [node for _, _, node in ops_of(trace, [partition])]
    for node in nodes:
        if path := called_module(node):
            yield path
    for node in nodes:
        yield from (str(source.target) for source in node.all_input_nodes if source.op == "get_attr")


def _adopt(holder: nn.Module, model: nn.Module, path: str) -> None:
    """Let `holder` have what the model has at `path`, at the same path. What is not there any more is left out."""
    *parents, name = path.split(".")
    source = model
    # Not by setattr: the model's names may be those of a stage's own attributes.
    for parent in parents:
        inner = source._modules.get(parent)
        if inner is None:
            return
        mirror = holder._modules.get(parent) or nn.Module()
        holder._modules[parent] = mirror
        if mirror is inner:
            return
        source, holder = inner, mirror
    if name in source._modules:
        holder._modules[name] = source._modules[name]
    elif name in source._parameters:
        holder._parameters[name] = source._parameters[name]
    elif isinstance(value := getattr(source, name, None), Tensor):
        holder._buffers[name] = value
        if name not in source._buffers or name in source._non_persistent_buffers_set:
            holder._non_persistent_buffers_set.add(name)


def stage_graph(
    trace: Trace, partition: Partition, *, is_last: bool, training: bool, returned: bool | None = None
) -> fx.Graph:
    """The ops of a partition as a graph of its own, from the list of values that it reads to what it writes.

    Each of its ops has the Op that it is in its node's meta, as `op`. The last one returns the model's output, perhaps
    that of the mode `returned`.
    """
    program, span = trace.programs[training], partition.span(training=training)
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

    for node, op in zip(program.nodes[span], program.graph.ops[span], strict=True):
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

    return value(*(trace.programs[mode].output.args[0] for mode in (TRAINING, EVALUATION)))


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


def code_of(graph: fx.Graph, label: str, backend: Backend | None = None) -> Code:
    """What a stage's graph says, as a function, compiled if there is a `backend`."""
    return Code(*source_of(graph), label, backend)


def stages(
    trace: Trace, partitions: Sequence[Partition], *, passes: Sequence[Pass] = (), backend: Backend | None = None
) -> tuple[Stage, ...]:
    """One stage a partition, sharing the modules of `trace.model`. Raises as `refuse_foreign` does."""
    refuse_foreign(trace, partitions)
    last = len(partitions) - 1
    return tuple(
        Stage(trace, partition, is_last=partition.index == last, passes=passes, backend=backend)
        for partition in partitions
    )


def refuse_foreign(trace: Trace, partitions: Sequence[Partition]) -> None:
    """Raise PartitionError when the partitions are not those of this trace."""
    ends = [0, *(partition.stop for partition in partitions)]
    if [partition.start for partition in partitions] != ends[:-1] or ends[-1] != len(trace.train):
        raise PartitionError(
            f"the partitions were made from another trace than this one, whose model has {len(trace.train)} ops; call "
            "fxsplit.partition with the trace that is given here"
        )
