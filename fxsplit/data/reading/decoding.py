"""Decodes an image file into square RGB pixels: formats that Pillow reads by itself, any bit depth, upright and opaque.

file ──open──► 16 bits, int32, float ──► 8 bits ──► over white ──► RGB ──► upright ──► resized and cropped
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from fxsplit.errors import DataError, printable, reason, shown_path

# How images may be resized, the usual way first.
INTERPOLATIONS = ("bilinear", "bicubic")
# A JPEG file is decoded at a half, a quarter or an eighth of its scale where it has so many times the pixels that are
# needed, along each side, even then.
GAP = 2
# The formats that are read, by Pillow's names. It knows others: for EPS it starts another program, Ghostscript; IPTC
# may wrap any format, EPS included; MPEG it recognizes but cannot decode.
READ = (
    *("AVIF", "BLP", "BMP", "CUR", "DCX", "DDS", "DIB", "FITS", "FLI", "FTEX", "GBR", "GIF", "ICNS", "ICO", "IM"),
    *("IMT", "JPEG", "JPEG2000", "MCIDAS", "MSP", "PCD", "PCX", "PIXAR", "PNG", "PPM", "PSD", "QOI", "SGI"),
    *("SPIDER", "SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM", "XVTHUMB"),
)
# A file of some kB may say that it has more pixels than memory holds. Of a JPEG file with more than so many, at most
# every other one along each side is decoded; another image is refused.
MOST_PIXELS = 1 << 26
# Of values with more than 8 bits, so many are scaled at a time.
SCALED_AT_ONCE = 1 << 20
# An image whose long side is more than so many short sides is cropped before it is resized.
LONGEST = 8

BITS_PER_SAMPLE, SAMPLE_FORMAT, UNSIGNED = 258, 339, 1  # of TIFF files
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Turns that exchange width and height.
SIDEWAYS = (5, 6, 7, 8)
# Formats whose decoder can leave out detail.
DRAFTED = ("JPEG", "MPO")

_reading = threading.local()

# Takes the width and height of an image, and returns those in which its pixels are enough.
Least = Callable[[int, int], tuple[float, float]]


def decode(path: str | Path, img_size: int, interpolation: str = INTERPOLATIONS[0], *, crop_pct: float = 1.0) -> Tensor:
    """Decode the image in a file to uint8 (3, img_size, img_size): short side resized, centre cropped.

    Args:
        path: of the file.
        img_size: side in pixels.
        interpolation: how it is resized, one of INTERPOLATIONS.
        crop_pct: the share of the short side that is left.

    Raises DataError when the file cannot be decoded, or has more than MOST_PIXELS.
    """
    pixels: Tensor = transforms.pil_to_tensor(read_square(path, img_size, interpolation, crop_pct=crop_pct))
    return pixels


def read_square(path: str | Path, img_size: int, interpolation: str, *, crop_pct: float = 1.0) -> Image.Image:
    """Read the image in a file as `decode` does, as an image of Pillow's."""
    short = img_size * GAP / crop_pct
    image, _, _ = read_image(path, lambda *sides: (short * sides[0] / min(sides), short * sides[1] / min(sides)))
    return square(image, img_size, interpolation, crop_pct=crop_pct)


def read_image(path: str | Path, least: Least | None = None) -> tuple[Image.Image, int, int]:
    """Read the image in a file as RGB pixels, and its own width and height.

    With `least`, the decoder of a JPEG file may leave out detail, as long as width and height stay above these.

    The image is turned as its EXIF orientation says, and transparent pixels are laid over white. Of several frames the
    first is taken. Values of more than 8 bits are scaled to 0 .. 255: from 0 .. 65535 if they have 16 bits, from 0 .. 1
    if they are floats within that range, from 0 .. 255 if they are 32-bit integers within that. Others have no known
    range: the smallest value in the image becomes 0 and the largest 255, and a warning says so.

    Raises DataError when the file cannot be decoded, or has more than MOST_PIXELS.
    """
    with open_image(path) as image:
        return read_open(image, least)


def square_pixels(
    image: Image.Image, img_size: int, interpolation: str = INTERPOLATIONS[0], *, crop_pct: float = 1.0
) -> Tensor:
    """Make the pixels of an image that is open already, as `decode` does. Whatever a decoder raises is raised.

    All of its detail is decoded, up to MOST_PIXELS: with less, it would be another image for those who have opened it.
    """
    whole, _, _ = read_open(image)
    pixels: Tensor = transforms.pil_to_tensor(square(whole, img_size, interpolation, crop_pct=crop_pct))
    return pixels


