"""Random erasing: a part of a normalized image becomes noise, as timm's RandomErasing does it."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

# timm's: least and largest share of the area, and least and largest height in widths.
AREA, SHAPE = (0.02, 1 / 3), (0.3, 1 / 0.3)
ATTEMPTS = 10


def draw_boxes(count: int, size: int, channels: int, stream: np.random.Generator, *, chance: float) -> Tensor:
    """Draw what is erased of square images: top, left, height, width, and a place in the noise: int64 (N, 5).

    With `chance` an image loses a part; else height and width are 0.
    """
    numbers = stream.random((count, 2 * ATTEMPTS + 4), dtype=np.float32).astype(np.float64)
    found = boxes(numbers[:, :-2], size)
    found[numbers[:, -2] >= chance] = 0
    places = np.floor(numbers[:, -1:] * (channels * size**2)).astype(np.int64)
    return torch.from_numpy(np.concatenate((found, places), axis=1))


def boxes(numbers: np.ndarray, size: int) -> np.ndarray:
    """Choose boxes in square images, as timm does: int64 (N, 4), top, left, height and width.

    `numbers` (N, 2 * ATTEMPTS + 2) are uniform in [0, 1): areas, shapes, and two for the place. A box that fits nowhere
    is empty.
    """
    areas = (AREA[0] + (AREA[1] - AREA[0]) * numbers[:, :ATTEMPTS]) * size**2
    low, high = math.log(SHAPE[0]), math.log(SHAPE[1])
    shapes = np.exp(low + (high - low) * numbers[:, ATTEMPTS : 2 * ATTEMPTS])
    tall, wide = np.rint(np.sqrt(areas * shapes)), np.rint(np.sqrt(areas / shapes))
    fits = (tall < size) & (wide < size)
    rows, first = np.arange(len(numbers)), fits.argmax(axis=1)
    sides = np.stack((tall[rows, first], wide[rows, first]), axis=1)
    corners = np.floor(numbers[:, 2 * ATTEMPTS :] * (size - sides + 1))
    found = np.where(np.any(fits, axis=1, keepdims=True), np.concatenate((corners, sides), axis=1), 0)
    return found.astype(np.int64)


def noise(channels: int, size: int, stream: np.random.Generator) -> Tensor:
    """Draw normal numbers, float32, twice as many as an image has: each image takes a run of them from its place on.

    So the noise is the same on every device, and a recorded step finds it where it is.
    """
    return torch.from_numpy(stream.standard_normal(2 * channels * size**2, dtype=np.float32))


def erase(images: Tensor, erased: Tensor, noise: Tensor) -> Tensor:
    """Fill the boxes of `draw_boxes` (B, 5) of normalized images (B, C, H, W) with noise, in place, and return them."""
    top, left, height, width = (each[:, None] for each in erased[:, :4].unbind(1))
    rows = torch.arange(images.shape[2], device=images.device)
    columns = torch.arange(images.shape[3], device=images.device)
    inside = ((rows >= top) & (rows < top + height))[:, :, None] & ((columns >= left) & (columns < left + width))[
        :, None, :
    ]
    fill = noise.unfold(0, images[0].numel(), 1).index_select(0, erased[:, 4]).view(images.shape)
    return torch.where(inside[:, None], fill, images, out=images)
