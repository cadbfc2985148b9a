"""Partitions as the stages of a pipeline over several processes, for the schedules of torch.distributed.pipelining.

    rank 0                rank 1                rank 0
    partition 0 ──[a]──►  partition 1 ──[b]──►  partition 2 ──► ...
                 ◄─[da]─             ◄─[db]─

A boundary crosses the wire whole: a value that is needed later is sent on by every stage in between.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, distributed, fx, nn
from torch.distributed.pipelining import PipelineStage

from fxsplit.arguments import require_call
from fxsplit.capture.contexts import contexts_of, opened
from fxsplit.capture.tracing import Trace
from fxsplit.errors import PartitionError, UsageError
from fxsplit.execute.ownership import changing, refuse_divided
from fxsplit.execute.stages import Stage, refuse_foreign
from fxsplit.graph import EVALUATION, TRAINING
from fxsplit.meta.evaluate import StandIn, evaluate, on_meta, resolve
from fxsplit.objects.structure import META
from fxsplit.plan.partition import Partition

# Before this parameter came, every value of whatever type had to have a gradient.
SENDS_GRADIENTS_OF_SOME = "input_grads" in inspect.signature(PipelineStage).parameters


class PipelineModule(Stage):
    """Runs a partition as pipeline schedules call it: boundary values are arguments, and come out as a tuple.

    It holds only its own part of the model, which alone is on this rank's device, and runs in its own mode. The first
    one is called as the model is, the last one returns what the model returns.
    """

    def __init__(self, trace: Trace, partition: Partition, *, is_last: bool) -> None:
        super().__init__(trace, partition, is_last=is_last)
        self._is_last = is_last
        self._signature = None if partition.index else trace.signature
        self._guards = {training: program.guards for training, program in trace.programs.items()}
        self.training = trace.model.training

    def arrange(self, model: nn.Module) -> None:
        """Share the modules and tensors that the model has now, and run over them alone."""
        super().arrange(model)
        vars(self)["_model"] = self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the partition. The first one raises GuardError when its inputs take another path than the traced one."""
        if self._signature is None:
            # Keyword arguments are for the first stage; schedules pass them to every stage of a rank.
            values = list(args)
        else:
            tensors = self._signature.tensors(args, kwargs)
            self._guards[self.training].check(tensors)
            values = [tensors[self._signature.names.index(name)] for name in self.partition.reads]
        result = super().forward(values)
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
    """Make this rank's stages for a schedule of torch.distributed.pipelining, one for each of its partitions.

    Of `n` ranks, rank `r` gets partitions `r`, `r + n`, `r + 2n`, ...: one each for `ScheduleGPipe` and `Schedule1F1B`,
    several for interleaved schedules. Each `stage.submod` shares this rank's part of the model, and moves it to
    `device`. Parameters on the meta device stay there, to be allocated with `stage.submod.to_empty(device=...)` and
    loaded by the model's own names. Nothing is computed or sent.

    Args:
        trace: the captured model.
        partitions: all of this trace.
        args: an example of one micro-batch; only shapes and types are looked at.
        kwargs: likewise.
        device: that of this rank.
        group: the ranks of the pipeline; None for all.

    Raises UsageError when torch.distributed is not initialized, or an argument is of another type; PartitionError when
    the partitions are not those of the trace or do not divide over the ranks, when several of them use one parameter,
    when something other than a tensor would have to be sent, or when the model returns anything but a tensor or a tuple
    of tensors.
    """
    if not distributed.is_initialized():
        raise UsageError(
            "torch.distributed is not initialized, so this process has no rank; start it with torchrun and call "
            "torch.distributed.init_process_group() first"
        )
    refuse_foreign(trace, partitions)
    require_call(args, kwargs)
    count = len(partitions)
    rank, ranks = distributed.get_rank(group), distributed.get_world_size(group)
    if count % ranks:
        raise PartitionError(
            f"{count} partitions cannot be dealt evenly to {ranks} ranks; make {ranks} partitions, or a multiple"
        )
    refuse_divided(trace, partitions, changing(trace, partitions), range(count))
    device = torch.device(device)
    boundaries = Boundaries(trace, args, kwargs or {}, device)
    for output in boundaries.outputs.values():
        _refuse_output(output)
    inputs = tuple(tensor.to(META) for tensor in args if isinstance(tensor, Tensor))
    output = boundaries.outputs[TRAINING]
    ends = [inputs, *map(boundaries.at, partitions[1:]), (output,) if isinstance(output, Tensor) else tuple(output)]
    own = []
    for index in range(rank, count, ranks):
        module = PipelineModule(trace, partitions[index], is_last=index == count - 1)
        if not any(tensor.is_meta for tensor in module.state_dict().values()):
            module.to(device)
        own.append(
            PipelineStage(
                module,
                index,
                count,
                device,
                # Without these torch would run the stage to find them, which changes BatchNorm and random states.
                input_args=ends[index],
                output_args=ends[index + 1],
                group=group,
            )
        )
    return own


