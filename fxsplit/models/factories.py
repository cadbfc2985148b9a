"""Calls a user's own function that builds a model: `file.py:FACTORY` or `pkg.module:FACTORY`."""

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
from typing import Any, NoReturn

from torch import nn

from fxsplit.errors import NoModelError, UsageError, nearest, reason, shown, shown_path
from fxsplit.paths import expanded

# What ends a user's code from outside. Whatever else it raises, also past every `except Exception`, is its own fault.
NOT_CAUGHT = (KeyboardInterrupt, MemoryError)


def call(
    source: str, name: str, offered: dict[str, Any], required: Mapping[str, Any], *, libraries: Collection[str]
) -> object:
    """Call a function or class of the user's and return its result.

    Args:
        source: path of a .py file, or dotted name of a module; `name` is looked up there.
        offered: arguments that are passed where its signature has them.
        required: arguments that are passed in any case.
        libraries: names that `source` may have been meant for, for the error.

    Raises NoModelError when there is no such file, module or function, UsageError when one of them raises.
    """
    spec = f"{source}:{name}"
    with _importable(source):
        module = _import_file(source) if is_file(source) else _import_module(source, spec, libraries)
        factory = getattr(module, name, None)
        if isinstance(factory, nn.Module):
            raise NoModelError(
                f"{shown_path(spec)} is a module already built; name a function that builds one and returns it"
            )
        if not callable(factory):
            callables = [key for key, value in vars(module).items() if callable(value)]
            raise NoModelError(f"{shown_path(source)} has no function or class {shown(name)}{nearest(name, callables)}")
        try:
            named = inspect.signature(factory).parameters
            return factory(**{key: value for key, value in offered.items() if key in named}, **required)
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
        module = _import_file(file)
    own = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    return [
        name
        for name, value in own.items()
        if callable(value) and not isinstance(value, nn.Module) and not name.startswith("_")
    ]


def _import_file(source: str) -> ModuleType:
    path = expanded(source)
    if not os.path.isfile(path):
        beside = (file.name for file in path.parent.glob("*.py"))
        raise NoModelError(f"there is no file {shown_path(source)}{nearest(path.name, beside)}")
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


def _import_module(source: str, spec: str, libraries: Collection[str]) -> ModuleType:
    try:
        return importlib.import_module(source)
    except BaseException as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{source}.".startswith(f"{missing}."):
            raise NoModelError(
                f"{shown(source)} in {shown_path(spec)} is no library ({', '.join(libraries)}), no .py file and no "
                f"module that can be imported{nearest(source, libraries)}"
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
