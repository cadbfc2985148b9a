"""What one operation costs: multiply-adds, and the bytes that autograd keeps for its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fxsplit.capture.meta import storage_key


class CostMeter:
    """Measures operations one after the other, on the meta device as well as on a real one.

    `known` are tensors that cost nothing when they are kept: parameters, buffers and the inputs of the model. A storage
    that several operations keep is charged to the first of them.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._kept: list[Tensor] = list(known)
        self._charged = {storage_key(tensor) for tensor in self._kept}

    def measure(self, run: Callable[[], Any]) -> tuple[Any, int, int]:
        """Call `run`; return its value, the multiply-adds of the batch, and the bytes newly kept for backward.

        Multiply-adds are those that torch's flop counter knows: matrix products, convolutions and attention.
        """
        bytes_kept = 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal bytes_kept
            key = storage_key(tensor)
            if key not in self._charged:
                self._charged.add(key)
                self._kept.append(tensor)
                bytes_kept += tensor.untyped_storage().nbytes()
            return tensor

        counter = FlopCounterMode(display=False)
        with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = run()
        return value, counter.get_total_flops() // 2, bytes_kept
