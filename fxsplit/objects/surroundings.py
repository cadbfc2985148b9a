"""Remembers what lies around a model and its code can change: globals, class attributes, closures, default arguments.

    forwards ──► names in their code ──► functions, classes and objects of these names ──► names in their code ...
                        │
                        └──► places, and the containers that lie in them ──► Moment ──► what has changed since

Only what the code names is looked at: a module of Python has hundreds of names, and a forward uses few.
"""

from __future__ import annotations

import gc
from argparse import Namespace
from collections import ChainMap, UserDict, UserList
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache, partial, partialmethod
from operator import is_
from types import CellType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from fxsplit.objects.code import is_users, names_in
from fxsplit.objects.contents import BUFFERS, CONTAINERS, content_of, held_by, holds, put_back, same_item
from fxsplit.objects.effects import MISSING
from fxsplit.objects.structure import INDIVISIBLE, members

# Containers in containers are compared this deep.
_DEPTH = 3
_LRU: Any = type(lru_cache(print))
# Code is followed through this many calls.
_CALLS = 6
# Methods that make objects. Those of modules that forwards do not call: a name such as `to` is a method of a tensor.
_MAKING = frozenset(("__init__", "__new__", "__post_init__", "__init_subclass__", "__setstate__", "__reduce__"))
_NOT_CALLED = frozenset((*dir(Tensor), *dir(nn.Module), *_MAKING)) - {"forward", "__call__"}
# Classes of Python's library whose objects hold what others put into them.
_OPEN = (SimpleNamespace, Namespace, ChainMap, UserDict, UserList)
_CLASS_BOOKKEEPING = frozenset(("__dict__", "__weakref__", "__annotations__", "__slotnames__", "__abstractmethods__"))


class _Globals:
    """The globals of a module of Python, as far as `names` go."""

    def __init__(self, space: dict[str, Any]) -> None:
        self._space = space
        self.names: dict[str, None] = {}

    def label(self, name: str) -> str:
        return f"the global {name!r}"

    def read(self) -> dict[str, Any]:
        space = self._space
        return {name: space[name] for name in self.names if name in space}

    def write(self, name: str, value: Any) -> None:
        if value is MISSING:
            self._space.pop(name, None)
        else:
            self._space[name] = value


class _ClassAttributes:
    """The attributes of a class itself."""

    def __init__(self, kind: type) -> None:
        self._kind = kind
        self.is_of_modules = issubclass(kind, nn.Module)

    def label(self, name: str) -> str:
        return f"{name!r} of the class {self._kind.__name__}"

    def read(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self._kind).items() if name not in _CLASS_BOOKKEEPING}

    def write(self, name: str, value: Any) -> None:
        if value is not MISSING:
            setattr(self._kind, name, value)
        elif name in vars(self._kind):
            delattr(self._kind, name)


class _Variables:
    """What a function uses besides globals: variables of the functions around it, defaults, its own attributes."""

    def __init__(self, function: FunctionType) -> None:
        self._function = function
        self._cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))

    def label(self, name: str) -> str:
        return f"the variable {name!r} of {self._function.__name__}"

    def read(self) -> dict[str, Any]:
        function = self._function
        found = {name: cell.cell_contents for name, cell in self._cells.items() if cell != _EMPTY}
        for kind in ("__defaults__", "__kwdefaults__", "__dict__"):
            if content := getattr(function, kind):
                found[kind] = content
        return found

    def write(self, name: str, value: Any) -> None:
        if name not in self._cells:
            setattr(self._function, name, None if value is MISSING else value)
        elif value is not MISSING:
            self._cells[name].cell_contents = value
        elif self._cells[name] != _EMPTY:
            del self._cells[name].cell_contents


_EMPTY = CellType()
Place = _Globals | _ClassAttributes | _Variables


class Change(NamedTuple):
    """Says what has changed: a name, and the words that describe it, such as "the global 'CACHE'"."""

    name: str
    words: str


