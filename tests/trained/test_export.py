"""Exports: other programs compute what the model computes, and a wrong export leaves no file."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import safetensors
import torch
from torch import Tensor, nn

import fxsplit
from fxsplit.errors import FxsplitError, ProofError, UsageError
from fxsplit.saving.run_folder import FILES, write_weights
from fxsplit.trained.export import FORMATS
from tests.trained.conftest import MEAN, STD
from tests.trained.test_load import config, photographs_of

EXACT = ("torchscript", "torch-export", "safetensors")


def called(path: Path, form: str) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """What another program does with the file: a function of images, and what the file says of its use."""
    if form == "onnx":
        session = onnxruntime.InferenceSession(path)
        (source,) = session.get_inputs()
        assert isinstance(source.shape[0], str)  # a name: any number of images
        metadata = session.get_modelmeta().custom_metadata_map["model.json"]
        onnx.checker.check_model(onnx.load(path), full_check=True)
        return lambda x: torch.from_numpy(session.run(None, {source.name: x.numpy()})[0]), json.loads(metadata)
    files = {"model.json": ""}
    if form == "torchscript":
        function = torch.jit.load(path, _extra_files=files)  # type: ignore[no-untyped-call]
        return function, json.loads(files["model.json"])
    if form == "torch-export":
        module = torch.export.load(path, extra_files=files).module()
        return module, json.loads(files["model.json"])
    with safetensors.safe_open(path, framework="pt") as file:
        return fxsplit.load(path), json.loads(file.metadata()["model.json"])


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:FutureWarning")
@pytest.mark.parametrize("form", FORMATS)
def test_an_exported_model_computes_the_same(form: str, run: Path, tmp_path: Path) -> None:
    path = tmp_path / f"out{FORMATS[form].suffix}"
    record = fxsplit.export(run, path, format=form)
    assert (record.path, record.format, record.bytes) == (str(path), form, path.stat().st_size)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert (record.difference == 0) == (form in EXACT)
    model, (function, said) = fxsplit.load(run), called(path, form)
    assert said == json.loads((run / "model.json").read_text(encoding="utf-8"))
    for count in (1, 5, 32):
        x = torch.randn(count, 3, 16, 16)
        with torch.no_grad():
            ours, theirs = model(x), function(x)
        if form in EXACT:
            assert torch.equal(ours, theirs)
        else:
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-4 * float(ours.abs().max()))


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:FutureWarning")
@pytest.mark.parametrize("form", ["onnx", "torchscript", "torch-export"])
def test_one_that_takes_pixels_prepares_them_itself(form: str, run: Path, tmp_path: Path) -> None:
    path = tmp_path / "out"
    record = fxsplit.export(run, path, format=form, pixels=True)
    assert record.takes == "pixels, uint8 (batch, 3, 16, 16)"
    model, (function, _) = fxsplit.load(run), called(path, form)
    file = photographs_of(run) / "test" / "cat" / "0.png"
    pixels = model.pixels(file)[None]
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (MEAN, STD))
    with torch.no_grad():
        ours = model((pixels / 255 - mean) / std)
        theirs = function(pixels)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-4 * float(ours.abs().max()))


def test_it_is_written_beside_the_weights(run: Path) -> None:
    record = fxsplit.export(run, format="torchscript")
    assert record.path == str(run / "model.pt")
    (run / "model.pt").unlink()
    with pytest.raises(UsageError, match=r"model.safetensors' is what would be exported"):
        fxsplit.export(run, format="safetensors")


def test_a_checkpoint_is_exported_as_weights(run: Path, tmp_path: Path) -> None:
    first, x = min((run / "checkpoints").iterdir()), torch.randn(2, 3, 16, 16)
    fxsplit.export(first, tmp_path / "first.safetensors", format="safetensors")
    assert torch.equal(fxsplit.load(tmp_path / "first.safetensors")(x), fxsplit.load(first)(x))
    assert not torch.equal(fxsplit.load(tmp_path / "first.safetensors")(x), fxsplit.load(run)(x))


class Trained(nn.Module):
    """Answers otherwise in training, as BatchNorm and dropout do; the export is of the evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.9), nn.Flatten(), nn.Linear(784, 3)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"scores": self.layers(x), "other": x}


FACTORY = """
from torch import nn

class Branches(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * (2 if float(x.sum()) > 0 else 1)

def build(num_classes):
    return Branches(nn.Flatten(), nn.Linear(768, num_classes))
"""


