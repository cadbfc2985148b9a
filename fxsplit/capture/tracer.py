"""torch.fx's tracer, with proxies that carry values.

Beside the symbolic trace every operation also runs on tensors of the meta device, so a proxy can answer what Python
asks of it: `if x.shape[1] > 3`, `len(x)`, `range(n)`. Each such answer is a guard, since it fixed the path through the
model. A module that cannot be traced through becomes one op, with a reason. All that leans on torch.fx's inner workings
is here.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from fxsplit.capture.costs import CostMeter, tensors_in

META = torch.device("meta")

# Creating a tensor dispatches on no argument, so torch.fx would run it once and keep the result as a constant.
FACTORIES = (
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace",
    "ones", "rand", "randint", "randn", "randperm", "tensor", "zeros",
)  # fmt: skip

# These move running statistics without telling autograd's version counter: (statistics, position of `training`).
NORMS_WITH_STATISTICS: dict[Any, tuple[tuple[int, str], tuple[int, str], tuple[int, str]]] = {
    nn.functional.batch_norm: ((1, "running_mean"), (2, "running_var"), (5, "training")),
    torch.batch_norm: ((3, "running_mean"), (4, "running_var"), (5, "training")),
    nn.functional.instance_norm: ((1, "running_mean"), (2, "running_var"), (5, "use_input_stats")),
}

QUESTIONS: dict[str, Callable[[Any], Any]] = {
    "bool": bool, "int": int, "float": float, "index": operator.index, "len": len
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """An answer that fixed a path: `question` was asked of the value of `node` at the user's line `where`."""

    node: fx.Node
    question: str
    answer: Any
    where: str


class UntraceableError(Exception):
    """Something that cannot be recorded; the module around it becomes one op. The message is the reason."""


def user_line() -> str:
    """`file.py:12`: the innermost line on the stack that is neither torch's nor ours."""
    ours = str(Path(__file__).parent)
    torchs = str(Path(torch.__file__).parent)
    frame = inspect.currentframe()
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((ours, torchs, "<")):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown"


