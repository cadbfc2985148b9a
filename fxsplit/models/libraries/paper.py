"""Builds the four networks of Bhyravabhottla and Lee, "Comparison between layer-to-layer network training and
conventional network training using Deep Convolutional Neural Networks", section 3, from its text.

Every builder takes the number of classes, the side of the square images in pixels and their channels, and returns a
module that maps images (N, in_channels, img_size, img_size) to logits (N, num_classes): cross-entropy applies the
softmax that the text puts last. Weights are Glorot-uniform and biases zero, the defaults of Keras, in which the paper's
experiments are written. What the text leaves open is as in the architecture that it names.

The builders raise UsageError when poolings would leave nothing of the image.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fxsplit.errors import NoModelError, UsageError, nearest, shown
from fxsplit.models.libraries.library import DROP_PATH, Library, drop_path_argument, refuse_pretrained
from fxsplit.models.surgery import keep_small_images


def cnn(num_classes: int = 10, img_size: int = 32, in_channels: int = 3) -> nn.Module:
    """Build the 12-layer base network ("Architecture"): one child module a layer, ReLUs with the layer before."""
    _require_pixels(img_size, at_least=4)
    side = img_size // 4  # two poolings
    return _glorot(
        nn.Sequential(
            OrderedDict(
                conv1=_conv_relu(in_channels, 32),
                conv2=_conv_relu(32, 32),
                pool1=nn.MaxPool2d(2),
                drop1=nn.Dropout(0.25),
                conv3=_conv_relu(32, 64),
                conv4=_conv_relu(64, 64),
                pool2=nn.MaxPool2d(2),
                drop2=nn.Dropout(0.25),
                flatten=nn.Flatten(),
                fc1=nn.Sequential(OrderedDict(linear=nn.Linear(64 * side * side, 512), relu=nn.ReLU())),
                drop3=nn.Dropout(0.5),
                fc2=nn.Linear(512, num_classes),
            )
        )
    )


def vgg16(num_classes: int = 10, img_size: int = 32, in_channels: int = 3) -> nn.Module:
    """Build what "VGG16 Architecture" describes: the layers of `cnn`, not the sixteen of Simonyan and Zisserman.

    Of the parameter counts in that section, for images (32, 32, 3), the network has 896, 18,496, 2,097,664 and 513 a
    class. Two contradict the text around them, which is followed here: the second convolution of a pair, "with the same
    parameters" as the first, reads 32 (or 64) channels and so has 9,248 parameters, not 896 (or 36,928, not 18,496).
    The 64 * 8 * 8 flattened values are those after two poolings.
    """
    return cnn(num_classes, img_size, in_channels)


def resnext(num_classes: int = 10, img_size: int = 32, in_channels: int = 3, drop_path_rate: float = 0.0) -> nn.Module:
    """Build four residual groups of two 3x3 convolutions with 64, 128, 256 and 512 filters, each followed by max
    pooling ("ResNext Architecture").

    The text leaves open how a group splits, transforms and merges. As in Xie et al., "Aggregated Residual
    Transformations for Deep Neural Networks", an ordinary convolution prepares the 32 paths, a grouped one (cardinality
    32) transforms each alone, and adding the shortcut merges them. The last ReLU of a group follows the addition, the
    shortcut is a 1x1 convolution with BatchNorm where the filters double, convolutions before a BatchNorm have no bias,
    and BatchNorm has eps 1e-5 and momentum 0.1 (Keras' momentum of 0.99, torch's 0.01, needs more steps than a short
    run has).

    The paper has no stochastic depth. With `drop_path_rate` above 0, group l of the 4 leaves out its transformed paths
    for an image at l / 4 of that rate, as in Huang et al., "Deep Networks with Stochastic Depth".
    """
    _require_pixels(img_size, at_least=16)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = in_channels
    for number, filters in enumerate((64, 128, 256, 512), start=1):
        layers[f"group{number}"] = ResNeXtGroup(channels, filters, drop_path_rate * number / 4)
        layers[f"pool{number}"] = nn.MaxPool2d(2)
        channels = filters
    layers.update(gap=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(channels, num_classes))
    return _glorot(nn.Sequential(layers))


def densenet(num_classes: int = 10, img_size: int = 32, in_channels: int = 3) -> nn.Module:
    """Build a convolution with BatchNorm and ReLU, three dense blocks of bottlenecks, global average pooling and the
    classifier ("DenseNet Architecture").

    The text gives no sizes. As in Huang et al., "Densely Connected Convolutional Networks", this is DenseNet-BC for
    CIFAR with their smallest depth and growth rate, 40 and 12, which two cores still train: 24 filters first, six
    layers a block, bottlenecks of 4 * 12 filters, BatchNorm and ReLU before each convolution, and transitions that
    halve both the channels (1x1 convolution) and the side (average pooling). BatchNorm is as in `resnext`, for the same
    reason, and there is no dropout.
    """
    _require_pixels(img_size, at_least=4)
    growth, depth, blocks = 12, 40, 3
    layers_per_block = (depth - blocks - 1) // (2 * blocks)  # the others: first, transitions, classifier
    channels = 2 * growth
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
        bn=nn.BatchNorm2d(channels),
        relu=nn.ReLU(),
    )
    for number in range(1, blocks + 1):
        inputs = [channels + growth * index for index in range(layers_per_block)]
        layers[f"block{number}"] = nn.Sequential(*(DenseLayer(count, growth) for count in inputs))
        channels += growth * layers_per_block
        if number < blocks:
            layers[f"transition{number}"] = _norm_conv(channels, channels // 2, kernel=1)
            layers[f"pool{number}"] = nn.AvgPool2d(2)
            channels //= 2
    layers.update(
        last_bn=nn.BatchNorm2d(channels),
        last_relu=nn.ReLU(),
        gap=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(channels, num_classes),
    )
    return _glorot(nn.Sequential(layers))


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "cnn": cnn,
    "vgg16": vgg16,
    "resnext": resnext,
    "densenet": densenet,
}


class ResNeXtGroup(nn.Module):
    """Maps (N, channels, H, W) to (N, filters, H, W) by two 3x3 convolutions, the second in 32 paths, and a shortcut.

    In training the convolutions are left out for an image at the rate `drop_path`.
    """

    def __init__(self, channels: int, filters: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, groups=32, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.shortcut = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(channels, filters, 1, bias=False), bn=nn.BatchNorm2d(filters))
        )
        self.relu2 = nn.ReLU()
        self.drop_path = _stochastic_depth(drop_path) if drop_path else None

    def forward(self, x: Tensor) -> Tensor:
        transformed = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.drop_path is not None:
            transformed = self.drop_path(transformed)
        merged: Tensor = self.relu2(transformed + self.shortcut(x))
        return merged


class DenseLayer(nn.Module):
    """Maps (N, channels, H, W) to (N, channels + growth, H, W): the input, and the output of a bottleneck and a
    convolution.
    """

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.bottleneck = _norm_conv(channels, 4 * growth, kernel=1)
        self.conv = _norm_conv(4 * growth, growth, kernel=3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(self.bottleneck(x))], dim=1)


def _conv_relu(channels: int, filters: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(channels, filters, 3, padding=1), relu=nn.ReLU()))


def _norm_conv(channels: int, filters: int, *, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            bn=nn.BatchNorm2d(channels),
            relu=nn.ReLU(),
            conv=nn.Conv2d(channels, filters, kernel, padding=kernel // 2, bias=False),
        )
    )


def _stochastic_depth(rate: float) -> nn.Module:
    from torchvision.ops import StochasticDepth  # the networks themselves need no torchvision

    layer: nn.Module = StochasticDepth(rate, "row")
    return layer


def _glorot(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


def _require_pixels(img_size: int, *, at_least: int) -> None:
    if img_size < at_least:
        raise UsageError(
            f"images of {img_size} x {img_size} pixels vanish in this network's poolings; "
            f"use at least {at_least} x {at_least}"
        )


def _build(name: str, *, num_classes: int, img_size: int, pretrained: bool, stem: str, drop_path: float) -> nn.Module:
    spec = f"paper:{name}"
    if name not in NETWORKS:
        raise NoModelError(
            f"the paper has no network {shown(name)}, only {', '.join(NETWORKS)}{nearest(name, NETWORKS)}"
        )
    refuse_pretrained(spec, pretrained)
    model = NETWORKS[name](num_classes, img_size, 3, **drop_path_argument(DROP_PATH, drop_path))
    if stem == "cifar":
        keep_small_images(model, spec)
    return model


LIBRARY = Library(build=_build, names=lambda: list(NETWORKS), native_size=lambda _name: 32)
