"""Compares values by structure and bits."""

from __future__ import annotations

from collections.abc import Mapping
from types import CellType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxsplit.objects.structure import taken_apart


def same_value(a: Any, b: Any) -> bool:
    """Whether two values are equal in type, structure and every bit; objects are compared by what they hold.

    Modules, and objects that cannot be taken apart, are the same only if they are identical.
    """
    return Comparison().values(a, b)


class Comparison:
    """Compares values; nodes of two graphs are the same if `nodes` maps the first to the second."""

    def __init__(self, nodes: Mapping[fx.Node, fx.Node] | None = None) -> None:
        self._nodes = nodes or {}
        # Pairs under comparison, which may refer to themselves; kept alive, so that their ids stay theirs.
        self._seen: dict[tuple[int, int], tuple[Any, Any]] = {}

    def values(self, a: Any, b: Any) -> bool:
        """Whether `a` and `b` are the same, as `same_value` defines it."""
        if isinstance(a, fx.Node):
            return self._nodes.get(a) is b
        if type(a) is not type(b):
            return False
        if a is b or (id(a), id(b)) in self._seen:
            return True
        if isinstance(a, Tensor):
            return same_tensor(a, b)
        if isinstance(a, float):
            return a == b or (a != a and b != b)
        if isinstance(a, str | int | bytes | complex | torch.dtype | torch.device | torch.Size | range):
            return bool(a == b)
        self._seen[id(a), id(b)] = a, b
        if isinstance(a, np.ndarray | np.generic):
            return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
        if isinstance(a, Mapping):
            return self._pairs(list(a.items()), list(b.items())) and self._attributes(a, b)
        if isinstance(a, tuple | list):
            return self._pairs(a, b) and self._attributes(a, b)
        if isinstance(a, set | frozenset):
            return bool(a == b)
        if isinstance(a, slice):
            return self._pairs((a.start, a.stop, a.step), (b.start, b.stop, b.step))
        if isinstance(a, FunctionType):
            # A function that is defined inside forward is another object in each call.
            return a.__code__ is b.__code__ and self.values(_held_by(a), _held_by(b))
        if isinstance(a, type | nn.Module):
            return False
        first, second = taken_apart(a), taken_apart(b)
        return first is not None and second is not None and self._pairs(first, second)

    def _pairs(self, a: Any, b: Any) -> bool:
        return len(a) == len(b) and all(self.values(one, other) for one, other in zip(a, b, strict=True))

    def _attributes(self, a: Any, b: Any) -> bool:
        return self._pairs(list(vars(a).items()), list(vars(b).items())) if hasattr(a, "__dict__") else True


def _held_by(function: FunctionType) -> tuple[Any, ...]:
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    return cells, function.__defaults__, function.__kwdefaults__


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal in shape, dtype, device, layout and, unless on meta, every bit; NaN equals NaN."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device or a.layout != b.layout:
        return False
    if a.is_meta:
        return True
    if a.layout is not torch.strided:
        return same_tensor(a.to_dense(), b.to_dense())
    return torch.equal(*(each.detach().contiguous().reshape(-1).view(torch.uint8) for each in (a, b)))
