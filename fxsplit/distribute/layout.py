"""Tensors of which each process has a part: told from others, made whole, and divided again.

A parameter that is divided, and with it gradient, optimizer state and averages, is a DTensor of torch, along its first
dimension. Arithmetic on those is that on whole tensors, so most code need not ask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed

from fxsplit.objects.structure import is_divided


def own_part(tensor: Tensor) -> Tensor:
    """Return the part of this process; all of a tensor that is not divided."""
    return tensor.to_local() if is_divided(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor that is divided; all processes must ask for it. Others are returned as they are."""
    if not is_divided(tensor):
        return tensor
    found: Tensor = tensor.full_tensor()
    # Where the parts are not of one size torch returns a view of more memory, which no file would take.
    return found if found.nbytes == found.untyped_storage().nbytes() else found.clone()


def divided_as(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a tensor as `other` of the same shape is: whole, or this process's part of it.

    Nothing is sent unless it was divided and is to be whole. What becomes divided gets type and device of `other`.
    """
    if not is_divided(other):
        return whole(tensor)
    if is_divided(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    placed = tensor.to(other.device, other.dtype)
    return distribute_tensor(placed, other.device_mesh, other.placements, src_data_rank=None)


def agreed(here: bool) -> bool:
    """Tell whether something holds in all processes, which all must ask."""
    given = torch.tensor(int(here))
    distributed.all_reduce(given, distributed.ReduceOp.MIN)
    return bool(given)


@torch.no_grad()
def gathered(state: Any, *, keep: bool) -> Any:
    """Return nested plain data with whole tensors in place of those that are divided; all processes must ask for it.

    They are gathered one after the other into memory of the host: where this process is to `keep` them. Elsewhere each
    is empty.
    """
    if is_divided(state):
        found = whole(state.detach())
        return found.cpu() if keep else found.new_empty(0)
    if isinstance(state, Mapping):
        return {key: gathered(each, keep=keep) for key, each in state.items()}
    if isinstance(state, list | tuple):
        items = [gathered(each, keep=keep) for each in state]
        return tuple(items) if isinstance(state, tuple) else items
    return state
