"""Data sets that a function of the user's returns: torch's, Hugging Face's, anything with numbered items."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike, fspath
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from fxsplit.data.files import InFile
from fxsplit.data.images import Data, Read, ReadImages
from fxsplit.data.reading.decoding import Least, read_open, square
from fxsplit.data.reading.folders import positions
from fxsplit.data.reading.unreadable import Unread, refuse_special
from fxsplit.data.reading.workers import OpenImage, OwnPixels
from fxsplit.errors import DataError, UsageError, reason, shown, shown_path
from fxsplit.objects import factories
from fxsplit.paths import expanded

# Names of the images to test on, in a mapping that a function returns. Of several the first with labels counts.
TEST = ("test", "validation", "val")
# Keys of an item that is a mapping, as Hugging Face's are.
IMAGE, LABEL = "image", "label"
# More classes are a mistake.
MOST_CLASSES = 1_000_000

Notice = Callable[[str], None]


class Items(Protocol):
    """A data set with numbered items, each an image and its label, the same whenever it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Half(NamedTuple):
    """Images to train or to test on: their items, labels int64 (N,), and the names of classes if there are any.

    `is_read` tells that labels were not at hand: every item was read for them.
    """

    items: Items
    labels: Tensor
    classes: tuple[str, ...] | None
    is_read: bool


# What a function returned for whoever asked about it first, until it is loaded: calling it may take long.
_described: dict[tuple[str, str], tuple[Half, Half]] = {}


def describe(name: str, *, data_dir: str, largest: int) -> tuple[int, int]:
    """Return the number of classes and the side in pixels of the images that `load` gives next.

    Raises what `load` raises.
    """
    halves = _described[name, data_dir] = _halves(name, data_dir)
    return len(_classes(name, *halves)), _own_size(name, halves[0], largest)


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
    halves = _described.pop((name, data_dir), None) or _halves(name, data_dir)
    if any(half.is_read for half in halves):
        notice(f"labels of {name} are read item by item; a data set that has them as `targets` is ready sooner")
    classes = _classes(name, *halves)
    size = img_size or _own_size(name, halves[0], largest)
    train, test = (
        CustomImages(
            name=name,
            items=half.items,
            ids=torch.arange(len(half.labels)),
            given_labels=half.labels,
            labels=half.labels if half.classes is None else positions(half.classes, classes)[half.labels],
            img_size=size,
            workers=workers,
            interpolation=interpolation,
        )
        for half in halves
    )
    return Data(train=train, test=test, classes=classes, img_size=size)


def _halves(name: str, data_dir: str) -> tuple[Half, Half]:
    source, _, function = name.partition(":")
    others = factories.Others("kind of data set", ("folder",), UsageError)
    with torch.random.fork_rng(devices=[]):
        made = factories.call(source, function, {"data_dir": str(expanded(data_dir))}, others=others)
    train, tests = _train_and_tests(name, made)
    half = _half(f"the data set to train on of {shown_path(name)}", train)
    for each in tests:
        test = _half(f"the data set to test on of {shown_path(name)}", each)
        # Hugging Face's test sets are often without labels, all of which are then -1.
        if bool((test.labels >= 0).any()):
            break
    return half, test


@dataclass(frozen=True, kw_only=True, eq=False)
class CustomImages(ReadImages):
    """Gives images that are items of a data set.

    Args:
        name: of the data set.
        items: all of it.
        ids: the number of each image's item, int64 (N,).
        given_labels: what the data set says of all its items, int64, to be held against each item that is read.
    """

    name: str
    items: Items
    ids: Tensor
    given_labels: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"image {index} of {self.name}" for index in self.ids.tolist())

    def subset(self, ids: Tensor) -> CustomImages:
        return replace(self, ids=self.ids[ids], labels=self.labels[ids])

    def reader(self, change: Callable[..., Tensor]) -> Read:
        return _FromItems(self.name, self.items, self.ids.tolist(), self.given_labels.tolist(), change)


