"""Partitions as the stages of a pipeline over several processes, for the schedules of torch.distributed.pipelining.

    rank 0                rank 1                rank 0
    partition 0 ──[a]──►  partition 1 ──[b]──►  partition 2 ──► ...
                 ◄─[da]─             ◄─[db]─

A boundary crosses the wire whole: a value that is needed later is sent on by every stage in between.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, distributed, fx, nn
from torch.distributed.pipelining import PipelineStage

from fxsplit.capture.contexts import contexts_of, opened
from fxsplit.capture.naming import called_module
from fxsplit.capture.tracing import Trace
from fxsplit.errors import PartitionError, UsageError
from fxsplit.execute.ownership import changing, ops_of, refuse_divided
from fxsplit.execute.stages import Stage, stages
from fxsplit.meta.evaluate import StandIn, evaluate, on_meta, resolve
from fxsplit.objects.structure import META
from fxsplit.plan.partition import Partition

# Before this parameter came, every value of whatever type had to have a gradient.
_SENDS_INTEGERS = "input_grads" in inspect.signature(PipelineStage).parameters


class PipelineModule(nn.Module):
    """A partition as a module of its own: boundary values in, boundary values out.

    It holds those modules, parameters and buffers of the model that its ops use, under the model's own names, and runs
    the graph of the mode that it is in. The first one is called as the model is, the last one returns what the model
    returns.
    """

    def __init__(self, trace: Trace, stage: Stage, *, is_last: bool) -> None:
        super().__init__()
        self._stage = stage
        self._is_last = is_last
        self._signature = None if stage.partition.index else trace.signature
        self._guards = {training: program.guards for training, program in trace.programs.items()}
        self.training = trace.model.training
        for path in _paths(trace, stage.partition):
            _adopt(self, trace.model, path)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises GuardError when the inputs of the first one take another path than the traced one."""
        if self._signature is None:
            # Keywords are the model's; schedules hand them to every stage of a rank.
            values = list(args)
        else:
            tensors = self._signature.tensors(args, kwargs)
            self._guards[self.training].check(tensors)
            values = [tensors[self._signature.names.index(name)] for name in self._stage.partition.reads]
        result = self._stage(self, values, training=self.training)
        # What is sent must lie in memory as the receiver expects it.
        return result if self._is_last else tuple(value.contiguous() for value in result)


def to_pipeline_stages(
    trace: Trace,
    partitions: Sequence[Partition],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    device: torch.device | str,
    group: distributed.ProcessGroup | None = None,
) -> list[PipelineStage]:
    """The stages of this rank, for a schedule of torch.distributed.pipelining: one a partition.

    Of `n` ranks in `group` (by default all), rank `r` gets partitions `r`, `r + n`, `r + 2n`, ...: one each for
    `ScheduleGPipe` and `Schedule1F1B`, several for interleaved schedules. `args` and `kwargs` are an example of one
    micro-batch, of which only shapes and types are looked at; nothing is computed or sent.

    Each `stage.submod` shares this rank's part of the model, and moves it to `device`. Parameters on the meta device
    stay there, to be allocated with `stage.submod.to_empty(device=...)` and loaded by the model's own names.

    Raises UsageError when torch.distributed is not initialized; PartitionError when the partitions are not those of
    the trace or do not divide over the ranks, when several of them use one parameter, when something other than a
    tensor would have to be sent, or when the model returns anything but a tensor or a tuple of tensors.
    """
    if not distributed.is_initialized():
        raise UsageError(
            "torch.distributed is not initialized, so this process has no rank; start it with torchrun and call "
            "torch.distributed.init_process_group() first"
        )
    made = stages(trace, partitions)
    rank, ranks = distributed.get_rank(group), distributed.get_world_size(group)
    if len(made) % ranks:
        raise PartitionError(
            f"{len(made)} partitions cannot be dealt evenly to {ranks} ranks; make {ranks} partitions, or a multiple"
        )
    refuse_divided(trace, partitions, changing(trace, partitions), range(len(partitions)))
    device = torch.device(device)
    boundaries = _boundaries(trace, partitions, args, kwargs or {}, device)
    own = []
    for index in range(rank, len(made), ranks):
        module = PipelineModule(trace, made[index], is_last=index == len(made) - 1)
        if not any(tensor.is_meta for tensor in module.state_dict().values()):
            module.to(device)
        own.append(
            PipelineStage(
                module,
                index,
                len(made),
                device,
                # Without these two torch would run the model to find them, which moves statistics and random state.
                input_args=boundaries[index],
                output_args=boundaries[index + 1],
                group=group,
            )
        )
    return own


