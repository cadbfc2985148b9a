"""Images in files: of any format and depth, upright, opaque, whatever else is wrong with them."""

from __future__ import annotations

import stat
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from sklearn.datasets import load_sample_image
from torch import Tensor
from torchvision.transforms import v2

from fxsplit.data.files import FileImages
from fxsplit.data.loader import Loader
from fxsplit.data.reading.decoding import READ, decode, formats, image_warnings, read_image, square, suffixes
from fxsplit.errors import DataError
from tests.fuzz_input.images import png

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def grey(pixels: Tensor) -> np.ndarray:
    """The one channel of a grey image."""
    assert torch.equal(pixels[0], pixels[1])
    assert torch.equal(pixels[0], pixels[2])
    return pixels[0].numpy()


def warned(read: Callable[[], object]) -> list[str]:
    with image_warnings() as found:
        read()
    return list(found.values())


# --- depth --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "values", "mode"),
    [
        (".png", RAMP.astype(np.uint16) * 257, "I;16"),
        (".tif", RAMP.astype(np.uint16) * 257, "I;16"),
        (".pgm", RAMP.astype(np.uint16) * 257, "I"),
        (".tif", RAMP.astype(np.int32), "I"),
        (".tif", (RAMP / np.float32(255)).astype(np.float32), "F"),
    ],
)
def test_values_of_a_known_range_are_scaled_by_it(tmp_path: Path, suffix: str, values: np.ndarray, mode: str) -> None:
    """Also where an image uses little of its range: a dark one stays dark."""
    for part in (RAMP >= 0, RAMP < 40):
        path = saved(Image.fromarray(np.where(part, values, 0).astype(values.dtype)), tmp_path / f"image{suffix}")
        with Image.open(path) as image:
            assert image.mode == mode
        assert np.array_equal(grey(decode(path, 16)), np.where(part, RAMP, 0))


def tiff(values: np.ndarray, kind: str, path: Path) -> Path:
    """Writes numbers (16, 16) as unsigned ones of a kind such as ">u2"; Pillow writes little-endian or signed ones."""
    order, values = kind[0], values.astype(kind)
    tags = {256: 16, 257: 16, 258: 8 * values.itemsize, 259: 1, 262: 1, 273: 134, 277: 1, 278: 16}
    tags |= {279: values.nbytes, 339: 1}
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = struct.pack(f"{order}HHIH", 0x4949 if order == "<" else 0x4D4D, 42, 8, len(tags)) + entries + bytes(4)
    assert len(head) == tags[273]
    path.write_bytes(head + values.tobytes())
    return path


def test_values_of_16_bits_in_the_other_order_of_bytes_are_scaled_too(tmp_path: Path) -> None:
    path = tiff(RAMP.astype(np.uint16) * 257, ">u2", tmp_path / "image.tif")
    with Image.open(path) as image:
        assert image.mode == "I;16B"
    assert np.array_equal(grey(decode(path, 16)), RAMP)


@pytest.mark.parametrize(
    "values",
    [
        RAMP.astype(np.float32) * 7 - 300,
        ((RAMP - np.float64(127.5)) * 2.6e36).astype(np.float32),
        RAMP.astype(np.int32) * 65536 - 2**23,
        RAMP.astype(np.int32) + 2**30,
    ],
)
def test_values_of_no_known_range_are_scaled_by_their_own_and_a_warning_says_so(
    tmp_path: Path, values: np.ndarray
) -> None:
    path = saved(Image.fromarray(values), tmp_path / "image.tif")
    with image_warnings() as found:
        pixels = decode(path, 16)
    assert np.array_equal(grey(pixels), RAMP)
    assert "no known range" in found[str(path)]


def test_unsigned_values_of_32_bits_do_not_turn_negative(tmp_path: Path) -> None:
    path = tiff(RAMP.astype(np.uint32) * 16843009, "<u4", tmp_path / "image.tif")
    with image_warnings():
        assert np.array_equal(grey(decode(path, 16)), RAMP)


def test_what_is_no_number_is_black_and_spoils_no_other_value(tmp_path: Path) -> None:
    values = (RAMP / np.float32(255)).astype(np.float32)
    values[0, 0], values[0, 1], values[0, 2] = np.nan, np.inf, -np.inf
    expected = RAMP.copy()
    expected[0, :3] = 0, 255, 0
    assert np.array_equal(grey(decode(saved(Image.fromarray(values), tmp_path / "a.tif"), 16)), expected)
    empty = np.full((4, 4), np.nan, dtype=np.float32)
    assert grey(decode(saved(Image.fromarray(empty), tmp_path / "b.tif"), 4)).max() == 0


