"""Detects what a forward changes besides tensors: containers, objects and random generators.

A recording shows only ops on tensors. A list that forward appends to, an attribute that it sets, or a generator that it
draws from would go unnoticed, so they are compared before and after.
"""

from __future__ import annotations

import copy
import random
import sys
import threading
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxsplit.errors import UntraceableError
from fxsplit.objects.code import is_users
from fxsplit.objects.same import same_value
from fxsplit.objects.structure import ATOMS, INDIVISIBLE, members, put_attributes, slots_of, taken_apart

# The state of a generator lies in C, not in attributes: functions that read and set it.
GENERATORS: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    random.Random: (lambda each: each.getstate(), lambda each, state: each.setstate(state)),
    np.random.RandomState: (lambda each: each.get_state(), lambda each, state: each.set_state(state)),
    np.random.Generator: (
        lambda each: each.bit_generator.state,
        lambda each, state: setattr(each.bit_generator, "state", state),
    ),
    torch.Generator: (lambda each: each.get_state(), lambda each, state: each.set_state(state)),
}
# The global generators, by the names under which people know them.
GLOBAL_GENERATORS: dict[str, Any] = {
    "random": vars(random)["random"].__self__,
    "numpy.random": vars(np.random)["rand"].__self__,
    "torch": torch.default_generator,
}
CONTAINERS = (OrderedDict, dict, list, tuple, set, deque)
# Numbers in a piece of memory.
BUFFERS = (np.ndarray, bytearray, array)
# Attributes of every module, and those that the tracer itself watches.
_IGNORED = frozenset((*vars(nn.Module()), "_flat_weights"))
# Objects in containers in objects are compared this deep.
_DEPTH = 6


class Contents:
    """Remembers the current contents of the containers, objects and generators that a model's modules hold."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._held: list[tuple[str, str, Any, Any]] = []
        seen: set[int] = set()
        for path, module in model.named_modules():
            for name, value in vars(module).items():
                if name not in _IGNORED:
                    self._look(path, name, value, seen)

    def changed(self, whole: Container[Any] = ()) -> dict[str, str]:
        """Map the modules that hold something which has changed since to the name of the first such attribute.

        Iterators, which cannot be set back, may advance in the modules in `whole`.
        """
        found: dict[str, str] = {}
        for path, name, held, before in self._held:
            if isinstance(held, Iterator) and path in whole:
                continue
            if path not in found and not holds(held, before):
                found[path] = name
        return found

    def changes(self) -> set[tuple[str, str]]:
        """List each attribute that holds something which has changed since, with the path of its module."""
        return {(path, name) for path, name, held, before in self._held if not holds(held, before)}

    def holds_values(self) -> bool:
        """Whether something that has changed since holds a value of a forward that is being traced."""
        changed = (held for _, _, held, before in self._held if not holds(held, before))
        return any(next(members(content_of(held), fx.Proxy), None) is not None for held in changed)

    def restore(self) -> None:
        """Give everything its former contents."""
        for _, _, held, before in self._held:
            if not holds(held, before):
                put_back(held, before)

    def again(self) -> Contents:
        """Remember the current contents of the same model."""
        return Contents(self._model)

    def _look(self, path: str, name: str, value: Any, seen: set[int]) -> None:
        self._held += [(path, name, held, content) for held, content in held_by(value, seen, _DEPTH)]


class Remembered:
    """Remembers the current contents of the containers, objects and generators nested in values given by name."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        seen: set[int] = set()
        self._held = [(name, *pair) for name, value in given.items() for pair in held_by(value, seen, _DEPTH)]

    def changed(self) -> list[str]:
        """List the names of those that hold something else now, or in which a number or a generator has moved."""
        return list(dict.fromkeys(name for name, held, before in self._held if not holds(held, before)))


@contextmanager
def unchanged(given: Any) -> Iterator[None]:
    """Raise UntraceableError at the end if containers or objects nested in `given` were changed inside."""
    held = Remembered({"given": given})
    yield
    if held.changed():
        raise UntraceableError("it changes what it is given, a list or an object, and tracing would lose that")


def held_by(
    value: Any, seen: set[int], depth: int, looks_into: Callable[[type], bool] = lambda _: True
) -> Iterator[tuple[Any, Any]]:
    """Yield what can change in nested values, each with its current contents; only types that one `looks_into`."""
    if type(value) in ATOMS or id(value) in seen or not depth or not looks_into(type(value)):
        return
    seen.add(id(value))
    content = content_of(value)
    if content is None:
        return
    yield value, content
    if type(value) not in GENERATORS and not isinstance(value, (Iterator, *BUFFERS)):
        for item in content.values() if isinstance(content, dict) else content:
            yield from held_by(item, seen, depth - 1, looks_into)


def generators_around(model: nn.Module) -> dict[str, Any]:
    """Find the generators that forwards can use without the model holding them: in module globals and closures."""
    found: dict[str, Any] = {}
    for kind in {type(module) for module in model.modules()}:
        module = sys.modules.get(kind.__module__)
        if module is None or kind.__module__.partition(".")[0] == "torch":
            continue
        found |= {f"{kind.__module__}.{name}": value for name, value in _generators_in(module)}
        forward = getattr(kind, "forward", None)
        names = forward.__code__.co_freevars if isinstance(forward, FunctionType) else ()
        for name, cell in zip(names, getattr(forward, "__closure__", None) or (), strict=True):
            with suppress(ValueError):  # an empty cell
                if type(cell.cell_contents) in GENERATORS:
                    found[name] = cell.cell_contents
    return found


