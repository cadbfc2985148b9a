"""Data sets that a function of the user's returns: the same images as from a folder, and clear words where it errs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fxsplit.data import datasets
from fxsplit.data.custom import CustomImages
from fxsplit.data.images import Data, ImageSet, MemoryImages
from fxsplit.errors import DataError, FxsplitError, UsageError
from fxsplit_cli.main import main

COUNTS = {"train": 12, "test": 6}
# Data sets that name their classes.
NAMED = ("torchvision", "named", "columns", "turned", "unlabelled", "foreign", "random")
FILE = f"""
import os
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import functional as transforms

PLACES = {{each: Path(__file__).parent / "images" / each for each in {list(COUNTS)}}}


def opened(path):
    with Image.open(path) as image:
        return image.copy()


class Items:
    "Images in a folder, each as `change` gives it."

    def __init__(self, which, change=opened):
        self.folder, self.change = ImageFolder(PLACES[which]), change

    def __len__(self):
        return len(self.folder)

    def __getitem__(self, index):
        path, label = self.folder.samples[index]
        return self.change(path), label


class Named(Items):
    def __init__(self, which):
        super().__init__(which)
        self.targets, self.classes = self.folder.targets, self.folder.classes


class Columns(Items):
    "As a data set of Hugging Face: items are dicts, and a name gives a column."

    def __init__(self, which):
        super().__init__(which)
        self.features = {{"image": None, "label": type("ClassLabel", (), {{"names": self.folder.classes}})}}

    def __getitem__(self, index):
        if index == "label":
            return self.folder.targets
        image, label = super().__getitem__(index)
        return {{"image": image, "label": label}}


def array(path):
    return np.array(opened(path))


def both(make):
    return make("train"), make("test")


def torchvision(): return both(lambda which: ImageFolder(PLACES[which]))
def named(): return dict(zip(("train", "test"), both(Named)))
def columns(): return dict(zip(("train", "validation"), both(Columns)))
def images(): return both(Items)
def paths(): return both(lambda which: Items(which, str))
def arrays(): return both(lambda which: Items(which, array))
def tensors(): return both(lambda which: Items(which, lambda path: transforms.pil_to_tensor(opened(path))))
def kept(data_dir):
    return both(lambda which: Items(which, lambda path: Path(data_dir, "images", *Path(path).parts[-3:])))


def nothing(): return None
def three(): return both(Items) + both(Items)
def streamed(): return both(lambda which: iter(Items(which)))
def empty(): return [], Items("test")
def words(): return both(lambda which: Items(which, lambda path: 3.5))
def floats(): return both(lambda which: Items(which, lambda path: array(path) / 255))
def flat(): return both(lambda which: Items(which, lambda path: array(path).reshape(-1)))
def broken(): return both(lambda which: Items(which, lambda path: 1 / 0))
def single(): return [Image.new("RGB", (9, 9))], Items("test")
def few():
    items = Named("train")
    items.classes = items.classes[:2]
    return items, Named("test")
def short():
    items = Named("train")
    items.targets = items.targets[:-1]
    return items, Named("test")
def halves():
    items = Named("train")
    items.targets = [label + .5 for label in items.targets]
    return items, Named("test")
def mixed_up():
    items = Named("train")
    items.targets = [2 - label for label in items.targets]
    return items, Named("test")
def turned():
    "Its test images have the classes in another order."
    items = Named("test")
    items.classes = items.classes[::-1]
    items.targets = [2 - label for label in items.targets]
    items.folder.samples = [(path, 2 - label) for path, label in items.folder.samples]
    return Named("train"), items
def unknown():
    items = Named("test")
    items.classes = ["a", "b", "z"]
    return Named("train"), items
def twice():
    items = Named("train")
    items.classes = ["a", "a", "c"]
    return items, Items("test")
def huge():
    items = Items("train")
    items.targets = [10**11, 0, *items.folder.targets[2:]]
    return items, Items("test")
def pipe():
    path = Path(__file__).with_name("pipe")
    path.exists() or os.mkfifo(path)
    return both(lambda which: Items(which, lambda _: str(path)))
def hollow(): return both(lambda which: Items(which, lambda _: Image.new("RGB", (9, 0))))
def leaves(): return both(lambda which: Items(which, lambda _: sys.exit(0)))
class Busy(Items):
    @property
    def targets(self):
        raise RuntimeError("not now")
def asked(): return both(Busy)
def spelt():
    items = Named("train")
    items.targets = [items.classes[label] for label in items.targets]
    return items, Named("test")
class Keys(Items):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return {{"img": image, "label": label}}
def keys(): return both(Keys)
def valid(): return dict(train=Items("train"), valid=Items("test"))
def unlabelled():
    "As ImageNet of Hugging Face: its test images have no labels."
    items = Columns("test")
    items.folder.targets = [-1] * len(items)
    return {{"train": Columns("train"), "test": items, "validation": Columns("test")}}
