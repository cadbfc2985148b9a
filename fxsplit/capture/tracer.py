"""Extends torch.fx's tracer with proxies that carry values.

Beside the symbolic trace every op also runs on meta tensors, so that a proxy can answer Python's questions: `if
x.shape[1] > 3`, `len(x)`, `range(n)`. Each answer becomes a guard, since it decided how forward went on. A module that
cannot be traced through becomes one op, with a reason. What depends on the internals of torch.fx is in this file.
"""

from __future__ import annotations

import builtins
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import is_dataclass
from enum import Enum
from functools import wraps
from inspect import unwrap
from threading import get_ident
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.nn.utils import parametrize

from fxsplit.capture.contexts import Context
from fxsplit.capture.op_effects import (
    is_unsure,
    moved_statistics,
    note_effects,
    note_gradients,
    wants_gradient,
    watch_norms,
)
from fxsplit.capture.proxy import HeldTensors, ValueProxy
from fxsplit.capture.questions import QUESTIONS, REAL_ISINSTANCE, Guard
from fxsplit.capture.reasons import READS_ANOTHER, reason_of, reason_to_keep_whole
from fxsplit.capture.signature import Signature
from fxsplit.capture.user_code import asserted, unseen_question, user_line
from fxsplit.errors import BranchError, UntraceableError
from fxsplit.meta.costs import CostMeter
from fxsplit.meta.evaluate import (
    Constant,
    ForeignCall,
    ImpureCall,
    Rebuild,
    Slot,
    StandIn,
    evaluate,
    expect,
    on_meta,
    resolve,
    storage_key,
)
from fxsplit.meta.kernels import Kernels
from fxsplit.meta.known import numbers_of
from fxsplit.meta.rest import Rest, calls_method
from fxsplit.objects.code import is_users
from fxsplit.objects.contents import drawing_nothing, unchanged, unshared_generators
from fxsplit.objects.effects import MISSING, Assignment, Effects
from fxsplit.objects.hooks import hooks_of, is_torchs
from fxsplit.objects.structure import LEAVES, map_tensors, members, module_at, template, tensors_in
from fxsplit.objects.surroundings import Change, Part, Surroundings

READ_DATA = ("item", "tolist", "numpy")
# Methods that act on autograd's graph and return nothing that a graph of ops could hold.
AUTOGRAD_METHODS = ("register_hook", "register_post_accumulate_grad_hook", "retain_grad", "backward")

# What never changes, besides functions and tuples of it.
IMMUTABLE = (*LEAVES, Enum, type, BuiltinFunctionType, ModuleType)

Leaf = str | type[nn.Module] | FunctionType


