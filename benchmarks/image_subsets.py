"""Makes folders of images to compare fine-tuning on: some held out, to choose learning rates by, and others to test on.

    python benchmarks/image_subsets.py CIFAR10 cifar10-tune
    python benchmarks/image_subsets.py CIFAR10 cifar10-inverted --inverted

    CIFAR10/train/CLASS/* ──┬─ the first of each class ──► cifar10-tune/choose/test/CLASS/*
                            └─ all others ──► cifar10-tune/choose/train and cifar10-tune/final/train
    CIFAR10/test/CLASS/*  ──── the first of each class ──► cifar10-tune/final/test/CLASS/*

Nothing is chosen on images that are tested on. Files are links, or with `--inverted` new ones, in which each colour v
is 255 - v.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image, ImageOps


def main(
    source: Annotated[Path, typer.Argument(help="A folder with train/CLASS/* and test/CLASS/*.")],
    target: Annotated[Path, typer.Argument(help="The folder to make.")],
    each: Annotated[int, typer.Option(help="Images of each class to test on, and to hold out.")] = 200,
    inverted: Annotated[bool, typer.Option(help="Invert the colours.")] = False,
) -> None:
    """Divide images into those to choose by, to train on, and to test on."""
    pixels = target / "pixels"
    for folder in sorted((source / "train").iterdir()):
        name = folder.name
        held_out, others = _divided(folder, each)
        tested, _ = _divided(source / "test" / name, each)
        if inverted:
            held_out, others, tested = (
                [_inverted(path, pixels / place / name) for path in paths]
                for place, paths in (("train", held_out), ("train", others), ("test", tested))
            )
        _link(held_out, target / "choose" / "test" / name)
        _link(tested, target / "final" / "test" / name)
        for use in ("choose", "final"):
            _link(others, target / use / "train" / name)


def _divided(folder: Path, each: int) -> tuple[list[Path], list[Path]]:
    paths = sorted(folder.iterdir())
    return paths[:each], paths[each:]


def _inverted(path: Path, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{path.stem}.png"
    with Image.open(path) as image:
        ImageOps.invert(image.convert("RGB")).save(made)
    return made


def _link(paths: Iterable[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        (folder / path.name).symlink_to(path.resolve())


if __name__ == "__main__":
    typer.run(main)
