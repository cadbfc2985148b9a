"""Images that vanish or cannot be decoded, and processes that read them and die."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from torch import Tensor

import fxsplit
from fxsplit.data import datasets
from fxsplit.data.augmentation.changes import Changes
from fxsplit.data.loader import Loader
from fxsplit.data.reading import decoding
from fxsplit.data.reading.decoding import decode
from fxsplit.errors import DataError
from fxsplit.report import Observer, StepRecord
from tests.faults.folders import images_in, load
from tests.saving.runs import differences, left_by
from tests.saving.test_resume import Interrupts, resumed, spec

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Of a machine with one core, torch says that two workers are too many.
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


def vanish(path: Path) -> None:
    path.unlink()


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [vanish, cut_off, empty, make_pipe, make_endless, make_folder]
Damage = Callable[[Path], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return images_in(tmp_path / "images")


def pixels(folder: Path, **changes: Any) -> Tensor:
    """All training images of a folder, in order."""
    data = load(folder, **changes).train
    return torch.cat(list(data.read(torch.arange(len(data)), 5)))


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_image_that_is_damaged_in_the_midst_is_named(damage: Damage, folder: Path) -> None:
    """After the folder was listed; nothing hangs."""
    data = load(folder).train
    batches = data.read(torch.arange(len(data)), 5)
    next(batches)
    broken = folder / "train" / "class0" / "07.png"
    damage(broken)
    with pytest.raises(DataError, match=r"image .*train/class0/07.png' (cannot be decoded|is not a file)"):
        list(batches)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_of_its_class_takes_its_place_and_it_is_named_once(damage: Damage, workers: int, folder: Path) -> None:
    """Whichever process reads it, and in whichever batch; the last of a class is followed by its first."""
    whole = pixels(folder)
    said: list[str] = []
    data = load(folder, workers=workers, max_bad_samples=2, said=said).train
    for name in ("class0/07.png", "class1/11.png"):
        damage(folder / "train" / name)
    for order in (torch.arange(len(data)), torch.randperm(len(data), generator=torch.Generator().manual_seed(0))):
        found = torch.cat(list(data.read(order, 5)))
        expected = whole.clone()
        expected[7], expected[23] = whole[8], whole[12]
        assert torch.equal(found, expected[order])
    told = [sentence for sentence in said if "bad image" in sentence]
    assert len(told) == 2
    assert told[0].startswith(f"the image '{folder}/train/class0/07.png' ")
    assert told[0].endswith(f"until then '{folder}/train/class0/08.png' takes its place (bad image 1 of at most 2)")
    assert told[1].endswith(f"until then '{folder}/train/class1/00.png' takes its place (bad image 2 of at most 2)")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augment", ["resized-crop", "crop-flip"])
def test_an_image_in_the_place_of_another_is_changed_by_the_numbers_of_that_place(
    augment: str, workers: int, folder: Path
) -> None:
    """So a run is the same with a copy of it there, and the images after it are changed as ever."""
    changes = Changes(aa="rand-m9-mstd0.5")

    def epoch(**given: Any) -> Tensor:
        data = load(folder, workers=workers, **given).train
        loader = Loader(data, batch_size=5, training=True, seed=3, augment=augment, changes=changes)
        return torch.cat([batch.images for batch in loader.batches(1)])

    class0 = folder / "train" / "class0"
    shutil.copy(class0 / "08.png", class0 / "07.png")
    expected = epoch()
    cut_off(class0 / "07.png")
    assert torch.equal(epoch(max_bad_samples=1), expected)


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_one_too_many_ends_the_run(limit: int, folder: Path) -> None:
    for name in ("07", "08", "09"):
        cut_off(folder / "train" / "class2" / f"{name}.png")

    def read(**changes: Any) -> None:
        data = load(folder, memory_limit_bytes=limit, **changes).train
        list(data.read(torch.arange(len(data)), 5))

    with pytest.raises(DataError, match=r"class2/09.png' cannot .*; it is number 3, and --max-bad-samples allows 2"):
        read(max_bad_samples=2)
    said: list[str] = []
    read(max_bad_samples=3, said=said)
    assert len([sentence for sentence in said if "bad image" in sentence]) == 3


def test_a_damaged_first_image_does_not_decide_the_size(folder: Path) -> None:
    for name in ("00", "01"):
        empty(folder / "train" / "class0" / f"{name}.png")
    assert load(folder, img_size=None, max_bad_samples=2).img_size == 16
    with pytest.raises(DataError, match=r"class0/01.png' cannot be decoded"):
        load(folder, img_size=None, max_bad_samples=1)


def test_a_class_that_cannot_be_read_is_no_endless_search(folder: Path) -> None:
    for path in (folder / "train" / "class0").iterdir():
        empty(path)
    data = load(folder, max_bad_samples=30).train
    with pytest.raises(DataError, match=r"class0/00.png' cannot be decoded"):
        next(data.read(torch.arange(len(data)), 5))


def test_an_image_that_may_not_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Image.open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path).endswith("class0/07.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(decoding.Image, "open", refuse)
    with pytest.raises(DataError, match=r"class0/07.png' cannot be decoded .*Permission denied"):
        pixels(folder)
    assert torch.equal(pixels(folder, max_bad_samples=1)[7], decode(folder / "train" / "class0" / "08.png", 12))


@pytest.mark.parametrize("damage", [make_pipe, make_endless])
def test_what_never_ends_is_left_out_when_it_is_there_at_first(damage: Damage, folder: Path) -> None:
    damage(folder / "train" / "class0" / "07.png")
    said: list[str] = []
    data = load(folder, said=said)
    assert len(data.train) == 35
    assert f"left out in {folder}/train: 1 not a file (class0/07.png)" in said


# Runs


def asked(tmp_path: Path, folder: Path, **changes: Any) -> fxsplit.RunSpec:
    given = {"data": f"folder:{folder}", "train_limit": None, "batch_size": 9, "workers": 0, "epochs": 3}
    return spec(tmp_path, "standard", **{**given, **changes})


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images do not fit into memory."""
    monkeypatch.setattr(datasets, "load", lambda *args, **kwargs: LOAD(*args, **kwargs, memory_limit_bytes=0))


