"""What is inside of values: tensors in any nesting of containers and objects, and the same nesting with others.

Python's own protocol for copies (`__reduce_ex__`) takes an object apart and puts it together again, so that a class of
the user's, a dict or list of an own kind, a dataclass or a slotted object needs no case of its own:

    object ──taken_apart──► how it is made, arguments, state, items, pairs ──put_together──► object
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

META = torch.device("meta")
# Nothing in these can be a tensor.
ATOMS = (type(None), bool, int, float, str, torch.dtype)
_ATOMS = {*ATOMS, bytes, complex, torch.device, torch.Size, torch.layout, torch.memory_format, range, slice, type(...)}
# Never looked into.
WHOLE = (
    *(type, FunctionType, BuiltinFunctionType, MethodType, ModuleType),
    *(nn.Module, fx.Node, fx.Proxy, np.ndarray, np.generic, torch.Generator, torch.jit.ScriptFunction),
)  # fmt: skip
Kind = type | tuple[type, ...]
# While a model is traced, another one lets a proxy pass for a tensor.
_isinstance = isinstance


def module_at(root: nn.Module, path: str) -> nn.Module:
    """What `root.get_submodule(path)` gives, without looking for attributes, which is slow while a model is traced.

    Raises KeyError when there is no such module.
    """
    module = root
    for name in path.split(".") if path else ():
        module = module._modules[name]  # type: ignore[assignment]
    return module


class Parts(NamedTuple):
    """An object taken apart: `make(*arguments)`, then its `state`, the `items` of a list and the `pairs` of a dict."""

    make: Any
    arguments: tuple[Any, ...]
    state: Any
    items: list[Any]
    pairs: dict[Any, Any]


def taken_apart(value: Any) -> Parts | None:
    """The parts of an object, or None if it has none or cannot be copied."""
    if _isinstance(value, WHOLE):
        return None
    try:
        reduced = value.__reduce_ex__(4)
    except Exception:
        return None
    if not _isinstance(reduced, tuple):
        return None
    make, arguments, *rest = reduced
    state, items, pairs = (*rest, None, None, None)[:3]
    return Parts(make, arguments, state, list(items or ()), dict(pairs or ()))


def put_together(make: Any, arguments: tuple[Any, ...], state: Any, items: list[Any], pairs: dict[Any, Any]) -> Any:
    """The object that has these parts."""
    made = make(*arguments)
    fill(made, state, items, pairs)
    return made


def fill(made: Any, state: Any, items: list[Any], pairs: dict[Any, Any]) -> None:
    """Give an object that has just been made what it held."""
    if state is not None:
        if hasattr(made, "__setstate__"):
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


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a tensor, in any nesting of containers, and in the attributes of objects."""
    return [value] if type(value) is Tensor else list(members(value, Tensor))


def members(value: Any, kind: Kind, seen: set[int] | None = None) -> Iterator[Any]:
    """What is of a kind in any nesting of containers and in objects; what an object holds twice, once."""
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
    elif type(value) not in _ATOMS:
        seen = set() if seen is None else seen
        if id(value) not in seen and (parts := taken_apart(value)):
            seen.add(id(value))
            yield from members(tuple(parts), kind, seen)


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """The same nesting of values with `function` applied to its tensors; objects that hold tensors are copied."""
    return map_members(function, value, Tensor)


def map_members(function: Callable[[Any], Any], value: Any, kind: Kind) -> Any:
    """The same nesting with `function` applied to what is of a kind; objects without any stay the very same."""
    return filled(template(function, value, kind))


def template(function: Callable[[Any], Any], value: Any, kind: Kind) -> Any:
    """The same nesting with `function` applied to what is of a kind, objects that hold any taken apart."""
    if _isinstance(value, kind):
        return function(value)
    items = _items(value)
    if items is not None:
        return _like(value, [template(function, item, kind) for _, item in items])
    if type(value) in _ATOMS or next(members(value, kind), None) is None:
        return value
    parts = taken_apart(value)
    assert parts is not None
    function = _once(function)
    return Parts(*(template(function, part, kind) for part in parts))


def filled(template: Any, function: Callable[[Any], Any] | None = None, kind: Kind = ()) -> Any:
    """A template with `function` applied to what is of a kind, and its objects put together."""
    if function is not None and _isinstance(template, kind):
        return function(template)
    items = _items(template)
    if items is None:
        return template
    made = [filled(item, function, kind) for _, item in items]
    return put_together(*made) if type(template) is Parts else _like(template, made)


def leaves_of(value: Any, name: str, seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """What is no container in a nesting, each by a name such as `batch.image`; of objects also the class.

    In the order of `members`, and like there what an object holds twice comes once.
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
    elif type(value) in _ATOMS or next(members(value, Tensor), None) is None:
        yield name, value
    else:
        seen = set() if seen is None else seen
        parts = taken_apart(value)
        if id(value) in seen or parts is None:
            return
        seen.add(id(value))
        yield f"{name}.class", type(value)
        yield from leaves_of(parts.arguments, f"{name}.made of", seen)
        yield from leaves_of(parts.state, name, seen)
        yield from leaves_of(parts.items, name, seen)
        yield from leaves_of(parts.pairs, name, seen)


def _items(value: Any) -> Iterable[tuple[Any, Any]] | None:
    """What a plain container holds, with keys; None of anything else."""
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
    """A plain container of the same kind and the same keys."""
    kind = type(container)
    if kind is dict:
        return dict(zip(container, items, strict=True))
    if kind is list:
        return items
    return tuple(items) if kind is tuple else kind(*items)


def _once(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same result for the same thing, which an object may hold under several names."""
    results: dict[int, Any] = {}

    def call(value: Any) -> Any:
        if id(value) not in results:
            results[id(value)] = function(value)
        return results[id(value)]

    return call
