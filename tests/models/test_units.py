"""Where real models come apart: by their graph alone, and by what their libraries say of them."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

import fxsplit
from fxsplit.models import registry
from fxsplit.models.units import units_of
from fxsplit.plan.cuts import cuts
from fxsplit.plan.partition import most_partitions


@cache
def captured(name: str) -> fxsplit.Trace:
    with torch.device("meta"):
        model = registry.build(name, num_classes=10, img_size=224)
    return fxsplit.trace(model, (torch.empty(2, 3, 224, 224, device="meta"),))


def stages(prefix: str, *blocks: int, first: int = 1) -> list[str]:
    """The borders of `blocks` in each stage: `layer1`, `layer1.1`, `layer1.2`, `layer2` ..."""
    return [
        f"{prefix}{stage}.{block}".removesuffix(".0")
        for stage, count in enumerate(blocks, start=first)
        for block in range(count)
    ]


NATURAL = {
    "timm:resnet50": [*stages("layer", 3, 4, 6, 3), "fc"],
    "timm:resnext50_32x4d": [*stages("layer", 3, 4, 6, 3), "fc"],
    "timm:densenet121": [*(f"features.denseblock{index}" for index in (1, 2, 3, 4)), "classifier"],
    "timm:vgg16_bn": ["features.7", "features.14", "features.24", "features.34", "pre_logits", "head"],
    "timm:vit_tiny_patch16_224": ["blocks", *(f"blocks.{index}" for index in range(1, 12)), "head"],
    "timm:convnext_atto": [
        "stages", "stages.0.blocks.1", "stages.1", "stages.1.blocks", "stages.1.blocks.1", "stages.2",
        "stages.2.blocks", *(f"stages.2.blocks.{index}" for index in range(1, 6)),
        "stages.3", "stages.3.blocks", "stages.3.blocks.1", "head.fc",
    ],
    "timm:efficientnet_b0": [*stages("blocks.", 1, 2, 2, 3, 3, 4, 1, first=0)[1:], "conv_head", "classifier"],
    "timm:mobilenetv3_small_100": [*stages("blocks.", 1, 2, 3, 2, 3, 1, first=0)[1:], "conv_head"],
}  # fmt: skip


@pytest.mark.parametrize("name", NATURAL)
def test_natural_cuts_are_those_that_a_person_would_choose(name: str) -> None:
    trace = captured(name)
    found = [cut.path for cut in cuts(trace) if cut.natural]
    assert found == NATURAL[name]


def borders(trace: fxsplit.Trace) -> list[str]:
    """All cuts by block, which is as many as there can be."""
    units = units_of(trace.model)
    most = most_partitions(trace, by="block", units=units)
    return [part.name for part in fxsplit.partition(trace, count=most, by="block")[1:]]


def test_timms_groups_are_units() -> None:
    assert borders(captured("timm:resnet50")) == [*stages("layer", 3, 4, 6, 3), "fc"]
    assert borders(captured("timm:mobilenetv3_small_100")) == [
        "blocks", *stages("blocks.", 1, 2, 3, 2, 3, 1, first=0)[1:], "conv_head",
    ]  # fmt: skip


def test_without_a_hint_the_models_children_are_units() -> None:
    assert borders(captured("torchvision:vgg11")) == ["avgpool", "classifier"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.linear(x))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers, self.norm = nn.Linear(3, 4), nn.Sequential(Block(), Block()), nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layers(self.embed(x)))


class LanguageModel(nn.Module):
    """Says in Hugging Face's way which of its classes stay whole."""

    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Sequential(nn.Dropout(), nn.Linear(4, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x))


def test_hugging_faces_blocks_are_units_and_what_lies_around_them_too() -> None:
    model = LanguageModel()
    assert list(units_of(model)) == ["encoder.embed", "encoder.layers.0", "encoder.layers.1", "encoder.norm", "head"]
    trace = fxsplit.trace(model, (torch.rand(2, 3),))
    assert borders(trace) == ["encoder.layers", "encoder.layers.1", "encoder.norm", "head"]
    model._no_split_modules = ("Encoder",)
    assert borders(trace) == ["head"]
