"""Changes the ends of a model in place: a classifier for other classes, a stem for small images."""

from __future__ import annotations

import torch
from torch import nn

from fxsplit.errors import UsageError


def fit_classifier(model: nn.Module, spec: str, known_classes: int, num_classes: int) -> None:
    """Replace the last linear layer of the pretrained model `spec`, in place, if it has another number of classes.

    The new one starts at zero, as `clear_classifier` says. Raises UsageError when the model does not end in a linear
    layer of `known_classes` outputs.
    """
    if known_classes == num_classes:
        return
    linears = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linears or linears[-1][1].out_features != known_classes:
        raise UsageError(
            f"the pretrained {spec!r} does not end in a linear layer that could be replaced by one of "
            f"{num_classes} classes; build it without pretrained weights"
        )
    path, last = linears[-1]
    head = nn.Linear(last.in_features, num_classes, bias=last.bias is not None)
    clear_classifier(head, num_classes)
    model.set_submodule(path, head)


@torch.no_grad()
def clear_classifier(head: nn.Module, num_classes: int) -> None:
    """Set the parameters of a new head of a pretrained model to zero, if they are those of `num_classes` classes.

    Then its random weights send no random gradients into the pretrained ones (Kolesnikov et al., Big transfer, 2020).
    """
    for parameter in head.parameters():
        if parameter.dim() and parameter.shape[0] == num_classes:
            parameter.zero_()


def keep_small_images(model: nn.Module, spec: str) -> None:
    """Give the model `spec`, in place, the stem that `build` calls "cifar". Raises UsageError if that is impossible."""
    convolutions = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    if not convolutions or max(convolutions[0][1].stride) == 1:
        raise UsageError(f"{spec!r} has no stem to change: it does not begin with a strided convolution")
    path, conv = convolutions[0]
    if hasattr(model.get_submodule(path.rpartition(".")[0]), "patch_size"):
        raise UsageError(f"the stem of {spec!r} cannot change, because all its layers depend on its patches")
    if conv.kernel_size == (3, 3):
        conv.stride = conv.padding = (1, 1)
    else:
        bias = conv.bias is not None
        small = type(conv)(conv.in_channels, conv.out_channels, 3, stride=1, padding=1, groups=conv.groups, bias=bias)
        model.set_submodule(path, small)
    if pooling := _stem_pooling(model, path):
        model.set_submodule(pooling, nn.Identity())


def _stem_pooling(model: nn.Module, conv_path: str) -> str | None:
    """Find the first pooling that is registered after the first convolution and before any block, or None."""
    modules: list[tuple[str, nn.Module]] = list(model.named_modules())
    start = [path for path, _ in modules].index(conv_path) + 1
    for path, module in modules[start:]:
        if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            return path
        if sum(isinstance(inner, nn.Conv2d) for inner in module.modules()) > 1:
            return None
    return None
