"""Data sets by name: installed with scikit-learn, downloaded, in a folder, of the user's own, or made of noise."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from fxsplit.data import custom
from fxsplit.data.files import FileImages, Warned
from fxsplit.data.images import Data, ImageSet, MemoryImages, ReadImages
from fxsplit.data.randomness import random_stream
from fxsplit.data.reading import folders
from fxsplit.data.reading.decoding import INTERPOLATIONS, image_warnings, short_side
from fxsplit.data.reading.unreadable import Unreadable
from fxsplit.errors import DataError, UsageError, nearest, printable, shown_path
from fxsplit.objects import factories
from fxsplit.paths import expanded
from fxsplit.trust import is_code_of_data

MEMORY_LIMIT_BYTES = 2 << 30
TEST_SHARE = 0.2
LARGEST_DEFAULT_SIZE = 224

Notice = Callable[[str], None]


def load(
    name: str,
    *,
    img_size: int | None,
    data_dir: str,
    seed: int,
    train_limit: int | None,
    notice: Notice,
    workers: int,
    interpolation: str = INTERPOLATIONS[0],
    crop_pct: float = 1.0,
    train_in_files: bool = False,
    max_bad_samples: int = 0,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
) -> Data:
    """Load the data set `name`, on the CPU: digits, cifar10, cifar100, synthetic, folder:PATH or one of the user's.

    Args:
        name: of the data set.
        img_size: side of the square images in pixels; None for the data's own: of a folder, the short side of its first
            image, at most 224.
        data_dir: where downloaded data sets are kept.
        seed: what is drawn here depends on it: synthetic images, the images held out of a folder, a `train_limit`.
        train_limit: how many images to train on, drawn at random; None for all.
        notice: is called with sentences about what was decided for the user.
        workers: processes that read images which do not fit in memory.
        interpolation: how images in files are resized, one of INTERPOLATIONS; a loader resizes those in memory.
        crop_pct: the share of a test image's short side that is left, in its middle.
        train_in_files: leave training images that lie in files there, for what needs their own pixels.
        max_bad_samples: how many images in a folder may be unreadable; others of their class take their places.
        memory_limit_bytes: a folder whose decoded images need more stays in files.

    Raises UsageError when there is no such data set or it has fewer images than `train_limit`, and DataError
    when it cannot be read, downloaded or split.
    """
    if path := _folder_path(name):
        data = _folder(path, img_size, seed, workers, interpolation, Unreadable(max_bad_samples, notice), notice)
    elif is_code_of_data(name):
        if max_bad_samples:
            raise UsageError(f"max-bad-samples is for images in a folder, and data is {shown_path(name)}; leave it out")
        data = _custom(name, img_size, data_dir, workers, interpolation, notice)
    else:
        known = _known(name)
        data = known.load(img_size or known.img_size, expanded(data_dir), seed)
    if train_limit is not None:
        data = replace(data, train=data.train.subset(_drawn(name, len(data.train), train_limit, seed)))
    if crop_pct < 1:
        data = replace(data, test=data.test.cropped(crop_pct))
    data = _into_memory(data, memory_limit_bytes, notice, train_in_files=train_in_files)
    if isinstance(data.train, MemoryImages):
        data = replace(data, train=replace(data.train, workers=workers))
    return data


class NamedImages(NamedTuple):
    """Images to test on, whose labels are positions among the classes of a model, and the name of each image."""

    images: ImageSet
    names: tuple[str, ...]


def load_test(
    name: str,
    classes: tuple[str, ...],
    *,
    img_size: int,
    data_dir: str,
    seed: int,
    notice: Notice,
    workers: int,
    interpolation: str = INTERPOLATIONS[0],
    crop_pct: float = 1.0,
    all_of_folder: bool = False,
    max_bad_samples: int = 0,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
) -> NamedImages:
    """Load the images to test on of the data set `name` alone, the same as `load` does, for a model with `classes`.

    Args:
        name: of the data set.
        classes: what labels mean. The data set may have them in another order, and fewer.
        img_size: side of the square images in pixels.
        data_dir: as for `load`, and so are seed, notice, workers, interpolation, crop_pct and memory_limit_bytes.
        all_of_folder: of a folder that is not divided into train/ and test/, take all images, not those held out.
        max_bad_samples: as for `load`.

    Raises UsageError and DataError as `load` does, and DataError when the data set has other classes.
    """
    if path := _folder_path(name):
        unreadable = Unreadable(max_bad_samples, notice)
        images: ImageSet = _test_files(
            path, classes, img_size, seed, workers, interpolation, unreadable, notice, all_of_folder
        )
    else:
        if is_code_of_data(name):
            data = _custom(name, img_size, data_dir, workers, interpolation, notice)
        else:
            data = _known(name).load(img_size, expanded(data_dir), seed)
        folders.refuse_unknown(name, data.classes, classes, whose="the model")
        if missing := [printable(each) for each in classes if each not in data.classes]:
            notice(f"{name} has no image of {', '.join(missing)}: accuracy is that of the other classes")
        images = data.test.labelled(folders.positions(data.classes, classes)[data.test.labels])
    images = images.cropped(crop_pct)
    if not isinstance(images, ReadImages):
        return NamedImages(images, tuple(f"test image {index} of {name}" for index in range(len(images))))
    fits = len(images) * 3 * img_size**2 <= memory_limit_bytes
    return NamedImages(_in_memory(images)[0] if fits else images, images.names)


def _test_files(
    root: Path,
    classes: tuple[str, ...],
    img_size: int,
    seed: int,
    workers: int,
    interpolation: str,
    unreadable: Unreadable,
    notice: Notice,
    all_of_folder: bool,
) -> FileImages:
    train_root, test_root = folders.layout(root, notice)
    files = partial(
        FileImages,
        img_size=img_size,
        workers=workers,
        interpolation=interpolation,
        warned=_say_once(notice),
        unreadable=unreadable,
    )
    if test_root or all_of_folder:
        if not test_root:
            notice(f"all images of {shown_path(str(root))} are taken, also those that a run may have trained on")
        paths, labels = folders.list_test(test_root or root, classes, notice, whose="the model")
        return files(paths=paths, labels=labels)
    own, paths, labels = folders.list_classes(train_root, notice)
    folders.refuse_unknown(str(root), own, classes, whose="the model")
    _, held_out = _held_out(labels, seed=seed)
    return files(paths=paths, labels=folders.positions(own, classes)[labels]).subset(held_out)


def describe(name: str, *, img_size: int | None, data_dir: str, max_bad_samples: int = 0) -> tuple[int, int]:
    """Return the number of classes and the side in pixels of the images that `load` would give, without loading them.

    Raises UsageError and DataError as `load` does.
    """
    if path := _folder_path(name):
        train_root, _ = folders.layout(path, _unsaid)
        classes, paths, _ = folders.list_classes(train_root, _unsaid)
        return len(classes), img_size or _own_size(paths[: 1 + max_bad_samples])
    if is_code_of_data(name):
        count, own = custom.describe(name, data_dir=data_dir, largest=LARGEST_DEFAULT_SIZE)
        return count, img_size or own
    known = _known(name)
    return known.classes, img_size or known.img_size


def _unsaid(_: str) -> None:
    """Drop a notice: `load` gives it again."""


def _folder_path(name: str) -> Path | None:
    scheme, _, path = name.partition(":")
    return expanded(path) if scheme == "folder" and path else None


def _custom(name: str, img_size: int | None, data_dir: str, workers: int, interpolation: str, notice: Notice) -> Data:
    return custom.load(
        name,
        img_size=img_size,
        data_dir=data_dir,
        workers=workers,
        interpolation=interpolation,
        notice=notice,
        largest=LARGEST_DEFAULT_SIZE,
    )


def _known(name: str) -> KnownData:
    if name in KNOWN:
        return KNOWN[name]
    if factories.is_file(name.removesuffix(":")):
        raise UsageError(f"data is {shown_path(name)}; name the function in that file, as file.py:FACTORY")
    hint = nearest(name, [*KNOWN, "folder:PATH"])
    if os.path.isdir(name):
        hint = f"; write folder:{name} for the images in that folder"
    known = ", ".join((*KNOWN, "folder:PATH"))
    raise UsageError(f"there is no data set {shown_path(name)}, only {known} and file.py:FACTORY{hint}")


def _drawn(name: str, images: int, limit: int, seed: int) -> Tensor:
    if limit > images:
        raise UsageError(
            f"train-limit is {limit}, but {name} has only {images} training images; "
            "lower it, or leave it out to use them all"
        )
    return torch.from_numpy(random_stream("train-limit", seed).permutation(images)[:limit])


def _into_memory(data: Data, limit_bytes: int, notice: Notice, *, train_in_files: bool) -> Data:
    """Read images into memory, if those of both sets fit into `limit_bytes`; or those to test on alone."""
    train, test = data.train, data.test
    if not (isinstance(train, ReadImages) and isinstance(test, ReadImages)):
        return data
    count = len(test) if train_in_files else len(train) + len(test)
    needed = count * data.channels * data.img_size**2
    if needed <= limit_bytes:
        sets = [test] if train_in_files else [test, train]
        found = _in_memory(*sets)
        return replace(data, test=found[0], train=train if train_in_files else found[1])
    notice(
        f"the decoded images take {needed / 2**30:.1f} GiB, more than the {limit_bytes / 2**30:.1f} GiB that are "
        "kept in memory: they are read anew in every epoch"
    )
    return data


def _in_memory(*sets: ReadImages) -> list[MemoryImages]:
    with image_warnings() as found:
        read = [images.in_memory() for images in sets]
    sets[0].note(found, {})
    return read


def _digits(img_size: int, _data_dir: Path, _seed: int) -> Data:
    """Load scikit-learn's 1797 scans of handwritten digits, 8x8 pixels of 0 .. 16, as three equal channels.

    The division into training and test images does not depend on the seed: every run is tested on the same images.
    """
    from sklearn.datasets import load_digits  # takes most of a second to import

    digits = load_digits()
    grey = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))
    scans = MemoryImages(
        pixels=grey[:, None].repeat(1, 3, 1, 1),
        labels=torch.from_numpy(digits.target).long(),
        img_size=img_size,
    )
    train, test = _held_out(scans.labels, seed=0)
    return Data(
        train=scans.subset(train),
        test=scans.subset(test),
        classes=tuple(str(name) for name in digits.target_names),
        img_size=img_size,
    )


def _cifar(kind: type[CIFAR10], img_size: int, data_dir: Path, _seed: int) -> Data:
    """Load CIFAR (Krizhevsky, 2009): 50,000 + 10,000 images, 32x32, downloaded once into `data_dir`."""
    try:
        parts = [kind(data_dir, train=train, download=True) for train in (True, False)]
    except (OSError, HTTPException, RuntimeError) as error:
        reason = str(getattr(error, "reason", error)).rstrip(".")
        raise DataError(
            f"{kind.__name__} is not in {str(data_dir)!r} and cannot be downloaded ({reason}); "
            f"put {kind.filename} from {kind.url} there, or use images at hand with folder:PATH"
        ) from error
    train, test = (
        MemoryImages(
            pixels=torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),
            labels=torch.tensor(part.targets),
            img_size=img_size,
        )
        for part in parts
    )
    return Data(train=train, test=test, classes=tuple(parts[0].classes), img_size=img_size)


def _synthetic(img_size: int, _data_dir: Path, seed: int) -> Data:
    """Make noise in 10 classes, for benchmarks: 512 images to train and 128 to test on. Nothing can be learnt."""
    stream = random_stream("synthetic", seed)
    train, test = (
        MemoryImages(
            pixels=torch.from_numpy(stream.integers(256, size=(count, 3, img_size, img_size), dtype=np.uint8)),
            labels=torch.from_numpy(stream.integers(10, size=count)),
            img_size=img_size,
        )
        for count in (512, 128)
    )
    return Data(train=train, test=test, classes=tuple("0123456789"), img_size=img_size)


class KnownData(NamedTuple):
    """A data set that has a name: its number of classes, the default side of its images in pixels, and its loader.

    `load` takes the side of the images, the folder for downloads and the seed.
    """

    classes: int
    img_size: int
    load: Callable[[int, Path, int], Data]


KNOWN = {
    "digits": KnownData(10, 32, _digits),
    "cifar10": KnownData(10, 32, partial(_cifar, CIFAR10)),
    "cifar100": KnownData(100, 32, partial(_cifar, CIFAR100)),
    "synthetic": KnownData(10, 64, _synthetic),
}


def _folder(
    root: Path,
    img_size: int | None,
    seed: int,
    workers: int,
    interpolation: str,
    unreadable: Unreadable,
    notice: Notice,
) -> Data:
    """Load images that lie in a folder for each class, below train/ and test/; or below `root`, to be divided here."""
    train_root, test_root = folders.layout(root, notice)
    classes, paths, labels = folders.list_classes(train_root, notice)
    everything = FileImages(
        paths=paths,
        labels=labels,
        img_size=img_size or _own_size(paths[: 1 + unreadable.most]),
        workers=workers,
        interpolation=interpolation,
        warned=_say_once(notice),
        unreadable=unreadable,
    )
    if test_root:
        test_paths, test_labels = folders.list_test(test_root, classes, notice)
        train, test = everything, replace(everything, paths=test_paths, labels=test_labels)
    else:
        _refuse_single_images(root, classes, labels)
        train, test = (everything.subset(ids) for ids in _held_out(labels, seed=seed))
        notice(
            f"{root} has no train/ with test/ or val/: {len(test)} of its {len(paths)} images, "
            f"drawn with seed {seed}, are held out for testing"
        )
    return Data(train=train, test=test, classes=classes, img_size=everything.img_size)


def _say_once(notice: Notice) -> Warned:
    """Make a function that passes on what Pillow warns of, in one notice, and only the first time."""
    said = False

    def say(found: Mapping[str, str]) -> None:
        nonlocal said
        if found and not said:
            said = True
            path, sentence = min(found.items())  # the same one whichever thread was first
            notice(
                f"Pillow warns of {len(found)} {'images, such as' if len(found) > 1 else 'image:'} {path!r} "
                f"({printable(sentence)}); what it warns of later is not said"
            )

    return say


def _refuse_single_images(root: Path, classes: tuple[str, ...], labels: Tensor) -> None:
    for name, count in zip(classes, torch.bincount(labels).tolist(), strict=True):
        if count < 2:
            raise DataError(
                f"the class folder {str(root / name)!r} has one image, too few to train and to test on; "
                "add images, or give folders train/ and test/"
            )


def _held_out(labels: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    """Draw ids to train and to test on, 4 to 1 and stratified by class, from `seed` alone."""
    from sklearn.model_selection import train_test_split  # takes most of a second to import

    count = max(math.ceil(TEST_SHARE * len(labels)), int(labels.max()) + 1)
    ids = np.arange(len(labels))
    train, test = train_test_split(ids, test_size=count, stratify=labels.numpy(), random_state=seed)
    return torch.from_numpy(train), torch.from_numpy(test)


def _own_size(paths: Sequence[str]) -> int:
    """Return the short side of the first of these images that can be read, at most LARGEST_DEFAULT_SIZE."""
    with image_warnings():  # they come again when the image is decoded
        for path in paths[:-1]:
            with suppress(DataError):
                return min(short_side(path), LARGEST_DEFAULT_SIZE)
        return min(short_side(paths[-1]), LARGEST_DEFAULT_SIZE)