class Foreign(Named):
    "Attributes of these names that mean something else, or are of another type."
    def __init__(self, which):
        super().__init__(which)
        self.features, self.classes = ["label"], np.array(self.classes)
def foreign(): return both(Foreign)
def random():
    torch.manual_seed(len(str(torch.rand(3))))
    return both(Named)


def spoilt():
    "Images that can be opened and have a size; the rest of them is gone."
    half = Path(__file__).with_name("half.png").read_bytes()
    return both(lambda which: Items(which, lambda path: Image.open(BytesIO(half))))
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    stream = np.random.default_rng(0)
    for which, count in COUNTS.items():
        for index in range(count):
            path = tmp_path / "images" / which / "abc"[index % 3] / f"{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(stream.integers(256, size=(20 + index, 24, 3), dtype=np.uint8)).save(path)
    whole = (tmp_path / "images" / "train" / "a" / "00.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def load(name: str, **options: Any) -> Data:
    given = {"img_size": 16, "data_dir": ".", "seed": 0, "train_limit": None, "notice": lambda _: None, "workers": 0}
    return datasets.load(name, **{**given, **options})


def pixels_of(images: ImageSet) -> Tensor:
    return torch.cat(list(images.read(torch.arange(len(images)), 5)))


def alike(one: Data, other: Data) -> None:
    for mine, expected in ((one.train, other.train), (one.test, other.test)):
        assert torch.equal(mine.labels, expected.labels)
        assert torch.equal(pixels_of(mine), pixels_of(expected))
    assert (one.img_size, one.channels) == (other.img_size, other.channels)


@pytest.mark.parametrize("name", [*NAMED, "images", "paths", "arrays", "tensors", "kept"])
@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["read in every epoch", "in memory"])
def test_images_are_those_in_the_files(file: Path, name: str, limit: int) -> None:
    """Bit for bit what the folder gives, whatever an item's image is."""
    expected = load(f"folder:{file.parent / 'images'}")
    found = load(f"{file}:{name}", memory_limit_bytes=limit, crop_pct=1.0)
    assert isinstance(found.train, MemoryImages if limit else CustomImages)
    alike(found, expected)
    assert found.classes == (expected.classes if name in NAMED else ("0", "1", "2"))


def test_the_random_state_is_left_alone(file: Path) -> None:
    torch.rand(1)  # so that it is not just the state that this function leaves
    before = torch.random.get_rng_state()
    load(f"{file}:random")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_workers_subsets_and_cropping_change_nothing(file: Path) -> None:
    given = {"train_limit": 7, "crop_pct": 0.8, "memory_limit_bytes": 0}
    expected = load(f"folder:{file.parent / 'images'}", **given)
    for workers in (0, 2):
        alike(load(f"{file}:named", workers=workers, **given), expected)


@pytest.mark.usefixtures("file")
def test_its_own_size_is_that_of_the_first_image() -> None:
    described = datasets.describe("mine:named", img_size=None, data_dir=".")
    assert described == (3, 20)
    assert load("mine:named", img_size=None).img_size == 20
    assert datasets.describe("mine:named", img_size=8, data_dir=".") == (3, 8)


