"""Finds which modules of a model belong together according to its library, such as blocks; the model is cut between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


def units_of(model: nn.Module) -> dict[str, str]:
    """Map the paths of modules to the name of the unit to which all their ops belong.

    Units come from timm's `group_matcher`, which groups parameters, from Hugging Face's `_no_split_modules`, which
    names the classes of blocks, or else are the model's own children.
    """
    if callable(matcher := getattr(model, "group_matcher", None)):
        return _grouped(model, matcher)
    if blocks := set(getattr(model, "_no_split_modules", None) or ()):
        return {path: path for path in _whole(model, blocks)}
    return {name: name for name, _ in model.named_children()}


def _grouped(model: nn.Module, matcher: Callable[[], Any]) -> dict[str, str]:
    """Map each module whose parameters are all of one group to that group."""
    from timm.models import group_parameters  # only where a model is timm's

    groups: dict[str, set[str]] = {}
    for parameter, group in group_parameters(model, matcher(), reverse=True).items():
        path = parameter.rpartition(".")[0]
        while path:
            groups.setdefault(path, set()).add(str(group))
            path = path.rpartition(".")[0]
    return {path: next(iter(members)) for path, members in groups.items() if len(members) == 1}


def _whole(model: nn.Module, blocks: set[str], path: str = "") -> Iterator[str]:
    """Yield the paths of the blocks, and of the largest modules around them that hold none."""
    for name, child in model.named_children():
        inner = f"{path}.{name}".removeprefix(".")
        is_block = type(child).__name__ in blocks
        if is_block or not any(type(module).__name__ in blocks for module in child.modules()):
            yield inner
        else:
            yield from _whole(child, blocks, inner)
