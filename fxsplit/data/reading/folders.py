"""Finds the images in folders and their classes, and gives a notice about the files that are left out.

ROOT/train/CLASS/**/*.jpg          ROOT/CLASS/**/*.jpg
ROOT/test/CLASS/**/*.jpg
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fxsplit.data.reading.decoding import suffixes
from fxsplit.errors import DataError, printable, shown_path

# Names of the folders of each set, in lower case.
TRAIN = ("train", "training")
TEST = ("test", "testing")
VALIDATION = ("val", "valid", "validation", "dev")
# What programs leave behind in folders, besides names that begin with a dot; most of it is copies of the images.
JUNK = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")

# So many classes are named in a sentence.
MOST_NAMED = 5
# A folder that is a link to one of those around it: following it would never end.
LEADS_UP = "linked back up"
# A folder that is a link to one that is read by another way: its images would count twice, under two labels perhaps.
LINKED_TWICE = "linked a second time"

Notice = Callable[[str], None]
# Device and inode of a folder: the same by whatever path it is reached.
Identity = tuple[int, int]


def layout(root: Path, notice: Notice) -> tuple[Path, Path | None]:
    """Find the folders to train and to test on; the second is None when `root` itself holds the class folders.

    Raises DataError when there is no such folder, when one of the two is missing, or when it has two names that mean
    the same.
    """
    if not os.path.isdir(root):
        raise DataError(f"there is no folder {shown_path(root)}; check the path after folder:")
    train, test, validation = (_named(root, names) for names in (TRAIN, TEST, VALIDATION))
    if train and (test or validation):
        if test and validation:
            notice(f"{root} has both {test[0].name}/ and {validation[0].name}/: {test[0].name}/ is used")
        return _only(train), _only(test or validation)
    for lone in (*train, *test, *validation):
        # Class folders have no folders in them, so this one holds classes, and the other of the two is missing.
        if any(not _is_hidden(path.name) for path in _folders(lone)):
            raise DataError(
                f"{str(root)!r} has {lone.name}/ but not train/ together with test/ or val/; "
                f"add what is missing, or give folder:{lone} to hold out a part of it"
            )
    return root, None


def list_classes(root: Path, notice: Notice) -> tuple[tuple[str, ...], list[str], Tensor]:
    """Find the classes below `root`, the paths of their images, and the label of each image, int64 (N,).

    Raises DataError when there are fewer than two classes, or one without images.
    """
    left_out, once = _LeftOut(root), _Once(root)
    classes = _class_names(root, left_out, once)
    paths, labels = _list_images(root, classes, classes, left_out, once)
    left_out.tell(notice)
    if len(classes) < 2:
        raise DataError(
            f"{str(root)!r} has {len(classes)} class folders, but at least 2 are needed; "
            "put the images of each class into a folder named like the class"
        )
    for name, count in zip(classes, torch.bincount(labels, minlength=len(classes)).tolist(), strict=True):
        if count == 0:
            raise DataError(
                f"the class folder {str(root / name)!r} has no image that Pillow reads; add some, or remove the folder"
            )
    return classes, paths, labels


def list_test(
    root: Path, classes: tuple[str, ...], notice: Notice, *, whose: str = "the training images"
) -> tuple[list[str], Tensor]:
    """Find the paths of the images to test on, and their labels, as positions in `classes`, int64 (N,).

    Raises DataError when there are other classes than those of `whose`, or no images.
    """
    left_out, once = _LeftOut(root), _Once(root)
    here = _class_names(root, left_out, once)
    refuse_unknown(str(root), here, classes, whose=whose)
    paths, labels = _list_images(root, classes, here, left_out, once)
    left_out.tell(notice)
    if not paths:
        raise DataError(f"{str(root)!r} has no image that Pillow reads in a class folder; add some to test on")
    tested = set(labels.tolist())
    if missing := [printable(name) for label, name in enumerate(classes) if label not in tested]:
        notice(f"{root} has no image of {', '.join(missing)}: accuracy is that of the other classes")
    return paths, labels


def positions(names: Sequence[str], classes: Sequence[str]) -> Tensor:
    """Return the position of each name among `classes`, which all are there, int64 (N,)."""
    place = {name: number for number, name in enumerate(classes)}
    return torch.tensor([place[name] for name in names], dtype=torch.int64)


def refuse_unknown(data: str, names: Collection[str], classes: Collection[str], *, whose: str) -> None:
    """Raise DataError when `data` have classes that are not among the `classes` of `whose`."""
    unknown = [printable(name) for name in names if name not in classes]
    if unknown:
        more = f" and {len(unknown) - MOST_NAMED} more" if len(unknown) > MOST_NAMED else ""
        raise DataError(
            f"{data!r} has the classes {', '.join(unknown[:MOST_NAMED])}{more}, which are not among those of {whose}; "
            "name them as there, or take them out"
        )


class _LeftOut:
    """Collects the files of a folder that are not read, by the reason."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._paths: dict[str, list[str]] = defaultdict(list)

    def add(self, why: str, path: str) -> None:
        """Add a file, or a folder, that is left out."""
        self._paths[why].append(printable(os.path.relpath(path, self._root)))

    def tell(self, notice: Notice) -> None:
        """Give one notice about all of them, if there are any."""
        groups = [
            f"{len(paths)} {why} ({paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''})"
            for why, paths in self._paths.items()
        ]
        if groups:
            notice(f"left out in {printable(str(self._root))}: {', '.join(groups)}")


