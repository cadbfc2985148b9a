"""Finds and replaces tensors in nested containers and objects, as torch's pytree does in containers alone.

Python's protocol for copies (`__reduce_ex__`) takes an object apart and puts it together again, so that user classes,
subclasses of dict and list, dataclasses and slotted objects need no special cases:

    object ──taken_apart──► Reduced: how it is made, arguments, state, items, pairs ──put_together──► object
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor, fx, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

HOST, META = torch.device("cpu"), torch.device("meta")
# Types of values that hold no tensor.
ATOMS = (type(None), bool, int, float, str, torch.dtype)
# Further ones, none of which can be changed.
LEAVES = (*ATOMS, bytes, complex, torch.device, torch.Size, torch.layout, torch.memory_format, range, slice, type(...))
_LEAVES = frozenset(LEAVES)
# Never taken apart.
INDIVISIBLE = (
    *(type, FunctionType, BuiltinFunctionType, MethodType, ModuleType),
    *(nn.Module, fx.Node, fx.Proxy, np.ndarray, np.generic, torch.Generator, torch.jit.ScriptFunction),
)  # fmt: skip
Kind = type | tuple[type, ...]
# While a model is traced, `isinstance` is patched to take a proxy for a tensor.
_isinstance = isinstance


def module_at(root: nn.Module, path: str) -> nn.Module:
    """Find a submodule as `root.get_submodule` does, but without `getattr`, which is slow while a model is traced.

    Raises KeyError when there is no such module.
    """
    module = root
    for name in path.split(".") if path else ():
        module = module._modules[name]  # type: ignore[assignment]
    return module


class Reduced(NamedTuple):
    """Holds an object taken apart: `make(*arguments)`, then its `state`, `items` of a list and `pairs` of a dict."""

    make: Any
    arguments: tuple[Any, ...]
    state: Any
    items: list[Any]
    pairs: dict[Any, Any]


def taken_apart(value: Any) -> Reduced | None:
    """Take an object apart; None if it is indivisible or cannot be copied."""
    if _isinstance(value, INDIVISIBLE):
        return None
    try:
        with _undeprecated(value):
            found = value.__reduce_ex__(4)
    except Exception:
        return None
    if not _isinstance(found, tuple):
        return None
    make, arguments, *rest = found
    state, items, pairs = (*rest, None, None, None)[:3]
    return Reduced(make, arguments, state, list(items or ()), dict(pairs or ()))


def _undeprecated(value: Any) -> AbstractContextManager[Any]:
    """Silence what the iterators of itertools say: they can be copied until Python 3.13."""
    if not _isinstance(value, Iterator):
        return nullcontext()
    return warnings.catch_warnings(action="ignore", category=DeprecationWarning)


def put_together(make: Any, arguments: tuple[Any, ...], state: Any, items: list[Any], pairs: dict[Any, Any]) -> Any:
    """Make the object that was taken apart into these arguments."""
    made = make(*arguments)
    fill(made, state, items, pairs)
    return made


def fill(made: Any, state: Any, items: list[Any], pairs: dict[Any, Any]) -> None:
    """Give a new object its state, items and pairs."""
    if state is not None:
        if hasattr(made, "__setstate__"):
            with _undeprecated(made):
                made.__setstate__(state)
        else:
            attributes, slots = state if _isinstance(state, tuple) else (state, None)
            if attributes:
                vars(made).update(attributes)
            for name, value in (slots or {}).items():
                object.__setattr__(made, name, value)
    for item in items:
        made.append(item)
    for key, value in pairs.items():
        made[key] = value


def slots_of(value: Any) -> dict[str, Any]:
    """Return the attributes of an object that lie in slots, as far as they are set."""
    return {name: getattr(value, name) for name in _slot_names(type(value)) if hasattr(value, name)}


def _slot_names(kind: type) -> tuple[str, ...]:
    """List the slots of a class and its bases: the descriptors by which Python reads them."""
    return tuple(
        name
        for base in kind.__mro__
        if "__slots__" in vars(base)
        for name, value in vars(base).items()
        if type(value) is MemberDescriptorType
    )


def put_attributes(value: Any, attributes: Mapping[str, Any]) -> None:
    """Give an object exactly these attributes, in its slots and its `__dict__`."""
    slots = _slot_names(type(value))
    for name in slots:
        if name in attributes:
            object.__setattr__(value, name, attributes[name])
        elif hasattr(value, name):
            object.__delattr__(value, name)
    if hasattr(value, "__dict__"):
        vars(value).clear()
        vars(value).update({name: each for name, each in attributes.items() if name not in slots})


def is_divided(tensor: Any) -> TypeGuard[DTensor]:
    """Tell whether each of several processes has a part of a tensor."""
    # Without its class, which takes a second to import.
    return isinstance(tensor, Tensor) and hasattr(type(tensor), "full_tensor")


def tensors_in(value: Any) -> list[Tensor]:
    """List the tensors in nested containers and in the attributes of objects; a tensor lists itself."""
    return [value] if type(value) is Tensor else list(members(value, Tensor))


def members(value: Any, kind: Kind, seen: set[int] | None = None) -> Iterator[Any]:
    """Yield the values of a type in nested containers and objects; what an object holds twice, only once."""
    if _isinstance(value, kind):
        if seen is None or id(value) not in seen:
            if seen is not None:
                seen.add(id(value))
            yield value
        return
    items = _items(value)
    if items is not None:
        for _, item in items:
            yield from members(item, kind, seen)
    elif type(value) not in _LEAVES:
        seen = set() if seen is None else seen
        if id(value) not in seen and (reduced := taken_apart(value)):
            seen.add(id(value))
            yield from members(tuple(reduced), kind, seen)


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Copy nested values with `function` applied to their tensors; objects that hold none are not copied."""
    return map_members(function, value, Tensor)


