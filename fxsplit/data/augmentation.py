"""Augmentations: images changed at random.

An augmentation draws its random numbers for the whole image set at once, on the CPU, and returns a function that
changes the pixels of a batch. So how an image is changed depends on no batch, device or worker.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fxsplit.data.images import ImageSet
from fxsplit.data.randomness import random_stream
from fxsplit.errors import UsageError, nearest

# Takes pixels uint8 (B, C, H, W) and ids int64 (B,), and returns pixels of the same shape.
Augment = Callable[[Tensor, Tensor], Tensor]


def augmentation(name: str, images: ImageSet, *, seed: int, draw: int) -> Augment:
    """Draw how augmentation `name` changes each of `images`, and return the function that changes a batch.

    What is drawn depends on `seed` and `draw` alone; epochs with the same `draw` change images alike. Raises UsageError
    when there is no such augmentation.
    """
    if name not in AUGMENTATIONS:
        known, hint = " and ".join(AUGMENTATIONS), nearest(name, tuple(AUGMENTATIONS))
        raise UsageError(f"there is no augmentation {name!r}, only {known}{hint}")
    return AUGMENTATIONS[name](images, seed, draw)


def _none(_images: ImageSet, _seed: int, _draw: int) -> Augment:
    return lambda pixels, _ids: pixels


def _crop_flip(images: ImageSet, seed: int, draw: int) -> Augment:
    """Crop each image, after padding it by an eighth of its size, to its own size; mirror it with probability 1/2."""
    padding = images.img_size // 8
    stream = random_stream("crop-flip", seed, draw)
    corners = torch.from_numpy(stream.integers(2 * padding + 1, size=(len(images), 2))).to(images.device)
    flips = torch.from_numpy(stream.random(len(images)) < 0.5).to(images.device)
    return lambda pixels, ids: crop_flip(pixels, corners[ids], flips[ids], padding=padding)


AUGMENTATIONS: dict[str, Callable[[ImageSet, int, int], Augment]] = {"none": _none, "crop-flip": _crop_flip}


def crop_flip(pixels: Tensor, corners: Tensor, flips: Tensor, *, padding: int) -> Tensor:
    """Pad images with zeros, cut a crop of their own size out of each, and mirror some; returns (B, C, H, W).

    Args:
        pixels: (B, C, H, W).
        corners: top and left of each crop in the padded image, 0 .. 2 * padding, int64 (B, 2).
        flips: which crops to mirror, bool (B,).
        padding: rows and columns of zeros on each side.
    """
    batch, channels, height, width = pixels.shape
    padded = functional.pad(pixels, (padding,) * 4)
    columns = torch.arange(width, device=pixels.device)
    columns = corners[:, 1, None] + torch.where(flips[:, None], width - 1 - columns, columns)
    rows = corners[:, 0, None] + torch.arange(height, device=pixels.device)
    positions = rows[:, :, None] * padded.shape[-1] + columns[:, None, :]
    index = positions.view(batch, 1, -1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, index).view(pixels.shape)
