"""Copies of a model for tracing: its modules and all that they hold, over other tensors.

`copy.deepcopy` gives up on a whole model for one lock, file or tensor with a history in it. Here what cannot be copied
is shared, and so is nothing else.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxsplit.objects.structure import ATOMS, META, fill, taken_apart


def twin_of(model: nn.Module) -> tuple[nn.Module, dict[int, Any]]:
    """A copy with parameters and buffers on the meta device; nothing that happens to it reaches the model.

    Also gives the original behind each copied object, by the id of the copy.
    """
    state = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}

    def on_meta(tensor: Tensor) -> Tensor:
        if id(tensor) not in state:
            return tensor.detach().clone().requires_grad_(tensor.requires_grad)
        empty = torch.empty_like(tensor, device=META, requires_grad=False)
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    copier = Copier(on_meta)
    twin = copier.copy(model)
    assert isinstance(twin, nn.Module)
    return twin, copier.originals()


class Copier:
    """Copies values, with `change` in the place of copying a tensor."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self._change = change
        # Originals are held, so that no other object can get the id of one of them.
        self._made: dict[int, tuple[Any, Any]] = {}

    def originals(self) -> dict[int, Any]:
        """The original behind each copy, by the id of the copy."""
        return {id(made): original for original, made in self._made.values() if made is not original}

    def copy(self, value: Any) -> Any:
        """A copy that shares nothing that can change, or the very same where there is none to be had."""
        kind = type(value)
        if kind in ATOMS:
            return value
        if id(value) in self._made:
            return self._made[id(value)][1]
        if isinstance(value, Tensor):
            return self._keep(value, self._change(value))
        if kind is list:
            made = self._keep(value, [])
            made.extend(map(self.copy, value))
            return made
        # The hooks of a module are in ordered dicts, nearly all of them empty.
        if kind is dict or (kind is OrderedDict and not vars(value)):
            made = self._keep(value, kind())
            made.update({self.copy(key): self.copy(item) for key, item in value.items()})
            return made
        if kind is tuple:
            return self._keep(value, tuple(map(self.copy, value)))
        if kind is MethodType:
            return self._keep(value, MethodType(value.__func__, self.copy(value.__self__)))
        if isinstance(value, nn.Module) and not isinstance(value, torch.jit.ScriptModule):
            made = self._keep(value, object.__new__(kind))
            # As in any copy of a module, what torch.compile made of it stays with the original.
            held = {name: item for name, item in vars(value).items() if name != "_compiled_call_impl"}
            vars(made).update({name: self.copy(item) for name, item in held.items()})
            return made
        if isinstance(value, torch.jit.ScriptModule):
            # Its tensors lie where no attribute leads to.
            with suppress(Exception):
                return self._keep(value, copy.deepcopy(value))
            return self._keep(value, value)
        if isinstance(value, torch.Generator):
            return self._keep(value, torch.Generator(value.device).set_state(value.get_state()))
        if isinstance(value, np.ndarray):
            return self._keep(value, value.copy())
        return self._object(value)

    def _object(self, value: Any) -> Any:
        parts = taken_apart(value)
        if parts is None:
            return self._keep(value, value)
        try:
            made = self._keep(value, parts.make(*map(self.copy, parts.arguments)))
            fill(made, self.copy(parts.state), self.copy(parts.items), self.copy(parts.pairs))
        except Exception:
            return self._keep(value, value)
        return made

    def _keep(self, value: Any, made: Any) -> Any:
        self._made[id(value)] = value, made
        return made