# By module: how many names it had when it was searched, and what was found.
_found: WeakKeyDictionary[ModuleType, tuple[int, list[tuple[str, Any]]]] = WeakKeyDictionary()


def _generators_in(module: ModuleType) -> list[tuple[str, Any]]:
    size, found = _found.get(module, (-1, []))
    if size != len(vars(module)):
        found = [(key, value) for key, value in list(vars(module).items()) if type(value) in GENERATORS]
        _found[module] = len(vars(module)), found
    return found


def content_of(value: Any) -> Any:
    """Return the current contents of a value, one level deep; None if it has none or is watched elsewhere."""
    kind = type(value)
    if kind in GENERATORS:
        return GENERATORS[kind][0](value)
    if (base := _base_of(kind)) is not None:
        # Not by the methods of a subclass, which may do more.
        return dict(base.items(value)) if issubclass(base, dict) else list(base.__iter__(value))
    if isinstance(value, BUFFERS):
        return copy.copy(value)
    if isinstance(value, Iterator):
        # One that cannot be copied is shared with the model, and not compared.
        return _position(value)
    if isinstance(value, (Tensor, *INDIVISIBLE)):
        return None
    # Objects of libraries keep caches of their own in slots, and where they can be called.
    users = is_users(kind.__module__)
    attributes = dict(vars(value)) if hasattr(value, "__dict__") and (users or not callable(value)) else None
    slots = slots_of(value) if users else {}
    return {**slots, **(attributes or {})} if slots or attributes is not None else None


def _base_of(kind: type) -> Any:
    """Return the container of Python that a class is, or is derived from; None if there is none."""
    return next((base for base in CONTAINERS if issubclass(kind, base)), None)


def _position(iterator: Any) -> Any:
    """Take an iterator apart, and those in it, into what does not move on with it; None if it cannot be."""

    def still(value: Any) -> Any:
        if isinstance(value, Iterator):
            return _position(value)
        return type(value)(map(still, value)) if type(value) in (list, tuple) else value

    reduced = taken_apart(iterator)
    return None if reduced is None else tuple(map(still, reduced))


def holds(held: Any, before: Any) -> bool:
    """Whether the contents are the same as before: numbers and generators by value, all else by identity."""
    now = content_of(held)
    if type(held) in GENERATORS:
        return _same_state(held, now, before)
    return same_value(now, before) if isinstance(held, (Iterator, *BUFFERS)) else _same(now, before)


def _same_state(generator: Any, one: Any, other: Any) -> bool:
    # Python's is a tuple of 625 numbers, which it compares by itself much faster.
    return bool(one == other) if type(generator) is random.Random else same_value(one, other)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return all(same_item(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return all(map(same_item, one, other))
    return False


def same_item(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return all(map(same_item, one, other))
    return type(one) in (*ATOMS, np.ndarray) and same_value(one, other)


def put_back(held: Any, before: Any) -> None:
    """Give a value the contents that it had before, except for iterators."""
    kind = type(held)
    base = _base_of(kind)
    if kind in GENERATORS:
        GENERATORS[kind][1](held, before)
    elif base in (dict, OrderedDict):
        base.clear(held)
        for key, item in before.items():
            base.__setitem__(held, key, item)
    elif base is list:
        list.__setitem__(held, slice(None), before)
    elif base in (set, deque):
        base.clear(held)
        for item in before:
            base.add(held, item) if base is set else base.append(held, item)
    elif isinstance(held, np.ndarray):
        held[...] = before
    elif isinstance(held, BUFFERS):
        held[:] = before
    elif base is not tuple and not isinstance(held, Iterator):
        put_attributes(held, before)


@contextmanager
def drawing_nothing(generators: Mapping[str, Any]) -> Iterator[None]:
    """Restore generators, given by name, at the end, and raise UntraceableError if numbers were drawn from one."""
    before = {name: state_of(generator) for name, generator in generators.items()}
    try:
        yield
    finally:
        drawn = [name for name, generator in generators.items() if restored(generator, before[name])]
    if drawn:
        raise UntraceableError(
            f"it draws from the generator {drawn[0]!r} where no op shows it, and its numbers would be the same in "
            "every call"
        )


def unshared_generators() -> Mapping[str, Any]:
    """Return the global generators, or none while another thread might draw from them."""
    return GLOBAL_GENERATORS if threading.active_count() == 1 else {}


def state_of(generator: Any) -> Any:
    """Read the state of a generator of one of the types in GENERATORS."""
    return GENERATORS[type(generator)][0](generator)


def restored(generator: Any, state: Any) -> bool:
    """Set a generator back to `state`, and return whether it had moved."""
    moved = not _same_state(generator, state_of(generator), state)
    if moved:
        GENERATORS[type(generator)][1](generator, state)
    return moved
