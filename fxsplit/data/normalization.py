"""From pixels to what a model takes: (pixels / 255 - mean) / std."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalization(nn.Module):
    """Scales pixels to [0, 1] and normalizes them, alike on every device.

    Args:
        mean: subtracted from images in [0, 1]: one number, or one a channel; none leaves them as they are.
        std: what images are then divided by, likewise.
        device: where the pixels are.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu") -> None:
        super().__init__()
        self._has_mean, self._has_std = len(mean) > 0, len(std) > 0
        for name, numbers in {"white": (255,), "mean": mean, "std": std}.items():
            tensor = torch.tensor(numbers, dtype=torch.float32, device=device).view(1, -1, 1, 1)
            self.register_buffer(name, tensor, persistent=False)

    white: Tensor
    mean: Tensor
    std: Tensor

    def forward(self, pixels: Tensor) -> Tensor:
        """Return images, float32 (B, C, H, W), for pixels (B, C, H, W)."""
        # A quotient by a tensor is rounded alike on every device; of converted pixels it takes half of the time.
        images = pixels.to(torch.float32, copy=True).div_(self.white)
        if self._has_mean:
            images = images.sub_(self.mean)
        if self._has_std:
            images = images.div_(self.std)
        return images
