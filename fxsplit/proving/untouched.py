"""Runs a model and restores it to what it was before, bit for bit."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxsplit.proving.equality import differences, leaves, random_states, set_random_states

CONTAINERS = (list, dict, set, OrderedDict, defaultdict)


@contextmanager
def untouched(*roots: nn.Module) -> Iterator[None]:
    """Restore at the end all that a forward or backward of these modules may have changed, also after an exception.

    Restored are the random states; each module's attributes, mode, hooks, and what is registered in it; the contents of
    parameters and buffers, of tensors and generators in attributes, and of lists, dicts and sets in attributes;
    gradients and `requires_grad`. Other objects in attributes are the same ones afterwards, but their contents are not
    restored.
    """
    modules = dict.fromkeys(module for root in roots for module in root.modules())
    kept = _Kept()
    for module in modules:
        kept.keep(vars(module))
    states = random_states()
    try:
        yield
    finally:
        kept.put_back()
        set_random_states(states)


class _Kept:
    """Keeps copies of the contents of objects that can be changed in place, by their id."""

    def __init__(self) -> None:
        self._containers: dict[int, tuple[Any, Any]] = {}
        self._tensors: dict[int, tuple[Tensor, Tensor, Tensor | None, bool]] = {}
        self._generators: dict[int, tuple[torch.Generator, Tensor]] = {}

    def keep(self, value: Any) -> None:
        """Keep the contents of a value, and of the values in it."""
        if isinstance(value, Tensor):
            self._keep_tensor(value)
        elif isinstance(value, torch.Generator):
            self._generators[id(value)] = value, value.get_state()
        elif type(value) in CONTAINERS and id(value) not in self._containers:
            self._containers[id(value)] = value, value.copy()
            for item in value.values() if isinstance(value, dict) else value:
                self.keep(item)
        elif isinstance(value, tuple):
            for item in value:
                self.keep(item)

    def _keep_tensor(self, tensor: Tensor) -> None:
        if id(tensor) not in self._tensors:
            grad = tensor.grad if tensor.is_leaf else None
            self._tensors[id(tensor)] = tensor, tensor.detach().clone(), grad, tensor.requires_grad

    def put_back(self) -> None:
        """Write all contents back into the objects; those that have not changed are not written."""
        for container, content in self._containers.values():
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        for generator, state in self._generators.values():
            generator.set_state(state)
        for tensor, content, grad, wants_gradient in self._tensors.values():
            if differences(leaves(content, "", copied=False), leaves(tensor.detach(), "", copied=False)):
                with torch.no_grad():
                    tensor.copy_(content)
            if tensor.is_leaf:
                tensor.grad = grad
                if tensor.requires_grad != wants_gradient:
                    tensor.requires_grad_(wants_gradient)