class _FromItems:
    """Reads items and changes the image of each; `change` takes an `OpenImage` and the rows of the image."""

    def __init__(
        self, name: str, items: Items, ids: list[int], labels: list[int], change: Callable[..., Tensor]
    ) -> None:
        self._name, self._items, self._ids, self._labels, self._change = name, items, ids, labels, change

    def __call__(self, index: int, rows: Sequence[Any], _unread: dict[str, Unread]) -> Tensor:
        number = self._ids[index]
        image, label = _item(shown_path(self._name), self._items, number)
        if not _is(label, self._labels[number]):
            raise DataError(
                f"item {number} of {shown_path(self._name)} has the label {shown(label)}, but its list of labels says "
                f"{self._labels[number]}; give the same in both"
            )
        return self._change(_opened(f"the image of item {number} of {shown_path(self._name)}", image), *rows)


def _is(label: Any, number: int) -> bool:
    """Tell whether an item's label, of whatever type, is a number."""
    try:
        return int(label) == number
    except (TypeError, ValueError):
        return False


class _Open:
    """An image that is open already, as an `OpenImage`; `what` it is, in words."""

    def __init__(self, image: Image.Image, what: str) -> None:
        self._image, self._what = image, what

    def square(self, size: int, interpolation: str, *, crop_pct: float = 1.0) -> Image.Image:
        return square(self.at_least(_any).image, size, interpolation, crop_pct=crop_pct)

    def at_least(self, _least: Least) -> OwnPixels:
        try:
            found = OwnPixels(*read_open(self._image))
        except Exception as error:
            raise DataError(f"{self._what} cannot be decoded ({reason(error)}); repair it, or leave it out") from error
        if not min(found.image.size):
            raise DataError(f"{self._what} has no pixels; leave it out")
        return found


def _any(width: int, height: int) -> tuple[float, float]:
    return width, height


def _opened(what: str, image: Any) -> OpenImage:
    """Open an image. Raises DataError when it is something else."""
    if isinstance(image, str | PathLike):
        path = fspath(image)
        refuse_special(path)
        return InFile(path)
    if isinstance(image, Image.Image):
        return _Open(image, what)
    if isinstance(image, Tensor | np.ndarray) and image.dtype in (torch.uint8, np.uint8):
        try:
            return _Open(transforms.to_pil_image(image), what)
        except (TypeError, ValueError) as error:
            raise DataError(f"{what} has the shape {tuple(image.shape)}, which is that of no image") from error
    kind = type(image).__name__ + (f" of {image.dtype}" if isinstance(image, Tensor | np.ndarray) else "")
    raise DataError(f"{what} is a {kind}, and must be an image of Pillow's, the path of a file, or uint8 pixels")


def _item(what: str, items: Items, number: int) -> tuple[Any, Any]:
    """Return image and label of an item of `what`, in words.

    Raises DataError when it cannot be read, or is something else.
    """
    try:
        item = items[number]
    except factories.NOT_CAUGHT:
        raise
    except BaseException as error:
        raise DataError(f"item {number} of {what} cannot be read: {type(error).__name__}: {reason(error)}") from error
    if isinstance(item, Mapping) and {IMAGE, LABEL} <= item.keys():
        return item[IMAGE], item[LABEL]
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    keys = f" with {', '.join(map(shown, item))}" if isinstance(item, Mapping) else ""
    raise DataError(
        f"item {number} of {what} is a {type(item).__name__}{keys}, and must be an image and a label, as a "
        f"pair or a mapping with {IMAGE!r} and {LABEL!r}"
    )