def map_members(function: Callable[[Any], Any], value: Any, kind: Kind) -> Any:
    """Copy nested values with `function` applied to those of a type; objects that hold none are not copied."""
    return filled(template(function, value, kind))


def template(function: Callable[[Any], Any], value: Any, kind: Kind) -> Any:
    """Copy nested values with `function` applied to those of a type; objects that hold any become Reduced."""
    if _isinstance(value, kind):
        return function(value)
    items = _items(value)
    if items is not None:
        return _like(value, [template(function, item, kind) for _, item in items])
    if type(value) in _LEAVES or next(members(value, kind), None) is None:
        return value
    reduced = taken_apart(value)
    assert reduced is not None
    function = _once(function)
    return Reduced(*(template(function, field, kind) for field in reduced))


def filled(template: Any, function: Callable[[Any], Any] | None = None, kind: Kind = ()) -> Any:
    """Copy a template with `function` applied to values of a type, and put its objects together again."""
    if function is not None and _isinstance(template, kind):
        return function(template)
    items = _items(template)
    if items is None:
        return template
    made = [filled(item, function, kind) for _, item in items]
    return put_together(*made) if type(template) is Reduced else _like(template, made)


def leaves_of(value: Any, name: str, seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested values, each with a name such as `batch.image`, and the classes of objects.

    They come in the order of `members`, and as there what an object holds twice comes once.
    """
    items = _items(value)
    if _isinstance(value, Tensor):
        if seen is None or id(value) not in seen:
            if seen is not None:
                seen.add(id(value))
            yield name, value
    elif items is not None:
        for key, item in items:
            yield from leaves_of(item, f"{name}.{key}", seen)
    elif type(value) in _LEAVES or next(members(value, Tensor), None) is None:
        yield name, value
    else:
        seen = set() if seen is None else seen
        reduced = taken_apart(value)
        if id(value) in seen or reduced is None:
            return
        seen.add(id(value))
        yield f"{name}.class", type(value)
        yield from leaves_of(reduced.arguments, f"{name}.made of", seen)
        yield from leaves_of(reduced.state, name, seen)
        yield from leaves_of(reduced.items, name, seen)
        yield from leaves_of(reduced.pairs, name, seen)


def _items(value: Any) -> Iterable[tuple[Any, Any]] | None:
    """List the keys and items of a plain container; None for anything else."""
    kind = type(value)
    if kind is dict:
        items: Iterable[tuple[Any, Any]] = value.items()
        return items
    if kind is tuple or kind is list:
        return enumerate(value)
    if _isinstance(value, tuple) and hasattr(value, "_fields"):
        return zip(value._fields, value, strict=True)
    return None


def _like(container: Any, items: list[Any]) -> Any:
    """Make a plain container of the same type and keys with other items."""
    kind = type(container)
    if kind is dict:
        return dict(zip(container, items, strict=True))
    if kind is list:
        return items
    return tuple(items) if kind is tuple else kind(*items)


def _once(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Cache `function` by identity, since an object may hold a value under several names."""
    results: dict[int, Any] = {}

    def call(value: Any) -> Any:
        if id(value) not in results:
            results[id(value)] = function(value)
        return results[id(value)]

    return call
