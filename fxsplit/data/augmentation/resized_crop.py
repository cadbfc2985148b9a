"""Random resized crops: of a whole batch in memory by products with small matrices, of one image by torchvision.

Resizing is linear in the pixels, and by rows and columns apart: a matrix for each image takes its rows to those of the
crop, another one its columns. Both are made on the device from the numbers of the crop, so crops of different sizes are
resized in two products, without Python for each of them, in tensors of the same shapes for every batch.

        rows (S, H)  x  pixels (H, W)  x  columns (W, S)  =  crop (S, S)
"""

from __future__ import annotations

import math
from functools import cache, partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from fxsplit.data.images import ImageSet
from fxsplit.data.reading.decoding import GAP, INTERPOLATIONS
from fxsplit.data.reading.workers import OpenImage

# So many sizes are drawn; where none fits into the image, the middle is taken.
ATTEMPTS = 10


class ResizedCrop:
    """Cuts a part of random size and shape out of each image, and resizes it, as torchvision's RandomResizedCrop does.

    Args:
        scale: least and largest share of the area.
        ratio: least and largest width, in heights.
        chance: that the crop is mirrored.
        interpolation: one of INTERPOLATIONS, or "random" for one of the two.
    """

    def __init__(
        self, *, scale: tuple[float, float], ratio: tuple[float, float], chance: float, interpolation: str
    ) -> None:
        self.scale, self.ratio, self.chance, self.interpolation = scale, ratio, chance, interpolation

    def draw(self, images: ImageSet, stream: np.random.Generator) -> tuple[Tensor, ...]:
        """Draw what `boxes` takes, float32 (N, 2 * ATTEMPTS + 2), and marks, int64 (N, 2): mirrored, bicubic."""
        count = len(images)
        numbers = stream.random((count, 2 * ATTEMPTS + 2), dtype=np.float32)
        flips, chosen = stream.random((2, count)) < np.array([[self.chance], [0.5]])
        if self.interpolation != "random":
            chosen[:] = self.interpolation == "bicubic"
        return torch.from_numpy(numbers), torch.from_numpy(np.stack((flips, chosen), axis=1).astype(np.int64))

    def place(self, images: ImageSet, numbers: Tensor, marks: Tensor) -> tuple[Tensor, ...]:
        """Make what `change` takes: boxes in the stored pixels with the marks, int64 (N, 6)."""
        assert images.stored_size is not None
        found = boxes(numbers.numpy(), *images.stored_size, scale=self.scale, ratio=self.ratio)
        return (torch.cat((torch.from_numpy(found), marks), dim=1),)

    def change(self, pixels: Tensor, placed: Tensor, *, size: int) -> Tensor:
        """Cut boxes out of a batch (B, C, H, W) and resize them: float32 (B, C, size, size), within 0 .. 255."""
        top, left, height, width, flips, bicubic = placed.unbind(1)
        down = resizing(top, height, pixels.shape[2], size, bicubic)
        across = resizing(left, width, pixels.shape[3], size, bicubic)
        across = torch.where(flips[:, None, None] == 1, across.flip(1), across)
        batch, channels, rows, columns = pixels.shape
        narrow = torch.bmm(pixels.float().view(batch, channels * rows, columns), across.mT)
        by_row = narrow.view(batch, channels, rows, size).transpose(1, 2).reshape(batch, rows, channels * size)
        crops = torch.bmm(down, by_row).view(batch, size, channels, size).transpose(1, 2)
        return crops.clamp(0, 255).contiguous()

    def of_image(self, open_image: OpenImage, numbers: np.ndarray, marks: np.ndarray, *, size: int) -> Image.Image:
        """Cut a box out of an image with all of its pixels, or with GAP times those that are needed along each side."""
        box = cache(partial(self._box, numbers))

        def least(width: int, height: int) -> tuple[float, float]:
            _, _, tall, wide = box(width, height)
            return width * GAP * size / wide, height * GAP * size / tall

        image, width, height = open_image.at_least(least)
        top, left, tall, wide = box(width, height)
        x, y = image.width / width, image.height / height
        crop = image.crop((round(left * x), round(top * y), round((left + wide) * x), round((top + tall) * y)))
        mode = InterpolationMode(INTERPOLATIONS[int(marks[1])])
        resized: Image.Image = transforms.resize(crop, [size, size], mode)
        return resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if marks[0] else resized

    def _box(self, numbers: np.ndarray, width: int, height: int) -> list[int]:
        found: list[int] = boxes(numbers[None], height, width, scale=self.scale, ratio=self.ratio)[0].tolist()
        return found


def boxes(
    numbers: np.ndarray, height: int, width: int, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    """Choose boxes in images of one size, as torchvision's RandomResizedCrop does: int64 (N, 4).

    They are top, left, height and width. `numbers` (N, 2 * ATTEMPTS + 2) are uniform in [0, 1): areas, shapes, and two
    for the place.
    """
    exact = numbers.astype(np.float64)
    areas = (scale[0] + (scale[1] - scale[0]) * exact[:, :ATTEMPTS]) * (height * width)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    shapes = np.exp(low + (high - low) * exact[:, ATTEMPTS : 2 * ATTEMPTS])
    wide, tall = np.rint(np.sqrt(areas * shapes)), np.rint(np.sqrt(areas / shapes))
    fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
    rows, first = np.arange(len(exact)), fits.argmax(axis=1)
    sides = np.stack((tall[rows, first], wide[rows, first]), axis=1)
    corners = np.floor(exact[:, 2 * ATTEMPTS :] * ([height, width] - sides + 1))
    whole = _middle(height, width, ratio)
    found = np.where(np.any(fits, axis=1, keepdims=True), np.concatenate((corners, sides), axis=1), whole)
    return found.astype(np.int64)


def _middle(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    """Return the largest box in the middle whose shape is within `ratio`."""
    tall, wide = height, width
    if width / height < ratio[0]:
        tall = round(width / ratio[0])
    elif width / height > ratio[1]:
        wide = round(height * ratio[1])
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def resizing(first: Tensor, length: Tensor, pixels: int, size: int, bicubic: Tensor) -> Tensor:
    """Make the matrices that resize parts of lines, with antialiasing as in Pillow: float32 (B, size, pixels).

    Args:
        first: where each part begins, int64 (B,).
        length: how many pixels it has, int64 (B,).
        pixels: of a line.
        size: of a resized part.
        bicubic: 1 for bicubic interpolation, 0 for bilinear, int64 (B,).
    """
    scale = length.double()[:, None, None] / size
    begin = first[:, None, None]
    # What follows is in double precision: a box of whole pixels then gives the same on every device.
    place = torch.arange(pixels, device=first.device)[None, None, :]
    centre = begin + (torch.arange(size, device=first.device, dtype=torch.float64)[None, :, None] + 0.5) * scale
    x = ((place + 0.5 - centre) / scale.clamp(min=1)).abs()
    linear = (1 - x).clamp(min=0)
    # Keys' kernel with a = -0.5.
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    cubic = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weight = torch.where(bicubic[:, None, None] == 1, cubic, linear)
    weight = torch.where((place >= begin) & (place < begin + length[:, None, None]), weight, 0.0)
    return (weight / weight.sum(dim=2, keepdim=True)).float()
