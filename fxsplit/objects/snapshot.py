"""Remembers what a traced graph depends on besides its inputs: the model's modules, and the attributes they hold.

    model ──► Snapshot, when it is traced        later: snapshot.differences(model) ──► [layer1.0: 'scale' 1.0, now 2.0]

A difference need not change the graph. Only tracing the model again shows whether it does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fxsplit.objects.code import is_users, names_in
from fxsplit.objects.hooks import hooks_of, is_torchs
from fxsplit.objects.same import same_value
from fxsplit.objects.structure import slots_of
from fxsplit.objects.surroundings import Place, Surroundings, may_change

# The attribute in which a model carries what an executor has frozen of it; see fxsplit.execute.freezing.
MARK = "_fxsplit_held"
# That in which it carries where settled weights were before they were moved to the host; see
# fxsplit.execute.settled.offload.
HOSTED = "_fxsplit_hosted"

# Compared by value.
ATOMS = (
    *(type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size),
    *(torch.layout, torch.memory_format, range),
)
CONTAINERS = (list, tuple, dict, set, frozenset, deque)
# Their attributes do not say what they do, or are compared elsewhere.
CLOSED = (nn.Module, Tensor, type, FunctionType, BuiltinFunctionType, MethodType, ModuleType)
# Nesting this deep, where an object counts twice, and containers this long are looked into; beyond, values are compared
# by identity alone.
DEPTH, LENGTH = 6, 1000

BOOKKEEPING = {*vars(nn.Module()), MARK, HOSTED}
CLASS_BOOKKEEPING = {
    *("__module__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__firstlineno__"),
    *("__static_attributes__", "__abstractmethods__", "_abc_impl", "__annotate__", "__annotations_cache__"),
}


class _Missing:
    def __repr__(self) -> str:
        return "not set"


MISSING = _Missing()


class Identity:
    """Remembers one object. A copied Identity takes the first object that it is compared with, the copy of its own."""

    def __init__(self, value: Any = MISSING) -> None:
        self.value = value

    def is_of(self, value: Any) -> bool:
        """Whether `value` is the object."""
        if self.value is MISSING:
            self.value = value
        return self.value is value

    def __reduce__(self) -> tuple[Any, ...]:
        return Identity, ()


class NestedForm:
    """Remembers a container or an object by the forms of what it holds; an object also by its `identity`."""

    def __init__(self, kind: type, items: Mapping[Any, Any], identity: Identity | None = None) -> None:
        self.kind, self.items, self.identity = kind, dict(items), identity


class Address(int):
    """Says where the numbers of a tensor lie in memory."""

    def __repr__(self) -> str:
        return f"at {int(self):#x}"


class ArrayForm:
    """Remembers an array of numpy by its numbers: written in place, it stays the same object."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array.copy()


