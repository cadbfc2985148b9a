"""Makes one HTML file of a template, which needs no network.

A page loads nothing. Its content security policy has the digest of its own style sheet, and all else, such as the names
of classes and files, is escaped. A template begins with

    {% extends "base.html.jinja" %}

and fills the blocks `title`, `header` and `main`.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fxsplit.errors import printable


def document(template: str, **values: Any) -> str:
    """Fill in a template of this folder, with `page.css` inside."""
    style = files("fxsplit.pages").joinpath("templates", "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment().get_template(template).render(style=Markup(style), style_digest=digest, **values)


@cache
def environment() -> Environment:
    """Return what templates are read by."""
    return Environment(
        loader=PackageLoader("fxsplit.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _shown(value: Any) -> Any:
    """Escape control characters in names: a page may be printed to a terminal."""
    return "\n".join(map(printable, value.split("\n"))) if type(value) is str else value
