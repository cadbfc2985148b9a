"""Evaluations: the numbers of the run's last epoch, the right counts of each class, and a page that is safe to open."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_score, recall_score

import fxsplit
from fxsplit.data import datasets
from fxsplit.data.images import Data
from fxsplit.errors import DataError, UsageError
from fxsplit.pages.evaluation import evaluation_page
from fxsplit.records import json_text
from fxsplit.report import ClassScore, EpochRecord, Evaluation, Mistake, Observer, StepRecord
from tests.pages.test_page import VOID, Page
from tests.saving.runs import COMMON, KINDS, model_in
from tests.trained.conftest import CLASSES, picture
from tests.trained.test_load import photographs_of

VOID.add("img")


class Heard(Observer):
    def __init__(self) -> None:
        self.sentences: list[str] = []

    def notice(self, sentence: str) -> None:
        self.sentences.append(sentence)


def numbers(found: Evaluation) -> tuple[float, float, float]:
    return found.loss, found.top1_pct, found.top5_pct


def last_of(epoch: EpochRecord) -> tuple[float, float, float]:
    return epoch.eval_loss, epoch.eval_top1, epoch.eval_top5


# Not float16: on a CPU its numbers have differed after other tests of the suite.
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["standard", "window", "l2l", "veto"])
def test_the_numbers_are_those_of_the_last_epoch(kind: str, tmp_path: Path) -> None:
    """Bit for bit, whatever the run kept in a cache, averaged or folded. Its checkpoints have all buffers."""
    spec = fxsplit.RunSpec(**{**COMMON, **KINDS[kind], "model": model_in(tmp_path), "output": str(tmp_path / "runs")})
    report = fxsplit.train(spec)
    last = max((Path(report.folder) / "checkpoints").iterdir())
    assert numbers(fxsplit.evaluate(last, device="cpu", trust_code=True)) == last_of(report.epochs[-1])


@pytest.mark.usefixtures("one_thread")
def test_a_checkpoint_is_the_averages_by_which_it_was_tested(tmp_path: Path) -> None:
    """Bit for bit, also before the last epoch, in which averages take the place of the weights."""
    options = {"model": model_in(tmp_path), "output": str(tmp_path / "runs"), "epochs": 3, "checkpoint_keep": 5}
    spec = fxsplit.RunSpec(**{**COMMON, **options, "model_ema": True, "model_ema_decay": 0.5})
    report = fxsplit.train(spec)
    checkpoints = sorted((Path(report.folder) / "checkpoints").iterdir())
    assert len(checkpoints) == 3
    for path, epoch in zip(checkpoints, report.epochs, strict=True):
        assert numbers(fxsplit.evaluate(path, device="cpu", trust_code=True)) == last_of(epoch)


def test_the_weights_of_a_run_that_was_interrupted_may_be_later_ones(tmp_path: Path) -> None:
    class Stop(Observer):
        def step_done(self, record: StepRecord) -> None:
            if record.epoch == 1:
                raise KeyboardInterrupt

    options = {"model": "paper:cnn", "data": "synthetic", "img_size": 8, "train_limit": 16, "batch_size": 8}
    spec = fxsplit.RunSpec(**options, epochs=2, device="cpu", log_interval=1, output=str(tmp_path), experiment="run")
    with pytest.raises(KeyboardInterrupt):
        fxsplit.train(spec, Stop())
    heard = Heard()
    fxsplit.evaluate(tmp_path / "run", device="cpu", observer=heard)
    assert any(sentence.startswith("the run is interrupted: its weights may be later") for sentence in heard.sentences)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("place", ["in memory", "in files", "known by name"])
def test_only_the_middle_is_tested_where_the_run_did_so(
    place: str, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "in files":
        for name in ("load", "load_test"):
            monkeypatch.setattr(datasets, name, partial(getattr(datasets, name), memory_limit_bytes=0))
    spec = fxsplit.RunSpec(
        model="paper:cnn", data="digits" if place == "known by name" else f"folder:{photographs}", img_size=16,
        crop_pct=0.6, train_limit=16, batch_size=8, epochs=2, device="cpu", workers=0, prove=False,
        output=str(tmp_path),
    )  # fmt: skip
    report = fxsplit.train(spec)
    assert numbers(fxsplit.evaluate(report.folder, device="cpu")) == last_of(report.epochs[-1])


@pytest.mark.usefixtures("one_thread")
def test_so_are_those_of_a_folder(run: Path) -> None:
    epochs = fxsplit.RunReport.from_dict(json.loads((run / "report.json").read_text("utf-8"))).epochs
    found = fxsplit.evaluate(run, device="cpu")
    assert numbers(found) == last_of(epochs[-1])
    assert numbers(found) != last_of(epochs[0])
    left = json.loads((run / "report.json").read_text("utf-8"))["confusion"]
    assert [[left[truth].get(other, 0) for other in CLASSES] for truth in CLASSES] == list(map(list, found.confusion))
    assert (found.images, found.batch_size, found.data) == (15, 8, f"folder:{photographs_of(run)}")
    first = min((run / "checkpoints").iterdir())
    assert numbers(fxsplit.evaluate(first, device="cpu")) == last_of(epochs[int(first.name[6:12]) - 1])


def test_classes_are_counted_as_scikit_learn_does(run: Path) -> None:
    found = fxsplit.evaluate(run, device="cpu")
    model, root = fxsplit.load(run), photographs_of(run) / "test"
    files = [root / name / f"{kind}.png" for name in CLASSES for kind in range(5)]
    truth = [file.parent.name for file in files]
    guesses = model.predict(files, top=3)
    taken = [row[0].label for row in guesses]
    assert np.array_equal(found.confusion, confusion_matrix(truth, taken, labels=CLASSES))
    recall, precision = (
        score(truth, taken, labels=CLASSES, average=None, zero_division=np.nan) * 100
        for score in (recall_score, precision_score)
    )
    for each, its_recall, its_precision in zip(found.classes, recall, precision, strict=True):
        assert (each.count, each.recall_pct) == (5, pytest.approx(its_recall))
        assert each.precision_pct == (None if np.isnan(its_precision) else pytest.approx(its_precision))
    assert found.top1_pct == pytest.approx(100 * np.mean([a == b for a, b in zip(truth, taken, strict=True)]))

    wrong = [index for index in range(15) if truth[index] != taken[index]]
    shares = [{guess.label: guess.probability for guess in row} for row in guesses]
    wrong.sort(key=lambda index: shares[index][truth[index]])
    assert [each.image for each in found.mistakes] == [str(files[index]) for index in wrong]
    for each, index in zip(found.mistakes, wrong, strict=True):
        assert (each.truth, each.predicted) == (truth[index], taken[index])
        assert each.truth_probability == pytest.approx(shares[index][each.truth], rel=1e-4)
        assert each.predicted_probability == pytest.approx(shares[index][each.predicted], rel=1e-4)
    assert wrong
    assert found.confused()[0][2] == max(
        count for truth, row in enumerate(found.confusion) for other, count in enumerate(row) if truth != other
    )


# --- other images -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., str]:
    """Writes so many images into each class folder; the name of the data."""
    stream = np.random.default_rng(1)

    def write(place: str, **counts: int) -> str:
        for name, count in counts.items():
            (tmp_path / place / name).mkdir(parents=True)
            for kind in range(count):
                picture(stream, kind).save(tmp_path / place / name / f"{kind}.png")
        return f"folder:{tmp_path / place}"

    return write


def test_of_another_folder_all_images_are_taken(run: Path, folder: Callable[..., str]) -> None:
    found = fxsplit.evaluate(run, data=folder("all", dog=3, bird=4, cat=5), device="cpu")
    assert [(each.name, each.count) for each in found.classes] == [("bird", 4), ("cat", 5), ("dog", 3)]
    data = folder("halves/train", dog=2, bird=2, cat=2).removesuffix("/train")
    folder("halves/test", dog=1, bird=2, cat=3)
    found = fxsplit.evaluate(run, data=data, device="cpu")
    assert [each.count for each in found.classes] == [2, 3, 1]


def test_fewer_classes_are_said_aloud(run: Path, folder: Callable[..., str]) -> None:
    heard = Heard()
    found = fxsplit.evaluate(run, data=folder("one", cat=5), device="cpu", observer=heard)
    assert [each.count for each in found.classes] == [0, 5, 0]
    assert found.classes[0].recall_pct is None
    assert any("has no image of bird, dog: accuracy is that of the other classes" in each for each in heard.sentences)


def test_other_classes_are_refused(run: Path, folder: Callable[..., str]) -> None:
    with pytest.raises(DataError, match=r"has the classes cow, which are not among those of the model"):
        fxsplit.evaluate(run, data=folder("more", cat=1, cow=1, dog=1), device="cpu")
    with pytest.raises(DataError, match=r"'digits' has the classes 0, 1, 2, 3, 4 and 5 more, which are not among"):
        fxsplit.evaluate(run, data="digits", device="cpu")
    with pytest.raises(DataError, match=r"there is no folder 'nowhere'"):
        fxsplit.evaluate(run, data="folder:nowhere", device="cpu")
    with pytest.raises(UsageError, match=r"there is no data set 'digit'.*did you mean 'digits'"):
        fxsplit.evaluate(run, data="digit", device="cpu")


def test_classes_in_another_order_mean_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set that lists the classes of digits backwards gives the same numbers, row by row."""

    def backwards(*arguments: Any) -> Data:
        data = datasets.KNOWN["digits"].load(*arguments)
        labelled = [images.labelled(9 - images.labels) for images in (data.train, data.test)]
        return Data(train=labelled[0], test=labelled[1], classes=data.classes[::-1], img_size=data.img_size)

    monkeypatch.setitem(datasets.KNOWN, "backwards", datasets.KnownData(10, 32, backwards))
    spec = fxsplit.RunSpec(
        model="paper:cnn", img_size=16, epochs=1, train_limit=256, device="cpu", prove=False, output=str(tmp_path)
    )
    report = fxsplit.train(spec)
    expected = fxsplit.evaluate(report.folder, device="cpu")
    assert numbers(expected) == last_of(report.epochs[-1])
    found = fxsplit.evaluate(report.folder, data="backwards", device="cpu")
    assert (found.classes, found.confusion, numbers(found)) == (expected.classes, expected.confusion, numbers(expected))