def read_open(image: Image.Image, least: Least | None = None) -> tuple[Image.Image, int, int]:
    """Read an image that is open already, as `read_image` does. Whatever a decoder raises is raised."""
    turn, size = None, image.size
    if image.format in DRAFTED:
        turn = _turn(image)
        width, height = _turned(size, turn)
        needed = (width, height) if least is None else least(width, height)
        if _pixels(image) > MOST_PIXELS:
            needed = min(needed[0], width // 2), min(needed[1], height // 2)
        image.draft(None, _turned(tuple(map(math.ceil, needed)), turn))
    if (found := _pixels(image)) > MOST_PIXELS:
        raise Image.DecompressionBombError(f"it has {found} pixels, and at most {MOST_PIXELS} are read")
    image.load()
    if image.format not in DRAFTED:
        turn, size = _turn(image), image.size
    width, height = _turned(size, turn)
    return _upright(_opaque(_eight_bits(image)), turn), width, height


def short_side(path: str | Path) -> int:
    """Return the pixels of the short side of the image in a file. Raises DataError when the file cannot be decoded."""
    with open_image(path) as image:
        return min(image.size)


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file. Inside, whatever exception a decoder raises becomes a DataError that names the file."""
    before = getattr(_reading, "path", None)
    _reading.path = str(path)
    try:
        with Image.open(path, formats=formats()) as image:
            yield image
    except Image.DecompressionBombError as error:
        raise DataError(
            f"the image {shown_path(path)} is too large to be read safely ({reason(error)}); "
            "save it smaller, or take it out of the folder"
        ) from error
    except Exception as error:
        raise DataError(
            f"the image {shown_path(path)} cannot be decoded ({printable(reason(error))}); repair or remove the file"
        ) from error
    finally:
        _reading.path = before


@cache
def formats() -> tuple[str, ...]:
    """Return the names of the formats that are read, of those that this Pillow decodes by itself."""
    Image.init()
    return tuple(name for name in Image.ID if name in READ and not _is_stub(Image.OPEN[name][0]))


@cache
def suffixes() -> frozenset[str]:
    """Return how the names of image files end, in lower case and with the dot."""
    read = {*formats(), "MPO"}  # JPEG's decoder reads that too
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in read)


def _is_stub(factory: Any) -> bool:
    """Tell whether Pillow leaves the decoding to a plug-in that is not installed."""
    return isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)


@contextmanager
def image_warnings() -> Iterator[Mapping[str, str]]:
    """Inside, collect the warnings while images are read, in any thread: the first sentence for each path."""
    found: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        show = warnings.showwarning

        def collect(message: Warning | str, *rest: Any, **more: Any) -> None:
            if path := getattr(_reading, "path", None):
                found.setdefault(path, " ".join(str(message).split()).rstrip("."))
            else:
                show(message, *rest, **more)

        warnings.showwarning = collect
        yield found


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale an image to at most 8 bits a channel; Pillow's own conversion would cut larger values off at 255."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    if image.mode == "I" and tags.get(BITS_PER_SAMPLE) == (32,) and tags.get(SAMPLE_FORMAT, (UNSIGNED,)) == (UNSIGNED,):
        values = values.view(np.uint32)
    if image.mode.startswith("I;16"):
        low, high = 0.0, 2.0 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
    elif image.format in ("PNG", "PPM") and image.mode == "I":
        low, high = 0.0, 65535.0
    else:
        low, high = _range(values)
    scaled = np.zeros(values.shape, np.uint8)
    rows = max(1, SCALED_AT_ONCE // max(1, values.shape[1]))
    for start in range(0, len(values) if high > low else 0, rows):
        part = values[start : start + rows].astype(np.float64)
        numbers = np.nan_to_num(part, copy=False, nan=low, posinf=high, neginf=low)
        scaled[start : start + rows] = np.rint((numbers - low) * (255 / (high - low))).clip(0, 255)
    return Image.fromarray(scaled)


def _pixels(image: Image.Image) -> int:
    width, height = image.size
    return width * height


def _range(values: np.ndarray[Any, np.dtype[Any]]) -> tuple[float, float]:
    """Find the values that become black and white, where the type of the values does not tell."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    most = 1.0 if values.dtype.kind == "f" else 255.0
    if low >= 0 and high <= most:
        return 0.0, most
    warnings.warn(
        f"its {values.dtype} values have no known range: from {low:g} to {high:g} they are scaled to 0 .. 255",
        stacklevel=1,
    )
    return low, high


def _opaque(image: Image.Image) -> Image.Image:
    """Make an RGB image; transparent pixels are laid over white, as they would be on a page."""
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    coloured = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), coloured).convert("RGB")


def _turn(image: Image.Image) -> int | None:
    """Return how an image has to be turned to be upright, as its EXIF data say.

    That of a TIFF file is right after it was loaded: Pillow turns it then.
    """
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception as error:  # every kind of broken data fails in its own way
        warnings.warn(f"its EXIF data cannot be read, and it is taken as upright ({reason(error)})", stacklevel=1)
        return None


def _turned(size: Sequence[int], turn: int | None) -> tuple[int, int]:
    width, height = size
    return (height, width) if turn in SIDEWAYS else (width, height)


def _upright(pixels: Image.Image, turn: int | None) -> Image.Image:
    return pixels.transpose(TURNS[turn]) if turn in TURNS else pixels


def square(pixels: Image.Image, size: int, interpolation: str, *, crop_pct: float = 1.0) -> Image.Image:
    """Resize the short side of an image to `size` / `crop_pct`, and cut the middle out."""
    side = int(size / crop_pct)
    if pixels.size == (size, size) == (side, side):
        return pixels
    resized = transforms.resize(_without_ends(pixels), [side], InterpolationMode(interpolation), antialias=True)
    cropped: Image.Image = transforms.center_crop(resized, [size])
    return cropped


def _without_ends(pixels: Image.Image) -> Image.Image:
    """Crop a very long image to its middle: a line of pixels whose short side is enlarged would take gigabytes."""
    width, height = pixels.size
    # As many pixels go on either side, so that the centre stays where it is.
    x, y = (max(0, (long - LONGEST * short) // 2) for long, short in ((width, height), (height, width)))
    return pixels.crop((x, y, width - x, height - y)) if x or y else pixels
