"""Models of Hugging Face that bring Python code of their own."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from torch import nn

from fxsplit.errors import UsageError
from fxsplit.models import registry
from fxsplit.trust import trusting_code

CODE = """
from pathlib import Path
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

Path({ran!r}).touch()

class OwnConfig(PretrainedConfig):
    model_type = "own"
    image_size = 16

class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.net = nn.Sequential(nn.Flatten(), nn.LazyLinear(config.num_labels))
        self.post_init()
    def _init_weights(self, module): pass
    def forward(self, pixel_values): return self.net(pixel_values)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and its code, which leaves a file `ran` when it runs."""
    folder = tmp_path / "own"
    folder.mkdir()
    classes = {"AutoConfig": "code.OwnConfig", "AutoModelForImageClassification": "code.OwnModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": classes}))
    (folder / "code.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder


def test_code_of_a_model_is_not_run_whoever_answers(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    for call in (
        lambda: registry.build(f"hf:{own}", num_classes=3, img_size=16),
        lambda: registry.native_size(f"hf:{own}"),
    ):
        with pytest.raises(UsageError, match=r"own' comes with Python code of its own, .* --trust-code"):
            call()
    assert not (own.parent / "ran").exists()
    assert sys.stdin.read() == "y\n" * 9


@pytest.mark.filterwarnings("ignore")  # of transformers and lazy modules
def test_code_of_a_model_that_is_trusted_is_run(own: Path) -> None:
    with trusting_code(True):
        model = registry.build(f"hf:{own}", num_classes=3, img_size=16)
    assert (own.parent / "ran").exists()
    assert type(model).__name__ == "OwnModel"
    assert isinstance(model, nn.Module)


def test_code_that_leaves_the_program_is_an_error(own: Path) -> None:
    (own / "code.py").write_text("raise SystemExit(0)")
    with trusting_code(True), pytest.raises(UsageError, match="hf cannot build"):
        registry.build(f"hf:{own}", num_classes=3, img_size=16)
