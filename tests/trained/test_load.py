"""Loading a model: from every place where one is saved, with the very preparation of its images, and no code run."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

import fxsplit
from fxsplit.data import datasets
from fxsplit.data.loader import Loader
from fxsplit.errors import DataError, FxsplitError, UsageError
from fxsplit.execute.forward import logits_of
from fxsplit.models import downloads, registry
from fxsplit.saving.model_config import ModelConfig
from fxsplit.saving.run_folder import write_weights
from fxsplit.spec import read_recipe
from tests.trained.conftest import CLASSES, MEAN, STD

SAFETENSORS = "model.safetensors"


def config(**changes: Any) -> ModelConfig:
    given: dict[str, Any] = {
        "model": "paper:cnn", "pretrained": False, "stem": "original", "drop_path": 0.0, "classes": CLASSES,
        "channels": 3, "img_size": 16, "interpolation": "bilinear", "mean": (), "std": (), "channels_last": False,
    }  # fmt: skip
    return ModelConfig(**{**given, **changes})


def photographs_of(run: Path) -> Path:
    name: str = read_recipe(run / "args.yaml")["data"]
    return Path(name.removeprefix("folder:"))


def test_the_folder_says_how_the_model_is_used(run: Path) -> None:
    said = json.loads((run / "model.json").read_text(encoding="utf-8"))
    with safetensors.safe_open(run / SAFETENSORS, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["model.json"]) == said
    assert metadata["format"] == "pt"  # without it, transformers does not take the file
    assert said == {
        "model": "paper:cnn", "file": "", "pretrained": False, "stem": "original", "drop_path": 0.0,
        "classes": list(CLASSES), "channels": 3, "img_size": 16, "crop_pct": 1.0,
        "resize": "short side to img_size / crop_pct, antialiased, then centre crop", "interpolation": "bicubic",
        "mean": list(MEAN), "std": list(STD), "channels_last": False, "schema": 1,
    }  # fmt: skip


def test_images_are_prepared_as_in_training(run: Path) -> None:
    model = fxsplit.load(run)
    assert model.classes == CLASSES
    root = photographs_of(run)
    data = datasets.load(
        f"folder:{root}", img_size=16, interpolation="bicubic", data_dir="", seed=0, train_limit=None, workers=0,
        notice=print,
    )  # fmt: skip
    expected = torch.cat([each.images for each in Loader(data.test, batch_size=4, mean=MEAN, std=STD).batches(0)])
    files = [root / "test" / name / f"{kind}.png" for name in CLASSES for kind in range(5)]
    assert torch.equal(torch.stack([model.preprocess(file) for file in files]), expected)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    by_hand = torch.stack([(model.pixels(file) / 255 - mean) / std for file in files])
    assert torch.allclose(by_hand, expected, rtol=0, atol=1e-5)
    opened = [Image.open(file) for file in files]
    assert torch.equal(torch.stack([model.preprocess(image) for image in opened]), expected)


def test_it_computes_what_the_trained_network_computes(run: Path) -> None:
    network = registry.build("paper:cnn", num_classes=3, img_size=16)
    safetensors.torch.load_model(network, run / SAFETENSORS)
    model, x = fxsplit.load(run), torch.randn(3, 3, 16, 16)
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(x), network.eval()(x))
    shares = model(x).softmax(1)
    guesses = model.predict(x, top=2)
    assert [[guess.probability for guess in row] for row in guesses] == shares.topk(2).values.tolist()
    best = [CLASSES[index] for index in shares.argmax(1)]
    assert [row[0].label for row in guesses] == best
    assert len(model.predict(x, top=9)[0]) == 3


def test_it_is_the_same_from_every_place(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 16, 16)
    expected = fxsplit.load(run)(x)
    shutil.copy(run / SAFETENSORS, tmp_path / "moved.safetensors")
    last = max((run / "checkpoints").iterdir())
    for place in (str(run), run / SAFETENSORS, tmp_path / "moved.safetensors", last):
        assert torch.equal(fxsplit.load(place)(x), expected)
    monkeypatch.chdir(last.parent)
    assert torch.equal(fxsplit.load(last.name)(x), expected)
    earlier = min((run / "checkpoints").iterdir())
    assert not torch.equal(fxsplit.load(earlier)(x), expected)


def test_predict_takes_files_images_and_tensors(run: Path) -> None:
    model, root = fxsplit.load(run), photographs_of(run)
    files = [root / "test" / "cat" / f"{kind}.png" for kind in range(3)]
    expected = model.predict(torch.stack([model.preprocess(file) for file in files]))
    assert model.predict(files) == expected
    assert model.predict([Image.open(files[0]), str(files[1]), files[2]]) == expected
    alone = model.predict(files[0])
    assert len(alone) == 1
    assert alone[0][0].label == expected[0][0].label
    assert alone == model.predict(str(files[0])) == model.predict(Image.open(files[0]))
    assert model.predict([]) == []
    with pytest.raises(UsageError, match="top is 0, but must be a whole number, at least 1"):
        model.predict(files, top=0)


def test_predict_computes_in_evaluation_and_puts_the_mode_back(run: Path) -> None:
    model, file = fxsplit.load(run), photographs_of(run) / "test" / "cat" / "0.png"
    expected, buffers = model.predict(file), {name: value.clone() for name, value in model.named_buffers()}
    model.train()
    first = next(module for module in model.model.modules() if not list(module.children()))
    first.eval()
    modes = [module.training for module in model.modules()]
    assert model.predict(file) == expected
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(RuntimeError):
        model.predict(torch.zeros(1, 4, 16, 16))
    assert [module.training for module in model.modules()] == modes


def test_what_is_no_image_is_refused_by_its_type(run: Path) -> None:
    model, array = fxsplit.load(run), np.zeros((16, 16, 3), dtype=np.uint8)
    said = r"^picture is of type ndarray, but must be a file or an image of Pillow; Image.fromarray\(array\) makes one"
    with pytest.raises(UsageError, match=said):
        model.preprocess(array)
    with pytest.raises(UsageError, match=said):
        model.predict([array])


def test_an_image_that_is_cut_off_is_one_sentence(run: Path, tmp_path: Path) -> None:
    model = fxsplit.load(run)
    whole = (photographs_of(run) / "test" / "cat" / "0.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"half.png' cannot be decoded"):
        model.preprocess(tmp_path / "half.png")
    with Image.open(tmp_path / "half.png") as image, pytest.raises(DataError, match=r"the image cannot be decoded"):
        model.preprocess(image)


def test_random_numbers_are_left_alone(run: Path) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    fxsplit.load(run)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]  # type: ignore[index]


# --- models of every source -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("timm:test_resnet", {"stem": "cifar", "drop_path": 0.2}),
        ("timm:test_vit", {"stem": "cifar", "img_size": 32}),
        ("torchvision:resnet18", {"stem": "cifar"}),
        ("torchvision:convnext_tiny", {"drop_path": 0.3, "img_size": 32}),
        ("paper:resnext", {"drop_path": 0.1}),
        ("hf:resnet", {"img_size": 32}),
        ("hf:vit", {"img_size": 32}),
    ],
)
def test_a_model_is_built_again_as_it_was(spec: str, options: dict[str, Any], tmp_path: Path) -> None:
    said = config(model=spec, **options)
    network = registry.build(
        spec, num_classes=3, img_size=said.img_size, stem=said.stem, drop_path=said.drop_path
    ).eval()
    write_weights(network, tmp_path / SAFETENSORS, said)
    again = fxsplit.load(tmp_path / SAFETENSORS)
    x = torch.randn(2, 3, said.img_size, said.img_size)
    assert str(again.model) == str(network)
    assert torch.equal(again(x), logits_of(network(x)))


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
@pytest.mark.parametrize("name", ["resnet18", "googlenet", "inception_v3"])
def test_what_was_built_for_pretrained_weights_is_built_so_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision normalizes images inside of some networks, but only where pretrained weights are asked for."""
    monkeypatch.setattr(downloads, "answers", lambda _url: True)
    quick = {} if name == "resnet18" else {"init_weights": False}
    published = torchvision.models.get_model(name, **quick).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_args, **_kwargs: published)
    network = registry.build(f"torchvision:{name}", num_classes=3, img_size=96, pretrained=True).eval()
    said = config(model=f"torchvision:{name}", pretrained=True, img_size=96)
    write_weights(network, tmp_path / SAFETENSORS, said)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", None)
    again = fxsplit.load(tmp_path / SAFETENSORS)
    assert again.state_dict().keys() == {f"model.{key}" for key in network.state_dict()}
    x = torch.rand(2, 3, 96, 96)
    assert torch.equal(again(x), network(x))


