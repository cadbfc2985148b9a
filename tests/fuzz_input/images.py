"""Images: files of every format that is read, damaged."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import warnings
import zlib
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from fxsplit.data.reading.decoding import decode, formats, image_warnings
from fxsplit.errors import DataError
from tests.fuzz_input.mutate import damaged
from tests.fuzz_input.outcome import Outcome, crashed, refused

SIDE = 24
MODES = ("RGB", "L", "RGBA", "P", "1", "CMYK", "LA", "I;16", "I", "F", "YCbCr")


@cache
def originals() -> tuple[tuple[str, bytes], ...]:
    """Whole files: every format that Pillow also writes, in every mode that it takes, and the suffix of each."""
    found = []
    values = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for name in sorted({*formats(), "MPO"} & set(Image.SAVE)):
        suffix = min((suffix for suffix, each in Image.registered_extensions().items() if each == name), default=".jpg")
        for mode in MODES:
            file = io.BytesIO()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    Image.fromarray(values).convert(mode).save(file, format=name)
            except Exception:  # not every format has every mode
                continue
            found.append((suffix, file.getvalue()))
    return tuple(found)


def png(width: int, height: int, *chunks: tuple[bytes, bytes], bits: int = 1, colour: int = 0) -> bytes:
    """A PNG file that says it has so many pixels, and holds few bytes."""
    rows = zlib.compress(b"\0" * min(10**6, (width * bits // 8 + 2) * height), 9)
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", rows), (b"IEND", b"")]
    written = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def text(draw: random.Random) -> tuple[str, bytes]:
    """The suffix and the bytes of a file."""
    if draw.random() < 0.1:
        sides = draw.choice(((1, 60_000), (60_000, 1), (13_300, 13_300), (2**31 - 1, 1), (0, 5), (9000, 9000), (2, 2)))
        bits, colour = draw.choice(((1, 0), (8, 2), (16, 0), (16, 6), (8, 3)))
        whole = ".png", png(*sides, bits=bits, colour=colour)
    else:
        whole = draw.choice(originals())
    suffix = draw.choice(originals())[0] if draw.random() < 0.1 else whole[0]
    return suffix, damaged(draw, whole[1], draw.choice((0, 1, 1, 2, 4, 16)))


def _no_program(*args: object, **_: object) -> None:
    raise AssertionError(f"a program is started: {args}")


def run(seed: int, folder: Path) -> Outcome:
    """Decode a file: pixels of the right form, or a sentence that names it."""
    suffix, data = text(random.Random(seed))
    path = folder / f"image{suffix}"
    path.write_bytes(data)
    try:
        with image_warnings(), patch.object(subprocess, "Popen", _no_program):
            pixels = decode(path, SIDE)
        assert pixels.dtype == torch.uint8, "other pixels"
        assert pixels.shape == (3, SIDE, SIDE), "other pixels"
    except DataError as error:
        outcome = refused(error, (DataError,))
        if path.name not in outcome.why:
            return Outcome("failed", "DataError", f"does not name the file: {outcome.why}")
        return outcome
    except BaseException as error:
        return crashed(error)
    finally:
        path.unlink()
    return Outcome("done")
