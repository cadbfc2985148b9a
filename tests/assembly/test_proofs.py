"""The proof of the first batch as a run makes it: with as many images as the memory of its plan holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fxsplit
from fxsplit.assembly import proofs
from fxsplit.plan.forecast import forecast
from fxsplit.plan.schedule import Phase
from fxsplit.proving.first_batch import Proof, prove_batch


def proven_images(spec: fxsplit.RunSpec, monkeypatch: pytest.MonkeyPatch) -> int:
    """Train, and return how many images the proof has taken."""
    taken: list[int] = []

    def counting(model: Any, net: Any, images: Any, labels: Any, **options: Any) -> Proof | None:
        assert len(images) == len(labels)
        taken.append(len(images))
        return prove_batch(model, net, images, labels, **options)

    monkeypatch.setattr(proofs, "prove_batch", counting)
    report = fxsplit.train(spec)
    assert report.prove_seconds > 0
    (count,) = taken
    return count


def spec_of(folder: Path, **options: Any) -> fxsplit.RunSpec:
    given = {
        "model": "paper:cnn", "data": "synthetic", "img_size": 16, "train_limit": 64, "batch_size": 32, "epochs": 2,
        "device": "cpu", "output": str(folder),
    }  # fmt: skip
    return fxsplit.RunSpec(**{**given, **options})


@pytest.mark.parametrize("options", [{}, {"grad_accum_steps": 2}, {"schedule": "settle", "parts": 3}])
def test_all_images_are_taken_where_a_phase_needs_as_much_memory(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert proven_images(spec_of(tmp_path, **options), monkeypatch) == 32


@pytest.mark.parametrize("options", [{"preset": "finetune", "force": True}, {"preset": "l2l"}, {"memory_budget": 0.5}])
def test_no_more_images_are_taken_than_the_memory_of_training_holds(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(tmp_path, epochs=4, **options)
    count = proven_images(spec, monkeypatch)
    assert 2 < count < 32
    found = fxsplit.inspect(spec)
    proof = Phase(start=0, stop=len(found.plan.partitions), epochs=1, micro_batches=found.plan.phases[0].micro_batches)
    of_proof = [
        forecast(replace(found.plan, phases=(proof,)), found, batch_size=images).phases[0].activation_bytes
        for images in (count, count + 1)
    ]
    assert found.forecast is not None
    most = max(phase.activation_bytes for phase in found.forecast.phases)
    assert of_proof[0] <= most < of_proof[1]


def test_two_images_are_taken_at_least(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head_alone = {"at": ("fc2",), "schedule": "finetune", "settle_front": 1.0, "force": True}
    assert proven_images(spec_of(tmp_path, batch_size=4, **head_alone), monkeypatch) == 2