def test_one_value_of_no_known_range_is_black(tmp_path: Path) -> None:
    path = saved(Image.fromarray(np.full((4, 4), 500, dtype=np.int32)), tmp_path / "a.tif")
    assert warned(lambda: decode(path, 4))
    with image_warnings():
        assert grey(decode(path, 4)).max() == 0


# --- orientation and transparency ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    """The first row of what is stored is to be shown at the top, top, bottom, ..., of four corners."""
    corners = np.array([[0, 80], [160, 240]], dtype=np.uint8)
    shown = {
        1: corners,
        2: corners[:, ::-1],
        3: corners[::-1, ::-1],
        4: corners[::-1],
        5: corners.T,
        6: np.rot90(corners, -1),
        7: corners[::-1, ::-1].T,
        8: np.rot90(corners),
    }[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = Image.fromarray(np.kron(corners, np.ones((8, 8), dtype=np.uint8)))
    options = {".webp": {"lossless": True}, ".jpg": {"quality": 100}}.get(suffix, {})
    pixels = decode(saved(stored, tmp_path / f"photo{suffix}", exif=exif, **options), 16)
    assert np.abs(pixels[0, 4::8, 4::8].numpy().astype(int) - shown).max() <= 2


def test_a_wide_photograph_of_a_tall_thing_is_cropped_as_it_is_shown(tmp_path: Path) -> None:
    tall = np.zeros((40, 20, 3), dtype=np.uint8)
    tall[10:30] = 200
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path = saved(Image.fromarray(np.rot90(tall)), tmp_path / "photo.png", exif=exif)
    assert decode(path, 20).unique().tolist() == [200]


def test_broken_exif_data_is_no_reason_to_refuse_an_image(tmp_path: Path) -> None:
    path = saved(Image.fromarray(RAMP), tmp_path / "photo.png", exif=b"Exif\0\0no such thing")
    with image_warnings() as found:
        assert np.array_equal(grey(decode(path, 16)), RAMP)
    assert len(found) == 1


def _transparent(mode: str) -> Image.Image:
    """Transparent red beside opaque blue."""
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (4, 0, 8, 8))
    if mode in ("RGBA", "LA"):
        return image.convert(mode)
    opaque = image.convert("RGB")
    if mode != "RGB":
        opaque = opaque.quantize(4) if mode == "P" else opaque.convert(mode)
    opaque.info["transparency"] = {"P": opaque.getpixel((0, 0)), "L": 76, "RGB": (255, 0, 0)}[mode]
    return opaque


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    image = _transparent(mode)
    options = {"transparency": image.info["transparency"]} if "transparency" in image.info else {}
    pixels = decode(saved(image, tmp_path / "image.png", **options), 8)
    assert pixels[:, :, :4].unique().tolist() == [255]
    assert pixels[:, 0, 7].tolist() == ([0, 0, 255] if mode in ("RGBA", "P", "RGB") else [29, 29, 29])


def test_half_transparent_is_half_white(tmp_path: Path) -> None:
    path = saved(Image.new("RGBA", (4, 4), (0, 0, 0, 102)), tmp_path / "image.png")
    assert decode(path, 4).unique().tolist() == [153]


def test_transparency_of_a_palette_in_bytes_makes_no_warning(tmp_path: Path) -> None:
    image = Image.fromarray(RAMP).quantize(16)
    path = saved(image, tmp_path / "image.png", transparency=bytes([0] * 8 + [255] * 8))
    decode(path, 16)  # warnings are errors here


# --- formats ------------------------------------------------------------------------------------------------------


