"""Gradient checkpointing of partitions: their activations are not kept, and their forward runs again in backward.

forward    values at the boundary ──► stage ──► ...        nothing is kept but the boundary
backward   values at the boundary ──► stage ──► gradients  from the same buffers and with the same dropout

Where an op writes into an input of the model, as a first ReLU in place does, a copy of that input is kept. The first
forward writes into the caller's tensor, as the plain model does; each further one writes into a copy of the kept copy.

Source: Chen et al., Training deep nets with sublinear memory cost, 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from fxsplit.capture.naming import called_module, method_of
from fxsplit.capture.tracing import Trace
from fxsplit.execute.code import Backend
from fxsplit.execute.passes import Pass
from fxsplit.execute.settled.prefix import ORIGINS
from fxsplit.execute.stages import Stage
from fxsplit.graph import TRAINING
from fxsplit.meta.evaluate import Constant
from fxsplit.objects.contents import GLOBAL_GENERATORS, Contents, restored, state_of
from fxsplit.objects.structure import map_tensors
from fxsplit.plan.partition import Partition
from fxsplit.plan.schedule import Phase
from fxsplit.plan.segments import segments

# What a module holds: its attributes, and its buffers.
Content = tuple[dict[str, Any], dict[str, Tensor | None]]
Modes = list[tuple[nn.Module, bool]]
# Random generators with their states.
States = list[tuple[Any, Any]]


class Recomputation:
    """Makes what runs in place of stages that recompute, as a whole or in segments, when a phase first needs it.

    Args:
        trace: the captured model.
        stages: those of the executor, all of them.
        passes: of the stages; segments, which are stages of their own, get them, too.
        backend: likewise.
    """

    def __init__(
        self, trace: Trace, stages: Sequence[Stage], *, passes: Sequence[Pass] = (), backend: Backend | None = None
    ) -> None:
        self._trace: Trace | None = trace
        self._stages, self._passes, self._backend = tuple(stages), tuple(passes), backend
        self._whole: tuple[tuple[Recomputing, ...], ...] = ()
        self._in_segments: tuple[tuple[Recomputing, ...], ...] = ()

    def prepare(self, phase: Phase, model: nn.Module) -> None:
        """Make what the phase needs, over the modules that the model has now."""
        if phase.recompute and self._trace is not None:
            self._make(replace(self._trace, model=model), segmented=phase.segmented)

    def of(self, index: int, *, segmented: bool) -> tuple[Recomputing, ...]:
        """Return what runs, one after the other, in place of stage `index`: its segments, or itself as a whole."""
        return (self._in_segments if segmented else self._whole)[index]

    def arrange(self, model: nn.Module) -> None:
        """Let segments share what the model has now; the executor arranges its own stages."""
        for pieces in self._in_segments:
            for piece in pieces:
                piece.stage.arrange(model)

    def _make(self, trace: Trace, *, segmented: bool) -> None:
        self._whole = self._whole or tuple((Recomputing(trace, stage),) for stage in self._stages)
        if segmented and not self._in_segments:
            divided = segments([stage.partition for stage in self._stages], trace)
            self._in_segments = tuple(
                whole if len(pieces) == 1 else tuple(self._segment(trace, piece) for piece in pieces)
                for whole, pieces in zip(self._whole, divided, strict=True)
            )

    def _segment(self, trace: Trace, piece: Partition) -> Recomputing:
        stage = Stage(trace, piece, is_last=False, modes=(TRAINING,), passes=self._passes, backend=self._backend)
        return Recomputing(trace, stage)

    def __getstate__(self) -> dict[str, Any]:
        # The graphs of a trace cannot be pickled, so all segments are made before, and the trace is left out.
        if self._trace is not None:
            self._make(self._trace, segmented=True)
        return {**vars(self), "_trace": None}


class Recomputing:
    """Runs a stage in training and keeps only the values at its start for backward; all results stay the same."""

    def __init__(self, trace: Trace, stage: Stage) -> None:
        self.stage = stage
        span = stage.partition.span(training=TRAINING)
        program = trace.programs[TRAINING]
        buffers = dict(trace.model.named_buffers())
        mutated = {name for op in program.graph.ops[span] for name in op.mutates}
        written = mutated & buffers.keys()
        if any(map(method_of, program.nodes)):
            # It may write into any buffer, and before this partition runs again.
            read = {str(source.target) for node in program.nodes[span] for source in node.all_input_nodes}
            written |= read & buffers.keys()
        parameters = mutated & dict(trace.model.named_parameters()).keys()
        owners = {name.rpartition(".")[0] for name in written}
        called: dict[str, None] = {}
        for node in program.nodes[span]:
            path = called_module(node)
            if path is not None:
                called[path] = None
                for inner, module in trace.model.get_submodule(path).named_modules(prefix=path):
                    if module._buffers or not _is_plain(module):
                        owners.add(inner)
        self._owners, self._called, self._weights = tuple(sorted(owners)), tuple(called), tuple(sorted(parameters))
        # Modules that may hold more that forward changes: lists, counters, generators.
        self._holders = tuple(path for path in called if not _is_plain(trace.model.get_submodule(path)))
        # Generators that ops are given as constants, in whatever partition the constant is made.
        constants = (node.target.value for node in program.nodes if isinstance(node.target, Constant))
        self._generators = [each for each in constants if isinstance(each, torch.Generator)]
        self._stops_early = all(_saves_final_tensors(trace.model, node) for node in program.nodes[span])
        # A cut at which a later op writes into an earlier value is refused, so what is written here are model inputs.
        values = program.graph.values
        memory = {values[name].storage for op in program.graph.ops[span] for name in op.mutates if name in values}
        self._written = tuple(
            position
            for position, name in enumerate(stage.partition.reads)
            if name in values and values[name].storage in memory
        )

    def __call__(self, model: nn.Module, values: list[Any]) -> Any:
        """Run on boundary values, whose list is emptied, and return boundary values."""
        boundary, values[:] = list(values), []
        contents = {path: _content(model.get_submodule(path)) for path in self._owners}
        places = (path.rpartition(".") for path in self._weights)
        weights = [_Weight.now(model.get_submodule(owner), name).copied() for owner, _, name in places]
        # The user may put the model into evaluation mode before backward.
        modes = [(each, each.training) for path in self._called for each in model.get_submodule(path).modules()]
        # torch's checkpoint restores torch's own generator.
        others = (GLOBAL_GENERATORS["random"], GLOBAL_GENERATORS["numpy.random"], *self._generators)
        generator_states = [(generator, state_of(generator)) for generator in others]
        snapshots = [Contents(model.get_submodule(path)) for path in self._holders]
        originals = {position: boundary[position] for position in self._written}
        for position, tensor in originals.items():
            boundary[position] = _copy(tensor.detach()).requires_grad_(tensor.requires_grad)

        def run(*given: Any) -> Any:
            values = list(given)
            for position in self._written:
                values[position] = originals.pop(position) if position in originals else _copy(values[position])
            return self.stage(values, training=TRAINING)

        restoring = _MadeOnEntry(lambda: _restored(model, contents, weights, modes, generator_states, snapshots))
        with set_checkpoint_early_stop(self._stops_early):
            return checkpoint(run, *boundary, use_reentrant=False, context_fn=lambda: (nullcontext(), restoring))


def _copy(tensor: Tensor) -> Tensor:
    """Copy a tensor with its memory layout, on which the choice of kernels may depend."""
    return tensor.new_empty_strided(tensor.size(), tensor.stride()).copy_(tensor)


def _saves_final_tensors(model: nn.Module, node: fx.Node) -> bool:
    """Tell whether the tensors that an op saves for backward are final at the moment when they are saved.

    Recomputation may then stop early, when the last of them is saved. RReLU saves its noise before it draws the
    numbers, and code from outside torch may use RReLU.
    """
    if node.op == "call_module":
        inner = model.get_submodule(str(node.target)).modules()
        return all(_is_plain(module) and not isinstance(module, nn.RReLU) for module in inner)
    if isinstance(node.target, str):
        return True
    origin = (getattr(node.target, "__module__", None) or "torch").partition(".")[0]
    return origin in ORIGINS and method_of(node) is None and not node.target.__name__.startswith("rrelu")


def _is_plain(module: nn.Module) -> bool:
    """Tell whether a module is one of torch's own: of these, forward changes nothing but buffers."""
    return type(module).__module__.startswith("torch.nn.")


