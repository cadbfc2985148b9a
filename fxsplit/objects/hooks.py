"""What runs around a module's own forward and backward."""

from __future__ import annotations

from typing import Any

from torch import nn


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """The hooks around a module's forward and backward, by kind."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether to call a module of that kind is to run its class's own forward and nothing else."""
    return type(module) is kind and "forward" not in vars(module) and not any(hooks_of(module))
