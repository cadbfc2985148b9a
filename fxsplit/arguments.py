"""What functions of the library are given: one thing where several may be, and what is refused before it is used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeVar, overload

from fxsplit.errors import UsageError, shown

Item = TypeVar("Item")


@overload
def listed(given: str) -> tuple[str, ...]: ...
@overload
def listed(given: Iterable[Item]) -> tuple[Item, ...]: ...
@overload
def listed(given: Item) -> tuple[Item, ...]: ...
def listed(given: Any) -> tuple[Any, ...]:
    """Return what was given as a tuple. One string, path, class or function stands for a list of one."""
    return (given,) if isinstance(given, str) or not isinstance(given, Iterable) else tuple(given)


def require(name: str, value: object, kind: type | tuple[type, ...], wanted: str, advice: str) -> None:
    """Refuse a value of another kind.

    Args:
        name: of the argument.
        value: what was given.
        kind: of what is right.
        wanted: the same in words, after "must be".
        advice: what to do instead.

    Raises UsageError.
    """
    if not isinstance(value, kind):
        raise UsageError(f"{name} is {_described(value)}, but must be {wanted}; {advice}")


def require_call(args: object, kwargs: object) -> None:
    """Refuse what are no arguments of a call, such as a tensor beside a tuple that holds it. Raises UsageError."""
    require("args", args, Sequence, "the arguments of a call in a tuple", "write (x,) for a single x")
    require("kwargs", kwargs, (Mapping, type(None)), "keyword arguments in a dict", "write {'name': x} for name=x")


def require_whole(least: int, **numbers: Any) -> None:
    """Refuse what is no whole number, or less than `least`. Raises UsageError."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise UsageError(f"{name} is {_described(value)}, but must be a whole number, at least {least}")


def require_share(**numbers: Any) -> None:
    """Refuse what is no number from 0 to 1. Raises UsageError."""
    for name, value in numbers.items():
        if not (isinstance(value, Real) and 0 <= float(value) <= 1):
            raise UsageError(f"{name} is {_described(value)}, but must be a number from 0 to 1")


def _described(value: object) -> str:
    """Write a value where it is short, else say what it is."""
    if value is None or isinstance(value, str | bool | int | float):
        return shown(value)
    return f"the class {value.__qualname__}" if isinstance(value, type) else f"of type {type(value).__name__}"
