"""The same on a GPU, where there is one: batches are those of a CPU bit for bit, also when they are replayed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fxsplit.cuda.recorder import CudaRecorder, Recording
from fxsplit.data.batch import Batch
from fxsplit.data.files import FileImages
from fxsplit.data.images import ImageSet, MemoryImages
from fxsplit.data.loader import ImageSource, Loader

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

CUDA = torch.device("cuda", 0)
Pair = tuple[ImageSet, ImageSet]


@pytest.fixture(params=["on the GPU", "on the host", "files"])
def images(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[ImageSet, ImageSet]:
    """Images for a CPU, and for the GPU."""
    stream = np.random.default_rng(0)
    pixels, labels = stream.integers(256, size=(70, 3, 64, 64), dtype=np.uint8), torch.arange(70) % 5
    if request.param == "files":
        paths = [str(tmp_path / f"{index}.png") for index in range(70)]
        for path, image in zip(paths, pixels, strict=True):
            Image.fromarray(image.transpose(1, 2, 0)).save(path)
        files = FileImages(paths=paths, labels=labels, img_size=64, workers=2)
        return files, files.to(CUDA)
    if request.param == "on the host":
        monkeypatch.setattr("fxsplit.data.images.free_bytes", lambda _device: 0)
    memory = MemoryImages(pixels=torch.from_numpy(pixels), labels=labels, img_size=64)
    moved = memory.to(CUDA)
    assert (moved.resident is None) == (request.param == "on the host")
    return memory, moved


def tensors(batch: Batch) -> list[Tensor]:
    return [*batch.values, batch.labels, batch.ids]


def busy() -> Iterator[None]:
    """Between batches, work for a while, so that a copy that does not wait for its turn comes too early."""
    work = torch.randn(4096, 4096, device=CUDA)
    while True:
        for _ in range(10):
            work = (work @ work).clamp(-1, 1)
        yield


@pytest.mark.parametrize("replayed", [False, True], ids=["eager", "replayed"])
@pytest.mark.parametrize(
    "options",
    [{}, {"augment": "crop-flip", "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.7)}, {"channels_last": True}],
)
def test_batches_are_those_of_a_cpu(images: Pair, options: dict[str, Any], replayed: bool) -> None:
    cpu, gpu = (Loader(each, batch_size=8, training=True, seed=3, **options) for each in images)
    source = ImageSource(gpu)
    recording: Recording[list[Tensor]] | None = None
    for epoch in range(3):
        found = []
        for key, _ in zip(source.put(epoch), busy(), strict=False):
            if key is None or not replayed:
                batch = tensors(source.fetch())
            else:
                if recording is None:
                    recorder = CudaRecorder(CUDA)
                    recorder.warm_up(source.fetch)
                    recording = recorder.record(lambda: tensors(source.fetch()))
                recording.replay()
                batch = recording.result
            found.append([tensor.clone() for tensor in batch])
        for batch, expected in zip(found, cpu.batches(epoch), strict=True):
            for tensor, other in zip(batch, tensors(expected), strict=True):
                assert tensor.device == CUDA
                assert tensor.stride() == other.stride()
                assert torch.equal(tensor.cpu(), other)
