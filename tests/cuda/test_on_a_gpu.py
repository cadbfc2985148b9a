"""The same on a GPU, where there is one: what the simulation claims of CUDA graphs."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import fxsplit
from fxsplit.assembly import determinism
from fxsplit.cuda.recorder import CudaRecorder
from fxsplit.cuda.trial import why_not_replayed
from fxsplit.training.optimizers import make_optimizer
from tests.cuda.test_graphed import batches, decays, evaluates, loop, nothing, plain, settles

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("between", [nothing, settles, evaluates, decays])
@pytest.mark.parametrize("sizes", [(4,), (4, 6)])
def test_a_graphed_loop_ends_as_the_plain_one(between: Callable[..., None], sizes: tuple[int, ...]) -> None:
    said = list[str]()
    given = batches(12, *sizes)

    def graphed(step: Callable[..., Any], *held: Any) -> Any:
        return fxsplit.graphed(step, *held, notice=said.append)

    with determinism(0, deterministic=True):
        expected = loop(plain, copy.deepcopy(given), between, "cuda")
        found = loop(graphed, given, between, "cuda")
    assert all(map(torch.equal, expected, found))
    assert said == []


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "momentum"])
def test_fused_optimizers_can_be_recorded(name: str) -> None:
    def make(parameters: Any, capturable: bool) -> torch.optim.Optimizer:
        given = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
        return make_optimizer(nn.ParameterList(parameters), name=name, capturable=capturable, **given)

    assert why_not_replayed(make, CudaRecorder(CUDA), CUDA) is None


def test_a_failed_recording_leaves_the_gpu_as_it_was() -> None:
    recorder, x = CudaRecorder(CUDA), torch.ones(1000, device=CUDA)
    stream, random_state = torch.cuda.current_stream(), torch.cuda.get_rng_state()

    def function() -> None:
        y = torch.nn.functional.dropout(x * 2)
        y.sum().item()

    with pytest.raises(RuntimeError):
        recorder.record(function)
    assert torch.cuda.current_stream() == stream
    assert torch.equal(torch.cuda.get_rng_state(), random_state)
    function()
    assert not torch.equal(torch.cuda.get_rng_state(), random_state)
    recording = recorder.record(lambda: x + 1)
    recording.replay()
    assert torch.equal(recording.result, torch.full_like(x, 2))


def test_the_memory_of_a_recording_is_free_when_it_is_gone() -> None:
    recorder = CudaRecorder(CUDA)

    def function() -> torch.Tensor:
        return torch.ones(2**26, device=CUDA).cumsum(0).sum()

    function()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    recording = recorder.record(function)
    assert torch.cuda.memory_reserved() - before >= 2**28
    del recording
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == before


class Notices(fxsplit.Observer):
    def __init__(self) -> None:
        self.sentences: list[str] = []

    def notice(self, sentence: str) -> None:
        self.sentences.append(sentence)


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "standard", "opt": "sgd", "clip_grad": 0.5},
        {"preset": "l2l", "by": "op", "epochs": 8, "amp": True},
        {"schedule": "settle", "opt": "lamb", "weight_decay": 0.05, "exits": 1},
    ],
    ids=["standard", "l2l", "update eager"],
)
def test_a_run_with_cuda_graphs_ends_as_one_without(options: dict[str, Any], tmp_path: Path) -> None:
    """With learning rates that float32 holds exactly."""
    given = {
        "model": "paper:cnn", "data": "digits", "img_size": 16, "train_limit": 200, "batch_size": 32, "epochs": 4,
        "lr": 2.0**-7, "sched": "step", "decay_rate": 0.5, "decay_epochs": 1.0, "deterministic": True, "device": "cuda",
        "output": str(tmp_path), **options,
    }  # fmt: skip
    saved, notices = [], Notices()
    for graphs in ("on", "off"):
        report = fxsplit.train(fxsplit.RunSpec(cuda_graphs=graphs, **given), notices)
        saved.append(safetensors.torch.load_file(Path(report.folder) / "model.safetensors"))
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[1])
    eagerly = [each for each in notices.sentences if "eager" in each]
    assert len(eagerly) == (options.get("opt") == "lamb"), eagerly
