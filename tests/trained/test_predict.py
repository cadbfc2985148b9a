"""Predictions for files and folders: what a model says of each, and that one bad file does not end the rest."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fxsplit
from fxsplit.data.reading.decoding import decode
from fxsplit.errors import UsageError
from fxsplit.report import Observer, Prediction
from fxsplit.trained.model import TrainedModel
from tests.trained.conftest import CLASSES
from tests.trained.test_load import photographs_of


def test_every_image_gets_what_the_model_says(run: Path) -> None:
    root = photographs_of(run) / "test"
    files = [root / name / f"{kind}.png" for name in CLASSES for kind in range(5)]
    model = fxsplit.load(run)
    expected = [(str(file), [guess.label for guess in model.predict(file, 2)[0]]) for file in files]
    shares = [[guess.probability for guess in model.predict(file, 2)[0]] for file in files]
    for batch_size in (1, 4, 64):
        found = list(fxsplit.predict(run, [root], top=2, batch_size=batch_size, device="cpu"))
        assert [(each.file, [name for name, _ in each.classes]) for each in found] == expected
        assert np.allclose([[share for _, share in each.classes] for each in found], shares, rtol=1e-4)
    again = list(fxsplit.predict(run, [*reversed(files), files[0]], device="cpu"))
    assert [each.file for each in again] == [str(file) for file in [*reversed(files), files[0]]]
    assert again[-1] == again[-2]
    assert len(again[0].classes) == 3


def test_one_file_stands_for_a_list_of_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photographs_of(run) / "test" / "cat")
    expected = list(fxsplit.predict(run, ["0.png"], device="cpu"))
    assert list(fxsplit.predict(run, "0.png", device="cpu")) == expected
    assert list(fxsplit.predict(run, Path("0.png"), device="cpu")) == expected


def test_only_the_middle_is_asked_about_where_the_run_tested_it(run: Path, tmp_path: Path) -> None:
    """Of files, and of images that are open already."""
    model = fxsplit.load(run)
    middle = TrainedModel(model.model, replace(model.config, crop_pct=0.6))
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "model.json").write_text(json.dumps(middle.config.to_dict()), encoding="utf-8")
    for path in sorted(photographs_of(run).rglob("*.png"))[:4]:
        expected = decode(path, 16, "bicubic", crop_pct=0.6)
        assert torch.equal(middle.pixels(path), expected)
        with Image.open(path) as image:
            assert torch.equal(middle.pixels(image), expected)
        (found,) = fxsplit.predict(tmp_path / "run", [path], device="cpu")
        ((guess, *_),) = model.predict(model.normalize(expected[None]))
        assert found.classes[0] == (guess.label, guess.probability)


def test_a_file_that_is_no_image_is_named_and_the_rest_goes_on(run: Path, tmp_path: Path) -> None:
    good = photographs_of(run) / "test" / "cat" / "0.png"
    shutil.copy(good, tmp_path / "b.png")
    (tmp_path / "a.png").write_text("x", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    (tmp_path / ".hidden.png").write_text("x", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    shutil.copy(good, tmp_path / "deep" / "deeper" / "c.png")
    (tmp_path / "deep" / "up").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    given = [tmp_path / "empty", "nowhere.jpg", tmp_path, tmp_path / "notes.txt", "/dev/zero", tmp_path / "b.png"]
    found = list(fxsplit.predict(run, given, batch_size=3, device="cpu"))
    says = {
        "empty": "has no image file", "nowhere.jpg": "there is no file 'nowhere.jpg'", "a.png": "cannot be decoded",
        "pipe.png": "is no regular file", "notes.txt": "cannot be decoded", "zero": "is no regular file",
    }  # fmt: skip
    assert [Path(each.file).name for each in found] == [
        "empty", "nowhere.jpg", "a.png", "b.png", "pipe.png", "c.png", "notes.txt", "zero", "b.png",
    ]  # fmt: skip
    for each in found:
        name = Path(each.file).name
        assert (each.error is None) == (name not in says)
        assert says.get(name, "") in (each.error or "")
        assert bool(each.classes) == (each.error is None)
    assert [name for name, _ in found[3].classes] == [name for name, _ in found[-1].classes]


def test_what_pillow_warns_of_is_said(run: Path, tmp_path: Path) -> None:
    sentences: list[str] = []

    class Heard(Observer):
        def notice(self, sentence: str) -> None:
            sentences.append(sentence)

    Image.fromarray(np.full((16, 16), 1000.0, dtype=np.float32)).save(tmp_path / "odd.tiff")
    (found,) = fxsplit.predict(run, [tmp_path / "odd.tiff"], device="cpu", observer=Heard())
    assert found.classes
    assert len(sentences) == 1
    assert "odd.tiff': its float32 values have no known range" in sentences[0]


def test_what_is_wrong_is_told_before_the_first_prediction(run: Path) -> None:
    with pytest.raises(UsageError, match="there is no run 'nowhere'"):
        fxsplit.predict("nowhere", ["a.png"])
    with pytest.raises(UsageError, match="top is 0, but must be a whole number, at least 1"):
        fxsplit.predict(run, ["a.png"], top=0)
    with pytest.raises(UsageError, match="batch-size is 0"):
        fxsplit.predict(run, ["a.png"], batch_size=0)


def test_a_record_is_plain_data() -> None:
    assert Prediction(file="a", classes=(("cat", 0.5),)).to_dict() == {
        "file": "a",
        "classes": [{"class": "cat", "probability": 0.5}],
    }
    assert Prediction(file="a", error="no").to_dict() == {"file": "a", "error": "no"}


@pytest.mark.parametrize("path", ["x" * 5000, "no\0path", "~no-such-user/a.png"])
def test_a_path_that_can_be_none_keeps_no_other_from_being_read(run: Path, photographs: Path, path: str) -> None:
    good = photographs / "test" / "cat" / "0.png"
    bad, read = fxsplit.predict(run, [path, good], device="cpu")
    assert bad.error
    assert len(bad.error) <= 500
    assert "\0" not in bad.error
    assert read.file == str(good)
    assert not read.error
