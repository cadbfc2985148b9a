"""Running single operations on the meta device, where tensors have shapes and types and no numbers."""

from __future__ import annotations

import operator
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list

from fxsplit.errors import GuardError
from fxsplit.meta import autocast
from fxsplit.meta.rest import calls_method
from fxsplit.objects.contents import Contents, unchanged
from fxsplit.objects.structure import ATOMS, META, filled, map_tensors, module_at, tensors_in
from fxsplit.objects.twins import Copier


def storage_key(tensor: Tensor) -> int:
    """Equal for two tensors that share memory, also on the meta device, as long as both are alive."""
    if tensor.layout is not torch.strided:
        return id(tensor)
    return int(tensor.untyped_storage()._cdata)


def bytes_of(tensor: Tensor) -> int:
    """What its memory takes, together with all that shares it."""
    is_dense = tensor.layout is torch.strided
    return tensor.untyped_storage().nbytes() if is_dense else tensor._nnz() * tensor.element_size()


def on_meta(values: Any) -> Any:
    """The same nesting of values, with its tensors on the meta device."""
    return map_tensors(lambda tensor: tensor if tensor.device == META else tensor.to(META), values)


def resolve(argument: Any, lookup: Callable[[Any], Any]) -> Any:
    """The arguments of a node with `lookup` applied to what is no container, in plain lists and dicts."""
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
    """An operation that delivers an object which is neither a number nor part of the model's state."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.__name__ = self.__qualname__ = "constant"

    def __call__(self) -> Any:
        return self.value


class External:
    """An operation that calls a function of another language, such as a scripted one."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.__name__ = self.__qualname__ = str(getattr(function, "name", type(function).__name__))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class Outside:
    """An operation that draws from a generator of the process, reads a clock or the contexts around the call.

    It goes by names, which may be dotted, so that a copy asks the same generator.
    """

    def __init__(self, owner: str, name: str) -> None:
        self.owner, self.name = owner, name
        self.__module__, self.__name__, self.__qualname__ = owner, name, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return operator.attrgetter(self.name)(sys.modules[self.owner])(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return Outside, (self.owner, self.name)


@contextmanager
def unchanged_generators() -> Iterator[None]:
    """Inside, drawing numbers changes nothing for those who draw later."""
    before = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


class Rebuild:
    """An operation that makes an object anew around the values that forward put into it.

    `template` is the object taken apart, with a Slot in the place of each value.
    """

    def __init__(self, template: Any, name: str) -> None:
        self.template = template
        self.__name__ = self.__qualname__ = name

    def __call__(self, values: Sequence[Any]) -> Any:
        return filled(self.template, lambda slot: values[slot.index], Slot)


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of a value in an object that is to be made."""

    index: int


def expect(condition: Any, answer: bool, where: str) -> None:
    """An operation that makes sure of an answer about data. Raises GuardError when `condition` is not `answer`."""
    if isinstance(condition, Tensor) and condition.device == META:
        return
    if bool(condition) is not answer:
        raise GuardError(
            f"this input takes another path through the model than the traced one, at {where}; "
            "trace the model again with such an input, unless that line refuses it"
        )


@dataclass(frozen=True)
class StandIn:
    """A value that was made from numbers that mean nothing, so that even its sizes may be others for real data."""

    value: Any


def evaluate(
    root: nn.Module, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
) -> Any:
    """Run one node whose tensors are on the meta device. Whatever asks for a tensor's device hears `device` instead.

    A module or function that looks at data, which meta tensors have none of, delivers a StandIn.
    """
    if target is getattr and isinstance(args[0], torch.device):
        return getattr(*args)
    asks = isinstance(args[0], Tensor) if args else False
    if target is getattr and asks and args[1] in ("device", "is_cuda"):
        return device if args[1] == "device" else device.type == "cuda"
    if kind == "call_method" and asks and target in ("cpu", "cuda"):
        return args[0]
    if kind == "call_method" and asks and target == "to":
        args = tuple(META if isinstance(argument, str) else argument for argument in args)
    if isinstance(target, Outside):
        with unchanged_generators():
            return target(*args, **kwargs)
    args, kwargs = resolve((args, kwargs), lambda leaf: META if isinstance(leaf, torch.device) else on_meta(leaf))
    if isinstance(kwargs.get("device"), str | torch.device):
        kwargs["device"] = META
    if isinstance(kwargs.get("generator"), torch.Generator):
        # It belongs to another device, and nothing is drawn here.
        kwargs["generator"] = None
    is_sparse = _is_sparse(args)
    if kind == "call_method":
        called = getattr(args[0], target)
        args = args[1:]
    else:
        called = _uncompiled(module_at(root, str(target))) if kind == "call_module" else target
    with _left_alone(called) if kind == "call_module" and not _is_plain(called) else nullcontext():
        try:
            with META, _users(called, (args, kwargs)):
                return on_meta(autocast.run(called, args, kwargs, device))
        except Exception:
            if not _is_leaf(called) and not is_sparse:
                raise
        with unchanged_generators():
            return StandIn(_on_stand_ins(called, args, kwargs))


@contextmanager
def _users(called: Any, given: Any) -> Iterator[None]:
    """Around code of the user's: it may draw, call compiled functions, which then do not compile, and refuses to
    change what it is given.
    """
    if not _is_leaf(called) or type(called).__module__.startswith("torch.nn."):
        yield
        return
    with unchanged_generators(), torch._dynamo.config.patch(error_on_nested_fx_trace=False), unchanged(given):
        yield


def _is_sparse(args: tuple[Any, ...]) -> bool:
    """The meta device knows few ops on sparse tensors."""
    return any(tensor.layout is not torch.strided for tensor in tensors_in(args))


def _uncompiled(module: nn.Module) -> nn.Module:
    original = getattr(module, "_orig_mod", module)
    assert isinstance(original, nn.Module)
    return original


def _is_plain(module: nn.Module) -> bool:
    """A single module of torch's own, whose forward replaces nothing in it."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return type(module).__module__.startswith("torch.nn.modules.") and not module._modules and not hooked


@contextmanager
def _left_alone(module: nn.Module) -> Iterator[None]:
    """Undo what a forward puts in the place of buffers and attributes; what it writes into them has no numbers."""
    # A scripted module keeps its state elsewhere.
    inner = [each for each in module.modules() if not isinstance(each, torch.jit.ScriptModule)]
    held = Contents(module)
    owners = [owner for each in inner for owner in (vars(each), each._buffers)]
    before = [dict(owner) for owner in owners]
    try:
        yield
    finally:
        for owner, content in zip(owners, before, strict=True):
            owner.clear()
            owner.update(content)
        held.restore()


def _is_leaf(called: Any) -> bool:
    """A module, a method of one, or a function of the user's: of other Python functions only torch's are recorded."""
    users = isinstance(called, FunctionType) and called.__module__.partition(".")[0] != "torch"
    return users or isinstance(called, External) or calls_method(called) or isinstance(called, nn.Module)


@unchanged_generators()
def _on_stand_ins(called: Any, args: Any, kwargs: Any) -> Any:
    """Run on the CPU, on numbers that mean nothing."""
    receiver = getattr(called, "__self__", None)
    if isinstance(receiver, Tensor):
        called = getattr(_filled(receiver), called.__name__)

    def lookup(leaf: Any) -> Any:
        return torch.device("cpu") if isinstance(leaf, torch.device) else map_tensors(_filled, leaf)

    if isinstance(called, nn.Module):
        called = _on_cpu(called)
    elif calls_method(called):
        args = (getattr(_on_cpu(args[0].__self__), args[0].__name__), *args[1:])
    args, kwargs = resolve((args, kwargs), lookup)
    with _users(called, (args, kwargs)):
        return on_meta(called(*args, **kwargs))


def _filled(tensor: Tensor) -> Tensor:
    if tensor.layout is not torch.strided:
        return torch.zeros(tensor.shape, dtype=tensor.dtype).to_sparse(layout=tensor.layout)
    make = torch.rand_like if tensor.is_floating_point() else torch.zeros_like
    return make(tensor, device="cpu")


def _on_cpu(module: nn.Module) -> nn.Module:
    """A copy, its parameters and buffers zero, other tensors in it filled."""
    state = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}

    def change(tensor: Tensor) -> Tensor:
        if id(tensor) not in state:
            return _filled(tensor) if tensor.is_meta else tensor.detach().clone()
        zero = torch.zeros_like(tensor, device="cpu", requires_grad=False)
        return nn.Parameter(zero, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else zero

    copied = Copier(change).copy(module)
    assert isinstance(copied, nn.Module)
    return copied
