"""What tells data from others, for a run that goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from fxsplit.data.images import Data, MemoryImages
from fxsplit.errors import UsageError

# Of so many images, at least, the pixels tell one data set from another.
SAMPLED = 64
# What the identity of data consists of, in words.
NOUNS = {
    "train": "images to train on",
    "test": "images to test on",
    "classes": "classes",
    "img_size": "pixels of a side",
    "channels": "channels",
    "labels": "checksums of the labels",
}


def identity(data: Data) -> dict[str, Any]:
    """Describe data so that others are told from them: counts, checksums of labels and of some pixels in memory."""
    labels = hashlib.sha256()
    pixels = hashlib.sha256()
    for images in (data.train, data.test):
        labels.update(images.labels.cpu().numpy().tobytes())
        if isinstance(images, MemoryImages):
            pixels.update(images.pixels[:: max(1, len(images) // SAMPLED)].cpu().contiguous().numpy().tobytes())
    return {
        "train": len(data.train),
        "test": len(data.test),
        "classes": list(data.classes),
        "img_size": data.img_size,
        "channels": data.channels,
        "labels": labels.hexdigest(),
        "pixels": pixels.hexdigest(),
    }


def refuse_others(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UsageError, which names what differs, when two identities are of other data than each other's."""
    for name, noun in NOUNS.items():
        if before[name] != now[name]:
            raise UsageError(
                f"the data are others than those of the run: {noun} were {before[name]} and are now {now[name]}; "
                "a run goes on with the data that it began with"
            )
