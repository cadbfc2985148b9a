"""The executor: a traced model that runs any phase. Only here does the model's state of training change.

partitions of a phase    [0, start)                  [start, stop)           [stop, n)
                         settled                     trains                  frozen
modules in training      in evaluation mode          as the user has them    in evaluation mode
autograd                 off, unless an input        on                      on, so that gradients pass through
                         requires a gradient
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from fxsplit.arguments import require
from fxsplit.capture.tracing import Trace, require_trace
from fxsplit.errors import GuardError, PartitionError, UsageError
from fxsplit.execute.changes import Changes
from fxsplit.execute.code import Backend
from fxsplit.execute.freezing import Freezing, ModesNow
from fxsplit.execute.passes import Pass
from fxsplit.execute.recompute import Recomputation
from fxsplit.execute.settled.offload import Offload, bring_back
from fxsplit.execute.settled.prefix import Prefix, in_precision, out_of_precision, without_history
from fxsplit.execute.stages import Stage, stages
from fxsplit.graph import EVALUATION, TRAINING
from fxsplit.plan.partition import Partition
from fxsplit.plan.schedule import Phase


class _Forward:
    """The forward of one executor, with the signature that its model's forward has."""

    def __init__(self, function: Callable[..., Any], executor: Executor) -> None:
        self.__func__, self.__self__ = function, executor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # A bound method has its function's attributes, too.
        return getattr(self.__func__, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.__self__, "forward")

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__self__._model.forward)


