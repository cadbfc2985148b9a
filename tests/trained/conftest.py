"""A run on photographs of all kinds, made once, and what it was trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fxsplit

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
CLASSES = ("bird", "cat", "dog")


def picture(stream: np.random.Generator, kind: int) -> Image.Image:
    """An image of noise, wide, tall or square: in colour, grey, of 16 bits, or half transparent."""
    height, width = [(14, 22), (30, 17), (16, 16)][kind % 3]
    grey = stream.integers(256, size=(height, width))
    if kind % 4 == 0:
        return Image.fromarray(stream.integers(256, size=(height, width, 3), dtype=np.uint8))
    if kind % 4 == 1:
        return Image.fromarray(grey.astype(np.uint8))
    if kind % 4 == 2:
        return Image.fromarray((grey * 257).astype(np.uint16))
    return Image.fromarray(stream.integers(256, size=(height, width, 4), dtype=np.uint8))


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of classes, divided into train/ and test/."""
    root, stream = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for part, count in {"train": 8, "test": 5}.items():
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
            for kind in range(count):
                picture(stream, kind).save(root / part / name / f"{kind}.png")
    return root


@pytest.fixture(scope="session")
def run(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the paper's network on the photographs."""
    report = fxsplit.train(
        fxsplit.RunSpec(
            model="paper:cnn", data=f"folder:{photographs}", img_size=16, interpolation="bicubic", mean=MEAN, std=STD,
            batch_size=8, epochs=3, device="cpu", workers=0, prove=False, experiment="photographs",
            output=str(tmp_path_factory.mktemp("runs")),
        )
    )  # fmt: skip
    return Path(report.folder)
