"""Runs single operations on the meta device, where tensors have shapes and dtypes but no numbers."""

from __future__ import annotations

import importlib
import operator
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list

from fxsplit.errors import BranchError, GuardError
from fxsplit.meta import autocast
from fxsplit.meta.rest import Rest, calls_method
from fxsplit.objects.contents import unchanged
from fxsplit.objects.copies import Copier
from fxsplit.objects.effects import Effects, seen_in_copy, undone
from fxsplit.objects.hooks import hooks_of, is_torchs
from fxsplit.objects.structure import ATOMS, META, filled, map_tensors, module_at, tensors_in


def storage_key(tensor: Tensor) -> int:
    """Return a key that is equal for two living tensors if they share memory, on the meta device too."""
    if tensor.layout is not torch.strided:
        return id(tensor)
    return int(tensor.untyped_storage()._cdata)


def bytes_of(tensor: Tensor) -> int:
    """Measure the memory behind a tensor, which may be a view of a part of it."""
    is_dense = tensor.layout is torch.strided
    return tensor.untyped_storage().nbytes() if is_dense else tensor._nnz() * tensor.element_size()


def on_meta(values: Any) -> Any:
    """Copy nested values with all tensors on the meta device."""
    return map_tensors(lambda tensor: tensor if tensor.device == META else tensor.to(META), values)


def resolve(argument: Any, lookup: Callable[[Any], Any]) -> Any:
    """Copy the arguments of a node with `lookup` applied to all leaves, into plain lists and dicts."""
    kind = type(argument)
    if kind in ATOMS:
        return argument
    if kind is tuple or (isinstance(argument, tuple) and hasattr(argument, "_fields")):
        items = [resolve(item, lookup) for item in argument]
        return tuple(items) if kind is tuple else kind(*items)
    if kind is list or kind is immutable_list:
        return [resolve(item, lookup) for item in argument]
    if kind is dict or kind is immutable_dict:
        return {key: resolve(item, lookup) for key, item in argument.items()}
    if kind is slice:
        return slice(*(resolve(item, lookup) for item in (argument.start, argument.stop, argument.step)))
    return lookup(argument)


