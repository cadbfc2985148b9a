"""Where images come from: embedded, downloaded, in a folder, or made up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from fxsplit.errors import DataError, UsageError, nearest
from fxsplit.run.data import Data, FileImages, MemoryImages, open_image, random_stream

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
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
) -> Data:
    """The data set `name`, on the CPU: digits, cifar10, cifar100, synthetic or folder:PATH.

    `img_size` None takes the data's own size; of a folder, the short side of its first image, at most 224.
    `train_limit` keeps the first images of a permutation drawn with `seed`. A folder whose decoded images need
    more than `memory_limit_bytes` stays in files, read by `workers` processes. What was decided for the user is
    said to `notice`.

    Raises UsageError when there is no such data set or it has fewer images than `train_limit`, and DataError
    when it cannot be read, downloaded or split.
    """
    if path := _folder_path(name):
        data = _folder(path, img_size, seed, workers, notice)
    else:
        source = _source(name)
        data = source.load(img_size or source.img_size, Path(data_dir).expanduser(), seed)
    if train_limit is not None:
        data = replace(data, train=data.train.subset(_drawn(name, len(data.train), train_limit, seed)))
    return _into_memory(data, memory_limit_bytes, notice)


def describe(name: str, *, img_size: int | None) -> tuple[int, int]:
    """Number of classes and side of the images that `load` would give, without loading them.

    Raises UsageError and DataError as `load` does.
    """
    if path := _folder_path(name):
        classes, paths, _ = _list_classes(_layout(path)[0])
        return len(classes), img_size or _own_size(paths)
    source = _source(name)
    return source.classes, img_size or source.img_size


def _folder_path(name: str) -> Path | None:
    scheme, _, path = name.partition(":")
    return Path(path).expanduser() if scheme == "folder" and path else None


def _source(name: str) -> Source:
    if name in SOURCES:
        return SOURCES[name]
    hint = nearest(name, [*SOURCES, "folder:PATH"])
    if Path(name).expanduser().is_dir():
        hint = f"; write folder:{name} for the images in that folder"
    raise UsageError(f"there is no data set {name!r}, only {', '.join(SOURCES)} and folder:PATH{hint}")


def _drawn(name: str, images: int, limit: int, seed: int) -> Tensor:
    if limit > images:
        raise UsageError(
            f"train-limit is {limit}, but {name} has only {images} training images; "
            "lower it, or leave it out to use them all"
        )
    return torch.from_numpy(random_stream("train-limit", seed).permutation(images)[:limit])


def _into_memory(data: Data, limit_bytes: int, notice: Notice) -> Data:
    """Images in files, decoded if those of both sets fit into `limit_bytes`."""
    train, test = data.train, data.test
    if not (isinstance(train, FileImages) and isinstance(test, FileImages)):
        return data
    needed = (len(train) + len(test)) * data.channels * data.img_size**2
    if needed <= limit_bytes:
        return replace(data, train=train.decoded(), test=test.decoded())
    notice(
        f"the decoded images take {needed / 2**30:.1f} GiB, more than the {limit_bytes / 2**30:.1f} GiB that are "
        "kept in memory: they are read from their files in every epoch"
    )
    return data


def _digits(img_size: int, _data_dir: Path, _seed: int) -> Data:
    """scikit-learn's 1797 scans of handwritten digits, 8x8 pixels of 0 .. 16, as three equal channels.

    The split does not depend on the seed: every run is tested on the same images.
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
    """CIFAR (Krizhevsky, 2009): 50,000 + 10,000 images, 32x32, downloaded once into `data_dir`."""
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
    """Noise in 10 classes, for benchmarks: 512 images to train and 128 to test on. Nothing can be learnt."""
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


class Source(NamedTuple):
    """A data set by name: its number of classes, the side its images have unless told, and what loads it."""

    classes: int
    img_size: int
    load: Callable[[int, Path, int], Data]


SOURCES = {
    "digits": Source(10, 32, _digits),
    "cifar10": Source(10, 32, partial(_cifar, CIFAR10)),
    "cifar100": Source(100, 32, partial(_cifar, CIFAR100)),
    "synthetic": Source(10, 64, _synthetic),
}


