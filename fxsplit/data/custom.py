"""Data sets that a function of the user's returns: torch's, Hugging Face's, anything with numbered items."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike, fspath
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from fxsplit.data.files import InFile
from fxsplit.data.images import Data, Read, ReadImages
from fxsplit.data.reading.decoding import Least, read_open, square
from fxsplit.data.reading.unreadable import Unread
from fxsplit.data.reading.workers import OpenImage, OwnPixels
from fxsplit.errors import DataError, UsageError, reason, shown_path
from fxsplit.objects import factories
from fxsplit.paths import expanded

# Names of the images to test on, in a mapping that a function returns; the first that is there counts.
TEST = ("test", "validation", "val")
# Keys of an item that is a mapping, as Hugging Face's are.
IMAGE, LABEL = "image", "label"

Notice = Callable[[str], None]


class Items(Protocol):
    """A data set with numbered items, each an image and its label, the same whenever it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def load(
    name: str,
    *,
    img_size: int | None,
    data_dir: str,
    workers: int,
    interpolation: str,
    notice: Notice,
    largest: int,
) -> Data:
    """Call the function that `name` means, as file.py:FACTORY or pkg.module:FACTORY, and take what it returns as data.

    It returns images to train on and to test on: two data sets, or a mapping from "train" and "test" (or "validation")
    to them. An item is an image and a label, as a pair or under "image" and "label"; an image is one of Pillow's, the
    path of a file, or uint8 pixels, an array (H, W), (H, W, C) or a tensor (C, H, W).

    Args:
        name: of the function. It gets `data_dir` if it has such a parameter.
        img_size: side of the square images in pixels; None for the short side of the first one, at most `largest`.
        data_dir: where data sets are kept.
        workers: processes that read items.
        interpolation: how images are resized, one of INTERPOLATIONS.
        notice: is called with what was decided for the user.
        largest: side in pixels that is not exceeded unless asked for.

    Raises UsageError when there is no such function, or it returns something else, and DataError when an item has no
    image or no label of a class.
    """
    source, _, function = name.partition(":")
    others = factories.Others("kind of data set", ("folder",), UsageError)
    made = factories.call(source, function, {"data_dir": str(expanded(data_dir))}, others=others)
    sets = _train_and_test(name, made)
    labels = [_labels(name, items, notice) for items in sets]
    classes = _classes(name, sets[0], labels)
    size = img_size or min(largest, min(_opened(name, sets[0], 0).at_least(_any).image.size))
    train, test = (
        CustomImages(
            name=name,
            items=items,
            ids=torch.arange(len(items)),
            labels=each,
            img_size=size,
            workers=workers,
            interpolation=interpolation,
        )
        for items, each in zip(sets, labels, strict=True)
    )
    return Data(train=train, test=test, classes=classes, img_size=size)


@dataclass(frozen=True, kw_only=True, eq=False)
class CustomImages(ReadImages):
    """Gives images that are items of a data set.

    Args:
        name: of the data set.
        items: all of it.
        ids: the number of each image's item, int64 (N,).
    """

    name: str
    items: Items
    ids: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"image {index} of {self.name}" for index in self.ids.tolist())

    def subset(self, ids: Tensor) -> CustomImages:
        return replace(self, ids=self.ids[ids], labels=self.labels[ids])

    def reader(self, change: Callable[..., Tensor]) -> Read:
        return _FromItems(self.name, self.items, self.ids.tolist(), change)


class _FromItems:
    """Reads items and changes the image of each; `change` takes an `OpenImage` and the rows of the image."""

    def __init__(self, name: str, items: Items, ids: list[int], change: Callable[..., Tensor]) -> None:
        self._name, self._items, self._ids, self._change = name, items, ids, change

    def __call__(self, index: int, rows: Sequence[Any], _unread: dict[str, Unread]) -> Tensor:
        number = self._ids[index]
        return self._change(_opened(self._name, self._items, number), *rows)


class _Open:
    """An image that is open already, as an `OpenImage`; `what` it is, in words."""

    def __init__(self, image: Image.Image, what: str) -> None:
        self._image, self._what = image, what

    def square(self, size: int, interpolation: str, *, crop_pct: float = 1.0) -> Image.Image:
        return square(self.at_least(_any).image, size, interpolation, crop_pct=crop_pct)

    def at_least(self, _least: Least) -> OwnPixels:
        try:
            return OwnPixels(*read_open(self._image))
        except Exception as error:
            raise DataError(f"{self._what} cannot be decoded ({reason(error)}); repair it, or leave it out") from error


