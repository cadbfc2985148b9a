"""A number that changes from step to step, such as a learning rate: recorded steps read it from the device."""

from __future__ import annotations

import torch
from torch import Tensor


class Number:
    """Holds a number that is set before a step and read within it.

    Args:
        device: where recorded steps read it, from a float32 tensor () that stays where it is; None holds a float.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._float = 0.0
        self._tensor = None if device is None else torch.zeros((), device=device)

    def set(self, value: float) -> None:
        """Set the number; nothing is sent to the device if it is the same."""
        if self._tensor is not None and value != self._float:
            self._tensor.fill_(value)
        self._float = value

    @property
    def value(self) -> float | Tensor:
        """The number: the tensor, where there is a device."""
        return self._float if self._tensor is None else self._tensor
