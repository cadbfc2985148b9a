"""Models of kinds or sizes that the libraries do not have: `fxsplit check --forecast benchmarks/models.py:unet`.

`vgg`, `resnext` and `densenet` are small ones of the layer-to-layer paper's families, for images of 32 pixels, that two
CPU cores train in minutes.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxsplit.models.libraries.paper import DenseLayer, ResNeXtGroup


def vgg(num_classes: int) -> nn.Module:
    """Five 3x3 convolutions of 16, 32, 32, 64 and 64 filters with BatchNorm, three poolings, two linear layers."""
    layers: list[nn.Module] = []
    channels = 3
    for widths in ((16,), (32, 32), (64, 64)):
        for width in widths:
            layers += _norm_relu(nn.Conv2d(channels, width, 3, padding=1, bias=False), width)
            channels = width
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(16 * channels, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, num_classes)]
    return nn.Sequential(*layers)


def resnext(num_classes: int) -> nn.Module:
    """A strided convolution, then residual groups of 32, 64 and 128 filters in 32 paths, each with a pooling."""
    channels = 16
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=_stem(channels))
    for number, filters in enumerate((32, 64, 128), start=1):
        layers[f"group{number}"] = ResNeXtGroup(channels, filters)
        layers[f"pool{number}"] = nn.MaxPool2d(2)
        channels = filters
    layers.update(gap=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(channels, num_classes))
    return nn.Sequential(layers)


def densenet(num_classes: int) -> nn.Module:
    """A strided convolution, then three dense blocks of three bottlenecks with growth rate 8."""
    growth, per_block, channels = 8, 3, 16
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=_stem(channels))
    for number in range(1, 4):
        inputs = [channels + growth * index for index in range(per_block)]
        layers[f"block{number}"] = nn.Sequential(*(DenseLayer(count, growth) for count in inputs))
        channels += growth * per_block
        if number < 3:
            half = channels // 2
            layers[f"transition{number}"] = nn.Sequential(
                nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, half, 1, bias=False), nn.AvgPool2d(2)
            )
            channels = half
    layers.update(
        norm=nn.BatchNorm2d(channels),
        relu=nn.ReLU(),
        gap=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(channels, num_classes),
    )
    return nn.Sequential(layers)


def _stem(filters: int) -> nn.Module:
    return nn.Sequential(*_norm_relu(nn.Conv2d(3, filters, 3, stride=2, padding=1, bias=False), filters))


def _norm_relu(convolution: nn.Module, filters: int) -> list[nn.Module]:
    return [convolution, nn.BatchNorm2d(filters), nn.ReLU(inplace=True)]


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
            for layer in _norm_relu(nn.Conv2d(width, filters, 3, padding=1), filters)
        )
    )