def test_a_model_that_cannot_be_exported_is_one_sentence_and_no_file(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(FACTORY, encoding="utf-8")
    scope: dict[str, Any] = {}
    exec(compile(FACTORY, str(file), "exec"), scope)
    (tmp_path / "run").mkdir()
    write_weights(
        scope["build"](3), tmp_path / "run" / "model.safetensors", config(model="net.py:build", file=str(file))
    )
    before = sorted((tmp_path / "run").iterdir())
    with pytest.raises(FxsplitError, match=r"'net.py:build' cannot be exported to torch-export: ") as caught:
        fxsplit.export(tmp_path / "run", format="torch-export", trust_code=True)
    assert len(str(caught.value)) < 500
    # TorchScript records one of the two ways, and gives other scores for images of the other.
    with pytest.raises(ProofError, match="gives other scores than the model: they differ by"):
        fxsplit.export(tmp_path / "run", format="torchscript", trust_code=True)
    with pytest.raises(UsageError, match="--trust-code"):
        fxsplit.export(tmp_path / "run", format="torchscript")
    assert sorted((tmp_path / "run").iterdir()) == before


@pytest.mark.parametrize("form", FORMATS)
def test_a_wrong_export_is_no_file(form: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = FORMATS[form]

    def wrong(model: nn.Module, example: Tensor, trained: Any, path: Path) -> None:
        with torch.no_grad():
            last = list(trained.model.parameters())[-1]
            before = last.clone()
            last[0] += 2e-4 * model(example).abs().max()
            whole.write(model, example, trained, path)
            last.copy_(before)

    monkeypatch.setitem(FORMATS, form, whole._replace(write=wrong))
    (tmp_path / "out").write_text("before", encoding="utf-8")
    with pytest.raises(ProofError, match=rf"the exported {form} gives other scores than the model"):
        fxsplit.export(run, tmp_path / "out", format=form)
    assert (tmp_path / "out").read_text(encoding="utf-8") == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_an_export_for_one_batch_size_is_no_file(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fixed(model: nn.Module, example: Tensor, _: Any, path: Path) -> None:
        with path.open("wb") as file:
            torch.export.save(torch.export.export(model, (example,)), file)

    monkeypatch.setitem(FORMATS, "torch-export", FORMATS["torch-export"]._replace(write=fixed))
    with pytest.raises(ProofError, match="the exported torch-export cannot be run on 1 images, and is not kept"):
        fxsplit.export(run, tmp_path / "out", format="torch-export")
    assert not list(tmp_path.iterdir())


def test_scores_inside_of_an_output_are_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxsplit.models.registry.rebuild", lambda *_args, **_kwargs: Trained())
    write_weights(Trained(), tmp_path / "model.safetensors", config())
    for form in ("torchscript", "torch-export", "onnx"):
        assert fxsplit.export(tmp_path, format=form).difference < 1e-5


def test_what_is_missing_says_which_extra_to_install(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else found(name))
    with pytest.raises(
        UsageError, match=r"onnx needs onnx, onnxscript, onnxruntime, which are not .*pip install 'fxsplit\[export\]'"
    ):
        fxsplit.export(run, tmp_path / "out")
    assert fxsplit.export(run, tmp_path / "out", format="torchscript").difference == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "onx"}, r"there is no format 'onx'; did you mean 'onnx'\?"),
        ({"format": "safetensors", "pixels": True}, "safetensors holds weights alone, which take no pixels"),
        ({"output": ""}, "is a folder; name a file"),
        ({"output": "nowhere/model.onnx"}, "cannot be written: No such file or directory"),
    ],
)
def test_wrong_options_are_one_sentence(options: dict[str, Any], said: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        fxsplit.export(run, tmp_path / options.pop("output", "out"), **options)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_sentence_and_no_file(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for form in ("onnx", "safetensors"):
        monkeypatch.setitem(FORMATS, form, FORMATS[form]._replace(write=full))
        with pytest.raises(UsageError, match="cannot be written: No space left on device"):
            fxsplit.export(run, tmp_path / "out", format=form)
    assert not list(tmp_path.iterdir())


def test_what_is_logged_afterwards_is_logged_as_before(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root.manager, "disable", logging.INFO)
    fxsplit.export(run, tmp_path / "out", format="safetensors")
    assert logging.root.manager.disable == logging.INFO


@pytest.mark.parametrize("path", ["x" * 5000, "no\0path", "~no-such-user/m.pt"])
def test_a_path_that_can_be_none_is_refused(run: Path, path: str) -> None:
    with pytest.raises(UsageError) as caught:
        fxsplit.export(run, path, format="torchscript")
    assert len(str(caught.value)) <= 500
    assert "\0" not in str(caught.value)


def test_a_link_to_itself_is_replaced(run: Path, tmp_path: Path) -> None:
    link = tmp_path / "model.safetensors"
    link.symlink_to(link.name)
    fxsplit.export(run, link, format="safetensors")
    assert fxsplit.load(link).classes == fxsplit.load(run).classes


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_files_of_the_run_are_not_replaced(name: str, run: Path) -> None:
    before = (run / name).read_bytes()
    with pytest.raises(UsageError, match=r"is a file that its run has left|is what would be exported"):
        fxsplit.export(run, format="torchscript", output=run / name)
    assert (run / name).read_bytes() == before
