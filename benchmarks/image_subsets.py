"""Makes folders of images to compare fine-tuning on: some held out, to choose learning rates by, and others to test on.

    python benchmarks/image_subsets.py CIFAR10 cifar10-tune
    python benchmarks/image_subsets.py CIFAR10 cifar10-inverted --change inverted
    python benchmarks/image_subsets.py CIFAR10 cifar10-noisy --change noisy

    CIFAR10/train/CLASS/* ──┬─ the first of each class ──► cifar10-tune/choose/test/CLASS/*
                            └─ all others ──► cifar10-tune/choose/train and cifar10-tune/final/train
    CIFAR10/test/CLASS/*  ──── the first of each class ──► cifar10-tune/final/test/CLASS/*

Nothing is chosen on images that are tested on. Files are links, or with `--change` new ones, that stray from the images
of the pretraining: each colour v is 255 - v, or has normal noise of standard deviation 64 added.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal
from zlib import crc32

import numpy as np
import typer
from PIL import Image, ImageOps

NOISE = 64.0


def main(
    source: Annotated[Path, typer.Argument(help="A folder with train/CLASS/* and test/CLASS/*.")],
    target: Annotated[Path, typer.Argument(help="The folder to make.")],
    each: Annotated[int, typer.Option(help="Images of each class to test on, and to hold out.")] = 200,
    change: Annotated[Literal["none", "inverted", "noisy"], typer.Option(help="How images are changed.")] = "none",
) -> None:
    """Divide images into those to choose by, to train on, and to test on."""
    pixels = target / "pixels"
    for folder in sorted((source / "train").iterdir()):
        name = folder.name
        held_out, others = _divided(folder, each)
        tested, _ = _divided(source / "test" / name, each)
        if change != "none":
            held_out, others, tested = (
                [_changed(path, pixels / place / name, change) for path in paths]
                for place, paths in (("train", held_out), ("train", others), ("test", tested))
            )
        _link(held_out, target / "choose" / "test" / name)
        _link(tested, target / "final" / "test" / name)
        for use in ("choose", "final"):
            _link(others, target / use / "train" / name)


def _divided(folder: Path, each: int) -> tuple[list[Path], list[Path]]:
    paths = sorted(folder.iterdir())
    return paths[:each], paths[each:]


def _changed(path: Path, folder: Path, change: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{path.stem}.png"
    with Image.open(path) as image:
        colours = image.convert("RGB")
    if change == "inverted":
        ImageOps.invert(colours).save(made)
    else:
        # The noise of an image is the same each time.
        noise = np.random.default_rng(crc32(str(made.relative_to(folder.parents[2])).encode())).normal(
            0, NOISE, (colours.height, colours.width, 3)
        )
        Image.fromarray((np.asarray(colours) + noise).clip(0, 255).astype(np.uint8)).save(made)
    return made


def _link(paths: Iterable[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        (folder / path.name).symlink_to(path.resolve())


if __name__ == "__main__":
    typer.run(main)
