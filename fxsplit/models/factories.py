"""Calls a user's own function that builds a model: `file.py:FACTORY` or `pkg.module:FACTORY`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from fxsplit.errors import NoModelError, UsageError, nearest, reason


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
            raise NoModelError(f"{spec!r} is a module already built; name a function that builds one and returns it")
        if not callable(factory):
            callables = [key for key, value in vars(module).items() if callable(value)]
            raise NoModelError(f"{source!r} has no function or class {name!r}{nearest(name, callables)}")
        try:
            named = inspect.signature(factory).parameters
            return factory(**{key: value for key, value in offered.items() if key in named}, **required)
        except (Exception, SystemExit) as error:
            raise UsageError(f"{spec!r} raised {type(error).__name__}: {reason(error)}") from error


def is_file(source: str) -> bool:
    """Whether `source` means a file rather than a module."""
    return source.endswith(".py")


def names(file: str) -> list[str]:
    """The functions and classes that a file defines, in its order; those with a leading underscore are its own affair.

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
    path = Path(source).expanduser()
    if not path.is_file():
        beside = (file.name for file in path.parent.glob("*.py"))
        raise NoModelError(f"there is no file {source!r}{nearest(path.name, beside)}")
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
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UsageError(f"{source!r} cannot be imported: {type(error).__name__}: {reason(error)}") from error
    return module


def _import_module(source: str, spec: str, libraries: Collection[str]) -> ModuleType:
    try:
        return importlib.import_module(source)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{source}.".startswith(f"{missing}."):
            raise NoModelError(
                f"{source!r} in {spec!r} is no library ({', '.join(libraries)}), no .py file and no module "
                f"that can be imported{nearest(source, libraries)}"
            ) from error
        raise UsageError(f"{source!r} cannot be imported: {type(error).__name__}: {reason(error)}") from error


@contextmanager
def _importable(source: str) -> Iterator[None]:
    """Let a user's code import what lies beside it, as `python file.py` and `python -m` do."""
    folder = Path(source).expanduser().parent if is_file(source) else Path()
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)
