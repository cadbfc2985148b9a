"""What a graph may depend on besides its inputs: the modules of the model, and what they hold.

    model ──► Snapshot, when it is traced        later: snapshot.differences(model) ──► [layer1.0: 'scale' 1.0, now 2.0]

A difference need not matter. Whether it does, tracing the model again tells.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxsplit.objects.hooks import hooks_of

# The attribute in which a model carries what an executor has frozen of it; see fxsplit.execute.freezing.
MARK = "_fxsplit_held"

# Compared by value.
ATOMS = (
    *(type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size),
    *(torch.layout, torch.memory_format, range),
)
CONTAINERS = (list, tuple, dict, set, frozenset)
# Their attributes say nothing about what they do, or are looked at elsewhere.
CLOSED = (nn.Module, Tensor, type, FunctionType, BuiltinFunctionType, MethodType, ModuleType)
# Containers in objects in containers are looked into; what is longer or deeper is compared by identity alone.
DEPTH, LENGTH = 3, 100

BOOKKEEPING = {*vars(nn.Module()), MARK}
CLASS_BOOKKEEPING = {
    *("__module__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__firstlineno__"),
    *("__static_attributes__", "__abstractmethods__", "_abc_impl", "__annotate__", "__annotations_cache__"),
}


class _Missing:
    def __repr__(self) -> str:
        return "not set"


MISSING = _Missing()


class Identity:
    """Stands for one object. A copy of it stands for whatever it meets first, since that was copied as well."""

    def __init__(self, value: Any = MISSING) -> None:
        self.value = value

    def is_of(self, value: Any) -> bool:
        if self.value is MISSING:
            self.value = value
        return self.value is value

    def __reduce__(self) -> tuple[Any, ...]:
        return Identity, ()


class Parts:
    """A container or an object, with the forms of what it holds. An object is meant itself: `identity`."""

    def __init__(self, kind: type, items: Mapping[Any, Any], identity: Identity | None = None) -> None:
        self.kind, self.items, self.identity = kind, dict(items), identity


class TensorForm:
    """A tensor that a module holds under a name of its own: the graph asks for it by that name in every call."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape


def form_of(value: Any, depth: int = DEPTH) -> Any:
    """What `value` is now, so that it can be told whether it was changed: atoms themselves, else one of the above."""
    kind = type(value)
    if kind in ATOMS or (kind is tuple and all(type(item) in ATOMS for item in value)):
        return value
    if depth and isinstance(value, CONTAINERS) and len(value) <= LENGTH:
        return Parts(kind, {key: form_of(item, depth - 1) for key, item in _items(value).items()})
    attributes = _attributes(value)
    if depth and attributes is not None and len(attributes) <= LENGTH:
        return Parts(kind, {name: form_of(item, depth - 1) for name, item in attributes.items()}, Identity(value))
    return Identity(value)


def is_unchanged(form: Any, value: Any) -> bool:
    """Whether `value` still is what it was."""
    kind = type(form)
    if form is value:
        return True
    if kind is Identity:
        return bool(form.is_of(value))
    if kind is TensorForm:
        return isinstance(value, Tensor) and value.shape == form.shape
    if kind is tuple:
        return type(value) is kind and len(form) == len(value) and all(map(is_unchanged, form, value))
    if kind is not Parts:
        # Two that are not numbers are no change.
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
    return None if isinstance(value, CLOSED) else getattr(value, "__dict__", None)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """`what` is another one now: in words, such as "attribute 'scale'"; of the module at `path`."""

    path: str
    what: str
    was: Any
    now: Any

    def __str__(self) -> str:
        where = repr(self.path) if self.path else "the model"
        return f"{self.what} of {where} was {_words(self.was)} when it was traced and is now {_words(self.now)}"


def _words(value: Any) -> str:
    value = value.value if isinstance(value, Identity) else value
    if isinstance(value, Parts):
        return f"another {value.kind.__name__}"
    if isinstance(value, _Shape):
        return f"{value.name!r} of shape {value.sizes}"
    if isinstance(value, type | FunctionType):
        return value.__qualname__
    if isinstance(value, CLOSED) or not isinstance(value, (*ATOMS, *CONTAINERS, _Missing)):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Shape(NamedTuple):
    """A parameter or buffer: the first of its names, and its sizes."""

    name: str
    sizes: tuple[int, ...]


class _Structure(NamedTuple):
    """What a module is made of: children, and shapes of tensors, each with the first of the names that it has."""

    children: dict[str, Any]
    parameters: dict[str, Any]
    buffers: dict[str, Any]


class _Held(NamedTuple):
    """What one module was: `attributes` are forms."""

    kind: type
    structure: _Structure
    attributes: dict[str, Any]


