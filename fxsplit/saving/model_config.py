"""What is needed to use a model when its run is over, as plain data: how it is built, and how images are prepared.

It is the file `model.json` of a run's folder, and the entry `model.json` in the metadata of its weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fxsplit.data.reading.decoding import INTERPOLATIONS
from fxsplit.errors import DataError
from fxsplit.records import json_line, read_record

# The name of the file, and the key in the metadata of weights.
MODEL_CONFIG = "model.json"
SCHEMA = 1
RESIZE = "short side to img_size / crop_pct, antialiased, then centre crop"
MOST_PIXELS = 1 << 16
LEAST_CROP = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Says how a model is built, what its outputs mean, and how images are prepared for it.

    Args:
        model: the line of text that names it.
        file: of a model in a Python file, its whole path; else empty.
        pretrained: it was built for pretrained weights, which may be another network than without.
        stem: as for `registry.build`, and so is drop_path.
        drop_path: rate of stochastic depth.
        classes: what each output means, in order.
        channels: of an image, 3: red, green, blue.
        img_size: side of the square images in pixels.
        crop_pct: the share of an image's short side that is left, in its middle.
        resize: how an image becomes such a square, in words, for other programs.
        interpolation: how it is resized.
        mean: subtracted from pixels / 255, one number or one a channel; none leaves them as they are.
        std: what they are then divided by, likewise.
        channels_last: it was trained with images in channels-last order.
        schema: of this record.
    """

    model: str
    file: str = ""
    pretrained: bool
    stem: str
    drop_path: float
    classes: tuple[str, ...]
    channels: int
    img_size: int
    crop_pct: float = 1.0
    resize: str = RESIZE
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels_last: bool
    schema: int = SCHEMA

    def name_of(self, index: int) -> str:
        """Name a class by its position; a model may have more outputs than classes."""
        return self.classes[index] if index < len(self.classes) else f"output {index}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def to_metadata(self) -> dict[str, str]:
        """Return the metadata of a file of weights: this, and the format by which libraries know that it is torch's."""
        return {"format": "pt", MODEL_CONFIG: json_line(self.to_dict())}


def read_model_config(path: Path) -> ModelConfig:
    """Read the file `model.json` at `path`. Raises DataError when it cannot be read or says something else."""
    try:
        return parse_model_config(path.read_text(encoding="utf-8"), origin=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{str(path)!r} cannot be read: {getattr(error, 'strerror', 'it is no text')}") from error


def parse_model_config(text: str, *, origin: str) -> ModelConfig:
    """Read a model's config from JSON. Raises DataError, which names its `origin`, when it says something else."""
    try:
        data = json.loads(text)
        if isinstance(data, Mapping) and data.get("schema") != SCHEMA:
            raise ValueError(f"its schema is {data.get('schema')!r}, and this version reads {SCHEMA}")
        config = read_record(ModelConfig, data)
        if fault := _fault(config):
            raise ValueError(fault)
    except (ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise DataError(f"{origin!r} does not say how the model is used: {said[:200]}") from error
    return config


def _fault(config: ModelConfig) -> str:
    """Say what cannot be in a config, or nothing."""
    if not config.classes:
        return "it has no classes"
    if config.channels != 3:
        return f"channels is {config.channels}, and images are prepared with 3"
    if not 1 <= config.img_size <= MOST_PIXELS:
        return f"img_size is {config.img_size}, and must be from 1 to {MOST_PIXELS}"
    if not LEAST_CROP <= config.crop_pct <= 1:
        return f"crop_pct is {config.crop_pct}, and must be from {LEAST_CROP} to 1"
    if config.resize != RESIZE:
        return f"resize is {config.resize!r}, and images are prepared by {RESIZE!r}"
    if config.interpolation not in INTERPOLATIONS:
        return f"interpolation is {config.interpolation!r}, and must be one of {', '.join(INTERPOLATIONS)}"
    if len(config.mean) != len(config.std) or len(config.mean) not in (0, 1, 3):
        return "mean and std must both have 1, 3 or no numbers"
    if not all(each > 0 for each in config.std):
        return "std must be above 0"
    return ""