def test_timm_takes_the_weights(tmp_path: Path) -> None:
    spec = fxsplit.RunSpec(
        model="timm:test_resnet", img_size=16, epochs=1, train_limit=64, device="cpu", prove=False, output=str(tmp_path)
    )
    folder = fxsplit.train(spec).folder
    network = timm.create_model("test_resnet", num_classes=10, checkpoint_path=f"{folder}/{SAFETENSORS}").eval()
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(network(x), fxsplit.load(folder)(x))


FACTORY = """
from pathlib import Path
from torch import nn
Path({marker!r}).touch()

def build(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(784, num_classes))
"""


def test_a_file_is_run_only_where_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "code").mkdir()
    file, marker = tmp_path / "code" / "net.py", tmp_path / "ran"
    file.write_text(FACTORY.format(marker=str(marker)), encoding="utf-8")
    network = registry.build(f"{file}:build", num_classes=3, img_size=16).eval()
    said = config(model="net.py:build", file=str(file))
    write_weights(network, tmp_path / SAFETENSORS, said)
    marker.unlink()
    with pytest.raises(UsageError, match=r"'net.py:build' is built by running '.*code/net.py'.*--trust-code"):
        fxsplit.load(tmp_path / SAFETENSORS)
    write_weights(network, tmp_path / "module.safetensors", config(model="net:build"))
    monkeypatch.chdir(file.parent)
    with pytest.raises(UsageError, match=r"'net:build' is built by running 'net'"):
        fxsplit.load(tmp_path / "module.safetensors")
    assert not marker.exists()

    x = torch.randn(2, 3, 16, 16)
    monkeypatch.chdir(tmp_path)  # where there is no net.py
    assert torch.equal(fxsplit.load(SAFETENSORS, trust_code=True)(x), network(x))
    file.rename(tmp_path / "net.py")  # as on another machine: what is named is looked for here
    assert torch.equal(fxsplit.load(SAFETENSORS, trust_code=True)(x), network(x))