LOAD = datasets.load


class Damages(Interrupts):
    """Damages an image after a step of the run."""

    def __init__(self, path: Path, step: int) -> None:
        super().__init__()
        self.path, self.at = path, step

    def step_done(self, record: StepRecord) -> None:
        if (record.epoch - 1) * record.steps + record.step == self.at:
            vanish(self.path)


@pytest.mark.usefixtures("files")
def test_a_run_that_ends_by_an_image_goes_on_when_it_is_back(tmp_path: Path, folder: Path) -> None:
    """What was done until then is saved, also in the midst of an epoch."""
    fxsplit.train(asked(tmp_path, folder, experiment="whole"))
    path = folder / "train" / "class1" / "03.png"
    shutil.copy(path, tmp_path / "kept.png")
    with pytest.raises(DataError, match=r"class1/03.png' cannot be decoded"):
        fxsplit.train(asked(tmp_path, folder, experiment="mine", checkpoint_every="99"), Damages(path, 5))
    (kept,) = (tmp_path / "mine" / "checkpoints").iterdir()
    assert not kept.stem.endswith("step-00000000")
    shutil.copy(tmp_path / "kept.png", path)
    resumed(tmp_path / "mine")
    assert differences(left_by(tmp_path / "whole"), left_by(tmp_path / "mine")) == []


@pytest.mark.usefixtures("files")
def test_a_run_goes_on_without_an_image(tmp_path: Path, folder: Path) -> None:
    heard = Damages(folder / "train" / "class1" / "03.png", 5)
    report = fxsplit.train(asked(tmp_path, folder, experiment="mine", max_bad_samples=1), heard)
    assert report.status == "finished"
    assert [sentence for sentence in heard.sentences if "bad image 1 of at most 1" in sentence]


def test_a_run_with_bad_images_finds_its_size_and_is_evaluated(tmp_path: Path, folder: Path) -> None:
    """Also where the first image is bad, which says how large images are, and one of those to test on."""
    for path in (folder / "train" / "class0" / "00.png", folder / "test" / "class1" / "00.png"):
        assert path.is_file()
        path.write_bytes(b"no image")
    report = fxsplit.train(asked(tmp_path, folder, experiment="mine", max_bad_samples=2, img_size=None))
    last = max((Path(report.folder) / "checkpoints").iterdir())  # which has all buffers of the model
    found = fxsplit.evaluate(last, device="cpu", trust_code=True)
    assert (found.loss, found.top1_pct) == (report.epochs[-1].eval_loss, report.epochs[-1].eval_top1)


class KillsWorkers(Observer):
    """Kills the processes that read images after a step, as the system does when memory runs out."""

    def __init__(self, by: int) -> None:
        self.by, self.killed = by, 0

    def step_done(self, record: StepRecord) -> None:
        if (record.epoch, record.step) == (2, 1):
            # Not all children: Python's own tracker of resources serves the tests that come after.
            workers = [psutil.Process(worker.pid) for worker in multiprocessing.active_children()]
            for worker in workers:
                os.kill(worker.pid, self.by)
                self.killed += 1
            while any(worker.status() != psutil.STATUS_ZOMBIE for worker in workers):
                time.sleep(0.01)  # where torch's own handler would raise its error


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["of files", "that changes images in memory"])
def test_a_worker_that_dies_ends_the_run_between_two_steps(
    limit: int, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load", lambda *args, **kwargs: LOAD(*args, **kwargs, memory_limit_bytes=limit))
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    changes = {"workers": 2, "batch_size": 3, "aa": "rand-m9-mstd0.5" if limit else None}
    fxsplit.train(asked(tmp_path, folder, experiment="whole", **changes))
    heard = KillsWorkers(signal.SIGKILL)
    words = r"a process that reads images has died \(.*\), as happens when memory runs out; use fewer --workers"
    with pytest.raises(DataError, match=words):
        fxsplit.train(asked(tmp_path, folder, experiment="mine", checkpoint_every="99", **changes), heard)
    assert heard.killed
    left = {path.name for path in (tmp_path / "mine").iterdir()}
    assert {"model.safetensors", "report.json", "report.html"} <= left
    assert [path.name[:12] for path in (tmp_path / "mine" / "checkpoints").iterdir()] == ["epoch-000001"]
    resumed(tmp_path / "mine")
    assert differences(left_by(tmp_path / "whole"), left_by(tmp_path / "mine")) == []
