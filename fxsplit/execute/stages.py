"""Stages: partitions made runnable, as modules that run the ops of either mode.

    values [a, b] ──► stage(values) ──► values [c]

A stage runs generated code that calls the model's own modules. The code holds no tensor, so it serves any copy of the
model.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from fxsplit.capture.naming import called_module
from fxsplit.capture.tracing import Program, Trace, require_trace
from fxsplit.errors import PartitionError
from fxsplit.execute.code import Backend, code_of
from fxsplit.execute.ownership import ops_of
from fxsplit.execute.passes import Pass, rewritten
from fxsplit.graph import EVALUATION, TRAINING
from fxsplit.meta.evaluate import resolve
from fxsplit.objects.same import same_value
from fxsplit.plan.partition import Partition, require_partitions


class Stage(nn.Module):
    """Runs a partition: takes the list of values at its start, returns the list of those at its end.

    The last stage returns the model's own output. The list that comes in is emptied, so that a value is freed as soon
    as it was read last; a hook that needs one takes it in a pre-forward hook.

    A stage shares the modules, parameters and buffers that its ops use, under the model's own names, so
    `parameters()`, `state_dict()` and FSDP2 see its part of the model. It calls the modules of the model itself, in the
    modes in which they are; `training` only chooses which of the two graphs runs.

    Args:
        trace: the captured model.
        partition: one of this trace.
        is_last: whether it is the last one, which returns the model's output.
        modes: the modes it can run in.
        passes: functions that rewrite its graph; they may change results by rounding. Without any it runs what the
            model runs.
        backend: of torch.compile, which compiles it when it first runs; None runs it as it is.
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
        # By (the mode of the ops, the mode whose output is returned).
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
        """Run the partition on the values at its start.

        Args:
            values: a list, which is emptied.
            training: the mode; None for the stage's own.
            returned: for the last stage, the mode whose output is returned; None for that in which it runs. In
                evaluation, the output of training has what ops in evaluation can give of it.
        """
        mode = self.training if training is None else training
        code = self._codes.get((mode, mode if returned is None else returned)) or self._codes[mode, mode]
        return code(self._model, values)

    def arrange(self, model: nn.Module) -> None:
        """Share the modules and tensors that the model has now, and run over this model from now on."""
        # Not registered: the stage holds a part of the model, not the model.
        vars(self)["_model"] = model
        for held in (self._modules, self._parameters, self._buffers):
            held.clear()
        for path in self._uses:
            _adopt(self, model, path)
        for code in self._codes.values():
            code.forget()


def _paths(trace: Trace, partition: Partition) -> Iterator[str]:
    """List the paths of all that the ops of a partition use of the model: modules first, then tensors."""
    nodes = [node for _, _, node in ops_of(trace, [partition])]
    for node in nodes:
        if path := called_module(node):
            yield path
    for node in nodes:
        yield from (str(read.target) for read in node.all_input_nodes if read.op == "get_attr")


def _adopt(holder: nn.Module, model: nn.Module, path: str) -> None:
    """Share with `holder` what the model has at `path`, at the same path; nothing, if it is not there any more."""
    *parents, name = path.split(".")
    owner = model
    # Not by setattr: the model's names may be those of a stage's own attributes.
    for parent in parents:
        inner = owner._modules.get(parent)
        if inner is None:
            return
        mirror = holder._modules.get(parent) or nn.Module()
        holder._modules[parent] = mirror
        if mirror is inner:
            return  # a module around it is shared as a whole
        owner, holder = inner, mirror
    if name in owner._modules:
        holder._modules[name] = owner._modules[name]
    elif name in owner._parameters:
        holder._parameters[name] = owner._parameters[name]
    elif isinstance(value := getattr(owner, name, None), Tensor):
        holder._buffers[name] = value
        if name not in owner._buffers or name in owner._non_persistent_buffers_set:
            holder._non_persistent_buffers_set.add(name)


def stage_graph(
    trace: Trace, partition: Partition, *, is_last: bool, training: bool, returned: bool | None = None
) -> fx.Graph:
    """Make the ops of a partition a graph of its own, from the list of values that it reads to what it writes.

    The node of each op has its Op in `meta["op"]`.

    Args:
        trace: the captured model.
        partition: one of this trace.
        is_last: return the model's output, not boundary values.
        training: the mode whose ops run.
        returned: for the last partition, the mode whose output is returned; None for that in which it runs.
    """
    program, span = trace.programs[training], partition.span(training=training)
    names = _nodes_by_name(program)
    graph = fx.Graph()
    values = graph.placeholder("values")
    # A value that only the other mode has is taken as well, and passed on: an earlier partition may run in that mode.
    taken = {name: graph.call_method("pop", (values,)) for name in reversed(partition.reads)}
    made = {names[name]: node for name, node in taken.items() if name in names}

    def find(node: fx.Node) -> fx.Node:
        if node.op == "get_attr" and node not in made:
            made[node] = graph.create_node("get_attr", node.target)
        return made[node]

    for node, op in zip(program.nodes[span], program.graph.ops[span], strict=True):
        for read in node.all_input_nodes:
            find(read)
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
    """Build the output of training from the values that a partition in evaluation has.

    A value that was not computed in training is replaced by the one that evaluation returns in its place, such as
    features without dropout; by None, if evaluation returns nothing there.

    Args:
        trace: the captured model.
        graph: that of the stage.
        at_hand: the nodes of the values that it has, by name.
        taken: the names of those that come from earlier partitions, which may run in either mode.
        find: maps a node of the trace to the stage's own.
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
    """Return the first of two values that was computed.

    Raises PartitionError when neither was: each lies in a partition that ran in the other mode.
    """
    if value is None and other is None:
        raise PartitionError(
            "the model returns a value that it makes in training before a cut and in evaluation after it, so that in "
            "this phase no partition makes it; cut elsewhere"
        )
    return other if value is None else value


def _returns_alike(trace: Trace) -> bool:
    """Tell whether both modes return the same values in the same places."""
    outputs = []
    for program in trace.programs.values():
        names = {node: name for name, node in _nodes_by_name(program).items()}

        def name_of(leaf: Any, names: Mapping[fx.Node, str] = names) -> Any:
            return names.get(leaf, leaf.target) if isinstance(leaf, fx.Node) else leaf

        outputs.append(resolve(program.output.args[0], name_of))
    return same_value(*outputs)


def stages(
    trace: Trace, partitions: Sequence[Partition], *, passes: Sequence[Pass] = (), backend: Backend | None = None
) -> tuple[Stage, ...]:
    """Make a stage for each partition, sharing the modules of `trace.model`. Raises as `refuse_foreign` does."""
    refuse_foreign(trace, partitions)
    last = len(partitions) - 1
    return tuple(
        Stage(trace, partition, is_last=partition.index == last, passes=passes, backend=backend)
        for partition in partitions
    )


def refuse_foreign(trace: Trace, partitions: Sequence[Partition]) -> None:
    """Raise PartitionError when the partitions are not those of this trace, UsageError when one of the two is none."""
    require_trace(trace)
    require_partitions(partitions)
    ends = [0, *(partition.stop for partition in partitions)]
    if [partition.start for partition in partitions] != ends[:-1] or ends[-1] != len(trace.train):
        raise PartitionError(
            f"these partitions were made from another trace, or some are missing (they end at op {ends[-1]}, and this "
            f"model has {len(trace.train)}); call fxsplit.partition(trace, ...) with the trace that is given here"
        )
