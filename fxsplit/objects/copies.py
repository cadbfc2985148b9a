"""Copies models with other tensors in place of their own, for tracing.

`copy.deepcopy` fails for a whole model because of one lock, open file or non-leaf tensor in it. Here such an object is
shared by model and copy, and nothing else is.
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

from fxsplit.objects.structure import ATOMS, META, fill, is_divided, taken_apart


def meta_copy(model: nn.Module) -> tuple[nn.Module, dict[int, Any]]:
    """Copy a model with parameters and buffers on the meta device; changes of the copy do not reach the model.

    Parameters that are divided among processes are whole in the copy.

    Returns the copy, and the original of each copied object by the id of its copy.
    """
    state = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}

    def on_meta(tensor: Tensor) -> Tensor:
        if id(tensor) not in state:
            return tensor.detach().clone().requires_grad_(tensor.requires_grad)
        if is_divided(tensor):
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
        else:
            empty = torch.empty_like(tensor, device=META, requires_grad=False)
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    copier = Copier(on_meta)
    copied = copier.copy(model)
    assert isinstance(copied, nn.Module)
    return copied, copier.originals()


class Copier:
    """Copies nested values deeply; `change` makes the copy of each tensor."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self._change = change
        # By id. The originals are kept alive, so that no later object gets their ids.
        self._made: dict[int, tuple[Any, Any]] = {}

    def originals(self) -> dict[int, Any]:
        """Map the id of each copy to its original."""
        return {id(made): original for original, made in self._made.values() if made is not original}

    def copy(self, value: Any) -> Any:
        """Copy a value, once however often it occurs; what cannot be copied is returned itself."""
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
        # The hooks of modules lie in ordered dicts, most of them empty: this is faster than taking them apart.
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
            # As in `nn.Module.__getstate__`, the compiled call stays with the original.
            held = {name: item for name, item in vars(value).items() if name != "_compiled_call_impl"}
            vars(made).update({name: self.copy(item) for name, item in held.items()})
            return made
        if isinstance(value, torch.jit.ScriptModule):
            # Its tensors lie in C++, where no attribute leads.
            with suppress(Exception):
                return self._keep(value, copy.deepcopy(value))
            return self._keep(value, value)
        if isinstance(value, torch.Generator):
            return self._keep(value, torch.Generator(value.device).set_state(value.get_state()))
        if isinstance(value, np.ndarray):
            return self._keep(value, value.copy())
        return self._object(value)

    def _object(self, value: Any) -> Any:
        reduced = taken_apart(value)
        if reduced is None:
            return self._keep(value, value)
        try:
            made = self._keep(value, reduced.make(*map(self.copy, reduced.arguments)))
            fill(made, self.copy(reduced.state), self.copy(reduced.items), self.copy(reduced.pairs))
        except Exception:
            return self._keep(value, value)
        return made

    def _keep(self, value: Any, made: Any) -> Any:
        self._made[id(value)] = value, made
        return made