def _train_and_tests(name: str, made: object) -> tuple[Any, list[Any]]:
    """Return the data set to train on, and those that may be the one to test on.

    Raises UsageError when a function has returned something else.
    """
    if isinstance(made, Mapping):
        found = {key: made[key] for key in ("train", *TEST) if made.get(key) is not None}
        if "train" in found and len(found) > 1:
            return found.pop("train"), list(found.values())
        kind = f"{type(made).__name__} with {', '.join(map(shown, made)) or 'nothing in it'}"
    elif isinstance(made, tuple | list):
        if len(made) == 2:
            return made[0], [made[1]]
        kind = f"{type(made).__name__} of {len(made)}"
    else:
        kind = type(made).__name__
    raise UsageError(
        f"{shown_path(name)} returned a {kind}; return the data sets to train and to test on, as a pair or a mapping "
        f"with 'train' and one of {', '.join(map(repr, TEST))}"
    )


def _half(what: str, items: Any) -> Half:
    """Ask a data set for labels and classes. Raises UsageError and DataError when it has none."""
    if not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
        raise UsageError(
            f"{what} is a {type(items).__name__}, whose items have no numbers; return one with __len__ and "
            "__getitem__, since each epoch has an order of its own"
        )
    try:
        count, features = len(items), getattr(items, "features", None)
        columns = features if isinstance(features, Mapping) else {}
        found = getattr(items, "targets", None)
        if found is None and LABEL in columns:
            found = items[LABEL]  # a column of a data set of Hugging Face
        classes = getattr(items, "classes", None)
        if classes is None:
            classes = getattr(columns.get(LABEL), "names", None)
        named = None if classes is None else tuple(map(str, classes))
    except Exception as error:
        raise DataError(
            f"{what} cannot be asked for its length, labels or classes: {type(error).__name__}: {reason(error)}"
        ) from error
    if not count:
        raise DataError(f"{what} is empty")
    is_read = found is None
    if is_read:
        found = [_item(what, items, number)[1] for number in range(count)]
    return Half(items, _whole_numbers(what, found, count), named, is_read)


def _whole_numbers(what: str, found: Any, count: int) -> Tensor:
    """Make labels, int64 (N,). Raises DataError when they are something else."""
    try:
        labels = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError) as error:
        some = f", such as {shown(found[0])}" if isinstance(found, list | tuple) and found else ""
        raise DataError(f"the labels of {what} are no whole numbers{some}; number the classes from 0") from error
    if labels.is_floating_point() or labels.is_complex() or labels.shape != (count,):
        raise DataError(
            f"the labels of {what} are {labels.dtype} of the shape {tuple(labels.shape)}, and must be a whole number "
            f"for each of {count} items"
        )
    return labels.long()


def _classes(name: str, train: Half, test: Half) -> tuple[str, ...]:
    """Name the classes, as the data set to train on does, or by their numbers.

    Raises DataError when labels do not fit.
    """
    most = max(int(half.labels.max()) for half in (train, test))
    classes = train.classes or tuple(map(str, range(min(most, MOST_CLASSES) + 1)))
    if len(set(classes)) < len(classes):
        raise DataError(f"{shown_path(name)} names a class twice: {', '.join(map(shown, classes))}")
    for half, which in ((train, "train"), (test, "test")):
        own, (least, largest) = half.classes or classes, (int(each) for each in half.labels.aminmax())
        if least < 0 or largest >= min(len(own), MOST_CLASSES):
            raise DataError(
                f"the labels to {which} on of {shown_path(name)} go from {least} to {largest}, but it has {len(own)} "
                f"classes, whose labels are 0 to {len(own) - 1}"
            )
        if unknown := [each for each in own if each not in classes]:
            raise DataError(
                f"{shown_path(name)} has images of {shown(unknown[0])} to {which} on, and no such class to train on"
            )
    return classes


def _own_size(name: str, half: Half, largest: int) -> int:
    """Return the short side of the first image in pixels, at most `largest`."""
    image = _opened(f"the image of item 0 of {shown_path(name)}", _item(shown_path(name), half.items, 0)[0])
    return min(largest, min(image.at_least(_any).image.size))