class ValueTracer(fx.Tracer):
    """Records one call of `model`, whose tensors are on the meta device.

    Args:
        signature: the form of the call; `arguments` are its arguments by name.
        device: where the inputs really are.
        leaves: paths, classes and functions that shall be one op each.
        whole: paths and functions that must be one op, with the reason.
        originals: by the id of a copied object that is neither parameter nor buffer, the user's own object.
        lenient: the model's own forward may ask for sizes that depend on data; each run checks the answers.
        kernels: cache of meta kernels.
        meter: measures the cost of each op, if given.
        surroundings: what lies around the model.
        attributing: find out which modules change the surroundings, at some cost.

    After `trace`, `guards`, `opaque`, `checkpoints` and `cuts_gradients` are as in a Recording, `assigned` is what
    forward put into modules, `numbers` what modules returned besides values of the graph, by path and place, and
    `effects` what modules that are one op left in themselves and around the model. `around` is what traced code has
    changed around it, by the path of the module; without `attributing`, "" may stand for any. The meta of each node has
    the keys `value`, `path`, `state`, `written` (nodes and state names written in place), `contexts` if there are any
    and, with a meter, `cost`.
    """

    proxy_type = ValueProxy

    def __init__(
        self,
        model: nn.Module,
        signature: Signature,
        arguments: Mapping[str, Any],
        *,
        device: torch.device,
        leaves: Sequence[Leaf] = (),
        whole: Mapping[str | FunctionType, str] | None = None,
        originals: Mapping[int, Any] | None = None,
        lenient: bool = False,
        kernels: Kernels,
        meter: CostMeter | None = None,
        surroundings: Surroundings,
        attributing: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.signature, self.arguments = model, signature, arguments
        self.device = device
        self.leaves = leaves
        self.originals = originals or {}
        self.lenient = lenient
        self.kernels, self.meter = kernels, meter
        self.guards: list[Guard] = []
        self.opaque: dict[str, str] = {}
        self.assigned: list[Assignment] = []
        self.effects: list[Effects] = []
        self.numbers: dict[str, dict[tuple[Any, ...], Any]] = {}
        self.around: dict[str, Change] = {}
        self.evaluating = False
        self.checkpoints = self.cuts_gradients = False
        self._thread = get_ident()
        self._held_tensors = HeldTensors(self)
        self._refused: list[UntraceableError] = []
        self._held: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._open: list[tuple[object, Context]] = []
        self._whole = whole or {}
        self._surroundings, self._attributing = surroundings, attributing
        self._path = ""
        self._batch_size = 1
        self._state: dict[int, str] = {}
        self._registered: set[str] = set()
        self._storages: dict[str, int] = {}
        self._state_nodes: dict[str, ValueProxy] = {}

    # What is recorded

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Make a placeholder for each tensor in the nested arguments; called by torch.fx."""
        self._state = {
            id(tensor): f"{path}.{name}" if path else name
            for path, module in self.root.named_modules()
            for name, tensor in vars(module).items()
            if isinstance(tensor, Tensor)
        }
        named = (*self.root.named_parameters(), *self.root.named_buffers())
        registered = {id(tensor): name for name, tensor in named}
        self._state |= registered
        self._registered = set(registered.values())
        self._storages = {name: storage_key(tensor) for name, tensor in named}
        sizes = (len(tensor) for tensor in tensors_in(self.arguments) if tensor.dim())
        self._batch_size = next(sizes, 1)
        names = iter(self.signature.names)

        def placeholder(leaf: Tensor) -> ValueProxy:
            node = self.create_node("placeholder", next(names), (), {})
            node.meta["value"] = leaf
            return self.proxy(node)

        args, kwargs = self.signature.call(map_tensors(placeholder, dict(self.arguments)))

        def call(module: nn.Module) -> Any:
            # Only now do the patches hold, also those by which torch.fx wraps functions.
            self._moment = self._before_op = self._surroundings.now()
            if super(ValueTracer, self).is_leaf_module(module, ""):
                return self.call_function(root_fn, (module, *args), kwargs)
            self._held = [(owner, dict(owner)) for owner in (module._buffers, vars(module))]
            with unchanged((args, kwargs)), self._held_tensors:
                # Found on the instance, which may have a forward of its own.
                return self._through(module, "", lambda: module.forward(*args, **kwargs))

        return call, [self.root]

    def proxy(self, node: fx.Node) -> ValueProxy:
        """Make the proxy of a node."""
        return ValueProxy(node, self)

    def create_proxy(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *rest: Any, **options: Any
    ) -> Any:
        """Record an op, run it on the meta device, and return its proxy; None if its value is None."""
        if target is torch._assert:
            # A condition on data becomes an op that checks it; asking for any other makes a guard.
            condition, message = [*args, *kwargs.values()]
            if type(condition) is ValueProxy and isinstance(condition.value, Tensor):
                return self.create_proxy("call_function", expect, (condition, True, user_line()), {})
            if not condition:
                raise AssertionError(message)
            return None
        if kind != "placeholder" and (place := unseen_question(ValueProxy)) is not None:
            raise self.refused(UntraceableError(f"{place} compares identities or types, which tracing cannot see"))
        if kind == "call_method" and target in READ_DATA and isinstance(args[0].value, Tensor):
            raise self.refused(BranchError(f"{user_line()} reads data: it calls {target}() of a tensor"))
        if kind == "call_method" and target in AUTOGRAD_METHODS:
            raise self.refused(UntraceableError(f"{user_line()} calls {target}() of a tensor"))
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        node = proxy.node
        node.meta["path"] = str(target) if kind == "call_module" else self._path
        if self._open:
            node.meta["contexts"] = self._contexts()
        try:
            with self._undone_around(node) if self._may_run_user_code(node) else nullcontext():
                value = self._evaluate(node)
        except Exception as error:
            # Forward may catch the error and go on, as it would in any call.
            self.graph.erase_node(node)
            raise (self.refused(error) if isinstance(error, UntraceableError) else error) from None
        node.meta["value"] = value
        if target is getattr and args[1] == "grad_fn":
            # Code asks whether it is None, which no proxy sees.
            self.guards.append(Guard(node=node, question="bool", answer=value is not None, where=user_line()))
        # The user's `is None` must hold.
        return None if value is None and kind != "placeholder" else proxy

    @contextmanager
    def _undone_around(self, node: fx.Node) -> Iterator[None]:
        """Undo what an op changes around the model, and note it as an effect of the op.

        Such ops find what those before them have left there, as they do in each run; traced code does not.
        """
        left = [each for each in self.effects if isinstance(each.before, Part)]
        for each in left:
            each.redo()
        self._before_op = before = self._surroundings.now()
        try:
            yield
            parts = before.since()
        finally:
            before.restore()
            for each in reversed(left):
                each.undo()
        if parts is not None:
            earlier, later = parts
            self.effects.append(Effects(str(node.target), before=earlier, after=later))

    def _may_run_user_code(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = module_at(self.root, str(node.target))
            return bool(module._modules) or not is_torchs(module) or any(hooks_of(module))
        if node.op != "call_function":
            return False
        is_function = isinstance(node.target, FunctionType) and is_users(node.target.__module__ or "")
        return is_function or calls_method(node.target) or isinstance(node.target, ForeignCall)

    def _note_changes(self) -> None:
        """Attribute what has changed around the model, since this was last asked, to the module whose forward runs."""
        if self._attributing and (changes := self._moment.changed()):
            self.around.setdefault(self._path, changes[0])
            self._moment = self._surroundings.now()

    def call_function(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a call of a function, or of a method of one of the model's modules, as one op."""
        module = args[0] if args else None
        paths = {self.root: "", **(self.submodule_paths or {})}
        path = paths.get(module) if isinstance(module, nn.Module) else None
        name = function.__name__
        # The method may be wrapped to be recorded.
        own = getattr(getattr(module, name, None), "__func__", None)
        if path is not None and (own is None or unwrap(own) is not unwrap(function)):
            raise self.refused(
                BranchError(f"{user_line()} gives a module to {name!r}, a function that tracing cannot look into")
            )
        if path is None:
            target, key = function, f"{function.__module__}.{name}"
        else:
            key = f"{path}.{name}".removeprefix(".")
            method = self.create_node("get_attr", key, (), {})
            method.meta.update(value=getattr(module, name), registered=False)
            target, args = operator.call, (self.proxy(method), *args[1:])
        if function in self._whole:
            self.opaque[key] = self._whole[function]
        if path is None:
            return self.create_proxy("call_function", target, args, kwargs)
        outer, self._path = self._path, path
        try:
            return self.create_proxy("call_function", target, args, kwargs)
        finally:
            self._path = outer

    def call_rest(self, rest: Rest, reason: str, variables: dict[str, Any]) -> Any:
        """Record the rest of the model's own forward as one op, which reads `variables`.

        Raises UntraceableError, with the `reason` for which it is one op, where there is no op before it, or where what
        is before it puts something into the model, which the rest may read, or hands over what is not made anew in
        each call, such as an iterator.
        """
        begun = any(node.op in ("call_module", "call_function", "call_method") for node in self.graph.nodes)
        changed = any(
            owner.get(name, MISSING) is not before.get(name, MISSING)
            for owner, before in self._held
            for name in owner.keys() | before.keys()
        )
        seen: set[int] = set()
        crosses = all(self._may_cross(value, seen) for value in variables.values())
        if not begun or changed or self.effects or not crosses:
            raise UntraceableError(reason)
        method = self.create_node("get_attr", "forward", (), {})
        method.meta.update(value=self.root.forward, registered=False)
        self.opaque[f"forward from line {rest.line} on"] = reason
        return self.create_proxy("call_function", rest, (self.proxy(method), variables), {})

    def _may_cross(self, value: Any, seen: set[int]) -> bool:
        """Whether a variable that is handed to the rest of forward is made anew in each call, or never changes.

        An object that forward made would be that of the first call in all of them, and a list with two names would
        become two lists. `seen` holds the ids of the lists so far.
        """
        kind = type(value)
        if kind is ValueProxy:
            return True
        if kind is list or kind is dict:
            # One that the model holds may change between calls.
            if id(value) in seen or id(value) in self.originals:
                return False
            seen.add(id(value))
            return all(self._may_cross(item, seen) for item in (value.values() if kind is dict else value))
        if isinstance(value, tuple):
            return all(self._may_cross(item, seen) for item in value)
        if isinstance(value, FunctionType):
            return vars(sys.modules.get(value.__module__, object)).get(value.__name__) is value
        return isinstance(value, (Tensor, *IMMUTABLE)) or id(value) in self.originals

    def call_foreign(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a call of a function that is not a Python function."""
        return self.create_proxy("call_function", ForeignCall(function), args, kwargs)

    def uncached(self, function: Any) -> Callable[..., Any]:
        """Make a function of one that keeps its results in a cache: it makes them anew, and they must be the same."""

        @wraps(function.__wrapped__)
        def call(*args: Any, **kwargs: Any) -> Any:
            value = function.__wrapped__(*args, **kwargs)
            if self.is_recording and not all(map(self._is_same_in_each_call, members(value, ValueProxy))):
                raise self.refused(
                    UntraceableError(
                        f"{user_line()} calls {function.__name__}, which keeps in a cache what does not follow from "
                        "sizes alone"
                    )
                )
            return value

        return call

    def _is_same_in_each_call(self, proxy: ValueProxy) -> bool:
        return self.knows(proxy) if isinstance(proxy.value, Tensor) else bool(proxy.node.meta.get("known"))

    def call_impure(self, owner: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a call whose result depends on the process: a draw, a seed, a clock."""
        return self.create_proxy("call_function", ImpureCall(owner, name), args, kwargs)

    def ask_ambient(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the state of a context; if forward did not open it itself, the answer is a guard."""
        kind = next(kind for kind in ("grad", "inference", "autocast") if kind in function.__name__)
        found = function(*args, **kwargs)
        if any(context.kind == kind for _, context in self._open):
            return found
        node = self.create_proxy("call_function", ImpureCall("torch", function.__name__), args, kwargs).node
        self.guards.append(Guard(node=node, question="str", answer=str(found), where=user_line()))
        return found

    def call_checkpointed(self, function: Callable[..., Any], args: Sequence[Any], *, reentrant: bool) -> Any:
        """Trace a checkpointed function; the reentrant kind gives no gradient where none of its inputs wants one."""
        self.checkpoints = True
        # Evaluation is recorded without gradients, but may run with them.
        records = torch.is_grad_enabled() or not self.model.training
        wanting = [argument for argument in args if wants_gradient(argument)]
        if reentrant and records and not wanting:
            self.cuts_gradients = True
            with torch.no_grad():
                return function(*args)
        if reentrant and records and all(map(is_unsure, wanting)):
            raise self.refused(
                UntraceableError(
                    f"{user_line()} checkpoints what wants a gradient in some calls alone, and the older kind of "
                    "checkpoint gives gradients only then; use_reentrant=False always does"
                )
            )
        if reentrant and records:
            # It adds up the gradients of an argument inside, before they meet those from outside.
            args = [arg.view_as(arg) if type(arg) is ValueProxy and wants_gradient(arg) else arg for arg in args]
        return function(*args)

    def refused(self, error: UntraceableError) -> UntraceableError:
        """Return an error to be raised, and note it: it must not be lost where forward itself catches errors."""
        self._refused.append(error)
        return error

    @property
    def is_recording(self) -> bool:
        """Whether calls in this thread are recorded now."""
        return not self.evaluating and get_ident() == self._thread

    def context_opened(self, holder: object, context: Context) -> None:
        """Note that ops run in this context until its `holder`, torch's context manager, is closed."""
        self._open.append((holder, context))

    def context_closed(self, holder: object) -> None:
        """Note that the context of `holder` is closed, if it was open."""
        self._open = [(other, context) for other, context in self._open if other is not holder]

    def _contexts(self) -> tuple[Context, ...]:
        """List the open contexts that matter, outermost first.

        Of several that switch gradients only the innermost does, unless inference mode is open too. An outer autocast
        matters beside an inner one, because it keeps its casts of weights.
        """
        contexts = [context for _, context in self._open]
        if any(context.kind == "inference" for context in contexts):
            return tuple(contexts)
        return tuple(
            {context.kind if context.kind == "grad" else id(context): context for context in contexts}.values()
        )

    def create_arg(self, a: Any) -> Any:
        """Convert an argument of a call to nodes, in more cases than torch.fx does."""
        kind = type(a)
        if kind is torch.Generator:
            # torch.fx would set it as an attribute of the model.
            return self._constant(a).node
        if kind is ValueProxy or kind is fx.proxy.Attribute:
            return a.node
        if isinstance(a, Tensor):
            name = self._state.get(id(a))
            return (self._constant(a) if name is None else self._state_proxy(name, a)).node
        if isinstance(a, tuple) and hasattr(a, "_fields"):
            # torch.fx would record its construction as an op.
            return kind(*(self.create_arg(item) for item in a))
        own_kind = isinstance(a, list | dict) and kind not in (list, dict, immutable_list, immutable_dict)
        if own_kind or is_dataclass(kind):
            # torch.fx would turn it into a plain list or dict, or call its class.
            return self._object(a)
        try:
            return super().create_arg(a)
        except NotImplementedError:
            # torch.fx refuses other objects as arguments.
            return self._object(a)

    def _object(self, a: Any) -> fx.Node:
        """Record an object that holds traced values as an op that makes it anew; any other as a constant."""
        values: list[Any] = []

        def slot(value: Any) -> Slot:
            values.append(value)
            return Slot(len(values) - 1)

        if isinstance(a, Iterator) and id(a) not in self.originals:
            raise self.refused(UntraceableError(f"{user_line()} hands over an iterator, used up after the first call"))
        reduced = template(slot, a, (ValueProxy, Tensor))
        if not values:
            return self._constant(a).node
        node = self.create_proxy("call_function", Rebuild(reduced, type(a).__name__), (values,), {}).node
        assert isinstance(node, fx.Node)
        return node

    def keys(self, obj: fx.Proxy) -> Any:
        """List the keys of a traced mapping, for `**value` and `dict.update(value)`."""
        return list(obj.node.meta["value"])

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Replace a tensor of the model's state by its proxy; called by torch.fx for each attribute of a module."""
        name = self._state.get(id(attr_val)) if self.is_recording else None
        return attr_val if name is None else self._state_proxy(name, attr_val)

    def held(self, tensor: Tensor) -> Any:
        """Return the proxy of a tensor that the model holds, or None for any other."""
        name = self._state.get(id(tensor))
        if name is not None:
            return self._state_proxy(name, tensor)
        return self._constant(tensor) if id(tensor) in self.originals else None

    def _state_proxy(self, name: str, tensor: Tensor) -> ValueProxy:
        self._refuse_replaced(tensor)
        if name not in self._state_nodes:
            node = self.create_node("get_attr", name, (), {})
            node.meta.update(value=tensor, registered=name in self._registered)
            self._state_nodes[name] = self.proxy(node)
        return self._state_nodes[name]

    def _refuse_replaced(self, tensor: Tensor) -> None:
        """Raise BranchError if a module that is one op put another tensor in the place of this one."""
        if any(each.before is tensor for effects in self.effects for each in effects.replaced()):
            name = self._state.get(id(tensor), "")
            error = BranchError(f"{user_line()} reads {name!r}, {READS_ANOTHER}")
            raise self.refused(error)

    def _constant(self, value: Any) -> ValueProxy:
        key = f"constant {id(value)}"
        if key not in self._state_nodes:
            constant = Constant(self.originals.get(id(value), value))
            self._state_nodes[key] = self.create_proxy("call_function", constant, (), {})
            # What ops do to it while they are traced happens to the copy.
            self.evaluating = True
            try:
                self._state_nodes[key].node.meta["value"] = on_meta(value)
            finally:
                self.evaluating = False
        return self._state_nodes[key]

    # Modules: traced through, or kept whole

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace through a module, or make it one op: if it is a leaf, must stay whole or cannot be traced through."""
        if not self.is_recording:
            return forward(*args, **kwargs)
        path = self.submodule_paths.get(m) if self.submodule_paths else None
        if path is None:
            # Made inside forward, so that it has no path by which a graph could call it: its own ops are recorded.
            return forward(*args, **kwargs)
        if self.is_leaf_module(m, path):
            return self.create_proxy("call_module", path, args, kwargs)
        reason = self.opaque.get(path) or self._whole.get(path) or reason_to_keep_whole(m)
        if reason is None:
            marks = (len(self.graph.nodes), len(self.guards), len(self.assigned), len(self.effects))
            refused = len(self._refused)
            self._note_changes()
            outer, self._path = self._path, path
            try:
                return self._through(m, path, lambda: forward(*args, **kwargs))
            except Exception as error:
                reason = reason_of(error)
                first_error = error
            finally:
                self._path = outer
            self._forget(*marks)
            del self._refused[refused:]
            self.opaque = {inner: why for inner, why in self.opaque.items() if not inner.startswith(f"{path}.")}
            self.opaque[path] = reason
            try:
                return self.create_proxy("call_module", path, args, kwargs)
            except Exception as error:
                # It does not run as one op on the meta device either: the module around it becomes one.
                del self.opaque[path]
                found = error if isinstance(error, UntraceableError) else first_error
                raise (self.refused(found) if isinstance(found, UntraceableError) else found) from None
        self.opaque[path] = reason
        return self.create_proxy("call_module", path, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one op: chosen by the user, or one of torch's own."""
        if any(
            module_qualified_name == leaf if isinstance(leaf, str) else isinstance(leaf, type) and isinstance(m, leaf)
            for leaf in self.leaves
        ):
            return True
        if parametrize.is_parametrized(m):
            # Its class lies in torch.nn, so that torch.fx would take it for one of torch's own: the base tells.
            return bool(type(m).__bases__[0].__module__.startswith("torch.nn."))
        return super().is_leaf_module(m, module_qualified_name)

    def _forget(self, nodes: int, guards: int, assigned: int, effects: int) -> None:
        """Undo everything that was recorded beyond these numbers."""
        forgotten = set(list(self.graph.nodes)[nodes:])
        for node in reversed(list(self.graph.nodes)[nodes:]):
            self.graph.erase_node(node)
        self._state_nodes = {name: proxy for name, proxy in self._state_nodes.items() if proxy.node not in forgotten}
        del self.guards[guards:]
        for assignment in reversed(self.assigned[assigned:]):
            assignment.undo()
        del self.assigned[assigned:]
        del self.effects[effects:]

    def _through(self, module: nn.Module, path: str, forward: Callable[[], Any]) -> Any:
        """Call forward, and record which buffers and attributes of the module it sets."""
        owners = {"_buffers": module._buffers, "__dict__": vars(module)}
        before = {kind: dict(owner) for kind, owner in owners.items()}
        open_before, with_gradients, refused = len(self._open), torch.is_grad_enabled(), len(self._refused)
        moment, around = self._moment, dict(self.around)
        try:
            # Containers of torch draw nothing themselves, so that the check is spared.
            with drawing_nothing({} if type(module).__module__.startswith("torch.") else unshared_generators()):
                value = forward()
            if self._refused[refused:]:
                # Forward caught it, and went another way than it does when it is not traced.
                raise self._refused[refused]
            for tensor in tensors_in(value) if self.effects else ():
                self._refuse_replaced(tensor)
            self._note_changes()
        except BaseException:
            if changes := moment.changed():
                moment.restore()
                if not self._attributing:
                    # Some of it may be the work of modules around this one.
                    around.setdefault("", changes[0])
            self._moment, self.around = moment, around
            for kind, owner in owners.items():
                owner.clear()
                owner.update(before[kind])
            del self._open[open_before:]
            torch._C._set_grad_enabled(with_gradients)
            raise
        for kind, owner in owners.items():
            for name, now in list(owner.items()):
                earlier = before[kind].get(name, MISSING)
                if now is not earlier:
                    self._assign(path, kind, owner, name, earlier, now)
        if numbers := dict(_numbers_in(value)):
            self.numbers[path] = numbers
        return value

    def _assign(self, path: str, kind: str, owner: dict[str, Any], name: str, before: Any, now: Any) -> None:
        node_of = self.create_arg(now)
        value = resolve(node_of, _value_of)
        self.assigned.append(Assignment(path=path, owner=owner, name=name, before=before, value=value))
        holder = self.create_node("get_attr", f"{path}.{kind}".removeprefix("."), (), {})
        holder.meta.update(value=None, registered=False)
        node = self.create_node("call_function", operator.setitem, (holder, name, node_of), {})
        key = f"{path}.{name}".removeprefix(".")
        state = (key,) if key in self._registered else ()
        node.meta.update(value=None, path=path, state=state, written=list(state))

    # Values

    def answer(self, proxy: ValueProxy, question: str) -> Any:
        """Answer Python's question about a value, and keep the answer as a guard; an assertion on data becomes an op.

        Raises UntraceableError when the answer depends on data or is drawn.
        """
        value = proxy.value
        if isinstance(value, Tensor) and question != "len":
            expected = self._expected(proxy) if question == "bool" else None
            if expected is None:
                raise self.refused(BranchError(f"{user_line()} branches on data: it asks for {question}() of a tensor"))
            self.create_proxy("call_function", expect, (proxy, expected, user_line()), {})
            return expected
        found = QUESTIONS[question](value)
        if proxy.node.meta.get("drawn"):
            raise self.refused(
                BranchError(
                    f"{user_line()} asks for {question}() of a number that is another one at each call, drawn or read "
                    "from a clock"
                )
            )
        if proxy.node.meta.get("stand_in"):
            self._answer_for_stand_in(proxy, question, found)
            return found
        self.guards.append(Guard(node=proxy.node, question=question, answer=found, where=user_line()))
        return found

    def _expected(self, proxy: ValueProxy) -> bool | None:
        """Find the truth of a tensor that runs can be checked for, if there is one."""
        numbers = self._numbers_of(proxy)
        return asserted() if numbers is None else bool(numbers)

    def knows(self, proxy: ValueProxy) -> bool:
        """Whether the numbers of a tensor follow from sizes alone, so that a model may branch on them."""
        return self._numbers_of(proxy) is not None

    def _numbers_of(self, proxy: ValueProxy) -> Tensor | None:
        self.evaluating = True
        try:
            return numbers_of(proxy.node)
        finally:
            self.evaluating = False

    def _answer_for_stand_in(self, proxy: ValueProxy, question: str, found: Any) -> None:
        """Record a check of an answer that depends on made-up numbers, if it is a length or the tracer is lenient."""
        where = user_line()
        is_container = isinstance(proxy.value, tuple | list | Mapping)
        if not is_container and (self._path or not self.lenient):
            raise self.refused(BranchError(f"{where} asks for {question}() of a size that may depend on data"))
        given = self.create_proxy("call_function", QUESTIONS[question], (proxy,), {})
        same = self.create_proxy("call_function", operator.eq, (given, found), {})
        self.create_proxy("call_function", expect, (same, True, where), {})

    def _evaluate(self, node: fx.Node) -> Any:
        """Run a node on the meta device, and note in its meta what it uses, writes and costs."""
        if node.op in ("placeholder", "get_attr"):
            return node.meta.get("value")
        args, kwargs = resolve((node.args, node.kwargs), _value_of)
        module = module_at(self.root, str(node.target)) if node.op == "call_module" else None
        state = {} if module is None else self._module_state(str(node.target), module)
        # Autograd raises the version of a tensor at each in-place write: that shows what the op writes into.
        watched: dict[str | fx.Node, list[Tensor]] = {
            **{argument: tensors_in(argument.meta["value"]) for argument in node.all_input_nodes},
            **{name: [tensor] for name, tensor in state.items()},
        }
        versions = {key: [tensor._version for tensor in tensors] for key, tensors in watched.items()}
        # Meta kernels call isinstance a thousand times an op, and no proxy reaches them: the original is faster.
        watching = builtins.isinstance

        def run(given: Any) -> Any:
            args, kwargs = given
            return evaluate(
                self.root,
                node.op,
                node.target,
                args,
                kwargs,
                self.device,
                effects=self.effects,
                before_retry=self._before_op.restore,
            )

        holder = getattr(args[0], "__self__", None) if calls_method(node.target) else None
        called = holder if module is None else module
        sizes, hooks = watch_norms(called) if isinstance(called, nn.Module) else ({}, [])
        self.evaluating, builtins.isinstance = True, REAL_ISINSTANCE
        try:
            with self._held_tensors.off():
                own = self._held_by(called)
                if self.meter is None:
                    with self.kernels:
                        value = run((args, kwargs))
                else:
                    used = holder.parameters() if isinstance(holder, nn.Module) else state.values()
                    value, node.meta["cost"] = self.meter.measure(run, (args, kwargs), [*used])
                written: list[str | fx.Node] = [
                    key for key, tensors in watched.items() if [tensor._version for tensor in tensors] != versions[key]
                ]
                written += self._behind([tensor for key in written for tensor in watched[key]])
                now = self._held_by(called)
                written += [name for name, held in own.items() if now.get(name) != held]
        finally:
            self.evaluating, builtins.isinstance = False, watching
            for hook in hooks:
                hook.remove()
        node.meta["state"] = tuple(state)
        written += [
            self._state[id(each)] if isinstance(each, Tensor) else each for each in moved_statistics(node, module)
        ]
        node.meta["written"] = written
        note_gradients(node, called)
        node.meta["stand_in"] = isinstance(value, StandIn)
        value = value.value if isinstance(value, StandIn) else value
        note_effects(node, module, value, sizes, batch_size=self._batch_size)
        return value

    def _held_by(self, called: Any) -> dict[str, tuple[int, int, int]]:
        """Note what a module holds that is one op, or has a method that is: each tensor, its memory and its version."""
        inside = called.modules() if isinstance(called, nn.Module) and not is_torchs(called) else ()
        return {
            self._state[id(tensor)]: (id(tensor), storage_key(tensor), tensor._version)
            for module in inside
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None and id(tensor) in self._state
        }

    def _behind(self, tensors: Sequence[Tensor]) -> list[str]:
        """List the parameters and buffers whose memory some tensors share, as `weight.data` does."""
        written = {storage_key(tensor) for tensor in tensors}
        return [name for name, storage in self._storages.items() if storage in written]

    def _module_state(self, path: str, module: nn.Module) -> dict[str, Tensor]:
        state = {
            self._state.get(id(tensor), f"{prefix}.{name}"): tensor
            for prefix, inner in module.named_modules(prefix=path)
            for name, tensor in (*inner._parameters.items(), *inner._buffers.items())
            if tensor is not None
        }
        if replaced := [name for name, tensor in state.items() if type(tensor) is ValueProxy]:
            raise UntraceableError(f"{user_line()} calls a module with another value as its {replaced[0]!r}")
        return state


def _numbers_in(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the numbers, flags and strings in what a module returns, each with its place."""
    if type(value) in (int, float, bool, str):
        yield place, value
    elif REAL_ISINSTANCE(value, (tuple, list, Mapping)):
        items = value.items() if REAL_ISINSTANCE(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _numbers_in(item, (*place, key))


def _value_of(leaf: Any) -> Any:
    return leaf.meta["value"] if isinstance(leaf, fx.Node) else leaf
