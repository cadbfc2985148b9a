"""Data sets in their real formats, written small: what is loaded, how it is split, one sentence for each mistake."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from fxsplit.data.datasets import KNOWN, describe, load
from fxsplit.data.files import FileImages
from fxsplit.data.images import Data, ImageSet, MemoryImages
from fxsplit.data.loader import Loader
from fxsplit.data.reading.decoding import decode
from fxsplit.errors import DataError, UsageError

# Python 3.12 warns of every fork in a process with threads, and the loader forks its workers.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

Folder = Callable[..., Path]


def quiet(sentence: str) -> None:
    pytest.fail(f"said aloud without need: {sentence}")


def open_data(name: str, **options: Any) -> Data:
    defaults: dict[str, Any] = {"img_size": None, "data_dir": "", "seed": 0, "train_limit": None, "workers": 0}
    return load(name, **{**defaults, "notice": quiet, **options})


def pixels(images: ImageSet) -> Tensor:
    assert isinstance(images, MemoryImages)
    return images.pixels


def refused(name: str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        open_data(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- digits and noise ---------------------------------------------------------------------------------------------


def test_digits_are_all_of_the_scans() -> None:
    data = open_data("digits", img_size=8)
    assert (len(data.train), len(data.test), data.img_size, data.channels) == (1437, 360, 8, 3)
    assert data.classes == tuple("0123456789")
    found = torch.cat((pixels(data.train), pixels(data.test)))
    assert found.shape == (1797, 3, 8, 8)
    assert found.dtype == torch.uint8
    assert torch.equal(found[:, 0], found[:, 1])
    assert torch.equal(found[:, 0], found[:, 2])
    labels = torch.cat((data.train.labels, data.test.labels))
    digits = load_digits()
    expected = sorted(
        (int(label), np.rint(scan * 255 / 16).astype(np.uint8).tobytes())
        for scan, label in zip(digits.images, digits.target, strict=True)
    )
    scans = zip(found[:, 0], labels, strict=True)
    assert sorted((int(label), scan.numpy().tobytes()) for scan, label in scans) == expected
    assert found.max() == 255


def test_digits_are_split_alike_in_every_class_and_for_every_seed() -> None:
    data, other = open_data("digits", seed=0), open_data("digits", seed=5)
    assert torch.equal(pixels(data.test), pixels(other.test))
    assert torch.equal(pixels(data.train), pixels(other.train))
    counts = torch.bincount(data.test.labels) / torch.bincount(torch.cat((data.train.labels, data.test.labels)))
    assert counts.sub(0.2).abs().max() < 0.01


def test_digits_are_as_large_as_asked() -> None:
    for asked, size in ((None, 32), (20, 20)):
        batch = next(Loader(open_data("digits", img_size=asked).train, batch_size=4).batches(0))
        assert batch.images.shape == (4, 3, size, size)
        assert batch.images.max() > 0.9


def test_synthetic_images_are_noise_drawn_with_the_seed() -> None:
    data = open_data("synthetic", seed=1)
    assert pixels(data.train).shape == (512, 3, 64, 64)
    assert pixels(data.test).shape == (128, 3, 64, 64)
    assert len(data.classes) == len(data.train.labels.unique()) == 10
    assert abs(pixels(data.train).float().mean() - 127.5) < 0.5
    assert torch.equal(pixels(data.train), pixels(open_data("synthetic", seed=1).train))
    assert not torch.equal(pixels(data.train), pixels(open_data("synthetic", seed=2).train))
    assert not torch.equal(pixels(data.train)[:128], pixels(data.test))
    assert pixels(open_data("synthetic", img_size=16).train).shape == (512, 3, 16, 16)


# --- the training images that are kept ----------------------------------------------------------------------------


def test_a_train_limit_keeps_the_first_of_a_seeded_permutation() -> None:
    everything = open_data("digits")
    few, more = (open_data("digits", train_limit=limit) for limit in (40, 100))
    assert (len(few.train), len(more.train)) == (40, 100)
    assert torch.equal(pixels(more.train)[:40], pixels(few.train))
    assert torch.equal(more.train.labels[:40], few.train.labels)
    assert torch.equal(pixels(few.test), pixels(everything.test))
    assert not torch.equal(pixels(few.train), pixels(everything.train)[:40])
    assert not torch.equal(pixels(few.train), pixels(open_data("digits", train_limit=40, seed=1).train))
    whole = open_data("digits", train_limit=1437)
    assert torch.equal(torch.bincount(whole.train.labels), torch.bincount(everything.train.labels))


def test_a_train_limit_above_the_images_is_refused() -> None:
    with pytest.raises(UsageError, match="train-limit is 1438, but digits has only 1437 training images"):
        open_data("digits", train_limit=1438)


# --- CIFAR --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes a small CIFAR archive as its authors pickled it, lets torchvision know its checksums, and goes offline."""

    def write(name: str) -> Path:
        kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
        root = tmp_path / "data"
        folder = root / kind.base_folder
        folder.mkdir(parents=True)
        stream = np.random.default_rng(0)
        label_key, names_key = ("labels", "label_names") if name == "cifar10" else ("fine_labels", "fine_label_names")
        classes = KNOWN[name].classes

        def dump(file: str, content: Mapping[str, object]) -> str:
            data = pickle.dumps(content, protocol=2)
            (folder / file).write_bytes(data)
            return hashlib.md5(data).hexdigest()

        for group in ("train_list", "test_list"):
            entries = []
            for file, _ in getattr(kind, group):
                content = {
                    "data": stream.integers(256, size=(4, 3072), dtype=np.uint8),
                    label_key: stream.integers(classes, size=4).tolist(),
                }
                entries.append([file, dump(file, content)])
            monkeypatch.setattr(kind, group, entries)
        names = {names_key: [f"class {index}" for index in range(classes)]}
        monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": dump(kind.meta["filename"], names)})
        monkeypatch.setattr(kind, "url", f"file://{tmp_path}/nowhere/{kind.filename}")
        return root

    return write