class Boundaries:
    """Knows the values that stages send each other for a micro-batch, by evaluating the model on the meta device.

    `outputs` has what the model returns, by mode.

    Args:
        trace: the captured model. Values want a gradient where a parameter that trains now lies before them.
        args: an example of one micro-batch; only shapes and types are looked at.
        kwargs: likewise.
        device: of the stages.

    Raises GuardError when the inputs take another path than the traced one.
    """

    def __init__(self, trace: Trace, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device) -> None:
        tensors = trace.signature.tensors(args, kwargs)
        self._values: dict[bool, dict[str, Any]] = {}
        self.outputs: dict[bool, Any] = {}
        for training in (TRAINING, EVALUATION):
            trace.programs[training].guards.check(tensors)
            self._values[training], self.outputs[training] = _evaluated(trace, training, tensors, device)
        self._trained = _trained(trace)

    def at(self, partition: Partition) -> tuple[Tensor, ...]:
        """Return what the stage that begins with a partition is sent, as tensors on the meta device.

        Raises PartitionError when something there cannot be sent.
        """
        train, evaluation = self._values[TRAINING], self._values[EVALUATION]
        return tuple(
            _sent(name, train.get(name), evaluation.get(name), partition, name in self._trained)
            for name in partition.reads
        )


def _evaluated(
    trace: Trace, training: bool, tensors: Sequence[Tensor], device: torch.device
) -> tuple[dict[str, Any], Any]:
    """Evaluate the ops of a mode on the meta device; return every value by name, and the output."""
    program = trace.programs[training]
    meta_model = copy.deepcopy(program.guards.meta_model)
    found: dict[fx.Node, Any] = dict(zip(program.inputs, on_meta(list(tensors)), strict=True))

    def lookup(leaf: Any) -> Any:
        if not isinstance(leaf, fx.Node):
            return leaf
        return found[leaf] if leaf in found else attrgetter(str(leaf.target))(meta_model)

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for node in program.nodes:
            args, kwargs = resolve((node.args, node.kwargs), lookup)
            with opened(contexts_of(node)):
                value = evaluate(meta_model, node.op, node.target, args, kwargs, device)
            found[node] = value.value if isinstance(value, StandIn) else value
    nodes = (*program.inputs, *program.nodes)
    return dict(zip(program.graph.values, map(found.get, nodes), strict=True)), resolve(program.output.args[0], lookup)


def _trained(trace: Trace) -> set[str]:
    """Find the values through which a gradient reaches a parameter."""
    parameters = {name for name, parameter in trace.model.named_parameters() if parameter.requires_grad}
    trained: set[str] = set()
    for op in trace.train.ops:
        if not parameters.isdisjoint(op.state) or not trained.isdisjoint(op.reads):
            trained.update((op.name, *op.mutates))
    return trained


def _sent(name: str, train: Any, evaluation: Any, partition: Partition, is_trained: bool) -> Tensor:
    """Make an example of a value sent to the next stage: contiguous, with a gradient in return if `is_trained`.

    Raises PartitionError when it cannot be sent.
    """
    if fault := _not_sendable(train, evaluation):
        raise PartitionError(
            f"the cut at {partition.name!r} cannot lie between two stages of a pipeline, because its value {name!r} "
            f"{fault}; cut elsewhere"
        )
    wants_gradient = is_trained and (train.is_floating_point() or train.is_complex())
    return torch.empty(train.shape, dtype=train.dtype, device=META, requires_grad=wants_gradient)


def _not_sendable(train: Any, evaluation: Any) -> str | None:
    if train is None or evaluation is None:
        return "is there in one of training and evaluation alone"
    for value in (train, evaluation):
        if not isinstance(value, Tensor):
            return f"is no tensor but of type {type(value).__name__}"
    if (train.shape, train.dtype) != (evaluation.shape, evaluation.dtype):
        return f"is {_form(train)} in training and {_form(evaluation)} in evaluation"
    if not SENDS_GRADIENTS_OF_SOME and not train.is_floating_point():
        return f"is {_form(train)}, for which torch {torch.__version__} wants a gradient, as newer ones do not"
    return None


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _refuse_output(output: Any) -> None:
    for value in output if type(output) in (tuple, list) else [output]:
        if not isinstance(value, Tensor):
            raise PartitionError(
                f"what the model returns holds a value of type {type(value).__name__}, and the last stage of a "
                "pipeline must return a tensor or a tuple of tensors; trace a call that does, such as one with "
                "return_dict=False"
            )