def _any(width: int, height: int) -> tuple[float, float]:
    return width, height


def _opened(name: str, items: Items, number: int) -> OpenImage:
    """Open the image of an item. Raises DataError when it has none."""
    what = f"the image of item {number} of {shown_path(name)}"
    image = _item(name, items, number)[0]
    if isinstance(image, str | PathLike):
        return InFile(fspath(image))
    if isinstance(image, Image.Image):
        return _Open(image, what)
    if isinstance(image, Tensor | np.ndarray) and image.dtype in (torch.uint8, np.uint8):
        try:
            return _Open(transforms.to_pil_image(image), what)
        except (TypeError, ValueError) as error:
            raise DataError(f"{what} has the shape {tuple(image.shape)}, which is that of no image") from error
    kind = type(image).__name__ + (f" of {image.dtype}" if isinstance(image, Tensor | np.ndarray) else "")
    raise DataError(f"{what} is a {kind}, and must be an image of Pillow's, the path of a file, or uint8 pixels")


def _item(name: str, items: Items, number: int) -> tuple[Any, Any]:
    """Return image and label of an item. Raises DataError when it cannot be read, or is something else."""
    try:
        item = items[number]
    except Exception as error:
        raise DataError(
            f"item {number} of {shown_path(name)} cannot be read: {type(error).__name__}: {reason(error)}"
        ) from error
    if isinstance(item, Mapping) and {IMAGE, LABEL} <= item.keys():
        return item[IMAGE], item[LABEL]
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    raise DataError(
        f"item {number} of {shown_path(name)} is a {type(item).__name__}, and must be an image and a label, as a pair "
        f"or a mapping with {IMAGE!r} and {LABEL!r}"
    )


def _train_and_test(name: str, made: object) -> tuple[Items, Items]:
    """Return the data sets to train on and to test on. Raises UsageError when a function returned something else."""
    if isinstance(made, Mapping):
        test = next((each for each in TEST if each in made), None)
        sets = (made["train"], made[test]) if "train" in made and test is not None else ()
    else:
        sets = tuple(made) if isinstance(made, tuple | list) else ()
    if len(sets) != 2:
        raise UsageError(
            f"{shown_path(name)} returned a {type(made).__name__}; return the data sets to train and to test on, as a "
            "pair or a mapping with 'train' and 'test'"
        )
    for each, which in zip(sets, ("train", "test"), strict=True):
        if not (hasattr(each, "__len__") and hasattr(each, "__getitem__")):
            raise UsageError(
                f"the data set to {which} on of {shown_path(name)} is a {type(each).__name__}, whose items have no "
                "numbers; return one with __len__ and __getitem__, since each epoch has an order of its own"
            )
        if not len(each):
            raise DataError(f"the data set to {which} on of {shown_path(name)} is empty")
    return sets


def _labels(name: str, items: Items, notice: Notice) -> Tensor:
    """List the labels of all items, int64 (N,): from `targets`, as torchvision's data sets have them, or a column."""
    found: Any = getattr(items, "targets", None)
    if found is None and LABEL in (getattr(items, "features", None) or ()):
        found = items[LABEL]  # type: ignore[index]  # a column of a data set of Hugging Face
    if found is None:
        notice(f"labels of {name} are read item by item; a data set that has them as `targets` is ready sooner")
        found = [_item(name, items, number)[1] for number in range(len(items))]
    try:
        labels = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"the labels of {shown_path(name)} are no whole numbers: {reason(error)}") from error
    if labels.is_floating_point() or labels.is_complex() or labels.shape != (len(items),):
        raise DataError(
            f"the labels of {shown_path(name)} are {labels.dtype} of the shape {tuple(labels.shape)}, and must be a "
            f"whole number for each of {len(items)} items"
        )
    return labels.long()


def _classes(name: str, train: Items, labels: Sequence[Tensor]) -> tuple[str, ...]:
    """Name the classes: as `classes` says, or the feature of a Hugging Face column, or by their numbers."""
    feature = (getattr(train, "features", None) or {}).get(LABEL)
    named = getattr(train, "classes", None) or getattr(feature, "names", None)
    least, most = (int(pick(torch.cat(list(labels)))) for pick in (torch.min, torch.max))
    classes = tuple(map(str, named)) if named else tuple(map(str, range(most + 1)))
    if least < 0 or most >= len(classes):
        raise DataError(
            f"the labels of {shown_path(name)} go from {least} to {most}, but it has {len(classes)} classes, whose "
            f"labels are 0 to {len(classes) - 1}"
        )
    return classes