def test_labels_that_are_not_at_hand_are_said(file: Path) -> None:
    said: list[str] = []
    load(f"{file}:named", notice=said.append)
    load(f"{file}:columns", notice=said.append)
    assert said == []
    load("mine:images", notice=said.append)
    words = "labels of mine:images are read item by item; a data set that has them as `targets` is ready sooner"
    assert said == [words]
    # Once, too, where somebody asked for the number of classes before; and then nothing is read again.
    datasets.describe("mine:images", img_size=16, data_dir=".")
    load("mine:images", notice=said.append)
    assert said == [words, words]


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("nothing", UsageError, "'mine.py:nothing' returned a NoneType; return the data sets to train and to test on"),
        ("three", UsageError, "'mine.py:three' returned a tuple of 4; return the data sets"),
        (
            "streamed",
            UsageError,
            "on of 'mine.py:streamed' is a iterator, whose items have no numbers",
        ),
        ("empty", DataError, "the data set to train on of 'mine.py:empty' is empty"),
        ("words", DataError, "the image of item 0 of 'mine.py:words' is a float, and must be an image of Pillow's"),
        ("floats", DataError, "the image of item 0 of 'mine.py:floats' is a ndarray of float64, and must be"),
        ("flat", DataError, "the image of item 0 of 'mine.py:flat' has the shape (1440,), which is that of no image"),
        (
            "broken",
            DataError,
            "item 0 of the data set to train on of 'mine.py:broken' cannot be read: ZeroDiv",
        ),
        (
            "single",
            DataError,
            "item 0 of the data set to train on of 'mine.py:single' is a Image, and must be",
        ),
        (
            "few",
            DataError,
            "the labels to train on of 'mine.py:few' go from 0 to 2, but it has 2 classes",
        ),
        (
            "short",
            DataError,
            "of 'mine.py:short' are torch.int64 of the shape (11,), and must be a whole number",
        ),
        (
            "halves",
            DataError,
            "of 'mine.py:halves' are torch.float32 of the shape (12,)",
        ),
        ("spoilt", DataError, "the image of item 0 of 'mine.py:spoilt' cannot be decoded ("),
        (
            "mixed_up",
            DataError,
            "item 0 of 'mine.py:mixed_up' has the label 0, but its list of labels says 2",
        ),
        ("unknown", DataError, "'mine.py:unknown' has images of 'z' to test on, and no such class to train on"),
        ("twice", DataError, "'mine.py:twice' names a class twice: 'a', 'a', 'c'"),
        ("huge", DataError, "to train on of 'mine.py:huge' go from 0 to 100000000000, but it has 1000001 classes"),
        ("pipe", DataError, "pipe' is not a file"),
        ("hollow", DataError, "the image of item 0 of 'mine.py:hollow' has no pixels; leave it out"),
        ("leaves", DataError, "item 0 of the data set to train on of 'mine.py:leaves' cannot be read: SystemExit: 0"),
        ("asked", DataError, "cannot be asked for its length, labels or classes: RuntimeError: not now"),
        ("spelt", DataError, "labels of the data set to train on of 'mine.py:spelt' are no whole numbers, such as 'a'"),
        ("keys", DataError, "is a dict with 'img', 'label', and must be an image and a label, as a pair or a mapping"),
        ("valid", UsageError, "returned a dict with 'train', 'valid'; return the data sets"),
        ("nowhere", UsageError, "'mine.py' has no function or class 'nowhere'"),
    ],
)
@pytest.mark.usefixtures("file")
def test_what_is_wrong_is_said(name: str, kind: type[FxsplitError], words: str) -> None:
    with pytest.raises(kind, match=re.escape(words)):
        load(f"mine.py:{name}")


def test_a_name_that_means_nothing(file: Path) -> None:
    with pytest.raises(UsageError, match=r"'foldr' in 'foldr:x' is no kind of data set \(folder\).* mean 'folder'"):
        load("foldr:x")
    for name in ("mine.py", "mine.py:"):
        with pytest.raises(UsageError, match=f"data is '{name}'; name the function in that file, as file.py:FACTORY"):
            load(name)
    with pytest.raises(UsageError, match=r"there is no file 'mien.py'; did you mean 'mine.py'"):
        load("mien.py:named")
    with pytest.raises(UsageError, match=r"max-bad-samples is for images in a folder, and data is 'mine.py:named'"):
        load("mine.py:named", max_bad_samples=1)
    assert file.is_file()


@pytest.mark.usefixtures("file")
def test_an_item_that_breaks_later_is_named(tmp_path: Path) -> None:
    images = load("mine.py:paths", memory_limit_bytes=0).train
    (tmp_path / "images" / "train" / "b" / "04.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"04\.png' cannot be decoded"):
        pixels_of(images)


TRAIN = ["train", "paper:cnn", "--img-size", "16", "--batch-size", "4", "-q", "--device", "cpu", "--experiment", "run"]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*words: str, code: int = 0) -> str:
        assert main(list(words)) == code
        return capsys.readouterr().err

    return run


@pytest.mark.usefixtures("file")
def test_a_run_is_trained_goes_on_and_is_tested_where_its_code_is_trusted(say: Callable[..., str]) -> None:
    run = os.path.join("output", "train", "run")
    say(*TRAIN, "--data", "mine.py:named", "--epochs", "1")
    assert "mine.py:named', which runs code; if you trust it, name the data beside" in say(
        "train", "--resume", run, "--epochs", "2", code=2
    )
    say("train", "--resume", run, "--epochs", "2", "--data", "mine.py:named", "-q")
    say("train", "--resume", run, "--epochs", "3", "--trust-code", "-q")
    assert "come from 'mine.py:named', which runs code; if you trust it, give it as --data" in say(
        "evaluate", run, code=2
    )
    say("evaluate", run, "--trust-code", "-o", "page.html")
    say("evaluate", run, "--data", "mine.py:columns")
    Path("recipe.yaml").write_text("model: paper:cnn\ndata: mine.py:named\nimg-size: 16\n")
    assert "data is 'mine.py:named', which runs code; if you trust it, add --trust-recipe" in say(
        "inspect", "-c", "recipe.yaml", code=2
    )
    say("inspect", "-c", "recipe.yaml", "--trust-recipe")