class Snapshot:
    """What the modules of `model` are and hold: classes, children, shapes of parameters, other attributes.

    What lies inside a module that the graph calls, one of the paths in `called`, is that module's business. So are the
    attributes of modules in `called` and `opaque`, which may count their calls there, unless they are torch's own or
    code that was traced through names them. `assigned` are paths of attributes that the graph itself sets.
    """

    def __init__(
        self, model: nn.Module, *, called: Collection[str], opaque: Collection[str], assigned: Collection[str]
    ) -> None:
        self._called, self._opaque = set(called), set(opaque)
        self._skipped: dict[str, set[str]] = {}
        for path, _, name in (each.rpartition(".") for each in assigned):
            self._skipped.setdefault(path, set(BOOKKEEPING)).add(name)
        visible = list(self._visible(model))
        modules = dict(model.named_modules())
        whole = (modules[path] for path in self._called | self._opaque if path in modules)
        self._named = set() if all(map(_is_torchs, whole)) else _names_in(self._traced_classes(visible))
        self._inner = {
            path: {name: _form_of_attribute(value) for name, value in attributes.items()}
            for path, attributes in self._named_inside(model, visible)
        }
        self._hooked = {path for path, module, _ in visible if any(hooks_of(module))}
        self._modules = {
            path: _Held(
                type(module),
                structure,
                {name: _form_of_attribute(value) for name, value in self._read(path, module).items()},
            )
            for path, module, structure in visible
        }
        self._classes = {
            kind: {name: form_of(value) for name, value in _own(kind).items()} for kind in self._traced_classes(visible)
        }

    def differences(self, model: nn.Module) -> list[Difference]:
        """What is another one now, in the order of the modules."""
        found: list[Difference] = []
        visible = list(self._visible(model))
        for path, module, structure in visible:
            was = self._modules.get(path)
            if was is None:
                # Told of as a child of the module that holds it.
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
            # A class that is new here is told of as a module's.
            if was_class is not None and (differing := list(_differing("", "", was_class, _own(kind)))):
                path = next(path for path, module, _ in visible if isinstance(module, kind))
                found += [replace(each, path=path, what=f"{kind.__name__}.{each.what}") for each in differing]
        return found

    def traced_through(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The modules below the model whose ops are in the graph, instead of a call of the module.

        Not those that had hooks when it was traced: with hooks a module stays one op, if it is called at all.
        """
        without = self._called | self._hooked
        return [(path, module) for path, module, _ in self._visible(model) if path and path not in without]

    def visible(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The modules that the graph calls and those that it goes through."""
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
        is_torchs = _is_torchs(module)
        attributes = vars(module)
        names = attributes.keys() - self._skipped.get(path, BOOKKEEPING)
        if not is_torchs and (path in self._called or path in self._opaque):
            names &= self._named
        return {name: attributes[name] for name in names if not (is_torchs and name[0] == "_")}

    def _named_inside(
        self, model: nn.Module, visible: Iterable[tuple[str, nn.Module, Any]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """What modules inside of those that are called hold under names that code outside has."""
        if not self._named:
            return
        seen = {path for path, _, _ in visible}
        for path, module in model.named_modules():
            if path not in seen and not _is_torchs(module):
                names = self._named & (vars(module).keys() - BOOKKEEPING)
                if names:
                    yield path, {name: vars(module)[name] for name in names}

    def _traced_classes(self, visible: Iterable[tuple[str, nn.Module, Any]]) -> list[type]:
        """Those with code of the user's that was traced through."""
        found: dict[type, None] = {}
        for path, module, _ in visible:
            if path not in self._called:
                found |= dict.fromkeys(
                    kind for kind in type(module).__mro__ if not kind.__module__.startswith("torch.")
                )
        found.pop(object, None)
        return list(found)


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules.")


def _names_in(classes: Iterable[type]) -> set[str]:
    """The names, and the strings that may be some, in the code of classes and of the functions that it calls."""
    found: set[str] = set()
    seen: set[Any] = set()
    waiting = [value for kind in classes for value in vars(kind).values()]
    while waiting:
        value = waiting.pop()
        function = getattr(value, "__func__", getattr(value, "fget", value))
        if not isinstance(function, FunctionType) or function in seen or f"{function.__module__}".startswith("torch."):
            continue
        seen.add(function)
        names = set(_names_of(function.__code__))
        found |= names
        spaces = [function.__globals__]
        spaces += [vars(each) for name in names if isinstance(each := spaces[0].get(name), ModuleType)]
        waiting += [space[name] for space in spaces for name in names if name in space]
    return found


def _names_of(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _names_of(constant)


def _form_of_attribute(value: Any) -> Any:
    return TensorForm(value.shape) if isinstance(value, Tensor) else form_of(value)


def _own(kind: type) -> dict[str, Any]:
    return {name: value for name, value in vars(kind).items() if name not in CLASS_BOOKKEEPING}


def _differing(path: str, word: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    for name in dict.fromkeys((*was, *now)):
        before, after = was.get(name, MISSING), now.get(name, MISSING)
        if not (name in was and name in now and is_unchanged(before, after)):
            place, before, after = _innermost(name, before, after)
            yield Difference(path=path, what=f"{word}{place!r}" if word else place, was=before, now=after)


def _innermost(name: str, form: Any, value: Any) -> tuple[str, Any, Any]:
    """Where in a container or an object the first difference is."""
    while isinstance(form, Parts) and type(value) is form.kind:
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
