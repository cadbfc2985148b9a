"""Calls a user's own function, which builds a model or data: `file.py:FACTORY` or `pkg.module:FACTORY`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

from torch import nn

from fxsplit.errors import UsageError, nearest, reason, shown, shown_path
from fxsplit.paths import expanded

# What ends a user's code from outside. Whatever else it raises, also past every `except Exception`, is its own fault.
NOT_CAUGHT = (KeyboardInterrupt, MemoryError)


class Others(NamedTuple):
    """What else `source` may have been meant for: a `noun` and names. Finding nothing is an error, a `missing`."""

    noun: str
    names: Collection[str]
    missing: type[UsageError]


def call(
    source: str, name: str, offered: Mapping[str, Any], required: Mapping[str, Any] | None = None, *, others: Others
) -> object:
    """Call a function or class of the user's and return its result.

    Args:
        source: path of a .py file, or dotted name of a module; `name` is looked up there.
        offered: arguments that are passed where its signature has them.
        required: arguments that are passed in any case.
        others: for the error when there is no such file, module or function.

    Raises that error, and UsageError when one of them raises.
    """
    spec = f"{source}:{name}"
    with _importable(source):
        module = _import_file(source, others.missing) if is_file(source) else _import_module(source, spec, others)
        factory = getattr(module, name, None)
        if isinstance(factory, nn.Module):
            raise others.missing(
                f"{shown_path(spec)} is a module already built; name a function that builds one and returns it"
            )
        if not callable(factory):
            callables = [key for key, value in vars(module).items() if callable(value)]
            hint = nearest(name, callables)
            raise others.missing(f"{shown_path(source)} has no function or class {shown(name)}{hint}")
        try:
            named = inspect.signature(factory).parameters
            return factory(**{key: value for key, value in offered.items() if key in named}, **(required or {}))
        except NOT_CAUGHT:
            raise
        except BaseException as error:
            raise UsageError(f"{shown_path(spec)} {_raised(error)}") from error


def is_file(source: str) -> bool:
    """Whether `source` means a file rather than a module."""
    return source.endswith(".py")


def names(file: str) -> list[str]:
    """List the functions and classes that a file defines, in its order, without those whose names begin with `_`.

    Raises UsageError when the file is not there or cannot be imported.
    """
    with _importable(file):
        module = _import_file(file, UsageError)
    own = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    return [
        name
        for name, value in own.items()
        if callable(value) and not isinstance(value, nn.Module) and not name.startswith("_")
    ]


def _import_file(source: str, missing: type[UsageError]) -> ModuleType:
    path = expanded(source)
    if not os.path.isfile(path):
        beside = (file.name for file in path.parent.glob("*.py"))
        raise missing(f"there is no file {shown_path(source)}{nearest(path.name, beside)}")
    path = path.resolve()
    # A name of its own, so that a file called torch.py hides nothing; pickle and dataclasses look it up in sys.modules.
    name = f"{path.stem}_{sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        _raise_unimportable(source, error)
    return module


def _import_module(source: str, spec: str, others: Others) -> ModuleType:
    try:
        return importlib.import_module(source)
    except BaseException as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{source}.".startswith(f"{missing}."):
            raise others.missing(
                f"{shown(source)} in {shown_path(spec)} is no {others.noun} ({', '.join(others.names)}), no .py file "
                f"and no module that can be imported{nearest(source, others.names)}"
            ) from error
        _raise_unimportable(source, error)


def _raise_unimportable(source: str, error: BaseException) -> NoReturn:
    """Raise UsageError about a file or module that cannot be imported; an interruption is raised again."""
    if isinstance(error, NOT_CAUGHT):
        raise error
    raise UsageError(f"{shown_path(source)} cannot be imported: {_raised(error).removeprefix('raised ')}") from error


def _raised(error: BaseException) -> str:
    """Say what a user's code raised."""
    if isinstance(error, SystemExit):
        return f"called sys.exit({'' if error.code is None else shown(error.code)})"
    return f"raised {type(error).__name__}: {reason(error)}"


@contextmanager
def _importable(source: str) -> Iterator[None]:
    """Let a user's code import what lies beside it, as `python file.py` and `python -m` do."""
    folder = expanded(source).parent if is_file(source) else Path()
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)