def test_the_images_held_out_of_a_folder_are_the_run_s(folder: Callable[..., str], tmp_path: Path) -> None:
    data = folder("flat", ant=15, bee=15)
    spec = fxsplit.RunSpec(
        model="paper:cnn", data=data, img_size=16, epochs=1, device="cpu", seed=3, workers=0, prove=False,
        output=str(tmp_path / "runs"),
    )  # fmt: skip
    report = fxsplit.train(spec)
    for given in (None, data, data + "/../flat"):
        found = fxsplit.evaluate(report.folder, data=given, device="cpu")
        assert (found.images, numbers(found)) == (6, last_of(report.epochs[-1]))
    assert all(Path(each.image).is_file() for each in found.mistakes)


def test_images_in_files_are_the_same_as_in_memory(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fxsplit.evaluate(run, device="cpu")
    decoded = datasets.load_test
    monkeypatch.setattr(datasets, "load_test", lambda *given, **more: decoded(*given, **more, memory_limit_bytes=0))
    assert fxsplit.evaluate(run, device="cpu") == expected


def test_weights_alone_need_to_be_told_the_images(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "model.safetensors", tmp_path)
    with pytest.raises(UsageError, match=r"is not in the folder of its run.*give the images as --data"):
        fxsplit.evaluate(tmp_path / "model.safetensors", device="cpu")
    data = f"folder:{photographs_of(run)}"
    found = fxsplit.evaluate(tmp_path / "model.safetensors", data=data, batch_size=8, device="cpu")
    assert numbers(found) == numbers(fxsplit.evaluate(run, device="cpu"))


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"device": "tpu"}, {"data": ""}])
def test_wrong_options_are_told_first(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="must be"):
        fxsplit.evaluate("nowhere", **options)


