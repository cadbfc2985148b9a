"""What files may decide without the user's word: nothing that runs code, and nothing that writes elsewhere.

    recipe    names a factory, or folders outside of this one    asks for --trust-recipe, or the option itself
    run       names a factory, when it goes on or is tested      asks for --trust-code, or the option itself
    hf:NAME   brings code of its own                             asks for --trust-code
    plan      names modules and numbers only                     asks for nothing

What stands on the command line or in an `FXSPLIT_*` variable is the user's word.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from fxsplit.errors import UsageError, shown_path
from fxsplit.options import key
from fxsplit.paths import leads_out

# Where models come from that are no code of the user's; everything else before the colon is a file or a module.
SOURCES = ("timm", "torchvision", "hf", "paper")
# What stands before the colon of data that are no code of the user's.
DATA = ("folder",)
# Options that name a folder in which files are made.
WRITTEN = ("output", "data_dir")

_code_is_trusted: ContextVar[bool] = ContextVar("code_is_trusted", default=False)


@contextmanager
def trusting_code(yes: bool) -> Iterator[None]:
    """Inside, code that comes with a model's weights may run, if `yes`."""
    before = _code_is_trusted.set(yes)
    try:
        yield
    finally:
        _code_is_trusted.reset(before)


def code_is_trusted() -> bool:
    """Tell whether code that comes with a model's weights may run."""
    return _code_is_trusted.get()


def is_code(model: str) -> bool:
    """Tell whether building the model of that name runs a file or module that is no library's."""
    return model.partition(":")[0] not in SOURCES


def is_code_of_data(data: str) -> bool:
    """Tell whether loading the data set of that name runs a file or module of the user's."""
    scheme, colon, rest = data.partition(":")
    return bool(colon and rest) and scheme not in DATA


# By option, what tells whether a value runs code.
CODE = {"model": is_code, "data": is_code_of_data}


def code_in(values: Mapping[str, Any]) -> dict[str, str]:
    """Find the options among `values` that run code, and what they name."""
    return {name: values[name] for name, runs in CODE.items() if name in values and runs(values[name])}


def refuse_recipe(recipe: Mapping[str, Any], given: Collection[str], defaults: Mapping[str, Any]) -> None:
    """Raise UsageError when a recipe runs code or writes outside of the current folder.

    Args:
        recipe: its values by field name.
        given: the fields that the user gives, who wins over the recipe.
        defaults: the values of fields that nobody gives, which are no reason to refuse.
    """
    decides = {name: value for name, value in recipe.items() if name not in given and value != defaults[name]}
    faults = {
        name: f"{key(name)} is {shown_path(decides[name])}, outside of the current folder"
        for name in WRITTEN
        if name in decides and leads_out(decides[name])
    }
    faults |= {name: f"{name} is {shown_path(value)}, which runs code" for name, value in code_in(decides).items()}
    if faults:
        raise UsageError(
            f"the recipe decides what is yours to decide: {'; '.join(faults.values())}; if you trust it, add "
            f"--trust-recipe, or give {' and '.join(map(key, faults))} yourself"
        )


def refuse_run(run: Mapping[str, Any], folder: str | Path, *, given: Collection[str] = (), trust_code: bool) -> None:
    """Raise UsageError when a run that goes on would run code that nobody has named, unless code is trusted.

    Args:
        run: what it was asked for, by field name.
        folder: of the run.
        given: the fields that the user gives.
        trust_code: whether code is trusted.
    """
    found = {name: value for name, value in code_in(run).items() if name not in given}
    if found and not trust_code:
        raise UsageError(
            f"the run in {shown_path(folder)} is of {' and '.join(map(shown_path, found.values()))}, which runs code; "
            f"if you trust it, name the {' and the '.join(found)} beside --resume, or add --trust-code"
        )