def test_formats_are_those_that_pillow_decodes_by_itself() -> None:
    assert {"PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "TGA", "ICO", "JPEG2000", "DDS", "PSD"} <= {*formats()}
    assert {*formats()} <= {*READ}
    assert not {"EPS", "IPTC", "WMF", "HDF5", "GRIB", "BUFR", "MPEG"} & {*formats()}
    assert {".png", ".jpg", ".jfif", ".gif", ".webp", ".mpo", ".tga", ".jp2", ".pfm"} <= suffixes()
    assert not {".eps", ".ps", ".pdf", ".mpg", ".h5", ".txt", ""} & suffixes()


@pytest.mark.parametrize(
    "suffix", ["bmp", "gif", "jp2", "pcx", "png", "ppm", "sgi", "tga", "tif", "webp", "qoi", "ico"]
)
def test_a_format_is_read(tmp_path: Path, suffix: str) -> None:
    image = Image.new("RGB", (16, 16), (10, 200, 30))
    path = saved(image, tmp_path / f"image.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    assert f".{suffix}" in suffixes()
    assert decode(path, 16)[:, 3, 5].tolist() == [10, 200, 30]


def test_the_first_of_several_frames_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    for suffix in ("gif", "png", "tif", "mpo"):
        path = tmp_path / f"film.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        assert (decode(path, 8)[:, 4, 4].int() - torch.tensor([255, 0, 0])).abs().max() <= 2


@pytest.mark.parametrize("where", ["alone", "within another"])
def test_no_image_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Pillow hands EPS to Ghostscript, whatever the file is called."""
    ran = tmp_path / "ran"
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {ran}\n")
    ghostscript.chmod(ghostscript.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    drawing = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    if where == "within another":
        # IPTC: one grey layer, 8 x 8, compressed in a format that its data tells.
        fields = [(3, 60, b"\1\0"), (3, 20, b"\0\x08"), (3, 30, b"\0\x08"), (3, 120, b"\5"), (8, 10, drawing)]
        drawing = b"".join(struct.pack(">BBBH", 0x1C, *tag, len(data)) + data for *tag, data in fields)
    path = tmp_path / "photo.jpg"
    path.write_bytes(drawing)
    with pytest.raises(DataError, match="cannot be decoded"):
        decode(path, 8)
    assert not ran.exists()


# --- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(37, 23), (23, 37), (16, 128), (200, 31), (5, 9), (9, 9)])
def test_ordinary_images_are_resized_and_cropped_as_everybody_does(tmp_path: Path, size: tuple[int, int]) -> None:
    stream = np.random.default_rng(sum(size))
    image = Image.fromarray(stream.integers(256, size=(*size, 3), dtype=np.uint8))
    path = saved(image, tmp_path / "image.png")
    usual = v2.Compose([v2.Resize(16, antialias=True), v2.CenterCrop(16), v2.PILToTensor()])
    assert torch.equal(decode(path, 16), usual(image))
    resize = v2.Resize(16, v2.InterpolationMode.BICUBIC, antialias=True)
    bicubic = v2.Compose([resize, v2.CenterCrop(16), v2.PILToTensor()])
    assert torch.equal(decode(path, 16, "bicubic"), bicubic(image))


@pytest.mark.parametrize(("long", "short"), [(60_000, 1), (60_001, 1), (50_000, 2), (50_001, 2)])
def test_a_line_of_pixels_takes_no_memory_and_keeps_its_middle(tmp_path: Path, long: int, short: int) -> None:
    values = np.zeros((short, long), dtype=np.uint8)
    middle = (long - 1) / 2
    near = np.abs(np.arange(long) - middle)
    values[:, near <= short / 2] = 255
    across = saved(Image.fromarray(values), tmp_path / "across.png")
    down = saved(Image.fromarray(values.T), tmp_path / "down.png")
    peak = peak_bytes(lambda: decode(across, 160))
    assert peak < 50 << 20
    pixels = decode(across, 160)
    assert torch.equal(pixels, pixels.flip(2))
    assert torch.equal(decode(down, 160), pixels.transpose(1, 2))
    assert pixels[:, :, 79:81].min() > 250


def peak_bytes(call: Callable[[], object]) -> int:
    """The most pixels that Pillow holds at a time while it resizes and crops."""
    largest = 0
    resize = Image.Image.resize

    def counted(self: Image.Image, size: tuple[int, int], *args: object, **kwargs: object) -> Image.Image:
        nonlocal largest
        largest = max(largest, 4 * size[0] * size[1])
        return resize(self, size, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", counted)
        call()
    assert largest
    return largest


@pytest.mark.parametrize("sides", [(13_300, 13_300), (60_000, 1200), (9000, 8000)])
def test_a_few_bytes_that_say_they_are_gigabytes_are_refused_before_they_are_decoded(
    tmp_path: Path, sides: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(*sides, bits=8, colour=2))

    def load(_: Image.Image) -> None:
        raise AssertionError("it is decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with (
        image_warnings(),
        pytest.raises(DataError, match=r"bomb.png' is too large to be read safely"),
    ):
        decode(path, 8)


def test_of_a_large_photograph_a_smaller_version_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ramp = Image.fromarray(np.linspace(0, 255, 512, dtype=np.uint8)[None].repeat(256, 0)).convert("RGB")
    photo, drawing = saved(ramp, tmp_path / "photo.jpg", quality=95), saved(ramp, tmp_path / "drawing.png")
    whole = decode(photo, 16)
    monkeypatch.setattr("fxsplit.data.reading.decoding.MOST_PIXELS", 512 * 256 - 1)
    assert (decode(photo, 16).int() - whole.int()).abs().max() <= 3
    # Whoever wants all pixels gets every other one.
    image, width, height = read_image(photo)
    assert (image.size, width, height) == ((256, 128), 512, 256)
    assert read_image(photo, lambda *_: (40.0, 20.0))[0].size == (64, 32)
    with pytest.raises(DataError, match=r"it has 131072 pixels, and at most 131071 are read"):
        decode(drawing, 16)
    monkeypatch.setattr("fxsplit.data.reading.decoding.MOST_PIXELS", 512 * 256)
    decode(drawing, 16)


def test_values_of_more_bits_are_scaled_in_parts_as_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (37, 23)).astype(np.uint16)
    path = saved(Image.fromarray(values), tmp_path / "image.png")
    whole = decode(path, 23)
    for at_once in (1, 23, 60):
        monkeypatch.setattr("fxsplit.data.reading.decoding.SCALED_AT_ONCE", at_once)
        assert torch.equal(decode(path, 23), whole)


def test_an_image_beyond_what_pillow_reads_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(Image.new("RGB", (30, 20)), tmp_path / "poster.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 299)
    with pytest.raises(
        DataError, match=r"poster.png' is too large .*600 pixels.*598 pixels.*save it smaller"
    ) as caught:
        decode(path, 8)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    assert "exceeds limit of 300 pixels" in warned(lambda: decode(path, 8))[0]


# --- warnings -----------------------------------------------------------------------------------------------------


def test_only_what_is_warned_of_while_images_are_read_is_collected(tmp_path: Path) -> None:
    path = saved(Image.fromarray(RAMP.astype(np.int32) - 1), tmp_path / "image.tif")

    def read() -> list[str]:
        with image_warnings() as found:
            warnings.warn("somebody else's", stacklevel=1)
            decode(path, 16)
        return list(found)

    with pytest.warns(UserWarning, match="somebody else's"):
        assert read() == [str(path)]


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(("size", "scale"), [(100, 4), (130, 2), (260, 1)])
def test_of_large_photographs_only_what_is_needed_is_decoded(
    orientation: int, size: int, scale: int, tmp_path: Path
) -> None:
    """At least twice the pixels along each side are left, so that hardly anything changes."""
    photograph = Image.fromarray(load_sample_image("china.jpg")).resize((1000, 840))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / "large.jpg"
    photograph.save(path, quality=95, exif=exif)
    upright = (840, 1000) if orientation == 6 else (1000, 840)
    asked = []

    def least(width: int, height: int) -> tuple[float, float]:
        asked.append((width, height))
        return width * 2 * size / 840, height * 2 * size / 840

    image, *own = read_image(path, least)
    assert asked == [upright]
    assert tuple(own) == upright
    assert image.size == (upright[0] // scale, upright[1] // scale)
    whole, *_ = read_image(path)
    assert whole.size == upright
    plain = v2.functional.pil_to_tensor(square(whole, size, "bilinear"))
    apart = (decode(path, size).int() - plain.int()).abs().float()
    assert apart.mean() < (1 if scale > 1 else 1e-9)


def test_crops_of_large_photographs_are_decoded_as_small_as_that(tmp_path: Path) -> None:
    Image.fromarray(load_sample_image("flower.jpg")).resize((1280, 854)).save(tmp_path / "large.jpg", quality=95)
    images = FileImages(paths=[str(tmp_path / "large.jpg")] * 20, labels=torch.zeros(20).long(), img_size=32, workers=0)
    sizes = []
    load = Image.Image.crop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "crop", lambda self, box: (sizes.append((self.width, box)), load(self, box))[1])
        (batch,) = Loader(images, batch_size=20, augment="resized-crop").batches(0)
    assert {width for width, _ in sizes} <= {1280, 640, 320, 160}
    assert min(width for width, _ in sizes) < 640
    assert all(min(box[2] - box[0], box[3] - box[1]) >= 63 for _, box in sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxsplit.data.augmentation.resized_crop.GAP", 99)
        (exact,) = Loader(images, batch_size=20, augment="resized-crop").batches(0)
    assert (batch.images - exact.images).abs().mean() < 0.01