@pytest.mark.parametrize(("name", "batch_files"), [("cifar10", 5), ("cifar100", 1)])
def test_cifar_is_what_its_archive_holds(cifar: Callable[[str], Path], name: str, batch_files: int) -> None:
    root = cifar(name)
    data = open_data(name, data_dir=str(root))
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    assert data.classes == tuple(f"class {index}" for index in range(KNOWN[name].classes))
    assert data.img_size == 32
    for images, files in ((data.train, kind.train_list), (data.test, kind.test_list)):
        held = [pickle.loads((root / kind.base_folder / file).read_bytes()) for file, _ in files]
        expected = np.concatenate([part["data"] for part in held]).reshape(-1, 3, 32, 32)
        assert np.array_equal(pixels(images).numpy(), expected)
        key = "labels" if name == "cifar10" else "fine_labels"
        assert images.labels.tolist() == [label for part in held for label in part[key]]
    assert (len(data.train), len(data.test)) == (4 * batch_files, 4)
    batch = next(Loader(open_data(name, data_dir=str(root), img_size=48).train, batch_size=2).batches(0))
    assert batch.images.shape == (2, 3, 48, 48)


def test_without_a_network_one_sentence_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"file://{tmp_path}/nowhere/cifar-10-python.tar.gz")
    sentence = refused("cifar10", data_dir=str(tmp_path / "data"))
    for part in ("CIFAR10", str(tmp_path / "data"), "cannot be downloaded", "cifar-10-python.tar.gz", "folder:PATH"):
        assert part in sentence


