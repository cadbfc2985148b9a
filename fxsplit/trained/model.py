"""A trained model with what is needed to use it: the names of its classes, and the preparation of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from fxsplit.arguments import listed, require, require_whole
from fxsplit.data.normalization import Normalization
from fxsplit.data.reading.decoding import decode, square_pixels
from fxsplit.errors import DataError, reason
from fxsplit.execute.forward import logits_of
from fxsplit.saving.model_config import ModelConfig

# Classes that are named where a model is printed.
MOST_NAMED = 12

# What to do with pixels.
ARRAYS = "Image.fromarray(array) makes one of pixels, uint8 (H, W, 3)"

# An image: a file, or one that Pillow has opened.
Picture = str | Path | Image.Image


@dataclass(frozen=True, slots=True)
class Guess:
    """A class that an image may be of, and its probability by the model, from 0 to 1."""

    label: str
    probability: float


class TrainedModel(nn.Module):
    """A trained image classifier, ready to call.

    Calling it gives class scores (B, classes) for images (B, 3, H, W) as `preprocess` makes them, whatever else the
    model itself returns. It computes in the mode that it is in; `fxsplit.load` gives it in evaluation mode, in which
    `predict` computes in any case.

    Args:
        model: the network itself.
        config: how it is used.
    """

    def __init__(self, model: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.normalize = Normalization(config.mean, config.std)

    def __str__(self) -> str:
        """Say in a few lines what it is and how it is called; `repr` has all modules of the network."""
        config, names = self.config, self.classes
        some = names if len(names) <= MOST_NAMED else (*names[: MOST_NAMED - 2], "...", names[-1])
        size = f"{config.channels} x {config.img_size} x {config.img_size}"
        return (
            f"{config.model}, trained, on {self.device}, in {'training' if self.training else 'evaluation'} mode\n"
            f"  classes  {len(names)}: {', '.join(some)}\n"
            f"  images   {size}, prepared by preprocess(file) or predict(files)"
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the scores."""
        return self.config.classes

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.normalize.white.device

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores (B, classes) for prepared images, float32 (B, 3, H, W)."""
        return logits_of(self.model(images))

    def pixels(self, picture: Picture) -> Tensor:
        """Return the pixels of an image, uint8 (3, img_size, img_size), resized and cropped as in the run's tests.

        Raises DataError when it cannot be decoded, and UsageError when it is neither a file nor an image of Pillow.
        """
        config = self.config
        require("picture", picture, (str, PathLike, Image.Image), "a file or an image of Pillow", ARRAYS)
        if not isinstance(picture, Image.Image):
            return decode(picture, config.img_size, config.interpolation, crop_pct=config.crop_pct)
        try:
            return square_pixels(picture, config.img_size, config.interpolation, crop_pct=config.crop_pct)
        except Exception as error:  # every kind of broken image fails in its own way
            raise DataError(f"the image cannot be decoded ({reason(error)})") from error

    def preprocess(self, picture: Picture) -> Tensor:
        """Prepare an image as in the run's tests: float32 (3, img_size, img_size), on the model's device.

        Raises DataError when it cannot be decoded, and UsageError when it is neither a file nor an image of Pillow.
        """
        prepared: Tensor = self.normalize(self.pixels(picture)[None].to(self.device))[0]
        return prepared

    def predict(self, images: Picture | Sequence[Picture] | Tensor, top: int = 5) -> list[list[Guess]]:
        """Return the most probable classes of each image, the most probable first, as computed in evaluation mode.

        Args:
            images: files or images, prepared here and run as one batch; or a tensor (B, 3, H, W) of prepared images. A
                single file or image is a batch of one.
            top: how many classes, at least 1; all, if there are fewer.

        Raises DataError when an image cannot be decoded, and UsageError when `top` is less than 1.
        """
        require_whole(1, top=top)
        if not isinstance(images, Tensor):
            pictures: tuple[Picture, ...] = listed(images)
            prepared = [self.preprocess(picture) for picture in pictures]
            if not prepared:
                return []
            images = torch.stack(prepared)
        with torch.no_grad(), _evaluating(self):
            scores = self(in_layout(self.config, images.to(self.device)))
        return self.guesses(scores, top)

    def guesses(self, scores: Tensor, top: int) -> list[list[Guess]]:
        """Name the most probable classes for each row of class scores (B, classes)."""
        found = scores.float().softmax(1).topk(min(top, scores.shape[1]), dim=1)
        return [
            [Guess(self.name_of(index), value) for value, index in zip(values, indices, strict=True)]
            for values, indices in zip(found.values.tolist(), found.indices.tolist(), strict=True)
        ]

    def name_of(self, index: int) -> str:
        """Name a class by its position; a model may have more outputs than classes."""
        return self.config.name_of(index)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, all modules are in evaluation mode; then each is in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def in_layout(config: ModelConfig, images: Tensor) -> Tensor:
    """Return images in the memory format that the model was trained with."""
    return images.contiguous(memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
