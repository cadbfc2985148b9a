"""An unmodified model to ordered operations, once for training and once for evaluation.

    the user's model ──► twin: the same modules over meta tensors (the model itself is never run or changed)
                          │ .train() / .eval()
                          ▼
          fx.Graph, one node an op ──► Graph (pure data)

The two graphs name their ops alike, so that a cut can be found in both.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from fxsplit.capture.costs import Cost, CostMeter, storage_key, tensors_in
from fxsplit.capture.guards import Guards
from fxsplit.capture.signature import Signature
from fxsplit.capture.tracer import META, UntraceableError, ValueTracer, on_meta, reason_of, recorded_calls
from fxsplit.errors import TraceError
from fxsplit.graph import Graph, Op, OpKind, State, Value

KINDS: dict[str, OpKind] = {"call_module": "module", "call_function": "function", "call_method": "method"}


@dataclass(frozen=True, kw_only=True)
class Program:
    """A mode of the model, ready to be cut: its graph as data, and the node behind each op, in the same order.

    `opaque` are the modules that became one op although they hold others, with the reasons.
    """

    graph: Graph
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    output: fx.Node
    guards: Guards
    opaque: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A captured model: `train` and `eval` graphs over one set of names. The model is shared, never copied.

    `tied` are the further names of parameters that have several.
    """

    model: nn.Module
    signature: Signature
    programs: Mapping[bool, Program]
    tied: Mapping[str, tuple[str, ...]]

    @property
    def train(self) -> Graph:
        return self.programs[True].graph

    @property
    def eval(self) -> Graph:
        return self.programs[False].graph

    @property
    def opaque(self) -> dict[str, str]:
        """The modules that became one op in either mode, with the reasons."""
        return {**self.programs[True].opaque, **self.programs[False].opaque}


def trace(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    leaves: Sequence[str | type[nn.Module]] = (),
) -> Trace:
    """Capture `model` as it would run on `args` and `kwargs`, in training and in evaluation.

    Only shapes and types are looked at, so tensors may be on the meta device and the model needs no weights; give at
    least two samples. `leaves` are dotted paths or classes of modules that shall stay one op.

    Raises TraceError when the model itself, and not just a module in it, branches on data or cannot run on `args`.
    """
    kwargs = kwargs or {}
    if lazy := [name for name, tensor in model.named_parameters() if is_lazy(tensor)]:
        raise TraceError(f"the parameter {lazy[0]!r} has no shape yet; run the model once before it is traced")
    if unknown := [leaf for leaf in leaves if isinstance(leaf, str) and leaf not in dict(model.named_modules())]:
        raise TraceError(f"there is no module {unknown[0]!r} to keep whole in {type(model).__name__}")
    signature = Signature.of(model, args, kwargs)
    programs = {
        training: _program(_twin(model).train(training), signature, args, kwargs, leaves) for training in (True, False)
    }
    return Trace(model=model, signature=signature, programs=programs, tied=_tied(model))