class _forward:  # noqa: N801 - used as a decorator
    """Decorates `forward`, so that tools which ask for its arguments see those of the model."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    def __get__(self, instance: Executor | None, owner: type[Executor]) -> Callable[..., Any]:
        return self._function if instance is None else _Forward(self._function, instance)


# The executor's own attributes: setting one must not reach a submodule of the model that has the same name.
OWN = frozenset(
    (
        *("_model", "_signature", "_stages", "_prefix", "_recomputation", "_read", "_settled_dtype", "_cuts_gradients"),
        *("_phase", "_everything", "_running", "_changes", "_freezing", "_hooks", "_modes", "_tap", "_wrappers"),
        "_offload",
    )
)


class _Modes:
    """Modules whose modes may change the graph, and the combinations of their modes that give the traced one."""

    def __init__(self, modules: Mapping[str, nn.Module], traced: Sequence[bool]) -> None:
        self.paths, self.now = tuple(modules), ModesNow(modules.values())
        self.known = {tuple(traced)}


class Executor(nn.Module):
    """Runs `trace.model` partition by partition, in any phase; takes the model's place in any training loop.

    It shares the model's modules, parameters and buffers, so `state_dict()` has the model's own keys, and moving or
    loading one of the two moves or loads both. `train()`, `eval()` and `training` are those of the model, and so is
    every attribute that the executor lacks. Before the first `enter` everything trains, and results equal the model's
    bit for bit. In a phase, settled partitions run folded while the rest trains, with 1x1 convolutions as matrix
    products, and on CUDA in kernels with what follows, where these are faster: their results equal the model's within
    rounding.

    Changes of the model after tracing are followed, or refused with a GuardError that names them: those of weights,
    modules and attributes at the next `enter`, `train()` or `eval()`, those of hooks and modes at the next call.

    Args:
        trace: the captured model.
        partitions: all partitions of this trace, in order.
        passes: functions that rewrite the graph of each stage, such as
            `fxsplit.execute.pointwise.pointwise_products`. A pass may change results by rounding.
        settled_dtype: the precision, such as torch.bfloat16, in which settled partitions run while the rest trains;
            None for that of the rest. Evaluation is not affected.
        backend: of torch.compile, such as "inductor": each stage is compiled when it first runs, and what is settled
            as one. None compiles nothing.
        settled_offload: keep parameters and buffers of settled partitions in memory of the host, as far as no other
            partition uses them; those of each are copied to the device of its inputs while it runs.

    Raises PartitionError when the partitions are not those of this trace; UsageError when settled partitions are to be
    compiled and offloaded, and when an argument is of another type.
    """

    _model: nn.Module
    _tap: Callable[[int, list[Any]], None] | None = None

    def __init__(
        self,
        trace: Trace,
        partitions: Sequence[Partition],
        *,
        passes: Sequence[Pass] = (),
        settled_dtype: torch.dtype | None = None,
        backend: Backend | None = None,
        settled_offload: bool = False,
    ) -> None:
        require_trace(trace)
        if settled_dtype is not None and not getattr(settled_dtype, "is_floating_point", False):
            raise UsageError(
                f"settled_dtype is {settled_dtype!r}, but must be a dtype of torch for floating-point numbers, such as "
                "torch.bfloat16"
            )
        if settled_offload and backend is not None:
            raise UsageError(
                "compiled stages keep the weights that they have, so settled ones cannot be copied from the host for "
                "each call; leave out the backend or settled_offload"
            )
        model = trace.model
        # Not registered as a submodule: that would put a prefix before the names in `state_dict()`.
        self._model = model
        training = model.training
        super().__init__()
        model.training = training
        self._parameters, self._buffers, self._modules = model._parameters, model._buffers, model._modules
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        # The model's own hooks are called for the executor, which takes the model's place.
        vars(self).update({name: value for name, value in vars(model).items() if "_hooks" in name})
        self._signature = trace.signature
        self._settled_dtype = settled_dtype
        self.is_compiled = backend is not None
        self._stages = stages(trace, partitions, passes=passes, backend=backend)
        self._offload = Offload(trace, partitions) if settled_offload else None
        self._prefix = Prefix(trace, self._stages, backend, self._offload)
        self._recomputation = Recomputation(trace, self._stages, passes=passes, backend=backend)
        self._read = tuple(trace.signature.names.index(name) for name in partitions[0].reads)
        self._wrappers: Mapping[int, Callable[[list[Any]], Any]] = {}
        self._phase = self._everything = self._running = Phase(start=0, stop=len(self._stages), epochs=1)
        self._cuts_gradients = {mode: program.cuts_gradients for mode, program in trace.programs.items()}
        self._changes = Changes(trace)
        self._freezing = Freezing(trace, partitions)
        self._arrange()

    @property
    def partitions(self) -> tuple[Partition, ...]:
        """All partitions, in order."""
        return tuple(stage.partition for stage in self._stages)

    def stage_at(self, index: int) -> Stage:
        """Return the module that runs partition `index`, to hook it or to wrap it, as FSDP2 does.

        It is called in every phase and mode, also where it is settled or recomputed; but a partition that recomputes in
        segments runs those instead.
        """
        return self._stages[index]

    @property
    def settled_dtype(self) -> torch.dtype | None:
        """The precision in which settled partitions run in training; None for that of the rest."""
        return self._settled_dtype

    @property
    def phase(self) -> Phase:
        """The present phase; before the first `enter`, one in which everything trains."""
        return self._phase

    @property
    def window(self) -> tuple[int, int]:
        """The partitions that train in the present phase, as (start, stop)."""
        return self._phase.start, self._phase.stop

    @property
    def owned(self) -> tuple[tuple[Parameter, ...], ...]:
        """The parameters of each partition, without those that the user froze.

        A parameter that several partitions use belongs to the first of them.
        """
        return self._freezing.owned

    @property
    def training(self) -> bool:
        """The model's own mode."""
        return self._model.training

    @training.setter
    def training(self, mode: bool) -> None:
        self._model.training = mode

    def train(self, mode: bool = True) -> Executor:
        """Call the model's own `train(mode)`, then put what the phase freezes into evaluation mode.

        Raises GuardError when the model was changed since tracing and computes something else.
        """
        self._freezing.restore_modes()
        self._model.train(mode)
        self._changes.check(self._model)
        self._arrange()
        self._freezing.freeze_modes()
        return self

    def enter(self, phase: Phase, optimizer: Optimizer | None = None) -> None:
        """Let the phase's partitions train, and freeze the others: no `requires_grad`, no gradient, evaluation mode.

        A loop may enter the phase of each epoch; entering a phase equal to the present one keeps all state. Parameters
        that the user froze, in the model or in one that it is a copy of, never train.

        Args:
            phase: from a plan of this executor's partitions.
            optimizer: drops its state of all that is frozen; when the phase is a new one with `fresh_optimizer`, of
                everything.

        Raises PartitionError when the phase has more partitions than there are, or when another executor has entered a
        phase over the model; GuardError when the model was changed since tracing and computes something else;
        UsageError when `phase` is no Phase, or `optimizer` no Optimizer.
        """
        require("phase", phase, Phase, "a Phase", "take one of a plan, such as plan.phase_at(epoch)")
        if optimizer is not None:
            require("optimizer", optimizer, Optimizer, "an Optimizer of torch", "give it itself, not its parameters")
        if phase.stop > len(self._stages):
            raise PartitionError(
                f"the phase trains partitions [{phase.start}, {phase.stop}) of {len(self._stages)}; "
                "make the plan from this executor's partitions"
            )
        self._changes.check(self._model)
        is_new = phase != self._phase
        self._enter(phase)
        if optimizer is not None:
            for parameter in list(optimizer.state):
                if (is_new and phase.fresh_optimizer) or not parameter.requires_grad:
                    del optimizer.state[parameter]

    def release(self) -> None:
        """Leave the phase: what trained before `enter` trains again, and modules are in the modes that the user set."""
        self._enter(self._everything)

    def _enter(self, phase: Phase) -> None:
        #   0 ............ start ................ stop ............ n
        #   |   settled     |       trains          |     frozen     |    (1) requires_grad, gradients, modes
        #                   |<-- recompute -->|                           (2) stages or segments that run in their place
        #   |<- folded ---->|                                             (3) from modules and weights as they are now
        self._freezing.enter(phase.start, phase.stop)  # (1)
        self._phase = self._running = phase
        self._recomputation.prepare(phase, self._model)  # (2)
        self._arrange()  # (3)

    def offload(self) -> None:
        """Move to the host what has settled, if that is asked for, and all else back to its device."""
        if self._offload is None:
            bring_back(self._model)
        else:
            self._offload.arrange(self._model, self._phase.start)

    def _arrange(self) -> None:
        """Find the modules and parameters that the model has now; weights are folded again when they are needed."""
        self._freezing.arrange()
        self.offload()
        for stage in self._stages:
            stage.arrange(self._model)
        self._recomputation.arrange(self._model)
        self._prefix.arrange(self._model)
        self._hooks = self._changes.hooks(self._model)
        visible = dict(self._changes.visible(self._model))
        free = {path: module for path, module in visible.items() if not self._freezing.covers(path)}
        # By the mode of the model, and whether partitions are frozen now: then modes of their modules do not count.
        self._modes = {
            (training, frozen): _Modes(modules, self._changes.modes_of(training, tuple(modules)))
            for training in (TRAINING, EVALUATION)
            for frozen, modules in ((True, free), (False, visible))
        }

    @_forward
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model would return. Raises GuardError when inputs take another path than the traced one."""
        return self._resume(self.settle(*args, **kwargs))

    def _check_model(self) -> None:
        """Check what may have changed since the last call without notice: hooks and modes. It takes microseconds."""
        if torch.compiler.is_compiling():
            return
        if any(self._hooks):
            self._changes.refuse_hook(self._model)
        frozen = self._freezing.refresh()
        training = self._model.training
        modes = self._modes[training, frozen]
        now = modes.now()
        if now not in modes.known:
            self._changes.check_modes(self._model, training, dict(zip(modes.paths, now, strict=True)))
            modes.known.add(now)
        running = self._everything if self._freezing.estimating else self._phase
        if running is not self._running:
            self._running = running

    @property
    def evaluates_without_autograd(self) -> bool:
        """Whether the model asks what autograd records, so that it can be evaluated under `torch.no_grad()` alone."""
        return self._changes.guards[False].ask_autograd

    def settle(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Run the settled partitions, and return the values at the cut after them; the inputs, if none is settled.

        Autograd is off, unless one of the inputs requires a gradient. Raises GuardError as `forward` does.
        """
        return self.settle_to(self._phase.start, *args, **kwargs)

    def settle_to(self, stop: int, /, *args: Any, **kwargs: Any) -> list[Any]:
        """Run the settled partitions before `stop` alone, and return the values at that cut; else as `settle`."""
        tensors = self._signature.tensors(args, kwargs)
        self._check_model()
        training, running = self._model.training, self._running
        everything = (running.start, running.stop) == (0, len(self._stages))
        # Where some partitions are in evaluation while others train, both graphs run, and the inputs must suit both.
        for mode in {training, training and everything}:
            guards = self._changes.guards[mode]
            if guards.ask_autograd and mode != training:
                with torch.no_grad():
                    guards.check(tensors)
            else:
                guards.check(tensors)
        values: list[Any] = [tensors[index] for index in self._read]
        tracked = torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in values)
        if tracked and self._cuts_gradients[training]:
            raise GuardError(
                "an input wants a gradient, and the model was traced with inputs that want none, where its checkpoints "
                "of the older kind give none to parameters either; trace it with such an input, or use checkpoints "
                "with use_reentrant=False"
            )
        return self._settle(values, 0, min(stop, running.start), tracked=tracked) if running.start else values

    def settle_on(self, values: Sequence[Any], cut: int, stop: int) -> list[Any]:
        """Run the settled partitions from `cut` to `stop` on the values at `cut`; return those at `stop`.

        What `settle` delivers for images is what this delivers for their values at an earlier cut, within rounding.
        """
        self._check_model()
        return self._settle(list(values), cut, min(stop, self._running.start), tracked=False)

    def _settle(self, values: list[Any], cut: int, stop: int, *, tracked: bool) -> list[Any]:
        if stop <= cut:
            return values
        training = self.training
        dtype = self._settled_dtype if training else None
        if training and not tracked:
            with self._freezing.evaluating(*range(cut, stop)):
                return self._prefix(self._model, values, cut, stop, dtype)
        with nullcontext() if tracked else torch.no_grad(), in_precision(values, dtype):
            for index in range(cut, stop):
                values = self._evaluate(index, values)
        values = out_of_precision(values, dtype)
        return values if tracked else without_history(values)

    def resume(self, values: list[Any], stop: int | None = None, *, cut: int = 0) -> Any:
        """Run the partitions after the settled ones; return what the model would return, or the values at cut `stop`.

        `values` are what `settle` returned or, if `cut` lies behind what is settled, those there; the list is emptied.
        """
        self._check_model()
        return self._resume(values, stop, cut)

    def _resume(self, values: list[Any], stop: int | None = None, cut: int = 0) -> Any:
        result: Any = values
        training, wrappers = self._model.training, self._wrappers
        for index in range(max(cut, self._running.start), len(self._stages) if stop is None else stop):
            if index in wrappers:
                result = wrappers[index](result)
            else:
                # In evaluation `run` would do the same, by a call more for each partition.
                result = self.run(index, result) if training else self._evaluate(index, result)
            if self._tap is not None and index < len(self._stages) - 1:
                self._tap(index, result)
        return result

    def wrap(self, wrappers: Mapping[int, Callable[[list[Any]], Any]]) -> None:
        """Call `wrappers`, by partition, with the values at its start, where it would `run`, which they are to call.

        Settled partitions are not among them. Those who wrap may have replaced parameters of the model.
        """
        self._wrappers = wrappers
        self._arrange()

    def run(self, index: int, values: list[Any]) -> Any:
        """Run partition `index`, which is not settled, as the phase has it, on the values at its start."""
        training, running = self._model.training, self._running
        if training and index < running.recompute and torch.is_grad_enabled():
            result: Any = values
            for segment in self._recomputation.of(index, segmented=running.segmented):
                result = segment(self._model, result)
            return result
        if training and index < running.stop:
            if self._offload is None:
                return self._stages[index](values, training=TRAINING)
            with self._offload.placed(index, values, training=TRAINING):
                return self._stages[index](values, training=TRAINING)
        return self._evaluate(index, values)

    def _evaluate(self, index: int, values: list[Any]) -> Any:
        """Run a partition in evaluation; while the model trains, the last one returns all that training returns."""
        # Asked first: inside, the model's own mode may be evaluation too.
        returned = self.training
        with self._freezing.evaluating(index):
            if self._offload is None:
                return self._stages[index](values, training=EVALUATION, returned=returned)
            with self._offload.placed(index, values, training=EVALUATION):
                return self._stages[index](values, training=EVALUATION, returned=returned)

    @contextmanager
    def tapped(self, tap: Callable[[int, list[Any]], None]) -> Iterator[None]:
        """Inside, call `tap(index, values)` with what each partition writes, before the next one runs.

        The values have their autograd history. Settled partitions and the last one are left out.
        """
        self._tap = tap
        try:
            yield
        finally:
            self._tap = None

    def settled_state(self, stop: int | None = None) -> dict[str, Tensor]:
        """Return the parameters and buffers of the settled partitions, or of those before `stop`, by name."""
        state: dict[str, Tensor] = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        owned = [
            name for stage in self._stages[: self.window[0] if stop is None else stop] for name in stage.partition.state
        ]
        return {name: state[name] for name in owned if name in state}

    # What tools ask of a model

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the number of items in the batch is a traced argument; the Trainer of transformers asks for this."""
        names = (*self._signature.names, *self._signature.constants)
        return any(name.rpartition(".")[2] == "num_items_in_batch" for name in names)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # copy and pickle look for special methods; those of the model would copy the model instead.
            if "_model" not in vars(self) or (name.startswith("__") and name.endswith("__")):
                raise
        return getattr(self._model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OWN:
            vars(self)[name] = value
            return
        known = name in vars(self) or hasattr(type(self), name)
        if not known and "_freezing" in vars(self) and name in vars(self._model):
            setattr(self._model, name, value)
        else:
            super().__setattr__(name, value)
