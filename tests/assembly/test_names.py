"""What is wrong is said before data are loaded, and before anything is made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fxsplit
from fxsplit.data import datasets
from fxsplit.errors import FxsplitError, TraceError, UsageError
from fxsplit.models import registry

NETS = """
import sys
from torch import nn

def few(): return nn.Sequential(nn.Flatten(), nn.Linear(768, 9))
def more(): return nn.Sequential(nn.Flatten(), nn.Linear(768, 11))
def maps(): return nn.Conv2d(3, 10, 3)
class Scalar(nn.Module):
    def forward(self, x): return x.mean()
class Nothing(nn.Module):
    def forward(self, x): return None
class Half(nn.Module):
    def forward(self, x): return x.flatten(1)[: len(x) // 2]
class Twofold(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(768, 10))
    def forward(self, x):
        return super().forward(x) if self.training else super().forward(x)[:, :3]
class Leaves(nn.Module):
    def forward(self, x): sys.exit(0)
class Throws(nn.Module):
    def forward(self, x): raise BaseException("stop")
"""


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., fxsplit.RunSpec]:
    """A run that would take a moment, whose data cannot be loaded."""

    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("data are loaded")

    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load", loaded)

    def make(**changes: Any) -> fxsplit.RunSpec:
        usual = {"model": "paper:cnn", "img_size": 16, "epochs": 1, "device": "cpu", "batch_size": 8}
        return fxsplit.RunSpec(**{**usual, **changes})

    return make


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"opt": "nope"}, "timm has no optimizer 'nope' (it has "),
        ({"opt": "adamv"}, "timm has no optimizer 'adamv'; did you mean"),
        ({"opt": "sgd", "momentum": 0.0}, "the optimizer 'sgd' cannot be made: Nesterov momentum requires"),
        ({"opt": "adahessian"}, "the optimizer 'adahessian' cannot be used here: "),
        ({"sched": "cosinus"}, "there is no learning-rate schedule 'cosinus'; did you mean 'cosine'"),
        ({"sched": "rsqrt"}, "the learning-rate schedule 'rsqrt' cannot be made so: "),
        ({"torchcompile": "inducter"}, "torch has no backend 'inducter' to compile with; did you mean 'inductor'"),
        ({"experiment": "taken"}, "the folder 'output/train/taken' already holds a run; name another"),
        ({"experiment": "file"}, "the run folder 'output/train/file' cannot be made: Not a directory"),
    ],
)
def test_names_are_tried_before_a_model_is_built(
    spec: Callable[..., fxsplit.RunSpec], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    def built(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is built")

    monkeypatch.setattr(registry, "build", built)
    folder = Path("output/train/taken")
    folder.mkdir(parents=True)
    (folder / "args.yaml").touch()
    (folder.parent / "file").touch()
    with pytest.raises(UsageError) as caught:
        fxsplit.train(spec(**changes))
    assert str(caught.value).startswith(words)
    assert sorted(each.name for each in folder.parent.iterdir()) == ["file", "taken"]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("few", "gives 9 class scores, and 'digits' has 10 classes"),
        ("maps", "returns values of shape 2 x 10 x 14 x 14 for 2 images, and train needs a score"),
        ("Scalar", "returns values of shape () for 2 images"),
        ("Nothing", "returns no tensor for 2 images"),
        ("Half", "returns values of shape 1 x 768 for 2 images"),
        ("Twofold", "gives 3 class scores"),
    ],
)
def test_a_model_that_gives_no_scores_is_refused(spec: Callable[..., fxsplit.RunSpec], model: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        fxsplit.train(spec(model=f"nets.py:{model}"))
    assert str(caught.value).startswith(f"'nets.py:{model}' {words}")
    assert not Path("output").exists()


@pytest.mark.parametrize(("model", "words"), [("Leaves", "SystemExit: 0"), ("Throws", "BaseException: stop")])
def test_a_forward_that_leaves_the_program_is_refused(
    spec: Callable[..., fxsplit.RunSpec], model: str, words: str
) -> None:
    with pytest.raises(TraceError, match=f"{model} cannot be traced in training: {words}"):
        fxsplit.train(spec(model=f"nets.py:{model}"))
    (record,) = fxsplit.check(["paper:cnn"], structure_only=True, img_size=16)  # nothing is left patched
    assert record.passed


def test_more_scores_than_classes_are_allowed(spec: Callable[..., fxsplit.RunSpec]) -> None:
    with pytest.raises(AssertionError, match="data are loaded"):
        fxsplit.train(spec(model="nets.py:more"))


def test_a_run_of_code_goes_on_when_it_is_named_or_trusted(
    spec: Callable[..., fxsplit.RunSpec], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "args.yaml").write_text(spec(model="nets.py:more", output=str(tmp_path), experiment="run").to_yaml())
    with pytest.raises(UsageError, match=r"the run in .* is of 'nets.py:more', which runs code; .* --trust-code"):
        fxsplit.train(resume=run)
    for given in ({"trust_code": True}, {"spec": spec(model="nets.py:more")}):
        with pytest.raises((AssertionError, FxsplitError), match="data are loaded"):
            fxsplit.train(resume=run, **given)