def _paths(trace: Trace, partition: Partition) -> Iterator[str]:
    """What the ops of a partition use of the model: modules first, then tensors."""
    nodes = [node for _, _, node in ops_of(trace, [partition])]
    for node in nodes:
        if path := called_module(node):
            yield path
    for node in nodes:
        yield from (str(source.target) for source in node.all_input_nodes if source.op == "get_attr")


def _adopt(holder: nn.Module, model: nn.Module, path: str) -> None:
    """Let `holder` have what the model has at `path`, at the same path."""
    *parents, name = path.split(".")
    source = model
    for parent in parents:
        source = source.get_submodule(parent)
        if parent not in holder._modules:
            holder.add_module(parent, nn.Module())
        holder = holder.get_submodule(parent)
        if holder is source:
            return
    value = getattr(source, name)
    if isinstance(value, nn.Module | nn.Parameter):
        setattr(holder, name, value)
    elif isinstance(value, Tensor):
        is_saved = name in source._buffers and name not in source._non_persistent_buffers_set
        holder.register_buffer(name, value, persistent=is_saved)


def _boundaries(
    trace: Trace, partitions: Sequence[Partition], args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device
) -> list[tuple[Tensor, ...]]:
    """The inputs, the values at each cut, and the outputs, as tensors on the meta device."""
    tensors = trace.signature.tensors(args, kwargs)
    values, outputs = {}, {}
    for training in (True, False):
        trace.programs[training].guards.check(tensors)
        values[training], outputs[training] = _evaluated(trace, training, tensors, device)
        _refuse_output(outputs[training])
    trained = _trained(trace)
    inputs = tuple(tensor.to(META) for tensor in args if isinstance(tensor, Tensor))
    inner = [
        tuple(_sent(name, values[True][name], values[False][name], part, name in trained) for name in part.reads)
        for part in partitions[1:]
    ]
    output = outputs[True]
    return [inputs, *inner, (output,) if isinstance(output, Tensor) else tuple(output)]


def _evaluated(
    trace: Trace, training: bool, tensors: Sequence[Tensor], device: torch.device
) -> tuple[dict[str, Any], Any]:
    """Every value by name, and the output, for such inputs, on the meta device."""
    program = trace.programs[training]
    twin = copy.deepcopy(program.guards.twin)
    found: dict[fx.Node, Any] = dict(zip(program.inputs, on_meta(list(tensors)), strict=True))

    def lookup(leaf: Any) -> Any:
        if not isinstance(leaf, fx.Node):
            return leaf
        return found[leaf] if leaf in found else attrgetter(str(leaf.target))(twin)

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for node in program.nodes:
            args, kwargs = resolve((node.args, node.kwargs), lookup)
            with opened(contexts_of(node)):
                value = evaluate(twin, node.op, node.target, args, kwargs, device)
            found[node] = value.value if isinstance(value, StandIn) else value
    nodes = (*program.inputs, *program.nodes)
    return dict(zip(program.graph.values, map(found.get, nodes), strict=True)), resolve(program.output.args[0], lookup)


def _trained(trace: Trace) -> set[str]:
    """The values through which a gradient reaches a parameter."""
    parameters = {name for name, parameter in trace.model.named_parameters() if parameter.requires_grad}
    trained: set[str] = set()
    for op in trace.train.ops:
        if not parameters.isdisjoint(op.state) or not trained.isdisjoint(op.reads):
            trained.update((op.name, *op.mutates))
    return trained


def _sent(name: str, train: Any, evaluation: Any, partition: Partition, is_trained: bool) -> Tensor:
    """How a value goes from one stage to the next: contiguous, and with a gradient in return if it is trained."""
    if fault := _not_sendable(train, evaluation):
        raise PartitionError(
            f"the cut at {partition.name!r} cannot lie between two stages of a pipeline, because its value {name!r} "
            f"{fault}; cut elsewhere"
        )
    wants_gradient = is_trained and (train.is_floating_point() or train.is_complex())
    return torch.empty(train.shape, dtype=train.dtype, device=META, requires_grad=wants_gradient)


def _not_sendable(train: Any, evaluation: Any) -> str | None:
    for value in (train, evaluation):
        if not isinstance(value, Tensor):
            return f"is no tensor but of type {type(value).__name__}"
    if (train.shape, train.dtype) != (evaluation.shape, evaluation.dtype):
        return f"is {_form(train)} in training and {_form(evaluation)} in evaluation"
    if not _SENDS_INTEGERS and not train.is_floating_point():
        return f"is {_form(train)}, for which torch {torch.__version__} wants a gradient, as newer ones do not"
    return None


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _refuse_output(output: Any) -> None:
    for part in output if type(output) in (tuple, list) else [output]:
        if not isinstance(part, Tensor):
            raise PartitionError(
                f"what the model returns holds a value of type {type(part).__name__}, and the last stage of a pipeline "
                "must return a tensor or a tuple of tensors; trace a call that does, such as with return_dict=False"
            )