class ValueProxy(fx.Proxy):
    """A proxy that knows the value of its node, on the meta device."""

    tracer: ValueTracer

    @property
    def value(self) -> Any:
        return self.node.meta["value"]

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # isinstance(x, torch.Tensor) and isinstance(n, int) must hold inside a traced model.
        value = self.node.meta["value"]
        return type(value) if isinstance(value, Tensor | int | float) else ValueProxy

    def __getattr__(self, name: str) -> Any:
        try:
            attribute = getattr(self.value, name)
        except AttributeError as error:
            raise AttributeError(f"{type(self.value).__name__!r} object has no attribute {name!r}") from error
        if callable(attribute):
            return fx.proxy.Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __bool__(self) -> bool:
        return bool(self.tracer.answer(self, "bool"))

    def __int__(self) -> int:
        return int(self.tracer.answer(self, "int"))

    def __float__(self) -> float:
        return float(self.tracer.answer(self, "float"))

    def __index__(self) -> int:
        return int(self.tracer.answer(self, "index"))

    def __len__(self) -> int:
        return int(self.tracer.answer(self, "len"))

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.value, Mapping):
            return iter(self.value)
        items = range(len(self))
        return (self.tracer.create_proxy("call_function", operator.getitem, (self, index), {}) for index in items)

    def __contains__(self, item: Any) -> bool:
        if isinstance(self.value, Mapping):
            return item in self.value
        return any(item is element or bool(item == element) for element in self)

    def __setitem__(self, key: Any, item: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, item), {})


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[ValueProxy, Any], Any]:
    def method(self: ValueProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


# torch.fx records `x += y` as `x + y`, which loses the write into x's memory.
for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(ValueProxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class ValueTracer(fx.Tracer):
    """Records one call of a model whose tensors are on the meta device.

    `call` holds the arguments, `names` a name for each tensor in them. `device` is where the inputs really are.
    `leaves` are paths and classes of modules to keep whole. After `trace`, `guards` are the answers that fixed the
    path and `opaque` the modules that became one op, with the reasons; every node has in its meta the keys `value`,
    `path`, `state`, `written` (nodes and state names written in place) and, with a meter, `cost`.
    """

    def __init__(
        self,
        call: inspect.BoundArguments,
        names: Sequence[str],
        *,
        device: torch.device,
        leaves: Sequence[str | type[nn.Module]] = (),
        meter: CostMeter | None = None,
    ) -> None:
        super().__init__()
        self.call, self.names = call, names
        self.device = device
        self.leaves = leaves
        self.meter = meter
        self.guards: list[Guard] = []
        self.opaque: dict[str, str] = {}
        self._evaluating = False
        self._path = ""
        self._state: dict[int, str] = {}
        self._registered: set[str] = set()
        self._state_nodes: dict[str, ValueProxy] = {}

    # What is recorded

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """One placeholder for each tensor in the arguments, however they are nested; all else stays as it is."""
        self._state = {
            id(tensor): f"{path}.{name}" if path else name
            for path, module in self.root.named_modules()
            for name, tensor in vars(module).items()
            if isinstance(tensor, Tensor)
        }
        registered = {id(t): name for name, t in (*self.root.named_parameters(), *self.root.named_buffers())}
        self._state |= registered
        self._registered = set(registered.values())
        names = iter(self.names)

        def placeholder(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            node = self.create_node("placeholder", next(names), (), {})
            node.meta["value"] = leaf
            return self.proxy(node)

        self.call.arguments = pytree.tree_map(placeholder, self.call.arguments)

        def call(module: nn.Module) -> Any:
            value = root_fn(module, *self.call.args, **self.call.kwargs)
            refuse_assigned_buffers(module)
            return value

        return call, [self.root]

    def proxy(self, node: fx.Node) -> ValueProxy:
        return ValueProxy(node, self)

    def create_proxy(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *rest: Any, **options: Any
    ) -> Any:
        if target is torch._assert:
            # A guard says the same, and needs no op.
            condition, message = [*args, *kwargs.values()]
            if not condition:
                raise AssertionError(message)
            return None
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        node = proxy.node
        node.meta["path"] = str(target) if kind == "call_module" else self._path
        value = self._evaluate(node)
        node.meta["value"] = value
        # None is passed on as itself, so that `is None` holds.
        return None if value is None and kind != "placeholder" else proxy

    def create_arg(self, a: Any) -> Any:
        if type(a) is ValueProxy or type(a) is fx.proxy.Attribute:
            return a.node
        if isinstance(a, Tensor):
            name = self._state.get(id(a))
            if name is None:
                raise UntraceableError(
                    "it computes with a tensor that is neither an input nor a parameter nor a buffer"
                )
            return self._state_proxy(name, a).node
        return super().create_arg(a)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        name = None if self._evaluating else self._state.get(id(attr_val))
        return attr_val if name is None else self._state_proxy(name, attr_val)

    def _state_proxy(self, name: str, tensor: Tensor) -> ValueProxy:
        if name not in self._state_nodes:
            node = self.create_node("get_attr", name, (), {})
            node.meta.update(value=tensor, registered=name in self._registered)
            self._state_nodes[name] = self.proxy(node)
        return self._state_nodes[name]

    # Modules: traced through, or kept whole

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._evaluating:
            return forward(*args, **kwargs)
        path = self.submodule_paths.get(m) if self.submodule_paths else None
        if path is None:
            # Made inside forward: it has no name to be called by, so its operations are recorded instead.
            return forward(*args, **kwargs)
        if self.is_leaf_module(m, path):
            return self.create_proxy("call_module", path, args, kwargs)
        reason = self.opaque.get(path) or self._whole(m)
        if reason is None:
            marks = len(self.graph.nodes), len(self.guards)
            outer, self._path = self._path, path
            buffers = dict(m._buffers)
            try:
                value = forward(*args, **kwargs)
                refuse_assigned_buffers(m)
                return value
            except Exception as error:
                reason = reason_of(error)
                first_error = error
            finally:
                self._path = outer
            m._buffers.update(buffers)
            self._forget(*marks)
            self.opaque = {inner: why for inner, why in self.opaque.items() if not inner.startswith(f"{path}.")}
            self.opaque[path] = reason
            try:
                return self.create_proxy("call_module", path, args, kwargs)
            except Exception:
                # It does not run whole on the meta device either: let the module around it try.
                del self.opaque[path]
                raise first_error from None
        self.opaque[path] = reason
        return self.create_proxy("call_module", path, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        named = any(
            module_qualified_name == leaf if isinstance(leaf, str) else isinstance(m, leaf) for leaf in self.leaves
        )
        return named or super().is_leaf_module(m, module_qualified_name)

    @staticmethod
    def _whole(module: nn.Module) -> str | None:
        """Why a module must not be traced through, although it could be."""
        hooks = (
            module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
        )  # fmt: skip
        if any(hooks):
            return "it has hooks, which tracing through it would drop"
        if isinstance(module, torch.jit.ScriptModule):
            return "it is a scripted module"
        return None

    def _forget(self, nodes: int, guards: int) -> None:
        for node in reversed(list(self.graph.nodes)[nodes:]):
            if node.op == "get_attr":
                del self._state_nodes[str(node.target)]
            self.graph.erase_node(node)
        del self.guards[guards:]

    # Values

    def answer(self, proxy: ValueProxy, question: str) -> Any:
        """What Python wants to know of a value; a guard from now on."""
        value = proxy.value
        if isinstance(value, Tensor) and question != "len":
            raise UntraceableError(f"{user_line()} branches on data: it asks for {question}() of a tensor")
        found = QUESTIONS[question](value)
        self.guards.append(Guard(node=proxy.node, question=question, answer=found, where=user_line()))
        return found

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op in ("placeholder", "get_attr"):
            return node.meta.get("value")
        args = fx.node.map_arg(node.args, lambda argument: argument.meta["value"])
        kwargs = fx.node.map_arg(node.kwargs, lambda argument: argument.meta["value"])
        state = self._module_state(node)
        watched: dict[str | fx.Node, list[Tensor]] = {
            **{argument: tensors_in(argument.meta["value"]) for argument in node.all_input_nodes},
            **{name: [tensor] for name, tensor in state.items()},
        }
        versions = {key: [tensor._version for tensor in tensors] for key, tensors in watched.items()}

        def run(given: Any) -> Any:
            args, kwargs = given
            try:
                return evaluate(self.root, node.op, node.target, args, kwargs, self.device)
            except Exception:
                if node.op != "call_module":
                    raise
                return self._stand_in(str(node.target), args, kwargs)

        self._evaluating = True
        try:
            if self.meter is None:
                value = run((args, kwargs))
            else:
                value, node.meta["cost"] = self.meter.measure(run, (args, kwargs), [*state.values()])
        finally:
            self._evaluating = False
        node.meta["state"] = tuple(state)
        node.meta["written"] = [
            key for key, tensors in watched.items() if [tensor._version for tensor in tensors] != versions[key]
        ] + self._moved_statistics(node)
        return value

    def _stand_in(self, path: str, args: Any, kwargs: Any) -> Any:
        """What a module that looks at data delivers, shapes alone: run on the CPU, on numbers that mean nothing."""

        def filled(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return torch.device("cpu") if isinstance(leaf, torch.device) else leaf
            return (
                torch.rand_like(leaf, device="cpu")
                if leaf.is_floating_point()
                else torch.zeros_like(leaf, device="cpu")
            )

        module = copy.deepcopy(self.root.get_submodule(path)).to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.zero_()
        args, kwargs = pytree.tree_map(filled, (args, kwargs))
        return on_meta(module(*args, **kwargs))

    def _module_state(self, node: fx.Node) -> dict[str, Tensor]:
        if node.op != "call_module":
            return {}
        module = self.root.get_submodule(str(node.target))
        return {self._state[id(tensor)]: tensor for tensor in (*module.parameters(), *module.buffers())}

    def _moved_statistics(self, node: fx.Node) -> list[str | fx.Node]:
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            return [
                self._state[id(tensor)]
                for inner in module.modules()
                if isinstance(inner, _NormBase) and inner.training
                for name, tensor in inner.named_buffers(recurse=False)
                if name in ("running_mean", "running_var")
            ]
        positions = NORMS_WITH_STATISTICS.get(node.target)
        if positions is None:
            return []

        def argument(place: tuple[int, str]) -> Any:
            position, keyword = place
            return node.args[position] if position < len(node.args) else node.kwargs.get(keyword)

        mean, variance, training = map(argument, positions)
        return [statistic for statistic in (mean, variance) if training and isinstance(statistic, fx.Node)]


def reason_of(error: Exception) -> str:
    """In one line."""
    text = str(error) if isinstance(error, UntraceableError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


def refuse_assigned_buffers(module: nn.Module) -> None:
    """A new tensor in the place of a buffer would be lost: only what is written into the old one is recorded."""
    for name, value in module._buffers.items():
        if isinstance(value, fx.Proxy):
            raise UntraceableError(
                f"its forward puts a new tensor in the place of its buffer {name!r} (copy_ into it can be traced)"
            )


def on_meta(values: Any) -> Any:
    """The same nesting of values, with its tensors on the meta device."""
    return pytree.tree_map(lambda leaf: leaf.to(META) if isinstance(leaf, Tensor) else leaf, values)


def evaluate(
    root: nn.Module,
    kind: str,
    target: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    device: torch.device,
) -> Any:
    """Run one node on the meta device. Whatever asks for a tensor's device hears `device` instead."""
    if kind == "call_function" and target is getattr and isinstance(args[0], Tensor):
        if args[1] == "device":
            return device
        if args[1] == "is_cuda":
            return device.type == "cuda"

    args, kwargs = pytree.tree_map(
        lambda leaf: META if isinstance(leaf, torch.device) else leaf, on_meta((args, kwargs))
    )
    if isinstance(kwargs.get("device"), str):
        kwargs["device"] = META
    with META:
        if kind == "call_module":
            return root.get_submodule(str(target))(*args, **kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)


@contextmanager
def recorded_calls(tracer: ValueTracer) -> Iterator[None]:
    """Inside, torch's tensor factories are recorded, and custom autograd functions are refused rather than lost."""

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if tracer._evaluating:
                return function(*args, **kwargs)
            return tracer.create_proxy("call_function", function, args, kwargs)

        return call

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if tracer._evaluating:
            return original_apply.__get__(None, cls)(*args, **kwargs)
        raise UntraceableError(f"it calls the custom autograd function {cls.__name__}")

    factories = {name: getattr(torch, name) for name in FACTORIES}
    # torch remembers which functions make tensors when a device context is first used: it must see the real ones.
    with META:
        torch.empty(0)
    original_apply: Any = vars(torch.autograd.Function)["apply"]
    function_class: Any = torch.autograd.Function
    try:
        for name, factory in factories.items():
            setattr(torch, name, recorded(factory))
        function_class.apply = classmethod(apply)
        yield
    finally:
        for name, factory in factories.items():
            setattr(torch, name, factory)
        function_class.apply = original_apply
