"""Augmentations: images changed at random.

An augmentation draws its random numbers for the whole image set at once, on the CPU, and changes the pixels of a batch
by the numbers of its images. So how an image is changed depends on no batch, device or worker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fxsplit.data.images import ImageSet
from fxsplit.data.randomness import random_stream
from fxsplit.errors import UsageError, nearest


class Augmentation(NamedTuple):
    """Says how images are changed at random.

    Args:
        draw: takes the image set and a random stream; returns tensors (N, ...) on the CPU, one row an image. Shapes and
            types are the same in every draw.
        change: takes pixels uint8 (B, C, H, W) and the rows (B, ...) of each tensor for these images; returns pixels of
            the same shape. It must not wait for the device, and draws nothing.
    """

    draw: Callable[[ImageSet, np.random.Generator], tuple[Tensor, ...]]
    change: Callable[..., Tensor]


def augmentation(name: str) -> Augmentation:
    """Return the augmentation of that name. Raises UsageError when there is none."""
    if name not in AUGMENTATIONS:
        known, hint = " and ".join(AUGMENTATIONS), nearest(name, tuple(AUGMENTATIONS))
        raise UsageError(f"there is no augmentation {name!r}, only {known}{hint}")
    return AUGMENTATIONS[name]


def drawn(name: str, images: ImageSet, *, seed: int, draw: int) -> tuple[Tensor, ...]:
    """Draw the random numbers of augmentation `name` for all `images`: tensors (N, ...) on the CPU.

    They depend on `seed` and `draw` alone; epochs with the same `draw` change images alike. Raises UsageError when
    there is no such augmentation.
    """
    return augmentation(name).draw(images, random_stream(name, seed, draw))


def _windows(images: ImageSet, stream: np.random.Generator) -> tuple[Tensor, ...]:
    """Draw the window of each crop, after padding an image by an eighth of its size, and mirror half of them."""
    padding, size = images.img_size // 8, images.img_size
    corners = torch.from_numpy(stream.integers(2 * padding + 1, size=(len(images), 2)))
    flips = torch.from_numpy(stream.random(len(images)) < 0.5)
    return (windows(corners, flips, width=size),)


def _crop_flip(pixels: Tensor, windows: Tensor) -> Tensor:
    return crop_flip(pixels, windows, padding=pixels.shape[-1] // 8)


AUGMENTATIONS: dict[str, Augmentation] = {
    "none": Augmentation(lambda _images, _stream: (), lambda pixels: pixels),
    "crop-flip": Augmentation(_windows, _crop_flip),
}


def windows(corners: Tensor, flips: Tensor, *, width: int) -> Tensor:
    """Return the windows that `crop_flip` cuts out, int64 (B, 3): first row, first column, and step between columns.

    Args:
        corners: top and left of each crop in the padded image, int64 (B, 2).
        flips: which crops to mirror, bool (B,): their columns are read from the right to the left.
        width: of a crop.
    """
    first = corners[:, 1] + flips * (width - 1)
    return torch.stack((corners[:, 0], first, 1 - 2 * flips.long()), dim=1)


def crop_flip(pixels: Tensor, windows: Tensor, *, padding: int) -> Tensor:
    """Pad images with zeros, and cut a window of their own size out of each; returns (B, C, H, W).

    Args:
        pixels: (B, C, H, W).
        windows: of the function `windows`, for corners 0 .. 2 * padding.
        padding: rows and columns of zeros on each side.
    """
    batch, channels, height, width = pixels.shape
    padded = functional.pad(pixels, (padding,) * 4)
    top, left, step = (column[:, None] for column in windows.unbind(1))
    rows = top + torch.arange(height, device=pixels.device)
    columns = torch.addcmul(left, step, torch.arange(width, device=pixels.device))
    positions = torch.add(columns[:, None, :], rows[:, :, None], alpha=padded.shape[-1])
    index = positions.view(batch, 1, -1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, index).view(pixels.shape)