class TensorForm:
    """Remembers the shape of a tensor in a plain attribute: the graph reads the attribute anew in every call."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape


def form_of(value: Any, depth: int = DEPTH, registered: Container[int] = ()) -> Any:
    """Make the form by which `is_unchanged` recognises a value: atoms themselves, else one of the classes above.

    Modules whose ids are in `registered` are compared elsewhere.
    """
    kind = type(value)
    if kind in ATOMS or kind is Address or (kind is tuple and all(type(item) in ATOMS for item in value)):
        return value
    if isinstance(value, np.ndarray):
        return ArrayForm(value)
    if depth > 0 and isinstance(value, CONTAINERS) and len(value) <= LENGTH:
        items = _items(value).items()
        return NestedForm(kind, {key: form_of(item, depth - 1, registered) for key, item in items})
    attributes = None if id(value) in registered or depth <= 1 else _attributes(value)
    if attributes is not None and len(attributes) <= LENGTH:
        forms = {name: form_of(item, depth - 2, registered) for name, item in attributes.items()}
        return NestedForm(kind, forms, Identity(value))
    return Identity(value)


def is_unchanged(form: Any, value: Any) -> bool:
    """Whether `value` still is what it was when `form` was made."""
    kind = type(form)
    if form is value:
        return True
    if kind is Identity:
        return bool(form.is_of(value))
    if kind is ArrayForm:
        return same_value(form.array, value)
    if kind is TensorForm:
        return isinstance(value, Tensor) and value.shape == form.shape
    if kind is tuple:
        return type(value) is kind and len(form) == len(value) and all(map(is_unchanged, form, value))
    if kind is not NestedForm:
        # NaN equals NaN here.
        return type(value) is kind and bool(form == value or (form != form and value != value))
    if type(value) is not form.kind or not (form.identity is None or form.identity.is_of(value)):
        return False
    items = _attributes(value) if form.identity is not None else _items(value)
    return (
        items is not None
        and items.keys() == form.items.keys()
        and all(is_unchanged(was, items[key]) for key, was in form.items.items())
    )


def _items(value: Any) -> dict[Any, Any]:
    if isinstance(value, dict):
        return value
    return dict.fromkeys(value) if isinstance(value, set | frozenset) else dict(enumerate(value))


def _attributes(value: Any) -> dict[str, Any] | None:
    """Return what an object holds by name: attributes in its `__dict__` and in slots; None if it is not looked into."""
    if isinstance(value, nn.Module):
        return _attributes_of_module(value)
    if isinstance(value, partial):
        return {"func": value.func, "args": value.args, "keywords": value.keywords}
    if isinstance(value, CLOSED):
        return None
    slots = slots_of(value) if is_users(type(value).__module__) else {}
    attributes: dict[str, Any] | None = getattr(value, "__dict__", None)
    return {**slots, **(attributes or {})} if slots else attributes


def _attributes_of_module(module: nn.Module) -> dict[str, Any]:
    """Return what a module holds, and where the numbers of its tensors lie: these may be replaced without a trace."""
    if isinstance(module, torch.jit.ScriptModule):
        return {}
    tensors = {**module._parameters, **module._buffers}
    return {
        **{name: value for name, value in vars(module).items() if name not in BOOKKEEPING or name == "training"},
        **module._modules,
        **tensors,
        **{f"{name}.data": _address_of(tensor) for name, tensor in tensors.items()},
    }


def _address_of(tensor: Tensor | None) -> Address:
    return Address(0 if tensor is None or tensor.layout is not torch.strided else tensor.data_ptr())


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Describes a change in the module at `path`; `what` changed is given in words, such as "attribute 'scale'"."""

    path: str
    what: str
    was: Any
    now: Any

    def __str__(self) -> str:
        where = repr(self.path) if self.path else "the model"
        return f"{self.what} of {where} was {_words(self.was)} when it was traced and is now {_words(self.now)}"


def _words(value: Any) -> str:
    value = value.value if isinstance(value, Identity) else value
    if isinstance(value, NestedForm | ArrayForm):
        return f"another {'ndarray' if isinstance(value, ArrayForm) else value.kind.__name__}"
    if isinstance(value, _Shape):
        return f"{value.name!r} of shape {value.sizes}"
    if isinstance(value, type | FunctionType):
        return value.__qualname__
    if isinstance(value, CLOSED) or not isinstance(value, (*ATOMS, *CONTAINERS, _Missing)):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Shape(NamedTuple):
    """Describes a parameter or buffer by the first of its names, and its sizes."""

    name: str
    sizes: tuple[int, ...]


class _Structure(NamedTuple):
    """Describes a module by its children and the shapes of its tensors, each under the first of its names."""

    children: dict[str, Any]
    parameters: dict[str, Any]
    buffers: dict[str, Any]


class _Held(NamedTuple):
    """Describes a module as it was; `attributes` are forms."""

    kind: type
    structure: _Structure
    attributes: dict[str, Any]


class _Around:
    """Remembers the globals and the like that traced code names; nothing in another process, which has its own."""

    def __init__(self, surroundings: Surroundings | None = None) -> None:
        self._surroundings = surroundings
        self._forms = {key: _form_of_global(value) for key, value in self._values().items()}

    def differences(self) -> Iterator[Difference]:
        """Yield what has changed since."""
        now = self._values()
        for key in dict.fromkeys((*self._forms, *now)):
            place, name = key
            was, is_now = ({place.label(name): each[key]} if key in each else {} for each in (self._forms, now))
            yield from _differing("", "", was, is_now)

    def _values(self) -> dict[tuple[Place, str], Any]:
        return {} if self._surroundings is None else self._surroundings.values()

    def __deepcopy__(self, memo: Any) -> _Around:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _Around, ()


