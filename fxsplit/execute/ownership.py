"""Finds which partitions use which parameters and buffers of a model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch import fx, nn

from fxsplit.capture.naming import assigned_by, method_of
from fxsplit.capture.tracing import Trace
from fxsplit.errors import PartitionError
from fxsplit.graph import EVALUATION, TRAINING, Op, prefixes
from fxsplit.plan.partition import Partition


def ops_of(trace: Trace, partitions: Sequence[Partition]) -> Iterator[tuple[int, Op, fx.Node]]:
    """Give the ops of both modes, each with the index of its partition and its node."""
    for partition in partitions:
        for training in (TRAINING, EVALUATION):
            program, span = trace.programs[training], partition.span(training=training)
            for op, node in zip(program.graph.ops[span], program.nodes[span], strict=True):
                yield partition.index, op, node


def users_of(trace: Trace, partitions: Sequence[Partition]) -> dict[str, set[int]]:
    """Return the partitions that use each parameter and buffer, and each other tensor that is an attribute of a module.

    An op that is a method is taken to use all that its module holds.
    """
    names = dict.fromkeys(first_names(trace.model).values())
    users: dict[str, set[int]] = {name: set() for name in names}
    for index, op, node in ops_of(trace, partitions):
        held = [name for name in names if op.path in prefixes(name)] if method_of(node) else op.state
        given = [str(read.target) for read in node.all_input_nodes if read.op == "get_attr"]
        for name in (*held, *given, *assigned_by(node)):
            users.setdefault(name, set()).add(index)
    return users


def changing(trace: Trace, partitions: Sequence[Partition]) -> set[str]:
    """Return the names of what changes in training: all parameters, and what ops write."""
    written = {name for _, op, node in ops_of(trace, partitions) for name in (*op.mutates, *assigned_by(node))}
    return written.union(name for name, _ in trace.model.named_parameters())


def refuse_divided(
    trace: Trace, partitions: Sequence[Partition], names: Collection[str], devices: Sequence[str | int]
) -> None:
    """Raise PartitionError when one of the parameters and buffers in `names` is used on two devices.

    `devices` has that of each partition, as a name or a number.
    """
    for _, op, node in ops_of(trace, partitions):
        if method_of(node) and not op.path:
            raise PartitionError(
                f"the model's own method {method_of(node)!r} stays one op and may use all of the model, which can then "
                "not be divided; move the method into a module of its own"
            )
    for name, users in users_of(trace, partitions).items():
        if name in names and len({devices[index] for index in users}) > 1:
            which = " and ".join(map(str, sorted(users)))
            raise PartitionError(
                f"{name!r} is used by partitions {which}, which would need a copy each; "
                "cut so that one partition holds all uses"
            )


def first_names(model: nn.Module) -> dict[str, str]:
    """Return for every name of a parameter or buffer the first name of the same tensor: tied ones have several."""
    first: dict[int, str] = {}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}
