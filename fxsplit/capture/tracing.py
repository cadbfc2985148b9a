"""Captures an unmodified model as ordered operations, once for training and once for evaluation.

    the user's model ──► meta_model: the same modules over meta tensors (the model itself is never run or changed)
                          │ .train() / .eval()
                          ▼
          fx.Graph, one node an op ──► Graph (pure data)

The two graphs name their ops alike, so that a cut can be found in both.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.nn.parameter import is_lazy

from fxsplit.arguments import listed, require, require_call
from fxsplit.capture.contexts import contexts_of
from fxsplit.capture.free_batch import free_batch
from fxsplit.capture.guards import Guards
from fxsplit.capture.naming import assigned_by, called_module, method_of, names_of
from fxsplit.capture.patches import LOCK
from fxsplit.capture.reasons import COMPILED, reason_not_to_look_inside
from fxsplit.capture.recording import Recorder, Recording, has_numbers_of_its_own, is_only_a_number
from fxsplit.capture.signature import Signature
from fxsplit.capture.tracer import Leaf
from fxsplit.errors import TraceError
from fxsplit.graph import EVALUATION, TRAINING, Graph, Op, OpKind, State, Value
from fxsplit.meta.costs import Cost
from fxsplit.meta.evaluate import on_meta, storage_key
from fxsplit.meta.kernels import Kernels
from fxsplit.objects.code import is_users
from fxsplit.objects.copies import meta_copy
from fxsplit.objects.hooks import is_torchs
from fxsplit.objects.snapshot import Snapshot
from fxsplit.objects.structure import map_tensors, tensors_in
from fxsplit.objects.surroundings import Surroundings

KINDS: dict[str, OpKind] = {"call_module": "module", "call_function": "function", "call_method": "method"}


@dataclass(frozen=True, kw_only=True)
class Program:
    """Holds one mode of the model: its graph as data, the torch.fx node of each op in the same order, and the guards.

    `opaque`, `checkpoints` and `cuts_gradients` are those of the Recording; what a checkpoint recomputes is in the
    graph like any other ops.
    """

    graph: Graph
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    output: fx.Node
    guards: Guards
    opaque: Mapping[str, str]
    checkpoints: bool
    cuts_gradients: bool


@dataclass(frozen=True, kw_only=True)
class Call:
    """Describes the call by which a model was traced, with meta tensors; `devices` are where the tensors were."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    devices: tuple[torch.device, ...]
    leaves: tuple[Leaf, ...]

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any], leaves: Sequence[Leaf]) -> Call:
        """Describe a call, without keeping its tensors."""
        devices = tuple(tensor.device for tensor in tensors_in((tuple(args), dict(kwargs))))
        return cls(args=on_meta(tuple(args)), kwargs=on_meta(dict(kwargs)), devices=devices, leaves=tuple(leaves))

    def arguments(self, dtypes: Mapping[torch.dtype, torch.dtype]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Make arguments of the same form from zeros, with some dtypes replaced by others."""
        devices = iter(self.devices)

        def zeros(tensor: Tensor) -> Tensor:
            dtype = dtypes.get(tensor.dtype, tensor.dtype)
            return torch.zeros_like(tensor, dtype=dtype, device=next(devices))

        args, kwargs = map_tensors(zeros, (self.args, dict(self.kwargs)))
        return args, kwargs


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Holds a captured model: `train` and `eval` graphs over one set of names. The model is shared, never copied.

    Args:
        programs: the two modes, by `training`.
        tied: by the first name of a parameter its further names.
        call: how the model was called; `signature` is the form of that call.
        snapshot: what the model was when it was traced.
        modes: by the mode of the model, the mode of each of its modules.
    """

    model: nn.Module
    signature: Signature
    programs: Mapping[bool, Program]
    tied: Mapping[str, tuple[str, ...]]
    call: Call
    snapshot: Snapshot
    modes: Mapping[bool, Mapping[str, bool]]

    def __str__(self) -> str:
        """List the ops of the training graph, one a line: name, kind and shape of the output."""
        rows = [(op.name, op.kind, " × ".join(map(str, op.output.shape or ())) or "-") for op in self.train.ops]
        name_width, kind_width = (max((len(row[column]) for row in rows), default=0) for column in (0, 1))
        return "\n".join(f"{name:{name_width}}  {kind:{kind_width}}  {shape}" for name, kind, shape in rows)

    @property
    def train(self) -> Graph:
        """Return the graph of training."""
        return self.programs[TRAINING].graph

    @property
    def eval(self) -> Graph:
        """Return the graph of evaluation."""
        return self.programs[EVALUATION].graph

    @property
    def opaque(self) -> dict[str, str]:
        """Map the modules and functions that became one op in either mode to the reasons."""
        return {**self.programs[TRAINING].opaque, **self.programs[EVALUATION].opaque}

    @property
    def checkpoints(self) -> bool:
        """Whether the model recomputes by itself in training. Its partitions do only where a phase says so."""
        return self.programs[TRAINING].checkpoints


def require_trace(trace: object) -> None:
    """Refuse what is no trace, such as the model itself. Raises UsageError."""
    require("trace", trace, Trace, "a Trace", "give what fxsplit.trace(model, args) returns")


@contextmanager
def _exclusively() -> Iterator[None]:
    """Run one trace at a time, outside of its caller's gradient contexts and without garbage collection.

    Capture keeps nearly all objects that it makes, so that collecting garbage among them takes long and finds little.
    """
    with LOCK, torch.inference_mode(False), torch.enable_grad():
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()


@_exclusively()
def trace(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    leaves: Leaf | Sequence[Leaf] = (),
) -> Trace:
    """Capture `model` as it would run on `args` and `kwargs`, in training and in evaluation.

    Args:
        model: left as it is; it may be on the meta device, without weights.
        args: positional arguments of one call, with at least two samples. Only shapes and dtypes of tensors matter.
        kwargs: keyword arguments of the call.
        leaves: dotted paths or classes of modules, and functions, that shall be one op each, or one of them.

    Returns the Trace. Raises TraceError when the model itself, and not just a module in it, branches on data before all
    else, or cannot run on `args`; UsageError when `model` is no module, or `args` are no arguments.
    """
    require("model", model, nn.Module, "an nn.Module", "a class must be called to make one")
    require_call(args, kwargs)
    # Modules of the user's that were put into another mode by hand are recorded in that.
    by_hand = {
        path: module.training
        for path, module in model.named_modules()
        if module.training is not model.training and not is_torchs(module)
    }
    return _traced(model, args, kwargs or {}, listed(leaves), {model.training: by_hand})


@_exclusively()
def trace_again(
    model: nn.Module, call: Call, modes: Mapping[bool, Mapping[str, bool]], dtypes: Mapping[torch.dtype, torch.dtype]
) -> Trace:
    """Capture `model` as it is now, by the `call` of an earlier trace with some dtypes replaced by others.

    `modes` gives, by the mode of the model, the mode of modules that are in another one. Raises TraceError as `trace`
    does.
    """
    args, kwargs = call.arguments(dtypes)
    return _traced(model, args, kwargs, call.leaves, modes)


def _traced(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    leaves: Sequence[Leaf],
    modes: Mapping[bool, Mapping[str, bool]],
) -> Trace:
    if lazy := [name for name, tensor in model.named_parameters() if is_lazy(tensor)]:
        raise TraceError(f"the parameter {lazy[0]!r} has no shape yet; run the model once before it is traced")
    if unknown := [leaf for leaf in leaves if isinstance(leaf, str) and leaf not in dict(model.named_modules())]:
        raise TraceError(f"there is no module {unknown[0]!r} to keep whole in {type(model).__name__}")
    compiled = {path: COMPILED for path, module in model.named_modules() if module._compiled_call_impl is not None}
    if reason := compiled.get("", reason_not_to_look_inside(model)):
        raise TraceError(f"{type(model).__name__} cannot be traced: {reason}")
    if type(model).__call__ is not nn.Module.__call__:
        raise TraceError(
            f"{type(model).__name__} cannot be traced: it has a __call__ of its own; put what that does into forward"
        )
    signature = Signature.of(model, args, kwargs)
    recorders = {}
    kernels, surroundings = Kernels(), Surroundings(model.modules())
    for training in (TRAINING, EVALUATION):
        meta_model, originals = meta_copy(model)
        meta_model.train(training)
        for path, mode in modes.get(training, {}).items():
            meta_model.get_submodule(path).training = mode
        recorders[training] = Recorder(
            meta_model=meta_model,
            signature=signature,
            arguments=signature.bind(args, kwargs).arguments,
            leaves=leaves,
            originals=originals,
            compiled=compiled,
            kernels=kernels,
            surroundings=surroundings,
        )
    recordings = _record_both(recorders)
    for training, recorder in recorders.items():
        free_batch(recordings[training], recorder)
    names = names_of(recordings[TRAINING].graph, recordings[EVALUATION].graph)
    alive = _alive(recordings, names)
    programs = {
        training: _program(recordings[training], alive[training], names, recorder.meta_model, recorder.batch_size)
        for training, recorder in recorders.items()
    }
    return Trace(
        model=model,
        signature=signature,
        programs=programs,
        tied=_tied(model),
        # What became one op stays one when the model is traced again: a table may have been stored in it since.
        call=Call.of(
            args, kwargs, (*leaves, *_whole_modules(model, programs.values()), *_functions(programs.values()))
        ),
        snapshot=_snapshot(model, programs.values()),
        modes={
            training: {path: module.training for path, module in recorder.meta_model.named_modules()}
            for training, recorder in recorders.items()
        },
    )


def _snapshot(model: nn.Module, programs: Iterable[Program]) -> Snapshot:
    nodes = [node for program in programs for node in program.nodes]
    return Snapshot(
        model,
        called={str(node.target) for node in nodes if node.op == "call_module"},
        opaque={path for node in nodes if (path := called_module(node)) is not None},
        assigned={path for node in nodes for path in assigned_by(node)},
        functions=_functions(programs),
    )


def _functions(programs: Iterable[Program]) -> list[FunctionType]:
    """List the functions of the user's that are ops, unless they are defined in another function."""
    targets = dict.fromkeys(node.target for program in programs for node in program.nodes if node.op == "call_function")
    return [
        each
        for each in targets
        if isinstance(each, FunctionType) and is_users(each.__module__ or "") and "<locals>" not in each.__qualname__
    ]


def _whole_modules(model: nn.Module, programs: Iterable[Program]) -> list[str]:
    paths = {path for path, _ in model.named_modules()}
    return [path for path in dict.fromkeys(path for program in programs for path in program.opaque) if path in paths]


def _record_both(recorders: Mapping[bool, Recorder]) -> dict[bool, Recording]:
    """Record both modes. What becomes one op in one mode does so in the other too, so that they have ops in common."""
    while True:
        recordings = {training: recorder.record(costs=training) for training, recorder in recorders.items()}
        for training, recorder in recorders.items():
            modules = dict(recorder.meta_model.named_modules())
            opaque = recordings[not training].opaque
            only_there = {
                path: opaque[path] for path in (opaque.keys() & modules.keys()) - recordings[training].opaque.keys()
            }
            if only_there:
                recorder.keep_whole(only_there)
                recordings[training] = recorder.record(costs=training)
        nondeterministic: dict[str, str] = {}
        for training, recorder in recorders.items():
            if has_numbers_of_its_own(recordings[training], recordings[not training]):
                nondeterministic |= recorder.nondeterministic_module(recordings[training])
        whole = nondeterministic or _give_other_numbers(recordings)
        if not whole:
            return recordings
        for recorder in recorders.values():
            recorder.keep_whole(whole)


def _give_other_numbers(recordings: Mapping[bool, Recording]) -> dict[str, str]:
    """Find the innermost modules that return another number in the other mode, with that as reason.

    What follows a module would have the number of its own mode, also where the module is settled and in evaluation.
    """
    first, second = recordings[TRAINING], recordings[EVALUATION]
    found = {
        path
        for path in first.numbers.keys() & second.numbers.keys()
        if path and path not in first.opaque and _differ(first.numbers[path], second.numbers[path])
    }
    innermost = {path for path in found if not any(other.startswith(f"{path}.") for other in found)}
    return dict.fromkeys(innermost, "it returns another number or flag in training than in evaluation")


def _differ(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
    return any(one[place] != other[place] for place in one.keys() & other.keys())


def _program(
    recording: Recording, alive: Sequence[fx.Node], names: Mapping[fx.Node, str], meta_model: nn.Module, batch_size: int
) -> Program:
    """Turn a recording into a Program: its nodes into ops as data. Afterwards the nodes hold no tensor."""
    recorded = recording.graph
    inputs = tuple(node for node in recorded.nodes if node.op == "placeholder")
    output = next(node for node in recorded.nodes if node.op == "output")
    guards = Guards.of(recording, names, meta_model)
    _give_state_to_methods(alive, meta_model)
    storages: dict[int, str] = {}
    values = {node: _value(names[node], node.meta["value"], storages, batch_size) for node in (*inputs, *alive)}
    _number_regions(alive)
    graph = Graph(
        batch_size=batch_size,
        inputs=tuple(values[node] for node in inputs),
        ops=tuple(_op(node, names, values[node], storages, batch_size) for node in alive),
        outputs=tuple(names[node] for node in output.all_input_nodes if node in names),
        state=_state(meta_model),
    )
    for node in recorded.nodes:
        contexts = contexts_of(node)
        node.meta.clear()
        if contexts:
            node.meta["contexts"] = contexts
    return Program(
        graph=graph,
        nodes=tuple(alive),
        inputs=inputs,
        output=output,
        guards=guards,
        opaque=recording.opaque,
        checkpoints=recording.checkpoints,
        cuts_gradients=recording.cuts_gradients,
    )


def _alive(recordings: Mapping[bool, Recording], names: Mapping[fx.Node, str]) -> dict[bool, list[fx.Node]]:
    """List the ops of each mode without sizes, numbers and flags that only guards use, in both modes."""
    nodes = {mode: [node for node in each.graph.nodes if node.op in KINDS] for mode, each in recordings.items()}
    needed: set[str] = set()
    # What evaluation needs, training keeps too: it is looked at once more.
    for mode in (TRAINING, EVALUATION, TRAINING):
        for node in reversed(nodes[mode]):
            users = (user for user in node.users if user.op == "output" or names[user] in needed)
            if not is_only_a_number(node) or next(users, None) is not None:
                needed.add(names[node])
    return {mode: [node for node in each if names[node] in needed] for mode, each in nodes.items()}


def _give_state_to_methods(nodes: Sequence[fx.Node], meta_model: nn.Module) -> None:
    """Give each called method the state of its module that no other op uses: it may use any of it."""
    claimed = {name for node in nodes for name in node.meta["state"]}
    claimed |= {str(source.target) for node in nodes for source in node.all_input_nodes if source.op == "get_attr"}
    held = [name for name, _ in (*meta_model.named_parameters(), *meta_model.named_buffers())]
    for node in nodes:
        if method_of(node):
            prefix = f"{node.meta['path']}.".removeprefix(".")
            own = [name for name in held if name.startswith(prefix) and name not in claimed]
            node.meta["state"] = (*node.meta["state"], *own)
            claimed.update(own)


def _value(name: str, value: Any, storages: dict[int, str], batch_size: int) -> Value:
    tensors = tensors_in(value)
    size = -(-sum(tensor.numel() * tensor.element_size() for tensor in tensors) // batch_size)
    is_tensor = isinstance(value, Tensor)
    owners = [storages.setdefault(storage_key(tensor), name) for tensor in tensors]
    return Value(
        name=name,
        shape=tuple(value.shape) if is_tensor else None,
        dtype=str(value.dtype).removeprefix("torch.") if is_tensor else type(value).__name__,
        bytes_per_sample=size,
        storage=owners[0] if owners else name,
    )


def _number_regions(nodes: Sequence[fx.Node]) -> None:
    """Number the outermost autocast regions, and give each op its number: casts are kept until that region is left."""
    numbers: dict[int, int] = {}
    for node in nodes:
        outermost = next((context for context in contexts_of(node) if context.kind == "autocast"), None)
        if outermost is not None:
            node.meta["autocast"] = numbers.setdefault(id(outermost), len(numbers))


def _op(node: fx.Node, names: Mapping[fx.Node, str], value: Value, storages: Mapping[int, str], batch_size: int) -> Op:
    cost: Cost = node.meta.get("cost", Cost())
    attributes = [each for each in node.all_input_nodes if each.op == "get_attr"]
    state = [*node.meta["state"], *(str(each.target) for each in attributes if each.meta["registered"])]
    written = [key if isinstance(key, str) else names.get(key, str(key.target)) for key in node.meta["written"]]
    called = method_of(node) or node.target
    target = called if isinstance(called, str) else _qualified(called)
    return Op(
        name=names[node],
        path=node.meta["path"],
        kind=KINDS[node.op],
        target=target,
        reads=tuple(names[each] for each in node.all_input_nodes if each in names),
        output=value,
        state=tuple(dict.fromkeys(state)),
        mutates=tuple(dict.fromkeys(written)),
        macs=cost.macs // batch_size,
        backward_macs=cost.backward_macs // batch_size,
        activation_bytes=-(-cost.new_bytes // batch_size),
        saves=tuple(dict.fromkeys(storages[key] for key in cost.saved if key in storages)),
        hidden_bytes=-(-sum(size for key, size in cost.saved.items() if key not in storages) // batch_size),
        uncounted=_is_uncounted(node),
        mixes_samples=node.meta.get("mixes_samples", False),
        single_value_norm=node.meta.get("single_value_norm"),
        is_dropout=node.meta.get("is_dropout", False),
        autocast=node.meta.get("autocast"),
    )


def _is_uncounted(node: fx.Node) -> bool:
    """Whether an op is a kernel not of torch, or the first to need real numbers: its work is not known."""
    if isinstance(node.target, OpOverload | OpOverloadPacket):
        return str(node.target).partition(".")[0] not in ("aten", "prims")
    needs_numbers = bool(node.meta.get("stand_in"))
    return needs_numbers and not any(each.meta.get("stand_in") for each in node.all_input_nodes)


def _qualified(function: Any) -> str:
    if isinstance(function, OpOverload | OpOverloadPacket):
        return str(function)
    module = getattr(function, "__module__", None) or ""
    return f"{module}.{getattr(function, '__qualname__', repr(function))}".removeprefix("_operator.").removeprefix(".")


def _state(model: nn.Module) -> tuple[State, ...]:
    parameters = dict(model.named_parameters())
    return tuple(
        State(
            name=name,
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            bytes=tensor.numel() * tensor.element_size(),
            is_parameter=name in parameters,
        )
        for name, tensor in (*parameters.items(), *model.named_buffers())
    )


def _tied(model: nn.Module) -> dict[str, tuple[str, ...]]:
    first: dict[int, str] = {}
    others: dict[str, tuple[str, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            others[owner] = (*others.get(owner, ()), name)
    return others
