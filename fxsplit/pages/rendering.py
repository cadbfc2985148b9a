"""What pages are made with: templates that escape what they are given, and the parts that a page carries in itself."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fxsplit.errors import printable

Functions = Mapping[str, Callable[..., Any]]


def environment(
    *, filters: Mapping[str, Callable[..., Any]], functions: Mapping[str, Callable[..., Any]]
) -> Environment:
    """Make the environment of a page's templates, which call these filters and functions."""
    made = Environment(
        loader=PackageLoader("fxsplit.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= filters
    made.globals |= functions
    return made


def asset(name: str) -> str:
    """Read a style sheet or script."""
    return files("fxsplit.pages").joinpath("templates", name).read_text(encoding="utf-8")


def digest(text: str) -> str:
    """Return the digest by which a content security policy allows a style sheet or script."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def share(part: float, whole: float) -> str:
    """Write the share of `part` in `whole` for an attribute of SVG, such as `12.5%`; that of 0 in 0 is `0%`."""
    return f"{100 * part / whole if whole else 0:.4g}%"


def _shown(value: Any) -> Any:
    """Escape control characters in names: a page may be printed to a terminal."""
    return "\n".join(map(printable, value.split("\n"))) if type(value) is str else value
