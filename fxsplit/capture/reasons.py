"""Why a module is not traced through: said in one line."""

from __future__ import annotations

from textwrap import shorten

import torch
from torch import nn
from torch.nn.utils import parametrize

from fxsplit.errors import UntraceableError
from fxsplit.objects.hooks import hooks_of

LONGEST_REASON = 400

COMPILED = "it is compiled; trace before torch.compile to see inside"

READS_ANOTHER = "in whose place a module that is one op put another tensor"


def reason_to_keep_whole(module: nn.Module) -> str | None:
    """Say why a module must not be traced through although it could be, or None."""
    if any(hooks_of(module)):
        return "it has hooks, which tracing through it would drop; take them off to see inside"
    return reason_not_to_look_inside(module)


def reason_not_to_look_inside(module: nn.Module) -> str | None:
    """Say why a module does more than its Python code shows, or None. Hooks do not count: the caller can run them."""
    if parametrize.is_parametrized(module):
        return "it is parametrized, which tracing through it would drop; remove_parametrizations to see inside"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a scripted module; give the Python module to see inside"
    if hasattr(module, "_orig_mod"):
        return COMPILED
    return None


def reason_of(error: BaseException) -> str:
    """Shorten an error to one line; some of torch's fill several screens."""
    text = str(error) if isinstance(error, UntraceableError) else f"{type(error).__name__}: {error}"
    text = "; ".join((text, *getattr(error, "__notes__", ())))
    return shorten(" ".join(text.split()), LONGEST_REASON, placeholder=" ...")
