"""Tells whose code runs, and which names it mentions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from types import CodeType


@cache
def is_users(module: str) -> bool:
    """Whether a module of Python, by its dotted name, is neither of its library, torch, numpy nor this package."""
    top = module.partition(".")[0]
    return top not in sys.stdlib_module_names and top not in ("torch", "numpy", "fxsplit")


def names_in(code: CodeType, *, strings: bool) -> Iterator[str]:
    """Yield the names of globals and attributes in code and in the functions defined inside of it, or `strings` too."""
    yield from code.co_names
    for constant in code.co_consts:
        if strings and isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from names_in(constant, strings=strings)
