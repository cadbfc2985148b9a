"""Where images come from: embedded, downloaded, in a folder, or made up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from http.client import HTTPException
from pathlib import Path

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


def load(
    name: str,
    *,
    img_size: int | None,
    data_dir: str,
    seed: int,
    train_limit: int | None,
    notice: Callable[[str], None],
    workers: int,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
) -> Data:
    """The data set `name`: digits, cifar10, cifar100, synthetic or folder:PATH; on the CPU.

    `img_size` None keeps the data's own size (digits: 32; a folder: the short side of its first image, at most 224).
    `train_limit` keeps the first of a permutation of the training images drawn with `seed`. A folder whose pixels
    need more than `memory_limit_bytes` stays in files, read by `workers` processes. Sentences on what was decided for
    the user go to `notice`.

    Raises UsageError when there is no such data set or it has fewer images than `train_limit`, and DataError when it
    cannot be read, downloaded or split.
    """
    scheme, _, path = name.partition(":")
    if scheme == "folder" and path:
        data: Data = _folder(Path(path).expanduser(), img_size, seed, workers, notice)
    elif name in SOURCES:
        data = SOURCES[name](img_size, Path(data_dir).expanduser(), seed)
    else:
        raise UsageError(
            f"there is no data set {name!r}, only {', '.join(SOURCES)} and folder:PATH{_hint(name)}"
        )
    if train_limit is not None:
        data = replace(data, train=data.train.subset(_drawn(name, len(data.train), train_limit, seed)))
    return _into_memory(data, memory_limit_bytes, notice)


def _hint(name: str) -> str:
    if Path(name).expanduser().is_dir():
        return f"; write folder:{name} for the images in that folder"
    return nearest(name, [*SOURCES, "folder:PATH"])


def _drawn(name: str, images: int, limit: int, seed: int) -> Tensor:
    if limit > images:
        raise UsageError(
            f"train-limit is {limit}, but {name} has only {images} training images; leave it out to use them all"
        )
    return torch.from_numpy(random_stream("train-limit", seed).permutation(images)[:limit])


def _into_memory(data: Data, limit_bytes: int, notice: Callable[[str], None]) -> Data:
    """Images in files, decoded if the pixels of both sets fit into `limit_bytes`."""
    train, test = data.train, data.test
    if isinstance(train, MemoryImages) or isinstance(test, MemoryImages):
        return data
    needed = (len(train) + len(test)) * data.channels * data.img_size**2
    if needed <= limit_bytes:
        return replace(data, train=train.decoded(), test=test.decoded())
    notice(
        f"the decoded images would take {needed / 2**30:.1f} GiB, more than the {limit_bytes / 2**30:.1f} GiB kept in "
        "memory, so they are read from their files in every epoch"
    )
    return data


def _digits(img_size: int | None, _data_dir: Path, _seed: int) -> Data:
    """scikit-learn's 1797 scans of handwritten digits, 8x8 pixels of 0 .. 16, as three equal channels.

    The split does not depend on the seed: every run is tested on the same images.
    """
    from sklearn.datasets import load_digits  # takes most of a second to import

    digits = load_digits()
    grey = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))
    scans = MemoryImages(
        pixels=grey[:, None].repeat(1, 3, 1, 1),
        labels=torch.from_numpy(digits.target).long(),
        img_size=img_size or 32,
    )
    train, test = _held_out(scans.labels, seed=0)
    classes = tuple(str(name) for name in digits.target_names)
    return Data(train=scans.subset(train), test=scans.subset(test), classes=classes, img_size=scans.img_size)


def _cifar(kind: type[CIFAR10], img_size: int | None, data_dir: Path, _seed: int) -> Data:
    """CIFAR-10 or CIFAR-100 (Krizhevsky, 2009): 50,000 + 10,000 images, 32x32; downloaded once into `data_dir`."""
    try:
        train, test = (kind(data_dir, train=train, download=True) for train in (True, False))
    except (OSError, HTTPException, RuntimeError) as error:
        reason = str(getattr(error, "reason", error)).rstrip(".")
        raise DataError(
            f"{kind.__name__} is not in {str(data_dir)!r} and cannot be downloaded ({reason}); put {kind.filename} from "
            f"{kind.url} there, or use images at hand with folder:PATH"
        ) from error
    size = img_size or 32
    sets = [
        MemoryImages(
            pixels=torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),
            labels=torch.tensor(part.targets),
            img_size=size,
        )
        for part in (train, test)
    ]
    return Data(train=sets[0], test=sets[1], classes=tuple(train.classes), img_size=size)


def _synthetic(img_size: int | None, _data_dir: Path, seed: int) -> Data:
    """Noise of 10 classes for benchmarks, 512 images to train and 128 to test on; nothing can be learnt from it."""
    size = img_size or 64
    stream = random_stream("synthetic", seed)
    train, test = (
        MemoryImages(
            pixels=torch.from_numpy(stream.integers(256, size=(count, 3, size, size), dtype=np.uint8)),
            labels=torch.from_numpy(stream.integers(10, size=count)),
            img_size=size,
        )
        for count in (512, 128)
    )
    return Data(train=train, test=test, classes=tuple(str(label) for label in range(10)), img_size=size)


SOURCES: dict[str, Callable[[int | None, Path, int], Data]] = {
    "digits": _digits,
    "cifar10": partial(_cifar, CIFAR10),
    "cifar100": partial(_cifar, CIFAR100),
    "synthetic": _synthetic,
}


def _folder(root: Path, img_size: int | None, seed: int, workers: int, notice: Callable[[str], None]) -> Data:
    """Images in one folder a class, below `train/` and `test/` or `val/`; else below `root`, to be split here."""
    if not root.is_dir():
        raise DataError(f"there is no folder {str(root)!r}; check the path after folder:")
    held_out = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if (root / "train").is_dir() and held_out:
        if len(held_out) > 1:
            notice(f"{root} has both test/ and val/: test/ is used")
        classes, paths, labels = _list_classes(root / "train")
        test_paths, test_labels = _list_test(held_out[0], classes, notice)
    else:
        _refuse_half_split(root)
        classes, found, all_labels = _list_classes(root)
        train, test = _split_folder(root, classes, all_labels, seed)
        paths, labels = [found[index] for index in train.tolist()], all_labels[train]
        test_paths, test_labels = [found[index] for index in test.tolist()], all_labels[test]
        notice(
            f"{root} has no train/ with test/ or val/: {len(test)} of its {len(found)} images, drawn with seed {seed}, "
            "are held out for testing"
        )
    size = img_size or _own_size(paths[0])
    return Data(
        train=FileImages(paths, labels, img_size=size, workers=workers),
        test=FileImages(test_paths, test_labels, img_size=size, workers=workers),
        classes=classes,
        img_size=size,
    )


def _list_classes(root: Path) -> tuple[tuple[str, ...], list[str], Tensor]:
    """The classes below `root`, the paths of their images, and the label of each."""
    classes = _subfolders(root)
    if len(classes) < 2:
        raise DataError(
            f"{str(root)!r} has {len(classes)} class folders, but at least 2 are needed; "
            "put the images of each class into a folder with the name of the class"
        )
    paths, labels = _list_images(root, classes)
    for label, count in enumerate(torch.bincount(labels, minlength=len(classes)).tolist()):
        if count == 0:
            raise DataError(
                f"the class folder {str(root / classes[label])!r} has no images ({', '.join(IMG_EXTENSIONS)}); "
                "add some or remove the folder"
            )
    return classes, paths, labels


def _list_test(
    root: Path, classes: tuple[str, ...], notice: Callable[[str], None]
) -> tuple[list[str], Tensor]:
    if unknown := [name for name in _subfolders(root) if name not in classes]:
        raise DataError(
            f"{str(root)!r} has the classes {', '.join(unknown)}, which the training images lack; "
            "name the class folders alike in both"
        )
    paths, labels = _list_images(root, classes)
    if not paths:
        raise DataError(
            f"{str(root)!r} has no images in class folders ({', '.join(IMG_EXTENSIONS)}); add some to test on"
        )
    tested = set(labels.tolist())
    if missing := [name for label, name in enumerate(classes) if label not in tested]:
        notice(f"{root} has no images of {', '.join(missing)}: accuracy is over the other classes")
    return paths, labels


def _list_images(root: Path, classes: tuple[str, ...]) -> tuple[list[str], Tensor]:
    labels = {name: label for label, name in enumerate(classes)}
    found = make_dataset(root, labels, extensions=IMG_EXTENSIONS, allow_empty=True)
    return [path for path, _ in found], torch.tensor([label for _, label in found], dtype=torch.int64)


def _subfolders(root: Path) -> tuple[str, ...]:
    try:
        entries = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    except OSError as error:
        raise DataError(f"the folder {str(root)!r} cannot be read: {error.strerror}") from error
    return tuple(name for name in entries if not name.startswith("."))


def _refuse_half_split(root: Path) -> None:
    """A lone `train/` with folders in it would pass for a class."""
    for name in ("train", "test", "val"):
        if (root / name).is_dir() and _subfolders(root / name):
            raise DataError(
                f"{str(root)!r} has {name}/ but not train/ together with test/ or val/; add what is missing, "
                f"or use folder:{root / name} to hold out a part of it"
            )


def _split_folder(root: Path, classes: tuple[str, ...], labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    for label, count in enumerate(torch.bincount(labels).tolist()):
        if count < 2:
            raise DataError(
                f"the class folder {str(root / classes[label])!r} has a single image, which cannot be used both to "
                "train and to test; add images, or give train/ and test/ folders"
            )
    return _held_out(labels, seed=seed)


def _held_out(labels: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    """Ids to train and to test on: 4 to 1, in every class, by a draw that depends on the seed alone."""
    from sklearn.model_selection import train_test_split  # takes most of a second to import

    count = max(math.ceil(TEST_SHARE * len(labels)), int(labels.max()) + 1)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=count, stratify=labels.numpy(), random_state=seed
    )
    return torch.from_numpy(train), torch.from_numpy(test)


def _own_size(path: str) -> int:
    with open_image(path) as image:
        return min(*image.size, LARGEST_DEFAULT_SIZE)
