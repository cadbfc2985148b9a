"""Augmentations by name: how images are cropped and mirrored, a whole batch at a time, on the device that trains.

An augmentation draws its random numbers for the whole image set at once, on the CPU, and changes the pixels of a batch
by the numbers of its images. So how an image is changed depends on no batch, device or worker.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fxsplit.data.augmentation import resized_crop
from fxsplit.data.augmentation.changes import Changes
from fxsplit.data.images import ImageSet
from fxsplit.data.randomness import random_stream
from fxsplit.errors import UsageError, nearest


class Augmentation(NamedTuple):
    """Says how images are changed at random.

    Args:
        draw: takes the image set and a random stream; returns tensors (N, ...) on the CPU, one row an image. Shapes and
            types are the same in every draw.
        change: takes pixels uint8 (B, C, H, W) and the rows (B, ...) of each tensor for these images; returns pixels of
            the same shape, 0 .. 255, or float ones between. It must not wait for the device, and draws nothing.
        turns: how many views there are, if they follow one after the other in epochs; the tensors are (N, turns, ...),
            and the rows (B, ...) are those of the epoch's turn. 0 draws anew for each epoch.
        place: replaces what was drawn by what `change` takes, where sizes must be known; takes the image set and the
            tensors.
        of_image: the same for one image on the host, with all of its pixels, as it lies in its file: takes an
            `OpenImage`, the rows of the image, and the `size` of the result. An augmentation that has it also resizes,
            and then `change` takes a `size`, too.
    """

    draw: Callable[[ImageSet, np.random.Generator], tuple[Tensor, ...]]
    change: Callable[..., Tensor]
    turns: int = 0
    place: Callable[..., tuple[Tensor, ...]] | None = None
    of_image: Callable[..., Image.Image] | None = None


def augmentation(name: str, changes: Changes) -> Augmentation:
    """Return the augmentation of that name. Raises UsageError when there is none."""
    if name not in AUGMENTATIONS:
        *others, last = AUGMENTATIONS
        raise UsageError(
            f"there is no augmentation {name!r}, only {', '.join(others)} and {last}"
            f"{nearest(name, tuple(AUGMENTATIONS))}"
        )
    return AUGMENTATIONS[name](changes)


def drawn(name: str, augmentation: Augmentation, images: ImageSet, *, seed: int, draw: int) -> tuple[Tensor, ...]:
    """Draw the random numbers of an augmentation for all `images`: tensors (N, ...) on the CPU.

    They depend on `seed` and `draw` alone; epochs with the same `draw` change images alike.
    """
    if not augmentation.turns:
        return augmentation.draw(images, random_stream(name, seed, draw))
    turn = draw % augmentation.turns
    return tuple(each[:, turn] for each in augmentation.draw(images, random_stream(name, seed)))


def _nothing(_images: ImageSet, _stream: np.random.Generator) -> tuple[Tensor, ...]:
    return ()


def _unchanged(pixels: Tensor) -> Tensor:
    return pixels


def _none(changes: Changes) -> Augmentation:
    if not changes.hflip:
        return Augmentation(_nothing, _unchanged)
    return Augmentation(partial(_flips, chance=changes.hflip), mirror)


def _flips(images: ImageSet, stream: np.random.Generator, *, chance: float) -> tuple[Tensor, ...]:
    return (torch.from_numpy(stream.random(len(images)) < chance),)


def _alternate(_changes: Changes) -> Augmentation:
    return Augmentation(_both_sides, mirror, turns=2)


def _both_sides(images: ImageSet, stream: np.random.Generator) -> tuple[Tensor, ...]:
    """Draw which images are mirrored in the first turn: the others are in the second."""
    (first,) = _flips(images, stream, chance=0.5)
    return (torch.stack((first, ~first), dim=1),)


def mirror(pixels: Tensor, flips: Tensor) -> Tensor:
    """Mirror those of a batch of images that `flips`, bool (B,), names."""
    return torch.where(flips[:, None, None, None], pixels.flip(3), pixels)


def _crops(changes: Changes) -> Augmentation:
    return Augmentation(partial(_windows, chance=_half(changes)), _crop_flip)


def _half(changes: Changes) -> float:
    return 0.5 if changes.hflip is None else changes.hflip


def _windows(images: ImageSet, stream: np.random.Generator, *, chance: float) -> tuple[Tensor, ...]:
    """Draw the window of each crop, after padding an image by an eighth of its size, and mirror some of them."""
    padding, size = images.img_size // 8, images.img_size
    corners = torch.from_numpy(stream.integers(2 * padding + 1, size=(len(images), 2)))
    flips = torch.from_numpy(stream.random(len(images)) < chance)
    return (windows(corners, flips, width=size),)


def _crop_flip(pixels: Tensor, windows: Tensor) -> Tensor:
    return crop_flip(pixels, windows, padding=pixels.shape[-1] // 8)


def _resized(changes: Changes) -> Augmentation:
    cropping = resized_crop.ResizedCrop(
        scale=changes.scale, ratio=changes.ratio, chance=_half(changes), interpolation=changes.interpolation
    )
    return Augmentation(cropping.draw, cropping.change, place=cropping.place, of_image=cropping.of_image)


AUGMENTATIONS: dict[str, Callable[[Changes], Augmentation]] = {
    "none": _none,
    "crop-flip": _crops,
    "flip-alternate": _alternate,
    "resized-crop": _resized,
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