def test_a_run_of_a_file_remembers_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.py").write_text(FACTORY.format(marker=str(tmp_path / "ran")), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    spec = fxsplit.RunSpec(
        model="net.py:build", img_size=16, epochs=1, train_limit=32, device="cpu", prove=False, output="runs"
    )
    said = json.loads((Path(fxsplit.train(spec).folder) / "model.json").read_text(encoding="utf-8"))
    assert (said["model"], said["file"]) == ("net.py:build", str(tmp_path / "net.py"))


# --- what is wrong --------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def refused(place: Path | str, kind: type[FxsplitError]) -> str:
    with pytest.raises(kind) as caught:
        fxsplit.load(place)
    assert type(caught.value) is kind
    sentence = str(caught.value)
    assert len(sentence) < 600
    assert "\n" not in sentence
    return sentence


def without_metadata(file: Path) -> None:
    safetensors.torch.save_file(safetensors.torch.load_file(file), file)


def test_a_folder_of_an_older_version_is_one_sentence(copy: Path) -> None:
    without_metadata(copy / SAFETENSORS)
    assert fxsplit.load(copy).classes == CLASSES  # its model.json is enough
    (copy / "model.json").unlink()
    assert "does not say how its model is used" in refused(copy, UsageError)
    last = max((copy / "checkpoints").iterdir())
    assert f"the folder '{copy}' of the checkpoint" in (said := refused(last, UsageError))
    assert "has no model.json" in said
    assert "train --resume" in said


def test_a_killed_run_names_its_checkpoint(copy: Path) -> None:
    (copy / SAFETENSORS).unlink()
    said = refused(copy, UsageError)
    assert "has not ended and has no model.safetensors" in said
    assert f"train --resume {copy}" in said
    last = max((copy / "checkpoints").iterdir())
    assert str(last) in said
    assert fxsplit.load(last).classes == CLASSES
    shutil.rmtree(copy / "checkpoints")
    assert "ended before anything was saved" in refused(copy, UsageError)
    (copy / "args.yaml").unlink()
    assert "is not the folder of a run" in refused(copy, UsageError)


