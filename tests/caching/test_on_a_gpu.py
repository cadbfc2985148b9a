"""The same on a GPU, where there is one: a cache changes nothing there either, wherever it lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import fxsplit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Notices(fxsplit.Observer):
    def __init__(self) -> None:
        self.sentences: list[str] = []

    def notice(self, sentence: str) -> None:
        self.sentences.append(sentence)


@pytest.mark.parametrize("graphs", ["off", "on"])
@pytest.mark.parametrize(
    "precision", [{}, {"amp": True}, {"settled_dtype": "bfloat16"}], ids=["float32", "amp", "settled"]
)
@pytest.mark.parametrize("augment", [{}, {"augment": "crop-flip", "cache_views": 2}], ids=["plain", "views"])
def test_training_from_a_cache_ends_as_without(
    graphs: str, precision: dict[str, Any], augment: dict[str, Any], tmp_path: Path
) -> None:
    # All batches are full: kernels for a smaller one may round otherwise.
    given = {
        "model": "paper:cnn", "data": "digits", "img_size": 16, "train_limit": 192, "batch_size": 16, "epochs": 9,
        "schedule": "settle", "parts": 2, "settle_from": 0.2, "settle_until": 0.3, "lr": 2.0**-7, "deterministic": True,
        "device": "cuda", "cuda_graphs": graphs, "output": str(tmp_path), **precision, **augment,
    }  # fmt: skip
    saved, kept = [], []
    for cache in ("off", "device", "ram", "disk", "auto"):
        notices = Notices()
        report = fxsplit.train(fxsplit.RunSpec(cache=cache, **given), notices)
        saved.append(safetensors.torch.load_file(Path(report.folder) / "model.safetensors"))
        kept.append([(each.cache_resident_bytes, each.cache_file_bytes) for each in report.epochs])
        assert not any("deliver the same" in each for each in notices.sentences)
    assert all(torch.equal(other[name], saved[0][name]) for other in saved[1:] for name in saved[0])
    assert kept[1] == kept[2]
    assert any(resident for resident, _ in kept[1])
    assert any(file for _, file in kept[3])