class Snapshot:
    """Remembers the modules of `model`: classes, children, shapes of parameters, other attributes.

    Args:
        called: paths of modules that are one op in the graph. What lies inside of them is not compared.
        opaque: paths of modules of which a method is one op. Attributes of modules in `called` and `opaque` may change,
            as when they count their calls, unless they are torch's own modules or traced code mentions the attribute.
        assigned: paths of attributes that the graph itself sets, which are not compared.
        functions: those that are one op in the graph. What they alone use around the model is not compared.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        called: Collection[str],
        opaque: Collection[str],
        assigned: Collection[str],
        functions: Collection[Any],
    ) -> None:
        self._called, self._opaque = set(called), set(opaque)
        self._skipped: dict[str, set[str]] = {}
        for path, _, name in (each.rpartition(".") for each in assigned):
            self._skipped.setdefault(path, set(BOOKKEEPING)).add(name)
        visible = list(self._visible(model))
        modules = dict(model.named_modules())
        registered = set(map(id, modules.values()))
        whole = (modules[path] for path in self._called | self._opaque if path in modules)
        self._named = set() if all(map(is_torchs, whole)) else _names_in(self._traced_classes(visible))
        self._inner = {
            path: {name: _form_of_attribute(value, registered) for name, value in attributes.items()}
            for path, attributes in self._named_inside(model, visible)
        }
        self._around = _Around(
            Surroundings((module for path, module, _ in visible if path not in self._called), functions)
        )
        self._hooked = {path for path, module, _ in visible if any(hooks_of(module))}
        self._modules = {
            path: _Held(
                type(module),
                structure,
                {name: _form_of_attribute(value, registered) for name, value in self._read(path, module).items()},
            )
            for path, module, structure in visible
        }
        self._classes = {
            kind: {name: form_of(value, registered=registered) for name, value in _own(kind).items()}
            for kind in self._traced_classes(visible)
        }

    def differences(self, model: nn.Module) -> list[Difference]:
        """List what has changed since, in the order of the modules."""
        found: list[Difference] = []
        visible = list(self._visible(model))
        for path, module, structure in visible:
            was = self._modules.get(path)
            if was is None:
                # It is new, and listed as a child of the module that holds it.
                continue
            if type(module) is not was.kind:
                found.append(Difference(path=path, what="the class", was=was.kind, now=type(module)))
            if structure != was.structure:
                for word, before, after in zip(("child", "parameter", "buffer"), was.structure, structure, strict=True):
                    found += _differing(path, f"{word} ", before, after)
            attributes = self._read(path, module)
            if attributes.keys() != was.attributes.keys() or not all(
                form is attributes[name] or is_unchanged(form, attributes[name])
                for name, form in was.attributes.items()
            ):
                found += _differing(path, "attribute ", was.attributes, attributes)
        for path, attributes in self._named_inside(model, visible):
            found += _differing(path, "attribute ", self._inner.get(path, attributes), attributes)
        for kind in self._traced_classes(visible):
            was_class = self._classes.get(kind)
            # A new class is listed as the class of a module.
            if was_class is not None and (differing := list(_differing("", "", was_class, _own(kind)))):
                path = next(path for path, module, _ in visible if isinstance(module, kind))
                found += [replace(each, path=path, what=f"{kind.__name__}.{each.what}") for each in differing]
        return [*found, *self._around.differences()]

    def traced_through(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """List the submodules whose own ops are in the graph, instead of a call of the module.

        Modules that had hooks when the model was traced are not among them: with hooks a module stays one op.
        """
        without = self._called | self._hooked
        return [(path, module) for path, module, _ in self._visible(model) if path and path not in without]

    def visible(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """List the modules that the graph calls, and those whose own ops are in it."""
        return [(path, module) for path, module, _ in self._visible(model)]

    def _visible(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, _Structure]]:
        modules = list(model.named_modules())
        first: dict[int, str] = {id(module): path for path, module in modules}
        for path, module in modules:
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        first.setdefault(id(tensor), f"{path}.{name}".removeprefix("."))
        inside: set[str] = set()
        for path, module in modules:
            is_inside = bool(path) and path.rpartition(".")[0] in inside
            if is_inside or (path and path in self._called):
                inside.add(path)
            if not is_inside:
                skipped = self._skipped.get(path, ())
                tensors_by_kind = (
                    {
                        name: None if tensor is None else _Shape(first[id(tensor)], tuple(tensor.shape))
                        for name, tensor in tensors.items()
                        if name not in skipped
                    }
                    for tensors in (module._parameters, module._buffers)
                )
                children = {
                    name: None if child is None else first[id(child)] for name, child in module._modules.items()
                }
                yield path, module, _Structure(children, *tensors_by_kind)

    def _read(self, path: str, module: nn.Module) -> dict[str, Any]:
        of_torch = is_torchs(module)
        attributes = vars(module)
        names = attributes.keys() - self._skipped.get(path, BOOKKEEPING)
        if not of_torch and (path in self._called or path in self._opaque):
            names &= self._named
        return {name: attributes[name] for name in names if not (of_torch and name[0] == "_")}

    def _named_inside(
        self, model: nn.Module, visible: Iterable[tuple[str, nn.Module, Any]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the attributes of modules inside of called ones whose names are mentioned in traced code outside."""
        if not self._named:
            return
        seen = {path for path, _, _ in visible}
        for path, module in model.named_modules():
            if path not in seen and not is_torchs(module):
                names = self._named & (vars(module).keys() - BOOKKEEPING)
                if names:
                    yield path, {name: vars(module)[name] for name in names}

    def _traced_classes(self, visible: Iterable[tuple[str, nn.Module, Any]]) -> list[type]:
        """List the classes whose user code was traced through."""
        found: dict[type, None] = {}
        for path, module, _ in visible:
            if path not in self._called:
                found |= dict.fromkeys(
                    kind for kind in type(module).__mro__ if not kind.__module__.startswith("torch.")
                )
        found.pop(object, None)
        return list(found)


