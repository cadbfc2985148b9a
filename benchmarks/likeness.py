"""What a pretrained EfficientNet-Lite0 makes of images, by depth: how much a linear head reads there, and how far
BatchNorm's statistics lie from those of the pretraining.

    python benchmarks/likeness.py lite0.safetensors FOLDER --img-size 64 --train-limit 1000

FOLDER has train/CLASS/* and test/CLASS/*, of which 100 of each class are tested on. Heads train on the means over
positions of what each stage delivers. The divergence is that of Kullback and Leibler between the normal distributions
that mean and variance describe, of each channel: the median over channels, averaged over the norms of a stage.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Annotated

import numpy as np
import timm
import torch
import typer
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

TESTED, LOOKED_AT, STEPS = 100, 128, 300


def main(
    weights: Annotated[Path, typer.Argument(help="As benchmarks/imagenet_weights.py writes them.")],
    folder: Annotated[Path, typer.Argument(help="The images.")],
    img_size: Annotated[int, typer.Option(help="Side of the images in pixels.")] = 64,
    train_limit: Annotated[int, typer.Option(help="Images that heads train on.")] = 1000,
) -> None:
    """Print accuracies of heads, and divergences, stage by stage."""
    torch.manual_seed(0)
    net = timm.create_model("tf_efficientnet_lite0")
    net.load_state_dict(load_file(weights))
    net.eval()
    classes = sorted(path.name for path in (folder / "train").iterdir())
    train, labels = load(folder / "train", classes, train_limit // len(classes), img_size)
    test, wanted = load(folder / "test", classes, TESTED, img_size)
    read, known = features(net, train), features(net, test)
    found = (head_accuracy(read[name], labels, known[name], wanted) for name in read)
    print("heads, %:", " ".join(f"{name} {accuracy:.1f}" for name, accuracy in zip(read, found, strict=True)))
    every = torch.randperm(len(train))[:LOOKED_AT]
    print("divergence:", " ".join(f"{name} {value:.3f}" for name, value in divergences(net, train[every]).items()))


def load(folder: Path, classes: list[str], each: int, size: int) -> tuple[Tensor, Tensor]:
    """Return images of all classes, float32 (N, 3, size, size), prepared as the weights want it, and labels (N,)."""
    pixels = []
    for name in classes:
        for path in sorted((folder / name).iterdir())[:each]:
            with Image.open(path) as image:
                pixels.append(np.array(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)))
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()
    return (images - 127) / 128, torch.arange(len(classes)).repeat_interleave(each)


@torch.no_grad()
def features(net: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return what each stage delivers, averaged over positions: (N, C) by name."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    stages = {f"blocks.{index}": stage for index, stage in enumerate(net.blocks)} | {"head": net.global_pool}
    handles = [
        stage.register_forward_hook(lambda _, __, out, name=name: found[name].append(out.flatten(2).mean(2)))
        if name != "head"
        else stage.register_forward_hook(lambda _, __, out: found["head"].append(out))
        for name, stage in stages.items()
    ]
    for batch in images.split(64):
        net(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def head_accuracy(given: Tensor, labels: Tensor, tested: Tensor, wanted: Tensor) -> float:
    """Train a linear head, and return its accuracy on other images in per cent."""
    mean, deviation = given.mean(0), given.std(0) + 1e-6
    given, tested = (given - mean) / deviation, (tested - mean) / deviation
    head = nn.Linear(given.shape[1], int(labels.max()) + 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.AdamW(head.parameters(), lr=5e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(head(given), labels).backward()
        optimizer.step()
        schedule.step()
    return 100 * float((head(tested).argmax(1) == wanted).float().mean())


@torch.no_grad()
def divergences(net: nn.Module, images: Tensor) -> dict[str, float]:
    """Return how far the statistics of `images` lie from the running ones, by stage."""
    found: dict[str, list[float]] = defaultdict(list)

    def look(name: str, norm: nn.BatchNorm2d, value: Tensor) -> None:
        variance, mean = torch.var_mean(value, (0, 2, 3), correction=0)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        known = norm.running_var + norm.eps
        ratio = (variance + norm.eps) / known
        divergence = ((mean - norm.running_mean) ** 2 / known + ratio - 1 - ratio.log()) / 2
        found[name].append(float(divergence.median()))

    handles = [
        module.register_forward_pre_hook(lambda norm, given, name=name: look(name, norm, given[0]))
        for path, module in net.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for name in [".".join(path.split(".")[:2]) if path.startswith("blocks") else path]
    ]
    net(images)
    for handle in handles:
        handle.remove()
    return {name: fmean(values) for name, values in found.items()}


if __name__ == "__main__":
    typer.run(main)
