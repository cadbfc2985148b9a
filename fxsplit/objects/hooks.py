"""Finds the hooks of modules, and modules whose code is torch's own."""

from __future__ import annotations

from typing import Any

from torch import nn


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """Return the hooks around a module's forward and backward, one dict a kind."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def is_torchs(module: nn.Module) -> bool:
    """Whether the class of a module is one of torch's layers or containers, and no subclass."""
    return type(module).__module__.startswith("torch.nn.modules.")


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` runs the forward of the class `kind` and nothing else: no subclass, override or hook."""
    return type(module) is kind and "forward" not in vars(module) and not any(hooks_of(module))