class Constant:
    """An op that returns an object which is neither a number nor part of the model's state."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.__name__ = self.__qualname__ = "constant"

    def __call__(self) -> Any:
        return self.value

    def __reduce__(self) -> tuple[Any, ...]:
        # A module of Python cannot be copied; it is found by its name.
        is_module = isinstance(self.value, ModuleType)
        return (_constant_module, (self.value.__name__,)) if is_module else (Constant, (self.value,))


def _constant_module(name: str) -> Constant:
    return Constant(importlib.import_module(name))


class ForeignCall:
    """An op that calls a function which is not a Python function, such as a scripted one."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.__name__ = self.__qualname__ = str(getattr(function, "name", type(function).__name__))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class ImpureCall:
    """An op that calls a function whose result depends on the process: a global generator, a clock, an open context.

    It finds the function by the name of its module and a dotted name in it, so that copies of the op, and pickled ones,
    use the generator of the process they run in.
    """

    def __init__(self, owner: str, name: str) -> None:
        self.owner, self.name = owner, name
        self.__module__, self.__name__, self.__qualname__ = owner, name, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return operator.attrgetter(self.name)(sys.modules[self.owner])(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return ImpureCall, (self.owner, self.name)


@contextmanager
def unchanged_generators() -> Iterator[None]:
    """Restore the process's generators at the end, so that drawing inside has no effect on later draws."""
    before = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


class Rebuild:
    """An op that makes a new object with the values that forward put into it.

    `template` is the object taken apart (see `fxsplit.objects.structure`), with a Slot in place of each value.
    """

    def __init__(self, template: Any, name: str) -> None:
        self.template = template
        self.__name__ = self.__qualname__ = name

    def __call__(self, values: Sequence[Any]) -> Any:
        return filled(self.template, lambda slot: values[slot.index], Slot)


@dataclass(frozen=True, slots=True)
class Slot:
    """Marks in a template which value goes there."""

    index: int


def expect(condition: Any, answer: bool, where: str) -> None:
    """Raise GuardError if `condition` on data is not `answer`, as it was assumed in tracing; an op of the graph.

    A condition on the meta device has no truth value and passes.
    """
    if isinstance(condition, Tensor) and condition.device == META:
        return
    if bool(condition) is not answer:
        raise GuardError(
            f"this input takes another path through the model than the traced one, at {where}; "
            "trace the model again with such an input, unless that line refuses it"
        )


@dataclass(frozen=True)
class StandIn:
    """Wraps a result that was computed from made-up numbers: for real data even its sizes may differ."""

    value: Any


def evaluate(
    root: nn.Module,
    kind: str,
    target: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    device: torch.device,
    *,
    effects: list[Effects] | None = None,
    before_retry: Callable[[], None] = lambda: None,
) -> Any:
    """Run one node of a graph whose tensors are on the meta device.

    Args:
        root: module in which `target` is found.
        kind: `op` of the node, such as "call_module"; `target`, `args` and `kwargs` are the node's own, with values.
        device: what a question for a tensor's device is answered with, instead of meta.
        effects: takes what a module leaves in itself, if anything; it is undone.
        before_retry: called when it has failed on the meta device and is about to run on made-up numbers.

    Returns the result on the meta device. A module or function that needs numbers, which meta tensors lack, runs on
    made-up ones instead, and its result is a StandIn.
    """
    if target is getattr and isinstance(args[0], torch.device):
        return getattr(*args)
    of_tensor = isinstance(args[0], Tensor) if args else False
    if target is getattr and of_tensor and args[1] in ("device", "is_cuda"):
        return device if args[1] == "device" else device.type == "cuda"
    if kind == "call_method" and of_tensor and target in ("cpu", "cuda"):
        return args[0]
    if kind == "call_method" and of_tensor and target == "type" and not (args[1:] or kwargs):
        name = torch.empty(0, dtype=args[0].dtype, device="cpu").type()
        return name if device.type == "cpu" else name.replace("torch.", f"torch.{device.type}.", 1)
    if kind == "call_method" and of_tensor and target == "to":
        args = tuple(META if isinstance(argument, str) else argument for argument in args)
    if isinstance(target, ImpureCall):
        with unchanged_generators():
            return target(*args, **kwargs)
    args, kwargs = resolve((args, kwargs), lambda leaf: META if isinstance(leaf, torch.device) else on_meta(leaf))
    if isinstance(kwargs.get("device"), str | torch.device):
        kwargs["device"] = META
    if isinstance(kwargs.get("generator"), torch.Generator):
        # It belongs to a real device, and nothing is drawn on the meta device.
        kwargs["generator"] = None
    is_sparse = _is_sparse(args)
    if kind == "call_method":
        called = getattr(args[0], target)
        args = args[1:]
    else:
        called = _uncompiled(module_at(root, str(target))) if kind == "call_module" else target
    if kind == "call_module" and not _is_plain(called):
        around: AbstractContextManager[Effects | None] = undone(called)
    else:
        around = _with_its_tensors(args[0].__self__, called) if calls_method(called) else nullcontext()
    left: Effects | None
    try:
        with around as left, META, _guarded(called, (args, kwargs)):
            value = on_meta(autocast.run(called, args, kwargs, device))
    except BranchError:
        raise
    except Exception:
        if not _is_leaf(called) and not is_sparse:
            raise
        before_retry()
        with unchanged_generators():
            made_up, left = _on_stand_ins(called, args, kwargs)
        value = StandIn(made_up)
    if left and effects is not None:
        effects.append(left)
    return value


@contextmanager
def _guarded(called: Any, given: Any) -> Iterator[None]:
    """Run user code such that draws have no effect outside and compiled functions run uncompiled.

    Raises UntraceableError when the code changes its arguments.
    """
    if not _is_leaf(called) or type(called).__module__.startswith("torch.nn."):
        yield
        return
    with unchanged_generators(), torch._dynamo.config.patch(error_on_nested_fx_trace=False), unchanged(given):
        yield


def _is_sparse(args: tuple[Any, ...]) -> bool:
    """Whether some argument is sparse: few ops on such tensors run on the meta device."""
    return any(tensor.layout is not torch.strided for tensor in tensors_in(args))


def _uncompiled(module: nn.Module) -> nn.Module:
    original = getattr(module, "_orig_mod", module)
    assert isinstance(original, nn.Module)
    return original


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a single module of torch's own, whose forward replaces none of its attributes."""
    return is_torchs(module) and not module._modules and not any(hooks_of(module))


_REPLACES = "it calls a method that puts another tensor in the place of "


@contextmanager
def _with_its_tensors(module: nn.Module, called: Any) -> Iterator[None]:
    """Restore the tensors that a method of a module replaces in it, or the rest of its forward does.

    Raises BranchError when a method does: what comes after it would find those of an earlier call.
    """
    owners = [(each, owner) for each in module.modules() for owner in (vars(each), each._buffers)]
    before = [dict(owner) for _, owner in owners]
    replaced = ""
    try:
        yield
    finally:
        for (each, owner), content in zip(owners, before, strict=True):
            for name, value in content.items():
                if isinstance(value, Tensor) and owner.get(name) is not value:
                    owner[name], replaced = value, f"{name!r} of {type(each).__name__}"
    if replaced and not isinstance(called, Rest):
        raise BranchError(_REPLACES + replaced)


def _is_leaf(called: Any) -> bool:
    """Whether an op may run user code: a module, a method of one, or a function that is not torch's own."""
    users = isinstance(called, FunctionType) and called.__module__.partition(".")[0] != "torch"
    return users or isinstance(called, ForeignCall) or calls_method(called) or isinstance(called, nn.Module)


@unchanged_generators()
def _on_stand_ins(called: Any, args: Any, kwargs: Any) -> tuple[Any, Effects | None]:
    """Run on the CPU, on made-up numbers; return the result, and what was left in a module."""
    receiver = getattr(called, "__self__", None)
    if isinstance(receiver, Tensor):
        called = getattr(_filled(receiver), called.__name__)

    made: list[tuple[Tensor, Tensor, int]] = []

    def made_up(tensor: Tensor) -> Tensor:
        own = _filled(tensor)
        made.append((tensor, own, own._version))
        return own

    def lookup(leaf: Any) -> Any:
        return torch.device("cpu") if isinstance(leaf, torch.device) else map_tensors(made_up, leaf)

    around: AbstractContextManager[Effects | None] = nullcontext()
    if isinstance(called, nn.Module):
        original, called = called, _on_cpu(called)
        around = seen_in_copy(called, original)
    elif calls_method(called):
        module = args[0].__self__
        copied = _on_cpu(module)
        args = (getattr(copied, args[0].__name__), *args[1:])
        around = seen_in_copy(copied, module)
    args, kwargs = resolve((args, kwargs), lookup)
    with around as left, _guarded(called, (args, kwargs)):
        value = on_meta(called(*args, **kwargs))
    for tensor, own, version in made:
        if own._version != version:
            # Written into: the version of a tensor tells so, whatever is written.
            torch.autograd.graph.increment_version(tensor)
    if left and left.replaced() and calls_method(called) and not isinstance(called, Rest):
        raise BranchError(_REPLACES + f"{left.replaced()[0].name!r} of {type(module).__name__}")
    return value, left


def _filled(tensor: Tensor) -> Tensor:
    if tensor.layout is not torch.strided:
        return torch.zeros(tensor.shape, dtype=tensor.dtype).to_sparse(layout=tensor.layout)
    make = torch.rand_like if tensor.is_floating_point() else torch.zeros_like
    return make(tensor, device="cpu")


def _on_cpu(module: nn.Module) -> nn.Module:
    """Copy a module to the CPU, with zeros as parameters and buffers and made-up numbers in its other meta tensors."""
    state = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}

    def change(tensor: Tensor) -> Tensor:
        if id(tensor) not in state:
            return _filled(tensor) if tensor.is_meta else tensor.detach().clone()
        zero = torch.zeros_like(tensor, device="cpu", requires_grad=False)
        return nn.Parameter(zero, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else zero

    copied = Copier(change).copy(module)
    assert isinstance(copied, nn.Module)
    return copied