def _twin(model: nn.Module) -> nn.Module:
    """The same modules over tensors of the meta device; nothing that happens to it reaches the model."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device=META), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device=META)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied for tracing, which copies its modules but no weights: {error}"
        ) from error


def _program(
    twin: nn.Module,
    signature: Signature,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    leaves: Sequence[str | type[nn.Module]],
) -> Program:
    """The mode in which `twin` is."""
    call = signature.bind(args, kwargs)
    given = tensors_in(call.arguments)
    state = [*twin.parameters(), *twin.buffers()]
    device = given[0].device if given else META
    call.arguments = on_meta(call.arguments)
    meter = CostMeter([*state, *tensors_in(call.arguments)]) if twin.training else None
    tracer = ValueTracer(call, signature.names, device=device, leaves=leaves, meter=meter)
    mode = "training" if twin.training else "evaluation"
    try:
        with (
            recorded_calls(tracer),
            torch.random.fork_rng(devices=[]),
            nullcontext() if twin.training else torch.no_grad(),
        ):
            recorded = tracer.trace(twin)
    except Exception as error:
        reason = reason_of(error)
        advice = (
            "; move that part into a module of its own, which then stays one op"
            if isinstance(error, UntraceableError)
            else ""
        )
        raise TraceError(f"{type(twin).__name__} cannot be traced in {mode}: {reason}{advice}") from error
    batch_size = next((len(tensor) for tensor in given if tensor.dim()), 1)
    return _read(recorded, tracer, twin, max(batch_size, 1))


def _read(recorded: fx.Graph, tracer: ValueTracer, twin: nn.Module, batch_size: int) -> Program:
    """An fx graph with values on its nodes to ops as data; afterwards the nodes hold no tensor."""
    nodes = [node for node in recorded.nodes if node.op in KINDS]
    inputs = tuple(node for node in recorded.nodes if node.op == "placeholder")
    output = next(node for node in recorded.nodes if node.op == "output")
    names = _names((*inputs, *nodes))
    guards = Guards.of(tracer.guards, recorded, names, twin)
    alive = _alive(nodes)
    storages: dict[int, str] = {}
    values = {node: _value(names[node], node.meta["value"], storages, batch_size) for node in (*inputs, *alive)}
    graph = Graph(
        batch_size=batch_size,
        inputs=tuple(values[node] for node in inputs),
        ops=tuple(_op(node, names, values[node], storages, batch_size) for node in alive),
        outputs=tuple(names[node] for node in output.all_input_nodes if node in names),
        state=_state(twin),
    )
    for node in recorded.nodes:
        node.meta.clear()
    return Program(graph=graph, nodes=tuple(alive), inputs=inputs, output=output, guards=guards, opaque=tracer.opaque)


def _names(nodes: Sequence[fx.Node]) -> dict[fx.Node, str]:
    """`layer1.0.conv1` for a module, `layer1.0:add` for a function inside `layer1.0`, `_1`, `_2` ... when repeated."""
    taken: set[str] = set()
    repeats: Counter[str] = Counter()
    names = {}
    for node in nodes:
        if node.op in ("placeholder", "call_module"):
            base = str(node.target)
        else:
            called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "call")
            base = f"{node.meta['path']}:{called}".removeprefix(":")
        name = base
        while name in taken:
            repeats[base] += 1
            name = f"{base}_{repeats[base]}"
        taken.add(name)
        names[node] = name
    return names


def _alive(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Without the sizes, numbers and flags that only guards looked at. Tensors stay: making them may draw or write."""
    dead: set[fx.Node] = set()
    for node in reversed(nodes):
        value = node.meta["value"]
        only_a_number = value is not None and not tensors_in(value) and node.op != "call_module"
        if only_a_number and all(user in dead for user in node.users):
            dead.add(node)
    return [node for node in nodes if node not in dead]


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


def _op(node: fx.Node, names: Mapping[fx.Node, str], value: Value, storages: Mapping[int, str], batch_size: int) -> Op:
    cost: Cost = node.meta.get("cost", Cost())
    attributes = [source for source in node.all_input_nodes if source.op == "get_attr"]
    state = [*node.meta["state"], *(str(source.target) for source in attributes if source.meta["registered"])]
    written = [key if isinstance(key, str) else names.get(key, str(key.target)) for key in node.meta["written"]]
    target = node.target if isinstance(node.target, str) else _qualified(node.target)
    return Op(
        name=names[node],
        path=node.meta["path"],
        kind=KINDS[node.op],
        target=target,
        reads=tuple(names[source] for source in node.all_input_nodes if source in names),
        output=value,
        state=tuple(dict.fromkeys(state)),
        mutates=tuple(dict.fromkeys(written)),
        macs=cost.macs // batch_size,
        backward_macs=cost.backward_macs // batch_size,
        activation_bytes=-(-cost.new_bytes // batch_size),
        saves=tuple(dict.fromkeys(storages[key] for key in cost.saved if key in storages)),
        hidden_bytes=-(-sum(size for key, size in cost.saved.items() if key not in storages) // batch_size),
    )


def _qualified(function: Any) -> str:
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
