"""Asks a trained model about image files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from fxsplit.arguments import listed, require_whole
from fxsplit.assembly.devices import choose_device
from fxsplit.data.reading.decoding import image_warnings, suffixes
from fxsplit.errors import DataError, UsageError, printable, shown_path
from fxsplit.paths import expanded
from fxsplit.report import Observer, Prediction
from fxsplit.spec import read_values
from fxsplit.trained.load import load
from fxsplit.trained.model import TrainedModel


def predict(
    run: str | Path,
    images: str | Path | Sequence[str | Path],
    *,
    top: int = 5,
    batch_size: int = 64,
    device: str = "auto",
    trust_code: bool = False,
    observer: Observer | None = None,
) -> Iterator[Prediction]:
    """Ask the model of a run about image files, and give what it says of each, in order, as soon as it is known.

    A file that cannot be read gives a prediction with an `error`, and the rest goes on.

    Args:
        run: as for `load`.
        images: files, or one; of a folder all image files in it, and in the folders in it, but for hidden ones.
        top: how many classes, the most probable first.
        batch_size: images at a time.
        device: as `RunSpec.device`.
        trust_code: as for `load`.
        observer: is given notices.

    Raises what `load` raises, at once, and UsageError when `top` is less than 1.
    """
    observer = observer or Observer()
    asked = read_values({"batch_size": batch_size, "device": device})
    require_whole(1, top=top)
    model = load(run, choose_device(asked["device"]), trust_code=trust_code)
    return _predictions(model, listed(images), top, asked["batch_size"], observer)


def _predictions(
    model: TrainedModel, images: Sequence[str | Path], top: int, batch_size: int, observer: Observer
) -> Iterator[Prediction]:
    waiting = _files(images)
    while files := list(islice(waiting, batch_size)):
        with image_warnings() as warned:
            read = [found if found.error else _read(model, found.file) for found in files]
        for path, sentence in sorted(warned.items()):
            observer.notice(f"Pillow warns of {printable(path)!r}: {printable(sentence)}")
        pixels = [each for each in read if isinstance(each, Tensor)]
        guesses = iter(model.predict(model.normalize(torch.stack(pixels).to(model.device)), top) if pixels else [])
        for found, each in zip(files, read, strict=True):
            if isinstance(each, Prediction):
                yield each
            else:
                classes = tuple((guess.label, guess.probability) for guess in next(guesses))
                yield Prediction(file=found.file, classes=classes)


def _read(model: TrainedModel, file: str) -> Tensor | Prediction:
    """Return the pixels of an image, or what is wrong with it."""
    if not os.path.exists(file):
        return Prediction(file=file, error=f"there is no file {shown_path(file)}")
    if not os.path.isfile(file):
        return Prediction(file=file, error=f"{file!r} is no regular file")  # reading a pipe would wait for ever
    try:
        return model.pixels(file)
    except DataError as error:
        return Prediction(file=file, error=str(error))


def _files(images: Iterable[str | Path]) -> Iterator[Prediction]:
    """List the files that are meant; what is wrong with a folder is an error in its place."""
    for each in images:
        try:
            path = expanded(each)
        except UsageError as error:
            yield Prediction(file=str(each), error=str(error))
            continue
        if not os.path.isdir(path):
            yield Prediction(file=str(path))
            continue
        found = False
        for file in _images_in(path):
            found = True
            yield Prediction(file=file)
        if not found:
            yield Prediction(file=str(path), error=f"the folder {str(path)!r} has no image file")


def _images_in(folder: Path) -> Iterator[str]:
    """List the image files in a folder and in those in it, in order, without hidden ones; links are not followed."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes():
                yield os.path.join(place, name)