class Surroundings:
    """Finds what the code of a model may use besides the model: the places where it lies, and functions that cache.

    Only the user's code is followed, from the forwards of `modules` on, to what it names, but not into `functions`.
    """

    def __init__(self, modules: Iterable[nn.Module], functions: Collection[Any] = ()) -> None:
        found = _Search(list(modules), functions)
        self._places = found.places
        self._names = found.names
        self._misses = {cached: cached.cache_info().misses for cached in found.caches}
        self._bypassed: set[Any] = set()

    def now(self) -> Moment:
        """Remember what is there at this moment."""
        return Moment([(place, place.read()) for place in self._places])

    def values(self) -> dict[tuple[Place, str], Any]:
        """Return what is there now, by place and name, except in the classes of modules."""
        places = (each for each in self._places if not (isinstance(each, _ClassAttributes) and each.is_of_modules))
        return {(place, name): value for place in places for name, value in place.read().items()}

    def functions_naming(self, name: str) -> list[FunctionType]:
        """List the functions in whose code a name occurs, without the forwards of modules."""
        return [each for each, names in self._names.items() if name in names and each.__name__ != "forward"]

    @contextmanager
    def without_caches(self, uncached: Callable[[Any], Any]) -> Iterator[None]:
        """Inside, what `uncached` makes of them stands in the place of the functions whose caches were emptied."""
        cached = [
            (place, name, value)
            for place in (self._places if self._bypassed else ())
            for name, value in place.read().items()
            if type(value) is _LRU and value in self._bypassed
        ]
        for place, name, value in cached:
            place.write(name, uncached(value))
        try:
            yield
        finally:
            for place, name, value in cached:
                place.write(name, value)

    def emptied_caches(self) -> bool:
        """Empty the caches into which tensors or traced values came since this was last asked.

        What a cache held before cannot be put back, and a cache may be emptied at any time. Returns whether there is a
        cache among them that was not emptied before.
        """
        filled = [cached for cached, misses in self._misses.items() if cached.cache_info().misses != misses]
        holding = {cached for cached in filled if _holds_tensors(cached)}
        for cached in holding:
            cached.cache_clear()
        self._misses |= {cached: cached.cache_info().misses for cached in filled}
        is_new = not holding <= self._bypassed
        self._bypassed |= holding
        return is_new


class Moment:
    """Remembers what was in places, and in the containers that lie there, at one moment."""

    def __init__(self, read: Sequence[tuple[Place, dict[str, Any]]]) -> None:
        self._read = read
        self._held: list[tuple[Place, str, Any, Any]] = []
        seen: set[int] = set()
        for place, values in read:
            for name, value in values.items():
                if may_change(type(value)):
                    self._held += [
                        (place, name, held, content) for held, content in held_by(value, seen, _DEPTH, may_change)
                    ]

    def changed(self) -> list[Change]:
        """List what has changed since."""
        found = {(place, name): None for place, before in self._read for name in _differing(before, place.read())}
        found |= {(place, name): None for place, name, held, before in self._held if not holds(held, before)}
        return [Change(name, place.label(name)) for place, name in found]

    def since(self) -> tuple[Part, Part] | None:
        """Remember all that has changed since, as it was and as it is now; None if nothing has."""
        earlier, later = Part([], []), Part([], [])
        for place, before in self._read:
            now = place.read()
            for name in _differing(before, now):
                earlier.values.append((place, name, before.get(name, MISSING)))
                later.values.append((place, name, now.get(name, MISSING)))
        for _, _, held, content in self._held:
            if not holds(held, content):
                earlier.contents.append((held, content))
                later.contents.append((held, content_of(held)))
        return (earlier, later) if any(later) else None

    def restore(self) -> None:
        """Put everything back as it was."""
        if (parts := self.since()) is not None:
            parts[0].restore()


class Part(NamedTuple):
    """Remembers some places' values, by name, and some containers' contents, at one moment."""

    values: list[tuple[Place, str, Any]]
    contents: list[tuple[Any, Any]]

    def restore(self) -> None:
        """Put them back as they were."""
        for place, name, value in self.values:
            place.write(name, value)
        for held, content in self.contents:
            put_back(held, content)


def _differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List the names with other values."""
    if before.keys() == now.keys() and all(map(is_, before.values(), now.values())):
        return []
    return [
        name
        for name in dict.fromkeys((*before, *now))
        if not same_item(before.get(name, MISSING), now.get(name, MISSING))
    ]


def may_change(kind: type) -> bool:
    """Whether values of a type are containers or objects that the user's code may change."""
    if issubclass(kind, (*CONTAINERS, *BUFFERS, *_OPEN)):
        return True
    return is_users(kind.__module__) and not issubclass(kind, (Tensor, *INDIVISIBLE))