def test_it_runs_no_code_of_the_user_s(tmp_path: Path) -> None:
    spec = fxsplit.RunSpec(**{**COMMON, "epochs": 1, "model": model_in(tmp_path), "output": str(tmp_path / "runs")})
    with pytest.raises(UsageError, match="--trust-code"):
        fxsplit.evaluate(fxsplit.train(spec).folder, device="cpu")


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_shows_the_mistakes_and_is_written_whole(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "page.html"
    found = fxsplit.evaluate(run, device="cpu", page=file)
    page = Page(text := file.read_text(encoding="utf-8"))
    pictures = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(pictures) == len(found.mistakes) > 0
    assert all(str(each["src"]).startswith("data:image/png;base64,") for each in pictures)
    assert all(each.image in text for each in found.mistakes)
    assert not re.findall(r"https?:|url\(|<script", text)

    file.write_text("before", encoding="utf-8")
    monkeypatch.setattr("fxsplit.trained.evaluate.evaluation_page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fxsplit.evaluate(run, device="cpu", page=file)
    assert [each.name for each in tmp_path.iterdir()] == ["page.html"]
    assert file.read_text(encoding="utf-8") == "before"


def test_the_pictures_are_those_of_the_images(run: Path, tmp_path: Path) -> None:
    from base64 import b64decode
    from io import BytesIO

    found = fxsplit.evaluate(run, device="cpu", page=tmp_path / "page.html")
    shown = re.findall(r'src="data:image/png;base64,([^"]*)"', (tmp_path / "page.html").read_text(encoding="utf-8"))
    model = fxsplit.load(run)
    for mistake, text in zip(found.mistakes, shown, strict=True):
        with Image.open(BytesIO(b64decode(text))) as image:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        assert torch.equal(pixels, model.pixels(mistake.image))


@pytest.mark.parametrize("place", ["", "nowhere/page.html"])
def test_an_unwritable_page_is_told_before_images_are_read(place: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder" if not place else "cannot be written: No such file"):
        fxsplit.evaluate(run, data="folder:nowhere", page=tmp_path / place)


def evaluation(count: int = 3, name: str = "<b>") -> Evaluation:
    names = [f"{name}{index}" for index in range(count)]
    return Evaluation(
        run="runs/<i>", model="<script>alert(1)</script>", data='"folder', device="cpu", batch_size=8, images=2 * count,
        loss=1.5, top1_pct=50.0, top5_pct=100.0,
        classes=tuple(ClassScore(name=each, count=2, predicted=2, correct=1) for each in names),
        confusion=tuple(tuple(int((other - row) % count < 2) for other in range(count)) for row in range(count)),
        mistakes=(
            Mistake(index=1, image="<img src=x>", truth=names[0], predicted=names[1], truth_probability=0.25,
                    predicted_probability=0.75),
        ),
    )  # fmt: skip


@pytest.mark.parametrize("count", [3, 40])
def test_the_page_escapes_names(count: int) -> None:
    page = Page(evaluation_page(evaluation(count), ["data:,"]))
    tags = {tag for tag, _ in page.elements}
    assert not {"script", "i", "b0"} & tags
    assert len([1 for tag, _ in page.elements if tag == "img"]) == 1
    assert page.texts["h1"] == ["<script>alert(1)</script>"]
    assert "<img src=x>" in page.texts["code"]
    (policy,) = [each["content"] for each in page.having("meta", "http-equiv", "Content-Security-Policy")]
    assert str(policy).startswith("default-src 'none'; style-src 'sha256-")
    assert not [each for _, each in page.elements if "style" in each or "onclick" in each]


def test_many_classes_are_drawn() -> None:
    few, many = (Page(evaluation_page(evaluation(count), ["data:,"])) for count in (30, 31))
    assert not few.having("rect", "class", "cell")
    assert len(many.having("rect", "class", "cell")) == 62
    assert not many.having("table", "class", "confusion")
    assert few.having("td", "class", "shade-5")
    assert not few.having("td", "class", "shade-6")


def test_a_record_is_plain_data() -> None:
    found = evaluation().to_dict()
    assert json_text(found)
    assert found["classes"][0] == {
        "name": "<b>0", "count": 2, "predicted": 2, "correct": 1, "precision_pct": 50.0, "recall_pct": 50.0,
    }  # fmt: skip
    assert found["mistakes"][0]["truth_probability"] == 0.25
