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
FILE = f"""
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


@pytest.mark.parametrize("name", ["torchvision", "named", "columns", "images", "paths", "arrays", "tensors", "kept"])
@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["read in every epoch", "in memory"])
def test_images_are_those_in_the_files(file: Path, name: str, limit: int) -> None:
    """Bit for bit what the folder gives, whatever an item's image is."""
    expected = load(f"folder:{file.parent / 'images'}")
    found = load(f"{file}:{name}", memory_limit_bytes=limit, crop_pct=1.0)
    assert isinstance(found.train, MemoryImages if limit else CustomImages)
    alike(found, expected)
    assert found.classes == (expected.classes if name in ("torchvision", "named", "columns") else ("0", "1", "2"))


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
    assert (
        said
        == ["labels of mine:images are read item by item; a data set that has them as `targets` is ready sooner"] * 2
    )


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("nothing", UsageError, "'mine.py:nothing' returned a NoneType; return the data sets to train and to test on"),
        ("three", UsageError, "'mine.py:three' returned a tuple; return the data sets"),
        (
            "streamed",
            UsageError,
            "on of 'mine.py:streamed' is a iterator, whose items have no numbers",
        ),
        ("empty", DataError, "the data set to train on of 'mine.py:empty' is empty"),
        ("words", DataError, "the image of item 0 of 'mine.py:words' is a float, and must be an image of Pillow's"),
        ("floats", DataError, "the image of item 0 of 'mine.py:floats' is a ndarray of float64, and must be"),
        ("flat", DataError, "the image of item 0 of 'mine.py:flat' has the shape (1440,), which is that of no image"),
        ("broken", DataError, "item 0 of 'mine.py:broken' cannot be read: ZeroDivisionError: division by zero"),
        ("single", DataError, "item 0 of 'mine.py:single' is a Image, and must be an image and a label, as a pair"),
        ("few", DataError, "the labels of 'mine.py:few' go from 0 to 2, but it has 2 classes, whose labels are 0 to 1"),
        ("short", DataError, "the labels of 'mine.py:short' are torch.int64 of the shape (11,), and must be a whole"),
        ("halves", DataError, "the labels of 'mine.py:halves' are torch.float32 of the shape (12,)"),
        ("spoilt", DataError, "the image of item 0 of 'mine.py:spoilt' cannot be decoded ("),
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