def _holds_tensors(cached: Any) -> bool:
    """Whether the cache of a function holds tensors or traced values, among keys or results."""
    waiting, seen = [each for each in gc.get_referents(cached) if each is not cached.__wrapped__], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        # A bounded cache is a ring of links, in C.
        if type(value).__qualname__ == "_lru_list_elem" or type(value) is dict:
            waiting += gc.get_referents(value)
        elif next(members(value, (Tensor, fx.Proxy)), None) is not None:
            return True
    return False


class _Search:
    """Follows code from the forwards of a model to all that it names.

    A method counts as called where any code that is reached names it, on whichever object.
    """

    def __init__(self, modules: Sequence[nn.Module], functions: Collection[Any]) -> None:
        self.places: list[Place] = []
        self.names: dict[FunctionType, set[str]] = {}
        self.caches: dict[Any, None] = {}
        self._globals: dict[int, _Globals] = {}
        self._classes: set[type] = set()
        self._methods: dict[str, list[Any]] = {}
        self._mentioned = {"forward"}
        self._waiting: list[FunctionType] = []
        self._left_out = set(functions)
        for kind in {type(module) for module in modules}:
            self._enter_class(kind)
        for module in modules:
            if is_users(type(module).__module__):
                for value in vars(module).values():
                    self._reach(value)
        for _ in range(_CALLS):
            functions, self._waiting = self._waiting, []
            for function in functions:
                self._follow(function)

    def _enter_class(self, kind: type) -> None:
        for base in kind.__mro__:
            if base in self._classes or not is_users(base.__module__):
                continue
            self._classes.add(base)
            self.places.append(_ClassAttributes(base))
            skipped = _NOT_CALLED if issubclass(base, nn.Module) else _MAKING
            for name, value in vars(base).items():
                if name in skipped:
                    continue
                self._methods.setdefault(name, []).append(value)
                # Methods with such names are called by operators and statements.
                if name in self._mentioned or name.startswith("__"):
                    self._reach(value)

    def _reach(self, value: Any) -> None:
        kind = type(value)
        if kind is FunctionType:
            if value not in self.names and value not in self._left_out:
                self.names[value] = set()
                self._waiting.append(value)
        elif kind is _LRU:
            self.caches[value] = None
            self._reach(value.__wrapped__)
        elif kind is MethodType:
            self._reach(value.__func__)
        elif kind is property:
            self._reach(value.fget)
        elif kind in (staticmethod, classmethod):
            self._reach(value.__func__)
        elif kind in (partial, partialmethod, cached_property):
            self._reach(value.func)
        elif isinstance(value, type):
            self._enter_class(value)
        elif is_users(kind.__module__):
            self._enter_class(kind)

    def _follow(self, function: FunctionType) -> None:
        # A decorator, such as torch's no_grad, leads to what it is around.
        self._reach(getattr(function, "__wrapped__", None))
        space = function.__globals__
        if not is_users(space.get("__name__", "")):
            return
        names = self.names[function] = set(names_in(function.__code__, strings=False))
        names.update(function.__code__.co_freevars)
        for name in names - self._mentioned:
            self._mentioned.add(name)
            for method in self._methods.get(name, ()):
                self._reach(method)
        variables = _Variables(function)
        self.places.append(variables)
        for value in variables.read().values():
            self._reach(value)
        self._look_in(space, names, set())

    def _look_in(self, space: dict[str, Any], names: set[str], seen: set[int]) -> None:
        """Enter the globals that are named, also those of the user's modules that are named."""
        seen.add(id(space))
        if id(space) not in self._globals:
            self._globals[id(space)] = _Globals(space)
            self.places.append(self._globals[id(space)])
        self._globals[id(space)].names |= dict.fromkeys(names)
        for name in names & space.keys():
            value = space[name]
            if type(value) is not ModuleType:
                self._reach(value)
            elif is_users(value.__name__) and id(vars(value)) not in seen:
                self._look_in(vars(value), names, seen)
