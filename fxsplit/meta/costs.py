"""Measures what single operations cost: multiply-adds, and the bytes that autograd keeps for their backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxsplit.meta.evaluate import StandIn, bytes_of, storage_key
from fxsplit.meta.kernels import Kernels
from fxsplit.objects.structure import map_tensors, tensors_in


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Holds what one operation on the whole batch costs.

    `saved` maps the keys of the storages that autograd keeps for it to their bytes; `new_bytes` sums those that no
    earlier operation keeps.
    """

    macs: int = 0
    backward_macs: int = 0
    new_bytes: int = 0
    saved: Mapping[int, int] = field(default_factory=dict)


class CostMeter:
    """Measures operations one after the other, on the meta device or a real one.

    `free` are tensors that cost nothing when autograd keeps them: parameters, buffers and the inputs of the model. A
    storage that several operations keep is charged to the first of them.
    """

    def __init__(self, free: Iterable[Tensor], kernels: Kernels) -> None:
        self._kernels = kernels
        # Kept alive, so that no later storage gets the key of one of them.
        self._kept: list[Tensor] = list(free)
        self._free = {storage_key(tensor) for tensor in self._kept}
        self._charged = set(self._free)
        self._backward_macs: dict[object, int] = {}

    def measure(self, run: Callable[[Any], Any], given: Any, state: Sequence[Tensor]) -> tuple[Any, Cost]:
        """Call `run` on the nested values `given` and return its result and cost; `state` are parameters that it uses.

        Only what torch's flop counter knows counts as multiply-adds: matrix products, convolutions and attention.
        """
        saved: dict[int, int] = {}
        needed: list[Tensor] = []

        def keep(tensor: Tensor) -> int:
            key = storage_key(tensor)
            if key not in self._free and key not in saved:
                saved[key] = bytes_of(tensor)
                self._kept.append(tensor.detach())
            needed.append(tensor)
            return len(needed) - 1

        # Backward runs on these inside of the op at most, which may take gradients itself. Then they are dropped: an op
        # that saved its own output would never be freed.
        with self._kernels.counting() as flops, torch.autograd.graph.saved_tensors_hooks(keep, needed.__getitem__):
            value = run(given)
        needed.clear()
        new_bytes = sum(size for key, size in saved.items() if key not in self._charged)
        self._charged.update(saved)
        macs = sum(flops.values()) // 2
        backward_macs = 0
        made, used = tensors_in(value), (*tensors_in(given), *state)
        # Backward cannot run where meta tensors and real ones meet.
        mixed = isinstance(value, StandIn) or len({tensor.device for tensor in (*made, *used)}) > 1
        if macs and not mixed and any(tensor.requires_grad for tensor in made):
            # Models repeat layers: backward of the same work on the same shapes is counted once.
            wanting = (tensor.shape for tensor in used if tensor.requires_grad)
            kind = (*flops.items(), *wanting)
            if kind not in self._backward_macs:
                self._backward_macs[kind] = self._count_backward(run, given, state)
            backward_macs = self._backward_macs[kind]
        return value, Cost(macs=macs, backward_macs=backward_macs, new_bytes=new_bytes, saved=saved)

    def _count_backward(self, run: Callable[[Any], Any], given: Any, state: Sequence[Tensor]) -> int:
        """Run once more, detached from earlier ops, and count the multiply-adds of all gradients that are wanted."""
        wanting = [tensor for tensor in state if tensor.requires_grad]

        def detached(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            wanting.append(tensor.detach().requires_grad_())
            # `run` may write into it in place, which autograd forbids for a leaf.
            return wanting[-1].clone()

        made = [tensor for tensor in tensors_in(run(map_tensors(detached, given))) if tensor.requires_grad]
        if not wanting:
            return 0
        with self._kernels.counting() as flops:
            torch.autograd.grad(made, wanting, [torch.empty_like(tensor) for tensor in made], allow_unused=True)
        return int(sum(flops.values()) // 2)