def _folder(root: Path, img_size: int | None, seed: int, workers: int, notice: Notice) -> Data:
    """Images in one folder a class, below `train/` and `test/` or `val/`; else below `root`, split here."""
    train_root, test_root = _layout(root)
    classes, paths, labels = _list_classes(train_root)
    files = partial(FileImages, img_size=img_size or _own_size(paths), workers=workers)
    everything = files(paths, labels)
    if test_root:
        train, test = everything, files(*_list_test(test_root, classes, notice))
        if test_root.name == "test" and (root / "val").is_dir():
            notice(f"{root} has both test/ and val/: test/ is used")
    else:
        _refuse_single_images(root, classes, labels)
        train, test = (everything.subset(ids) for ids in _held_out(labels, seed=seed))
        notice(
            f"{root} has no train/ with test/ or val/: {len(test)} of its {len(paths)} images, "
            f"drawn with seed {seed}, are held out for testing"
        )
    return Data(train=train, test=test, classes=classes, img_size=everything.img_size)


def _layout(root: Path) -> tuple[Path, Path | None]:
    """The folders to train and to test on; the second is None when `root` itself holds the class folders."""
    if not root.is_dir():
        raise DataError(f"there is no folder {str(root)!r}; check the path after folder:")
    train, test, val = (root / name for name in ("train", "test", "val"))
    if train.is_dir() and (test.is_dir() or val.is_dir()):
        return train, test if test.is_dir() else val
    for lone in (train, test, val):
        # Class folders have no folders in them, so this is a split of which the other half is missing.
        if lone.is_dir() and _subfolders(lone):
            raise DataError(
                f"{str(root)!r} has {lone.name}/ but not train/ together with test/ or val/; "
                f"add what is missing, or give folder:{lone} to hold out a part of it"
            )
    return root, None


def _list_classes(root: Path) -> tuple[tuple[str, ...], list[str], Tensor]:
    """The classes below `root`, the paths of their images, and the label of each image."""
    classes = _subfolders(root)
    if len(classes) < 2:
        raise DataError(
            f"{str(root)!r} has {len(classes)} class folders, but at least 2 are needed; "
            "put the images of each class into a folder named like the class"
        )
    paths, labels = _list_images(root, classes)
    for name, count in zip(classes, torch.bincount(labels, minlength=len(classes)).tolist(), strict=True):
        if count == 0:
            raise DataError(
                f"the class folder {str(root / name)!r} has no image ({', '.join(IMG_EXTENSIONS)}); "
                "add some, or remove the folder"
            )
    return classes, paths, labels


def _list_test(root: Path, classes: tuple[str, ...], notice: Notice) -> tuple[list[str], Tensor]:
    if unknown := [name for name in _subfolders(root) if name not in classes]:
        raise DataError(
            f"{str(root)!r} has the classes {', '.join(unknown)}, which the training images lack; "
            "name the class folders alike in both"
        )
    paths, labels = _list_images(root, classes)
    if not paths:
        raise DataError(
            f"{str(root)!r} has no image ({', '.join(IMG_EXTENSIONS)}) in a class folder; add some to test on"
        )
    tested = set(labels.tolist())
    if missing := [name for label, name in enumerate(classes) if label not in tested]:
        notice(f"{root} has no image of {', '.join(missing)}: accuracy is that of the other classes")
    return paths, labels


def _list_images(root: Path, classes: tuple[str, ...]) -> tuple[list[str], Tensor]:
    labels = {name: label for label, name in enumerate(classes)}
    found = make_dataset(root, labels, extensions=IMG_EXTENSIONS, allow_empty=True)
    return [path for path, _ in found], torch.tensor([label for _, label in found], dtype=torch.int64)


def _subfolders(root: Path) -> tuple[str, ...]:
    try:
        names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    except OSError as error:
        raise DataError(f"the folder {str(root)!r} cannot be read: {error.strerror}") from error
    return tuple(name for name in names if not name.startswith("."))


def _refuse_single_images(root: Path, classes: tuple[str, ...], labels: Tensor) -> None:
    for name, count in zip(classes, torch.bincount(labels).tolist(), strict=True):
        if count < 2:
            raise DataError(
                f"the class folder {str(root / name)!r} has one image, too few to train and to test on; "
                "add images, or give folders train/ and test/"
            )


def _held_out(labels: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    """Ids to train and to test on, 4 to 1 and stratified by class; drawn by `seed` alone."""
    from sklearn.model_selection import train_test_split  # takes most of a second to import

    count = max(math.ceil(TEST_SHARE * len(labels)), int(labels.max()) + 1)
    ids = np.arange(len(labels))
    train, test = train_test_split(ids, test_size=count, stratify=labels.numpy(), random_state=seed)
    return torch.from_numpy(train), torch.from_numpy(test)


def _own_size(paths: list[str]) -> int:
    with open_image(paths[0]) as image:
        return min(*image.size, LARGEST_DEFAULT_SIZE)
