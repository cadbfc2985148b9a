"""Models of a kind that the libraries do not have: `fxsplit check --forecast benchmarks/models.py:unet`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that everybody gives it


def unet(num_classes: int) -> nn.Module:
    """A small U-Net: images (N, 3, H, W) to maps (N, num_classes, H, W)."""
    return UNet(num_classes)


class UNet(nn.Module):
    """Three levels down and up again, what was made on the way down joined on the way up."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.down1, self.down2, self.down3 = _double(3, 16), _double(16, 32), _double(32, 64)
        self.bottom = _double(64, 128)
        self.up3, self.up2, self.up1 = _double(192, 64), _double(96, 32), _double(48, 16)
        self.head = nn.Conv2d(16, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        third = self.down3(F.max_pool2d(second, 2))
        y = self.bottom(F.max_pool2d(third, 2))
        for skip, up in ((third, self.up3), (second, self.up2), (first, self.up1)):
            y = up(torch.cat([skip, F.interpolate(y, scale_factor=2.0)], 1))
        maps: Tensor = self.head(y)
        return maps


def _double(channels: int, filters: int) -> nn.Module:
    return nn.Sequential(
        *(
            layer
            for width in (channels, filters)
            for layer in (nn.Conv2d(width, filters, 3, padding=1), nn.BatchNorm2d(filters), nn.ReLU(inplace=True))
        )
    )
