"""Makes one HTML file of a template, which needs no network.

A page loads nothing. Its content security policy has the digests of its own style sheet and script, so that the browser
runs no others. All else, such as the names of models and modules, is escaped. A template begins with

    {% extends "base.html.jinja" %}

and fills the blocks `title`, `header` and `main`; charts are drawn by the macros of `charts.html.jinja`.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fxsplit.errors import printable
from fxsplit.pages import figures


def document(template: str, *, script: str | None = None, **values: Any) -> str:
    """Fill in a template of this folder, with `page.css` and perhaps a script of this folder inside."""
    style, code = _asset("page.css"), _asset(script) if script else ""
    return (
        environment()
        .get_template(template)
        .render(
            style=Markup(style),
            style_digest=_digest(style),
            script=Markup(code),
            script_digest=_digest(code),
            **values,
        )
    )


@cache
def environment() -> Environment:
    """Return what templates are read by, with the filters and functions that all of them have."""
    made = Environment(
        loader=PackageLoader("fxsplit.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "human": figures.human,
        "duration": figures.duration,
        "shape": figures.shape,
        "percent": percent,
    }
    made.filters |= filters
    made.globals |= {
        "epochs": figures.epochs,
        "epochs_of": figures.epochs_of,
        "in_words": figures.in_words,
        "share": share,
        "trains": figures.trains,
    }
    return made


def share(part: float, whole: float) -> str:
    """Write the share of `part` in `whole` for an attribute of SVG, such as `12.5%`; that of 0 in 0 is `0%`."""
    return percent(part / whole if whole else 0)


def percent(part: float) -> str:
    """Write a share from 0 to 1 for an attribute of SVG, such as `12.5%`."""
    return f"{100 * part:.4g}%"


def _shown(value: Any) -> Any:
    """Escape control characters in names: a page may be printed to a terminal."""
    return "\n".join(map(printable, value.split("\n"))) if type(value) is str else value


def _asset(name: str) -> str:
    return files("fxsplit.pages").joinpath("templates", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