class _Once:
    """Sees to it that each folder below `root` is read once, whatever links lead to it.

    One that lies below `root` itself is read there, and not by a link.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def is_new(self, path: str) -> bool:
        """Tell whether a folder that a link leads to, or that lies in such a folder, has not been read yet."""
        count = len(self._read)
        self._read.add(_identity(path))
        return len(self._read) > count

    @cached_property
    def _read(self) -> set[Identity]:
        return {_identity(path) for path, _, _ in os.walk(self._root)}  # which follows no links


def _named(root: Path, names: tuple[str, ...]) -> list[Path]:
    """Find the folders with one of these names, in upper or lower case."""
    return [path for path in _folders(root) if path.name.lower() in names]


def _only(found: list[Path]) -> Path:
    if len(found) > 1:
        raise DataError(
            f"{str(found[0].parent)!r} has {' and '.join(f'{path.name}/' for path in found)}, which mean the same; "
            "keep one of them"
        )
    return found[0]


def _folders(root: Path) -> list[Path]:
    with _readable(root):
        return sorted(path for path in root.iterdir() if path.is_dir())


def _class_names(root: Path, left_out: _LeftOut, once: _Once) -> tuple[str, ...]:
    names, above = [], _above(root) | {_identity(root)}
    for entry in _entries(root, left_out):
        if entry.is_dir():
            if _identity(entry.path) in above:
                left_out.add(LEADS_UP, entry.path)
            elif entry.is_symlink() and not once.is_new(entry.path):
                left_out.add(LINKED_TWICE, entry.path)
            else:
                names.append(entry.name)
        elif _is_named_like_an_image(entry.name):
            left_out.add("in no class folder", entry.path)
    return tuple(names)


def _list_images(
    root: Path, classes: Sequence[str], here: Collection[str], left_out: _LeftOut, once: _Once
) -> tuple[list[str], Tensor]:
    """Find the images below the folders that are `here`, and their labels, as positions in `classes`."""
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        folder = root / name
        below = _images_below(str(folder), _above(folder), left_out, once, linked=folder.is_symlink())
        found = list(below) if name in here else []
        paths += sorted(found, key=os.path.split)
        labels += [label] * len(found)
    return paths, torch.tensor(labels, dtype=torch.int64)


def _images_below(
    folder: str, above: frozenset[Identity], left_out: _LeftOut, once: _Once, *, linked: bool
) -> Iterator[str]:
    """Find the images in `folder` and in the folders in it; `above` are the folders that it lies in.

    It is `linked` if a link has led to it.
    """
    above |= {_identity(folder)}
    for entry in _entries(folder, left_out):
        if entry.is_dir():
            if _identity(entry.path) in above:
                left_out.add(LEADS_UP, entry.path)
            elif (by_link := linked or entry.is_symlink()) and not once.is_new(entry.path):
                left_out.add(LINKED_TWICE, entry.path)
            else:
                yield from _images_below(entry.path, above, left_out, once, linked=by_link)
        elif not _is_named_like_an_image(entry.name):
            left_out.add("not named like an image that Pillow reads", entry.path)
        elif os.path.exists(entry.path) and not entry.is_file():
            # Reading a pipe would wait for ever. A broken link is kept, so that the error of reading it names it.
            left_out.add("not a file", entry.path)
        else:
            yield entry.path


def _entries(folder: str | Path, left_out: _LeftOut) -> list[os.DirEntry[str]]:
    """List the files and folders in a folder by name, without hidden ones, which are noted as left out."""
    with _readable(folder), os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if _is_hidden(entry.name):
            left_out.add("hidden", entry.path)
    return [entry for entry in entries if not _is_hidden(entry.name)]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in JUNK


def _is_named_like_an_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in suffixes()


def _above(folder: Path) -> frozenset[Identity]:
    """Find all folders that `folder` lies in, both by the path given and by its real path, without links."""
    return frozenset(_identity(path) for each in (folder.absolute(), folder.resolve()) for path in each.parents)


def _identity(folder: str | Path) -> Identity:
    with _readable(folder):
        found = os.stat(folder)
    return found.st_dev, found.st_ino


@contextmanager
def _readable(folder: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"the folder {str(folder)!r} cannot be read: {error.strerror}") from error
