"""Images per second of each augmentation, beside timm's own loader on the same files, with the same workers.

    taskset -c 0,1 python benchmarks/augment.py FOLDER

Photographs are cut out of two that scikit-learn ships, and saved as JPEG files below FOLDER. Loaders take turns, and a
first epoch of each, in which its worker processes start, is left out. Processor time is that of this process and its
workers, and tells more than the clock where others share the machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import typer
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import Mixup, create_dataset, create_loader
from torch import Tensor

from fxsplit.data.augmentation.changes import Changes
from fxsplit.data.files import FileImages
from fxsplit.data.images import ImageSet, MemoryImages
from fxsplit.data.loader import ImageSource, Loader

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# By name, what is asked of us and of timm. timm's loader always crops and mirrors, unless it augments nothing.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {"no_aug": True}),
    "resized-crop": ({"augment": "resized-crop"}, {}),
    "color-jitter": ({"augment": "resized-crop", "changes": Changes(color_jitter=0.4)}, {"color_jitter": 0.4}),
    # Without -inc1, with which timm 1.0.31 ends in an error beside Pillow 13.
    "aa": ({"augment": "resized-crop", "changes": Changes(aa="rand-m7-mstd0.5")}, {"auto_augment": "rand-m7-mstd0.5"}),
    "reprob": (
        {"augment": "resized-crop", "changes": Changes(reprob=0.25)},
        {"re_prob": 0.25, "re_mode": "pixel"},
    ),
    "mixup, cutmix": (
        {"augment": "resized-crop", "changes": Changes(mixup=0.2, cutmix=1.0), "classes": 2},
        {"mixup": True},
    ),
    "flip-alternate": ({"augment": "flip-alternate"}, {}),
    "crop-flip": ({"augment": "crop-flip"}, {}),
}


def photographs(folder: Path, *, count: int, width: int, height: int) -> list[str]:
    """Save parts of photographs as JPEG files, in two classes, unless they are there."""
    stream, paths = np.random.default_rng(0), []
    for label, pixels in enumerate(load_sample_images().images):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels).resize((2 * width, 2 * height), Image.Resampling.BICUBIC)
        for index in range(count // 2):
            path = folder / str(label) / f"{index}.jpg"
            paths.append(str(path))
            if not path.exists():
                x, y = (int(stream.integers(side)) for side in (width, height))
                image.crop((x, y, x + width, y + height)).save(path, quality=90)
    return paths


def ours(images: ImageSet, batch: int, options: dict[str, Any]) -> Callable[[int], Iterator[Tensor]]:
    loader = Loader(images, batch_size=batch, training=True, mean=MEAN, std=STD, **options)
    source = ImageSource(loader)

    def epoch(number: int) -> Iterator[Tensor]:
        for _ in source.put(number):
            yield source.fetch().images

    return epoch


def timms(
    folder: Path, batch: int, size: int, workers: int, options: dict[str, Any]
) -> Callable[[int], Iterator[Tensor]]:
    options = {"color_jitter": None, "interpolation": "bilinear", **options}
    mixes = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, num_classes=2) if options.pop("mixup", False) else None
    loader = create_loader(
        create_dataset("", root=str(folder), is_training=True),
        input_size=(3, size, size),
        batch_size=batch,
        is_training=True,
        num_workers=workers,
        mean=MEAN,
        std=STD,
        device=torch.device("cpu"),
        persistent_workers=True,
        pin_memory=False,
        **options,
    )

    def epoch(_number: int) -> Iterator[Tensor]:
        for images, labels in loader:
            yield images if mixes is None else mixes(images, labels)[0]

    return epoch


def processor_seconds() -> float:
    me = psutil.Process()
    times = [each.cpu_times() for each in (me, *me.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def measured(epoch: Callable[[int], Iterator[Tensor]], number: int) -> tuple[float, float]:
    """Return images per second, and milliseconds of processor time for each."""
    began, spent, count = perf_counter(), processor_seconds(), 0
    for images in epoch(number):
        count += len(images)
    return count / (perf_counter() - began), 1000 * (processor_seconds() - spent) / count


def main(
    folder: Path,
    count: int = 512,
    width: int = 500,
    height: int = 375,
    size: int = 224,
    batch: int = 64,
    turns: int = 3,
    workers: Annotated[int, typer.Option(help="Processes that read.")] = 2,
    memory: Annotated[bool, typer.Option("--memory", help="Ours alone, of images in memory.")] = False,
) -> None:
    torch.set_num_threads(1)
    place = folder / f"{width}x{height}"
    paths = photographs(place, count=count, width=width, height=height)
    labels = torch.arange(len(paths)) // (len(paths) // 2)
    print(f"{'':16} {'images/s':>17} {'processor ms/image':>19}")
    print(f"{'':16} {'ours':>8} {'timm':>8} {'ours':>9} {'timm':>9}")
    for name, (options, theirs) in KINDS.items():
        images: ImageSet = FileImages(paths=paths, labels=labels, img_size=size, workers=workers)
        if memory:
            pixels = torch.randint(256, (count, 3, size, size), dtype=torch.uint8)
            images = MemoryImages(pixels=pixels, labels=labels, img_size=size, workers=workers)
        loaders = {"ours": ours(images, batch, options)}
        if not memory and name not in ("flip-alternate", "crop-flip"):
            loaders["timm"] = timms(place, batch, size, workers, theirs)
        for epoch in loaders.values():
            measured(epoch, 0)
        found: dict[str, list[tuple[float, float]]] = {each: [] for each in loaders}
        for turn in range(1, turns + 1):
            for each, epoch in loaders.items():
                found[each].append(measured(epoch, turn))
        medians = {
            each: [statistics.median(column) for column in zip(*runs, strict=True)] for each, runs in found.items()
        }
        rate = [f"{medians[each][0]:8.0f}" if each in medians else " " * 8 for each in ("ours", "timm")]
        cost = [f"{medians[each][1]:9.2f}" if each in medians else "" for each in ("ours", "timm")]
        print(f"{name:16}", *rate, *cost, flush=True)


if __name__ == "__main__":
    typer.run(main)