@pytest.mark.filterwarnings("ignore:Python 3.14 will, by default, filter:DeprecationWarning")  # of torchvision's code
def test_an_archive_put_in_place_is_used(cifar: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the sentence about the missing network advises."""
    root = cifar("cifar10")
    kind = torchvision.datasets.CIFAR10
    with tarfile.open(root / kind.filename, "w:gz") as archive:
        archive.add(root / kind.base_folder, arcname=kind.base_folder)
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5((root / kind.filename).read_bytes()).hexdigest())
    for file in (root / kind.base_folder).iterdir():
        file.unlink()
    assert len(open_data("cifar10", data_dir=str(root)).train) == 20


# --- folders ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Writes so many PNG files in each class folder; every image has one colour of its own."""
    colours = iter(range(1, 255))

    def write(place: str = "", *, size: tuple[int, int] = (12, 12), **counts: int) -> Path:
        for name, count in counts.items():
            target = tmp_path / "images" / place / name
            target.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                Image.new("RGB", size, (next(colours), 0, 0)).save(target / f"{index}.png")
        return tmp_path / "images"

    return write


def colours_of(images: ImageSet) -> list[int]:
    found = torch.cat([batch.images for batch in Loader(images, batch_size=4).batches(0)])
    return [round(255 * float(image[0].mean())) for image in found]


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_a_folder_with_both_halves_is_taken_as_it_is(folder: Folder, held_out: str) -> None:
    folder("train", cat=3, dog=2)
    data = open_data(f"folder:{folder(held_out, cat=1, dog=2)}")
    assert data.classes == ("cat", "dog")
    assert data.img_size == 12
    assert (colours_of(data.train), data.train.labels.tolist()) == ([1, 2, 3, 4, 5], [0, 0, 0, 1, 1])
    assert (colours_of(data.test), data.test.labels.tolist()) == ([6, 7, 8], [0, 1, 1])


def test_test_is_taken_before_val_and_said_aloud(folder: Folder) -> None:
    folder("train", cat=1, dog=1)
    folder("val", cat=1, dog=1)
    said: list[str] = []
    data = open_data(f"folder:{folder('test', cat=1, dog=1)}", notice=said.append)
    assert colours_of(data.test) == [5, 6]
    assert len(said) == 1
    assert "test/ is used" in said[0]


def test_class_folders_are_split_by_the_seed_and_said_aloud(folder: Folder) -> None:
    root = folder(cat=20, dog=10)
    said: list[str] = []
    first, again, other = (open_data(f"folder:{root}", seed=seed, notice=said.append) for seed in (3, 3, 4))
    assert (len(first.train), len(first.test)) == (24, 6)
    assert torch.bincount(first.test.labels).tolist() == [4, 2]
    assert sorted(colours_of(first.train) + colours_of(first.test)) == list(range(1, 31))
    assert all((colour > 20) == label for colour, label in zip(colours_of(first.test), first.test.labels, strict=True))
    assert colours_of(first.test) == colours_of(again.test) != colours_of(other.test)
    assert len(said) == 3
    assert "6 of its 30 images, drawn with seed 3, are held out" in said[0]


def test_few_images_are_split_too(folder: Folder) -> None:
    data = open_data(f"folder:{folder(a=2, b=2, c=2)}", notice=[].append)
    assert sorted(data.train.labels.tolist()) == sorted(data.test.labels.tolist()) == [0, 1, 2]


@pytest.mark.parametrize("limit", [{}, {"memory_limit_bytes": 0, "notice": [].append}])
def test_files_are_resized_by_the_interpolation_that_is_asked_for(folder: Folder, limit: dict[str, Any]) -> None:
    folder("train", cat=1, dog=1)
    root = folder("test", cat=1, dog=1)
    stream = np.random.default_rng(0)
    for path in root.rglob("*.png"):
        Image.fromarray(stream.integers(256, size=(12, 12, 3), dtype=np.uint8)).save(path)
    data = open_data(f"folder:{root}", img_size=8, interpolation="bicubic", **limit)
    for name, images in (("train", data.train), ("test", data.test)):
        expected = torch.stack([decode(root / name / each / "0.png", 8, "bicubic") for each in ("cat", "dog")])
        (batch,) = Loader(images, batch_size=2).batches(0)
        assert torch.equal(batch.images, expected / 255)


def test_images_of_other_sizes_follow_the_first(folder: Folder) -> None:
    folder("train", size=(30, 20), cat=1)
    folder("train", size=(9, 9), dog=1)
    root = folder("test", size=(400, 300), cat=1, dog=1)
    assert pixels(open_data(f"folder:{root}").train).shape == (2, 3, 20, 20)
    assert pixels(open_data(f"folder:{root}").test).shape == (2, 3, 20, 20)
    assert pixels(open_data(f"folder:{root}", img_size=7).train).shape == (2, 3, 7, 7)


def test_a_folder_of_large_images_is_shown_at_224(folder: Folder) -> None:
    root = folder(size=(300, 400), cat=2, dog=2)
    assert open_data(f"folder:{root}", notice=[].append).img_size == 224


def test_jpeg_files_in_subfolders_count_and_other_files_do_not(folder: Folder) -> None:
    root = folder("train", cat=1, dog=1)
    folder("test", cat=1, dog=1)
    (root / "train" / "cat" / "more").mkdir()
    Image.new("RGB", (12, 12), (200, 0, 0)).save(root / "train" / "cat" / "more" / "x.JPG", quality=100)
    (root / "train" / "cat" / "notes.txt").write_text("none")
    (root / "train" / ".cache").mkdir()
    said: list[str] = []
    data = open_data(f"folder:{root}", notice=said.append)
    assert (colours_of(data.train), data.train.labels.tolist()) == ([1, 200, 2], [0, 0, 1])
    assert said == [
        f"left out in {root}/train: 1 hidden (.cache), 1 not named like an image that Pillow reads (cat/notes.txt)"
    ]


@pytest.mark.parametrize("junk", [".ipynb_checkpoints", "__MACOSX", "@eaDir", "._cat"])
def test_what_programs_leave_behind_is_no_class_and_no_image(folder: Folder, junk: str) -> None:
    root = folder("train", cat=2, dog=1)
    folder("test", cat=1, dog=1)
    for place in ("train", "train/cat", "test", "test/dog"):
        Image.new("RGB", (12, 12)).save(root / place / "._0.png")
        (root / place / junk).mkdir()
        Image.new("RGB", (12, 12)).save(root / place / junk / "0.png")
    said: list[str] = []
    data = open_data(f"folder:{root}", notice=said.append)
    assert data.classes == ("cat", "dog")
    assert (colours_of(data.train), colours_of(data.test)) == ([1, 2, 3], [4, 5])
    assert len(said) == 2
    assert said[0].startswith(f"left out in {root}/train: 4 hidden (._0.png and 3 more)")
    assert describe(f"folder:{root}", img_size=None, data_dir="data") == (2, 12)


def test_images_that_lie_beside_the_class_folders_are_said(folder: Folder) -> None:
    root = folder("train", cat=1, dog=1)
    folder("test", cat=1, dog=1)
    Image.new("RGB", (12, 12)).save(root / "train" / "lost.png")
    (root / "train" / "labels.csv").write_text("")
    said: list[str] = []
    assert len(open_data(f"folder:{root}", notice=said.append).train) == 2
    assert said == [f"left out in {root}/train: 1 in no class folder (lost.png)"]


def test_images_come_in_the_order_of_their_folders_and_names(folder: Folder) -> None:
    folder("train", dog=1)
    for place, name in (("a/b", "0"), ("a-b", "0"), (".", "z"), ("a", "9"), ("a", "10")):
        root = folder(f"train/cat/{place}", **{"": 1})
        (root / "train" / "cat" / place / "0.png").rename(root / "train" / "cat" / place / f"{name}.PNG")
    folder("test", cat=1, dog=1)
    train = open_data(f"folder:{root}", img_size=3, memory_limit_bytes=0, notice=[].append).train
    assert isinstance(train, FileImages)
    expected = sorted((place, file) for place, _, files in os.walk(root / "train" / "cat") for file in files)
    assert train.names[:-1] == tuple(f"{place}/{file}" for place, file in expected)


@pytest.mark.parametrize("suffix", ["gif", "webp", "tga", "jp2", "jfif"])
def test_every_format_that_pillow_reads_counts(folder: Folder, suffix: str) -> None:
    root = folder("train", cat=1, dog=1)
    folder("test", cat=1, dog=1)
    kind = {"jfif": "jpeg", "jp2": "jpeg2000"}.get(suffix, suffix)
    Image.new("RGB", (12, 12), "white").save(root / "train" / "cat" / f"1.{suffix.upper()}", kind)
    assert colours_of(open_data(f"folder:{root}").train) == [1, 255, 2]


@pytest.mark.parametrize("target", ["..", "../..", ".", "../../train/cat", "link"])
def test_a_link_that_leads_back_up_is_not_followed(folder: Folder, target: str) -> None:
    root = folder("train", cat=2, dog=1)
    folder("test", cat=1, dog=1)
    (root / "link").symlink_to(root)
    if target == "link":
        root = root / "link"  # the way back up is then not the one that led there
        target = str(root)
    (root / "train" / "cat" / "up").symlink_to(target)
    said: list[str] = []
    data = open_data(f"folder:{root}", notice=said.append)
    assert colours_of(data.train) == [1, 2, 3]
    assert said == [f"left out in {root}/train: 1 linked back up (cat/up)"]


def test_a_link_that_leads_back_up_is_no_class(folder: Folder) -> None:
    root = folder(cat=2, dog=2)
    (root / "all").symlink_to(".")
    said: list[str] = []
    assert open_data(f"folder:{root}", notice=said.append).classes == ("cat", "dog")
    assert "1 linked back up (all)" in said[0]


@pytest.mark.parametrize("name", ["aaa", "zzz"])
def test_a_folder_that_several_links_lead_to_is_read_once(folder: Folder, tmp_path: Path, name: str) -> None:
    """Under its own name where it lies in the folder, else by the first link; whatever the names are."""
    root = folder("train", cat=3, dog=2)
    folder("test", cat=1, dog=1)
    (root / "train" / "cat" / "more").mkdir()
    next((root / "train" / "cat").glob("*.png")).rename(root / "train" / "cat" / "more" / "moved.png")
    outside = tmp_path / "outside"
    shutil.copytree(root / "train" / "dog", outside / "inner")
    (root / "train" / name).symlink_to("cat")  # a class that is another one
    (root / "train" / "dog" / name).symlink_to("../cat/more")  # images of one class below another
    (root / "train" / "cat" / f"{name}1").symlink_to(outside)
    (root / "train" / "dog" / f"{name}2").symlink_to(outside / "inner")
    (root / "test" / name).symlink_to("dog")
    said: list[str] = []
    data = open_data(f"folder:{root}", notice=said.append)
    assert data.classes == ("cat", "dog")
    assert torch.bincount(data.train.labels).tolist() == [3 + 2, 2]
    assert len(data.test) == 2
    assert said == [
        f"left out in {root}/train: 3 linked a second time ({name} and 2 more)",
        f"left out in {root}/test: 1 linked a second time ({name})",
    ]


def test_links_to_other_folders_are_followed(folder: Folder, tmp_path: Path) -> None:
    root = folder("train", dog=1)
    folder("test", cat=1, dog=1)
    folder("../elsewhere/more", cat=2)
    (root / "train" / "cat").symlink_to(tmp_path / "elsewhere" / "more" / "cat")
    assert colours_of(open_data(f"folder:{root}").train) == [4, 5, 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pipe_is_not_waited_for_and_a_link_to_nothing_is_named(folder: Folder, workers: int) -> None:
    root = folder("train", cat=2, dog=1)
    folder("test", cat=1, dog=1)
    os.mkfifo(root / "train" / "cat" / "9.png")
    said: list[str] = []
    assert colours_of(open_data(f"folder:{root}", notice=said.append).train) == [1, 2, 3]
    assert said == [f"left out in {root}/train: 1 not a file (cat/9.png)"]
    (root / "train" / "cat" / "8.png").symlink_to("gone.png")
    assert f"the image '{root}/train/cat/8.png' cannot be decoded" in refused(
        f"folder:{root}", workers=workers, notice=said.append
    )


def test_a_folder_that_cannot_be_read_is_named(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder("train", cat=1, dog=1)
    folder("test", cat=1, dog=1)
    (root / "train" / "cat" / "private").mkdir()
    real = os.scandir

    def scandir(path: str) -> Any:
        if str(path).endswith("private"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert f"the folder '{root}/train/cat/private' cannot be read: Permission denied" in refused(f"folder:{root}")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("in_memory", [True, False])
def test_what_pillow_warns_of_is_said_once(folder: Folder, workers: int, in_memory: bool) -> None:
    root = folder("train", cat=3, dog=3)
    folder("test", cat=1, dog=1)
    for place in ("train/cat/0.png", "train/cat/1.png", "train/dog/2.png", "test/cat/0.png"):
        (root / place).unlink()
        values = np.arange(144, dtype=np.int32).reshape(12, 12) - 7
        Image.fromarray(values).save((root / place).with_suffix(".tif"))
    said: list[str] = []
    limit = {} if in_memory else {"memory_limit_bytes": 0}
    data = open_data(f"folder:{root}", workers=workers, notice=said.append, **limit)
    for _ in range(2):
        for images in (data.train, data.test):
            assert len(colours_of(images)) == len(images)
    notices = [sentence for sentence in said if "Pillow warns" in sentence]
    assert len(notices) == 1
    assert f"{root}/{'test' if in_memory else 'train'}/cat/0.tif" in notices[0]
    assert "no known range: from -7 to 136" in notices[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_unusual_images_are_read_alike_from_memory_and_from_files(folder: Folder, workers: int) -> None:
    root = folder("train", cat=1, dog=1)
    folder("test", cat=1, dog=1)
    stream = np.random.default_rng(0)
    deep = stream.integers(2**16, size=(30, 14))
    Image.fromarray(deep.astype(np.uint16)).save(root / "train" / "cat" / "a.png")
    Image.fromarray(deep.astype(np.float32)).save(root / "train" / "cat" / "b.tif")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(deep.astype(np.uint8)).save(root / "train" / "dog" / "c.jpg", exif=exif)
    Image.fromarray(stream.integers(256, size=(9, 14, 4), dtype=np.uint8)).save(root / "train" / "dog" / "d.png")
    memory, files = (
        open_data(f"folder:{root}", workers=workers, memory_limit_bytes=limit, notice=[].append).train
        for limit in (2**30, 0)
    )
    assert isinstance(memory, MemoryImages)
    assert isinstance(files, FileImages)
    for one, other in zip(Loader(memory, batch_size=4).batches(0), Loader(files, batch_size=4).batches(0), strict=True):
        assert torch.equal(one.images, other.images)


@pytest.mark.parametrize(
    ("train", "held_out"),
    [("Train", "Test"), ("TRAINING", "testing"), ("train", "valid"), ("training", "Validation"), ("train", "dev")],
)
def test_halves_are_known_by_their_usual_names(folder: Folder, train: str, held_out: str) -> None:
    folder(train, cat=2, dog=2)
    root = folder(held_out, cat=1, dog=1)
    data = open_data(f"folder:{root}")
    assert (colours_of(data.train), colours_of(data.test)) == ([1, 2, 3, 4], [5, 6])
    assert describe(f"folder:{root}", img_size=None, data_dir="data") == (2, 12)
    (root / held_out).rename(root / "unlabelled")
    assert f"has {train}/ but not" in refused(f"folder:{root}")


def test_two_folders_for_one_half_are_refused(folder: Folder) -> None:
    folder("train", cat=1, dog=1)
    folder("Training", cat=1, dog=1)
    root = folder("val", cat=1, dog=1)
    assert "has Training/ and train/, which mean the same" in refused(f"folder:{root}")
    (root / "Training").rename(root / "dev")
    assert "has dev/ and val/, which mean the same" in refused(f"folder:{root}")
    folder("test", cat=1, dog=1)
    assert len(open_data(f"folder:{root}", notice=[].append).test) == 2


def test_a_name_gives_no_orders_to_a_terminal(folder: Folder) -> None:
    name = "b\x1b]0;title\x07\x9b2J\u202e"
    folder("train", cat=1, **{name: 1})
    root = folder("test", cat=1)
    (root / "train" / name / "x\x1b[31m.txt").write_text("")
    (root / "test" / ".\x1b").mkdir()
    said: list[str] = []
    open_data(f"folder:{root}", notice=said.append)
    folder("test", **{f"{name}?": 1})
    sentences = [*said, refused(f"folder:{root}", notice=said.append)]
    assert len(sentences) == 4
    assert all(sentence.isprintable() for sentence in sentences)
    assert all(r"\x1b" in sentence for sentence in sentences)


def test_a_folder_above_the_memory_limit_stays_in_files(folder: Folder) -> None:
    folder("train", cat=3, dog=4)
    root = folder("test", cat=1, dog=1)
    needed = (7 + 2) * 3 * 12 * 12
    said: list[str] = []
    options = {"train_limit": 5, "seed": 2, "workers": 0}
    memory = open_data(f"folder:{root}", memory_limit_bytes=needed, **options)
    streamed = open_data(f"folder:{root}", memory_limit_bytes=(5 + 2) * 432 - 1, notice=said.append, **options)
    assert isinstance(memory.train, MemoryImages)
    assert isinstance(streamed.train, FileImages)
    assert isinstance(streamed.test, FileImages)
    assert len(said) == 1
    assert "read anew in every epoch" in said[0]
    assert colours_of(streamed.train) == colours_of(memory.train)
    assert colours_of(streamed.test) == colours_of(memory.test)
    assert torch.equal(streamed.train.labels, memory.train.labels)


def test_the_memory_limit_itself_still_fits(folder: Folder) -> None:
    folder("train", cat=1, dog=1)
    root = folder("test", cat=1, dog=1)
    assert isinstance(open_data(f"folder:{root}", memory_limit_bytes=4 * 432).train, MemoryImages)


def test_a_class_without_test_images_is_said_aloud(folder: Folder) -> None:
    folder("train", cat=1, dog=1, elk=1)
    said: list[str] = []
    data = open_data(f"folder:{folder('test', dog=1)}", notice=said.append)
    assert data.test.labels.tolist() == [1]
    assert len(said) == 1
    assert "no image of cat, elk" in said[0]


def test_half_a_split_is_refused(folder: Folder) -> None:
    root = folder("train", cat=2, dog=2)
    sentence = refused(f"folder:{root}")
    assert f"{str(root)!r} has train/ but not" in sentence
    assert f"folder:{root / 'train'}" in sentence
    folder(unlabelled=2)
    assert "has train/ but not" in refused(f"folder:{root}")


def test_train_may_be_the_name_of_a_class(folder: Folder) -> None:
    assert open_data(f"folder:{folder(bus=2, train=2)}", notice=[].append).classes == ("bus", "train")


def test_what_is_wrong_with_a_folder_is_said(folder: Folder, tmp_path: Path) -> None:
    assert f"no folder '{tmp_path}/nowhere'" in refused(f"folder:{tmp_path}/nowhere")
    (tmp_path / "file").write_text("")
    assert f"no folder '{tmp_path}/file'" in refused(f"folder:{tmp_path}/file")
    (tmp_path / "empty").mkdir()
    assert f"'{tmp_path}/empty' has 0 class folders" in refused(f"folder:{tmp_path}/empty")
    root = folder(cat=2)
    assert f"'{root}' has 1 class folders" in refused(f"folder:{root}")
    folder(dog=0)
    assert f"the class folder '{root}/dog' has no image" in refused(f"folder:{root}")
    folder(dog=1)
    assert f"the class folder '{root}/dog' has one image" in refused(f"folder:{root}")
    (root / "dog" / "0.png").write_text("no image")
    (root / "dog" / "1.png").write_text("no image")
    assert f"the image '{root}/dog/" in refused(f"folder:{root}", notice=[].append)
    folder("train", cat=1, dog=1)
    folder("test", cat=0)
    assert f"'{root}/test' has no image" in refused(f"folder:{root}")
    folder("test", cat=1, doe=1)
    assert f"'{root}/test' has the classes doe, which are not among those of the training images" in refused(
        f"folder:{root}"
    )


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [("cifar11", "'cifar10'"), ("digit", "'digits'"), ("folder", "'folder:PATH'"), ("folder:", "'folder:PATH'")],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, hint: str) -> None:
    for use in (open_data, partial(describe, img_size=None, data_dir="data")):
        with pytest.raises(UsageError, match=f"no data set '{name}', only digits.*did you mean.*{hint}"):
            use(name)


def test_a_bare_path_is_answered_with_the_name_to_write(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"write folder:{tmp_path}"):
        open_data(str(tmp_path))


@pytest.mark.parametrize("img_size", [None, 10])
@pytest.mark.parametrize("name", ["digits", "synthetic", "split folder", "whole folder", "cifar10", "cifar100"])
def test_describe_tells_what_load_gives(
    name: str, img_size: int | None, folder: Folder, cifar: Callable[[str], Path]
) -> None:
    data_dir = cifar(name) if name.startswith("cifar") else Path()
    if name == "whole folder":
        folder(size=(9, 9), cat=2)
        name = f"folder:{folder(cat=2, dog=9)}"
    elif name == "split folder":
        folder("train", size=(9, 14), cat=2, dog=9)
        name = f"folder:{folder('test', dog=1, cat=1)}"
    data = open_data(name, img_size=img_size, data_dir=str(data_dir), notice=[].append)
    assert describe(name, img_size=img_size, data_dir="data") == (len(data.classes), data.img_size)
