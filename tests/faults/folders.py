"""Folders of images that runs of the fault suite train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fxsplit.data import datasets
from fxsplit.data.images import Data
from fxsplit.data.randomness import random_stream

CLASSES, IMAGES = 3, 12


def images_in(folder: Path) -> Path:
    """Write 3 classes of 12 images to train and 4 to test on; noise of 16 pixels."""
    stream = random_stream("faults", 0)
    for half, count in (("train", IMAGES), ("test", 4)):
        for label in range(CLASSES):
            here = folder / half / f"class{label}"
            here.mkdir(parents=True)
            for index in range(count):
                pixels = stream.integers(256, size=(16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(here / f"{index:02}.png")
    return folder


def load(folder: Path, *, said: list[str] | None = None, **changes: Any) -> Data:
    """Load them as a run does; by files, unless `memory_limit_bytes` says otherwise."""
    given: dict[str, Any] = {"img_size": 12, "data_dir": "", "seed": 0, "train_limit": None, "workers": 0}
    notice = (lambda _: None) if said is None else said.append
    return datasets.load(f"folder:{folder}", **{**given, "memory_limit_bytes": 0, **changes}, notice=notice)