def _names_in(classes: Iterable[type]) -> set[str]:
    """Collect the names and strings in the code of classes, and of the functions that they call."""
    found: set[str] = set()
    seen: set[Any] = set()
    waiting = [value for kind in classes for value in vars(kind).values()]
    while waiting:
        value = waiting.pop()
        function = getattr(value, "__func__", getattr(value, "fget", value))
        if not isinstance(function, FunctionType) or function in seen or f"{function.__module__}".startswith("torch."):
            continue
        seen.add(function)
        names = set(names_in(function.__code__, strings=True))
        found |= names
        spaces = [function.__globals__]
        spaces += [vars(each) for name in names if isinstance(each := spaces[0].get(name), ModuleType)]
        waiting += [space[name] for space in spaces for name in names if name in space]
    return found


def _form_of_attribute(value: Any, registered: Container[int]) -> Any:
    return TensorForm(value.shape) if isinstance(value, Tensor) else form_of(value, registered=registered)


def _form_of_global(value: Any) -> Any:
    return form_of(value) if type(value) in ATOMS or may_change(type(value)) else Identity(value)


def _own(kind: type) -> dict[str, Any]:
    return {name: value for name, value in vars(kind).items() if name not in CLASS_BOOKKEEPING}


def _differing(path: str, word: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    for name in dict.fromkeys((*was, *now)):
        before, after = was.get(name, MISSING), now.get(name, MISSING)
        if not (name in was and name in now and is_unchanged(before, after)):
            inner, before, after = _innermost(name, before, after)
            yield Difference(path=path, what=f"{word}{inner!r}" if word else inner, was=before, now=after)


def _innermost(name: str, form: Any, value: Any) -> tuple[str, Any, Any]:
    """Find the first difference inside of a container or an object: its name, and both sides."""
    while isinstance(form, NestedForm) and type(value) is form.kind:
        items = _items(value) if form.identity is None else _attributes(value)
        if items is None or not (form.identity is None or form.identity.is_of(value)):
            break
        key = next(
            key
            for key in dict.fromkeys((*form.items, *items))
            if not (key in form.items and key in items and is_unchanged(form.items[key], items[key]))
        )
        name = f"{name}[{key!r}]" if form.identity is None else f"{name}.{key}"
        form, value = form.items.get(key, MISSING), items.get(key, MISSING)
    return name, form, value
