"""Generated functions as objects: bound to the model that they run over, compiled, pickled.

graph ──► source ──► Code      code(model, values):  the first call finds where the model keeps what is used;
                                                     later calls run, as long as the same modules are on the way
"""

from __future__ import annotations

import importlib
import itertools
import linecache
import sys
import weakref
from collections.abc import Callable, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._ops import OpOverload, OpOverloadPacket

from fxsplit.execute.source import BIND, STAGE, source_of

# A backend of torch.compile: its name, or a function.
Backend = str | Callable[..., Any]
# A dict in which a module keeps attributes.
Place = dict[str, Any]
Bind = Callable[[Callable[[str], nn.Module], Callable[[nn.Module, str], Place]], Callable[[list[Any]], Any]]

_serial = itertools.count()


def code_of(graph: fx.Graph, label: str, backend: Backend | None = None) -> Code:
    """Make the function of a stage's graph, compiled if there is a `backend`; tracebacks call it `label`."""
    return Code(*source_of(graph, bound=backend is None), label, backend)


class Code:
    """A generated function `(model, values) -> result` that can be pickled and copied.

    It empties the list of values: arguments would be kept alive by the callers' frames until it returns, but a value is
    freed as soon as it was read last.

    Args:
        source: of the function, as `source_of` writes it: bound, unless there is a `backend`.
        objects: what it refers to, by name.
        label: what tracebacks call it.
        backend: of torch.compile, which compiles it when it first runs; None runs it as it is.
    """

    def __init__(self, source: str, objects: dict[str, Any], label: str, backend: Backend | None = None) -> None:
        self._source, self._objects, self._label, self._backend = source, objects, label, backend
        file = f"<fxsplit {label} {next(_serial)}>"
        scope = dict(objects)
        exec(compile(source, file, "exec"), scope)
        # Tracebacks and debuggers find the generated lines here, as long as the function exists.
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        weakref.finalize(self, linecache.cache.pop, file, None).atexit = False
        self._compiled: Callable[[nn.Module, list[Any]], Any] | None = None
        self._bound: _Bound | None = None
        if backend is None:
            self._bind: Bind = scope[BIND]
        else:
            self.uncompiled: Callable[[nn.Module, list[Any]], Any] = scope[STAGE]
            self._compiled = torch.compile(self.uncompiled, backend=backend)

    def __call__(self, model: nn.Module, values: list[Any]) -> Any:
        if self._compiled is not None:
            return self._compiled(model, values)
        bound = self._bound
        if bound is None or not bound.holds_for(model):
            bound = self._bound = _Bound.to(model, self._bind)
        return bound.function(values)

    def forget(self) -> None:
        """Find anew, in the next call, where the model keeps what is used."""
        self._bound = None

    def __reduce__(self) -> tuple[Any, ...]:
        objects = {name: _Reference.of(value) or value for name, value in self._objects.items()}
        return _restore, (self._source, objects, self._label, self._backend)


def compiled_chain(codes: Sequence[Code], backend: Backend) -> Callable[[nn.Module, list[Any], list[Any]], Any]:
    """Compile functions, of which each takes the values that the one before returns, as one, for fixed shapes.

    The result is called with the model, the values for the first, and a list of what each is given as one more value.
    `codes` have a backend.
    """
    calls = [f"    values.append(further[{index}]); values = c{index}(model, values)" for index in range(len(codes))]
    source = "\n".join(["def chain(model, values, further):", *calls, "    return values\n"])
    scope: dict[str, Any] = {f"c{index}": code.uncompiled for index, code in enumerate(codes)}
    # Of its own source, since torch.compile limits how often one is compiled.
    exec(compile(source, f"<fxsplit chain {next(_serial)}>", "exec"), scope)
    return torch.compile(scope["chain"], backend=backend, dynamic=False)


class _Bound(NamedTuple):
    """A function `(values) -> result` of one model. On the way to what it uses, `holders[i][names[i]]` is `modules[i]`.

    What lies at the end of the way is taken from its place in every call, so only the way is remembered.
    """

    function: Callable[[list[Any]], Any]
    model: nn.Module
    holders: tuple[Place, ...]
    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]

    @classmethod
    def to(cls, model: nn.Module, bind: Bind) -> _Bound:
        """Bind to what the model has now. Raises KeyError when a module is not there."""
        way: dict[tuple[int, str], tuple[Place, str, nn.Module]] = {}

        def find(path: str) -> nn.Module:
            module = model
            for name in path.split(".") if path else ():
                holder: Place = module._modules
                module = holder[name]
                way[id(holder), name] = (holder, name, module)
            return module

        function = bind(find, place_of)
        holders, names, modules = zip(*way.values(), strict=True) if way else ((), (), ())
        return cls(function, model, holders, names, modules)

    def holds_for(self, model: nn.Module) -> bool:
        """Whether this is the model, and the same modules are on the way. It takes a fraction of a microsecond."""
        return model is self.model and all(map(is_, map(dict.get, self.holders, self.names), self.modules))


def place_of(module: nn.Module, name: str) -> Place:
    """Find the dict that `getattr(module, name)` reads; an empty one if that does more than read a dict."""
    kind = type(module)
    if kind.__getattribute__ is nn.Module.__getattribute__ and not hasattr(kind, name):
        if name in vars(module):
            return vars(module)
        if kind.__getattr__ is nn.Module.__getattr__:
            places = (module._parameters, module._buffers, module._modules)
            return next((place for place in places if name in place), {})
    return {}


class _Reference(NamedTuple):
    """Names a function by the module and path where it is found; several of torch's cannot be pickled themselves."""

    module: str
    path: str

    @classmethod
    def of(cls, value: Any) -> _Reference | None:
        """Make the reference of a function, or None if it is not found by its name."""
        if isinstance(value, OpOverload | OpOverloadPacket):
            return cls("torch", f"ops.{value}")
        module, name = getattr(value, "__module__", None) or "", getattr(value, "__name__", None) or ""
        return cls(module, name) if vars(sys.modules.get(module, cls)).get(name) is value else None

    def resolve(self) -> Any:
        """Find the function."""
        return attrgetter(self.path)(importlib.import_module(self.module))


def _restore(source: str, objects: dict[str, Any], label: str, backend: Backend | None) -> Code:
    found = {name: value.resolve() if type(value) is _Reference else value for name, value in objects.items()}
    return Code(source, found, label, backend)
