"""Detects what a forward changes besides tensors: containers, objects and random generators.

A recording shows only ops on tensors. A list that forward appends to, an attribute that it sets, or a generator that it
draws from would go unnoticed, so they are compared before and after.
"""

from __future__ import annotations

import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxsplit.errors import UntraceableError
from fxsplit.objects.same import same_value
from fxsplit.objects.structure import ATOMS, INDIVISIBLE, members, taken_apart

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
            if path not in found and not _holds(held, before):
                found[path] = name
        return found

    def changes(self) -> set[tuple[str, str]]:
        """List each attribute that holds something which has changed since, with the path of its module."""
        return {(path, name) for path, name, held, before in self._held if not _holds(held, before)}

    def holds_values(self) -> bool:
        """Whether something that has changed since holds a value of a forward that is being traced."""
        changed = (held for _, _, held, before in self._held if not _holds(held, before))
        return any(next(members(_content(held), fx.Proxy), None) is not None for held in changed)

    def restore(self) -> None:
        """Give everything its former contents."""
        for _, _, held, before in self._held:
            if not _holds(held, before):
                _restore(held, before)

    def again(self) -> Contents:
        """Remember the current contents of the same model."""
        return Contents(self._model)

    def _look(self, path: str, name: str, value: Any, seen: set[int]) -> None:
        self._held += [(path, name, held, content) for held, content in _held_by(value, seen, _DEPTH)]


class Remembered:
    """Remembers the current contents of the containers, objects and generators nested in values given by name."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        seen: set[int] = set()
        self._held = [(name, *pair) for name, value in given.items() for pair in _held_by(value, seen, _DEPTH)]

    def changed(self) -> list[str]:
        """List the names of those that hold something else now, or in which a number or a generator has moved."""
        return list(dict.fromkeys(name for name, held, before in self._held if not _holds(held, before)))


@contextmanager
def unchanged(given: Any) -> Iterator[None]:
    """Raise UntraceableError at the end if containers or objects nested in `given` were changed inside."""
    held = Remembered({"given": given})
    yield
    if held.changed():
        raise UntraceableError("it changes what it is given, a list or an object, and tracing would lose that")


def _held_by(value: Any, seen: set[int], depth: int) -> Iterator[tuple[Any, Any]]:
    """Yield what can change in nested values, each with its current contents."""
    if type(value) in ATOMS or id(value) in seen or not depth:
        return
    seen.add(id(value))
    content = _content(value)
    if content is None:
        return
    yield value, content
    if type(value) not in GENERATORS and not isinstance(value, Iterator):
        for item in content.values() if isinstance(content, dict) else content:
            yield from _held_by(item, seen, depth - 1)


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


def _content(value: Any) -> Any:
    """Return the current contents of a value, one level deep; None if it has none or is watched elsewhere."""
    kind = type(value)
    if kind in GENERATORS:
        return GENERATORS[kind][0](value)
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, list | tuple | set | deque):
        return list(value)
    if isinstance(value, Iterator):
        # Its position. One that cannot be copied is shared with the model, and not compared.
        return taken_apart(value)
    is_looked_into = (
        hasattr(value, "__dict__") and not callable(value) and not isinstance(value, (Tensor, *INDIVISIBLE))
    )
    return dict(vars(value)) if is_looked_into else None


def _holds(held: Any, before: Any) -> bool:
    """Whether the contents are the same as before: numbers and generators by value, all else by identity."""
    now = _content(held)
    by_value = type(held) in GENERATORS or isinstance(held, Iterator)
    return same_value(now, before) if by_value else _same(now, before)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return all(_same_item(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return all(map(_same_item, one, other))
    return False


def _same_item(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return all(map(_same_item, one, other))
    return type(one) in (*ATOMS, np.ndarray) and same_value(one, other)


def _restore(held: Any, before: Any) -> None:
    kind = type(held)
    if kind in GENERATORS:
        GENERATORS[kind][1](held, before)
    elif isinstance(held, dict):
        held.clear()
        held.update(before)
    elif isinstance(held, list):
        held[:] = before
    elif isinstance(held, deque):
        held.clear()
        held.extend(before)
    elif isinstance(held, set):
        held.clear()
        held.update(before)
    elif not isinstance(held, tuple | Iterator):
        vars(held).clear()
        vars(held).update(before)


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
    moved = not same_value(state_of(generator), state)
    if moved:
        GENERATORS[type(generator)][1](generator, state)
    return moved