def test_a_place_that_is_none_is_one_sentence(tmp_path: Path, run: Path) -> None:
    assert "there is no run 'nowhere'" in refused("nowhere", UsageError)
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    assert "is no whole safetensors file" in refused(tmp_path / "notes.txt", DataError)
    assert "is no whole safetensors file" in refused(run / "args.yaml", DataError)
    with pytest.raises(UsageError, match="device is 'gpu', but must be auto, cpu, cuda or cuda:N"):
        fxsplit.load(run, "gpu")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 2}, "its schema is 2, and this version reads 1"),
        ({"img_size": 0}, "img_size is 0"),
        ({"img_size": 10**9}, "img_size is 1000000000"),
        ({"img_size": "16"}, "'img_size' of ModelConfig cannot be '16'"),
        ({"crop_pct": 1.5}, "crop_pct is 1.5, and must be from 0.1 to 1"),
        ({"crop_pct": 1e-9}, "crop_pct is 1e-09"),
        ({"crop_pct": None}, "crop_pct is nan"),
        ({"classes": []}, "it has no classes"),
        ({"classes": "ab"}, "'classes' of ModelConfig cannot be 'ab'"),
        ({"channels": 1}, "channels is 1, and images are prepared with 3"),
        ({"interpolation": "nearest"}, "interpolation is 'nearest'"),
        ({"resize": "stretched"}, "resize is 'stretched'"),
        ({"mean": [0.1, 0.2]}, "mean and std must both have 1, 3 or no numbers"),
        ({"std": [0.1, 0.2, 0.0]}, "std must be above 0"),
        ({"std": [0.1, 0.2, None]}, "std must be above 0"),
        ({"extra": 1}, "has no key 'extra'"),
    ],
)
def test_a_wrong_config_is_one_sentence(change: dict[str, Any], said: str, copy: Path) -> None:
    file = copy / "model.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    sentence = refused(copy, DataError)
    assert said in sentence
    assert str(file) in sentence


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"schema": 1}', "\xff"])
def test_a_broken_config_is_one_sentence(text: str, copy: Path) -> None:
    (copy / "model.json").write_bytes(text.encode("latin-1"))
    refused(copy, DataError)


def shortened(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def of_another(file: Path) -> None:
    network = nn.Linear(2, 2)
    write_weights(network, file, config())


def of_a_wrong_size(file: Path) -> None:
    tensors = safetensors.torch.load_file(file)
    name = max(tensors)
    safetensors.torch.save_file({**tensors, name: torch.zeros(1)}, file, metadata=config().to_metadata())


@pytest.mark.parametrize("damage", [shortened, of_another, of_a_wrong_size])
def test_damaged_weights_are_one_sentence(damage: Callable[[Path], None], copy: Path) -> None:
    damage(copy / SAFETENSORS)
    assert SAFETENSORS in refused(copy, DataError)


def test_a_damaged_checkpoint_is_one_sentence(copy: Path) -> None:
    last = max((copy / "checkpoints").iterdir())
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    assert "its checksum is another" in refused(last, DataError)


def test_more_scores_than_classes_are_numbered() -> None:
    model = fxsplit.TrainedModel(nn.Sequential(nn.Flatten(), nn.Linear(768, 5)), config())
    labels = [guess.label for guess in model.predict(torch.randn(1, 3, 16, 16))[0]]
    assert sorted(labels) == ["bird", "cat", "dog", "output 3", "output 4"]


@pytest.mark.parametrize("path", ["x" * 5000, "no\0path", "~no-such-user/run"])
def test_a_path_that_can_be_none_is_refused(path: str) -> None:
    with pytest.raises(UsageError) as caught:
        fxsplit.load(path)
    assert len(str(caught.value)) <= 500
    assert "\0" not in str(caught.value)


def test_a_model_says_what_it_is(run: Path) -> None:
    model = fxsplit.load(run, device="cpu")
    assert str(model).splitlines() == [
        "paper:cnn, trained, on cpu, in evaluation mode",
        "  classes  3: bird, cat, dog",
        "  images   3 x 16 x 16, prepared by preprocess(file) or predict(files)",
    ]
    assert "in training mode" in str(model.train())
