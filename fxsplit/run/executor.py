"""The executor: a traced model that runs any phase. It is the one place where the state of training changes.

phase [start, stop)      [0, start)         [start, stop)     [stop, n)
                         settled            trains            frozen
mode in training         evaluation         training          evaluation
autograd                 off                on                on, for gradients that pass through
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxsplit.capture.tracing import Trace
from fxsplit.errors import PartitionError
from fxsplit.plan.partition import Partition
from fxsplit.plan.schedule import Phase
from fxsplit.plan.segments import segments
from fxsplit.run.prefix import Prefix
from fxsplit.run.recompute import Recomputing
from fxsplit.run.stages import Stage, stages


class Executor(nn.Module):
    """Runs `trace.model` partition by partition; takes its place in any training loop.

    It shares the model's modules, parameters and buffers, so `state_dict()` has the model's own keys, and moving or
    loading either of the two does so to both. Before the first `enter`, everything trains, bit for bit as the model
    does but for what `fxsplit.run.pointwise` does. What is settled is folded, and delivers the same within rounding.
    With a `settled_dtype`, such as torch.bfloat16, it runs in that precision while the rest trains; in evaluation as
    ever.

    `owned` are the parameters of each partition that trained when the executor was made; one that several partitions
    use belongs to the first of them.

    Raises PartitionError when the partitions are not those of this trace.
    """

    _model: nn.Module
    settled_dtype: torch.dtype | None = None
    _hear: Callable[[int, list[Any]], None] | None = None

    def __init__(self, trace: Trace, partitions: Sequence[Partition]) -> None:
        super().__init__()
        model = trace.model
        # Not registered as a submodule: its names would then begin with another one.
        object.__setattr__(self, "_model", model)
        self._parameters, self._buffers, self._modules = model._parameters, model._buffers, model._modules
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        # The model's own hooks go on, and hear of the executor in its place.
        vars(self).update({name: value for name, value in vars(model).items() if "_hooks" in name})
        self._signature = trace.signature
        self._guards = {training: program.guards for training, program in trace.programs.items()}
        self._stages = stages(trace, partitions)
        self._prefix = Prefix(trace, self._stages)
        self._recomputing = tuple((Recomputing(trace, stage),) for stage in self._stages)
        divided = segments(partitions, trace.train, trace.eval)
        self._in_segments = tuple(
            whole
            if len(parts) == 1
            else tuple(Recomputing(trace, Stage(trace, part, is_last=False, modes=(True,))) for part in parts)
            for whole, parts in zip(self._recomputing, divided, strict=True)
        )
        self._fed = tuple(trace.signature.names.index(name) for name in partitions[0].reads)
        parameters = dict(model.named_parameters())
        self.owned = tuple(
            tuple(parameters[name] for name in partition.state if name in parameters and parameters[name].requires_grad)
            for partition in partitions
        )
        self._phase = self._everything = Phase(start=0, stop=len(self._stages), epochs=1)

    @property
    def partitions(self) -> tuple[Partition, ...]:
        return tuple(stage.partition for stage in self._stages)

    @property
    def window(self) -> tuple[int, int]:
        """Partitions [start, stop) train."""
        return self._phase.start, self._phase.stop

    def enter(self, phase: Phase, optimizer: Optimizer | None = None) -> None:
        """Let the phase's partitions train, and nothing else: other parameters want no gradient and hold none.

        With `optimizer` they have no state in it either, and a phase with `fresh_optimizer` begins without any.
        Entering the phase that it is in changes nothing, so a loop may do so in every epoch.

        Parameters that did not train when the executor was made never do. Raises PartitionError when the phase has more
        partitions than there are.
        """
        if phase.stop > len(self._stages):
            raise PartitionError(
                f"the phase trains partitions [{phase.start}, {phase.stop}) of {len(self._stages)}; "
                "make the plan from this executor's partitions"
            )
        is_new = phase is not self._phase
        if is_new:
            self._prefix.forget()
        self._phase = phase
        for index, parameters in enumerate(self.owned):
            trains = phase.start <= index < phase.stop
            for parameter in parameters:
                parameter.requires_grad_(trains)
                if not trains:
                    # Momentum would move a parameter even with a gradient of zero.
                    parameter.grad = None
        if optimizer is not None:
            for held in list(optimizer.state):
                if (is_new and phase.fresh_optimizer) or not held.requires_grad:
                    del optimizer.state[held]

    def release(self) -> None:
        """Let everything train again that did when the executor was made."""
        self.enter(self._everything)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model would return. Raises GuardError when the inputs take another path than the traced one."""
        return self.resume(self.settle(*args, **kwargs))

    def settle(self, *args: Any, **kwargs: Any) -> list[Any]:
        """The values of the boundary after the settled partitions, without autograd; the inputs, if none is settled.

        Raises GuardError as `forward` does.
        """
        tensors = self._signature.tensors(args, kwargs)
        start, stop = self.window
        everything = (start, stop) == (0, len(self._stages))
        for training in {self.training, self.training and everything}:
            self._guards[training].check(tensors)
        values: list[Any] = [tensors[index] for index in self._fed]
        if not start:
            return values
        return self._prefix(self._model, values, start, self.settled_dtype if self.training else None)

    def resume(self, values: list[Any], stop: int | None = None) -> Any:
        """What the model would return, from what `settle` gave; the list is emptied. Or the values at cut `stop`."""
        result: Any = values
        recompute = self._phase.recompute if self.training and torch.is_grad_enabled() else 0
        for index in range(self._phase.start, len(self._stages) if stop is None else stop):
            if index < recompute:
                for segment in (self._in_segments if self._phase.segmented else self._recomputing)[index]:
                    result = segment(self._model, result)
            else:
                result = self._stages[index](self._model, result, training=self.training and index < self._phase.stop)
            if self._hear is not None and index < len(self._stages) - 1:
                self._hear(index, result)
        return result

    @contextmanager
    def heard(self, hear: Callable[[int, list[Any]], None]) -> Iterator[None]:
        """Inside, `hear(index, values)` is told what each partition delivers, before the next one runs.

        The values are those that the partition `writes`, on the tape of autograd. Settled partitions and the last one
        are not told of.
        """
        # As a plain attribute, a module would become one of the model's.
        object.__setattr__(self, "_hear", hear)
        try:
            yield
        finally:
            object.__setattr__(self, "_hear", None)

    def settled_state(self) -> dict[str, Tensor]:
        """The parameters and buffers of the settled partitions, by the model's names."""
        state: dict[str, Tensor] = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        owned = [name for stage in self._stages[: self.window[0]] for name in stage.partition.state]
        return {name: state[name] for name in owned if name in state}

    def compile_stages(self, backend: str) -> None:
        """Compile each stage with a backend of `torch.compile`; takes effect when it first runs."""
        inner = (part.stage for parts in self._in_segments for part in parts)
        for stage in dict.fromkeys([*self._stages, *inner]):
            stage.compile(backend)
        self._prefix.compile_stages(backend)