def _content(module: nn.Module) -> Content:
    buffers = {name: None if buffer is None else buffer.clone() for name, buffer in module._buffers.items()}
    return {} if _is_plain(module) else dict(vars(module)), buffers


class _Weight(NamedTuple):
    """A parameter that is written in forward, where it is in the model, and its numbers at a moment."""

    module: nn.Module
    name: str
    parameter: nn.Parameter
    numbers: Tensor

    @classmethod
    def now(cls, module: nn.Module, name: str) -> _Weight:
        """Take the parameter that the module has now."""
        parameter = module.get_parameter(name)
        return cls(module, name, parameter, parameter.data)

    def copied(self) -> _Weight:
        """Return it with a copy of its numbers."""
        return self._replace(numbers=self.numbers.clone())

    def put(self) -> None:
        """Give the module this parameter with these numbers, which autograd does not take for a change in place."""
        self.module._parameters[self.name], self.parameter.data = self.parameter, self.numbers


class _MadeOnEntry:
    """A context that makes a new one whenever it is entered, since backward may run several times."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self._make = make

    def __enter__(self) -> None:
        self._context = self._make()
        self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


@contextmanager
def _restored(
    model: nn.Module,
    contents: Mapping[str, Content],
    weights: Sequence[_Weight],
    modes: Modes,
    generator_states: States,
    snapshots: Sequence[Contents],
) -> Iterator[None]:
    """Inside, modules hold what they held before the first forward, and the same random numbers are drawn.

    At the end, modules and generators have their present states again.
    """
    modules = {path: model.get_submodule(path) for path in contents}
    now = {path: (dict(vars(module)), dict(module._buffers)) for path, module in modules.items()}
    # Where forward has replaced a parameter, the first one has numbers, too.
    weights_now = [each._replace(numbers=each.parameter.data) for each in weights]
    weights_now += [_Weight.now(each.module, each.name) for each in weights]
    modes_now = [(module, module.training) for module, _ in modes]
    states_now = [(generator, state_of(generator)) for generator, _ in generator_states]
    snapshots_now = [each.again() for each in snapshots]
    try:
        for each in snapshots:
            each.restore()
        _set_generators(generator_states)
        for weight in weights:
            weight.copied().put()
        for path, (attributes, buffers) in contents.items():
            vars(modules[path]).update(attributes)
            # Copies, since every run must start from the same buffers.
            modules[path]._buffers.update(map_tensors(Tensor.clone, buffers))
        _set(modes)
        yield
    finally:
        _set_generators(states_now)
        for each in snapshots_now:
            each.restore()
        _set(modes_now)
        for path, (attributes, buffers) in now.items():
            for owner, before in ((vars(modules[path]), attributes), (modules[path]._buffers, buffers)):
                owner.clear()
                owner.update(before)
        for weight in weights_now:
            weight.put()


def _set_generators(states: States) -> None:
    for generator, state in states:
        restored(generator, state)


def _set(modes: Modes) -> None:
    for module, mode in modes:
        if module.training is not mode:
            module.training = mode
