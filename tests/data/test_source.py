"""Where a step gets its batch from: a recorded fetch delivers each batch, from tensors that stay where they are."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch import Tensor

from fxsplit.data.batch import Batch
from fxsplit.data.images import MemoryImages
from fxsplit.data.loader import ImageSource, Loader
from tests.cuda.simulated import SimulatedRecorder, Tape


def equal(one: Batch, other: Batch) -> bool:
    pairs = [*zip(one.values, other.values, strict=True), (one.labels, other.labels), (one.ids, other.ids)]
    return all(a is b is None or (torch.equal(a, b) and a.stride() == b.stride()) for a, b in pairs)


def tensors(batch: Batch) -> list[Tensor]:
    return [*batch.values, batch.labels, batch.ids]


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("img_size", [16, 12])
def test_a_recorded_fetch_delivers_each_batch_of_each_epoch(augment: str, channels_last: bool, img_size: int) -> None:
    pixels = torch.randint(256, (11, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = MemoryImages(pixels=pixels, labels=torch.arange(11) % 5, img_size=img_size)
    loader = Loader(
        images, batch_size=4, training=True, augment=augment, channels_last=channels_last, mean=(0.4,), std=(0.2,)
    )
    source = ImageSource(loader)
    tape: Tape[list[Tensor]] | None = None
    for epoch in range(3):
        for expected, key in zip(loader.batches(epoch), source.put(epoch), strict=True):
            assert (key is None) == (len(expected) < 4)
            assert equal(source.fetch(), expected)
            if key is not None:
                tape = tape or SimulatedRecorder().record(lambda: tensors(source.fetch()))
                tape.replay()
                assert all(map(torch.equal, tape.result, tensors(expected)))


def test_an_epoch_goes_on_where_it_was_left() -> None:
    """Batches that are put and not fetched are passed over."""
    images = MemoryImages(pixels=torch.zeros(11, 3, 4, 4, dtype=torch.uint8), labels=torch.arange(11), img_size=4)
    loader = Loader(images, batch_size=4, training=True)
    source = ImageSource(loader)
    rest = [source.fetch().ids.tolist() for _ in islice(source.put(1), 1, None)]
    assert rest == [batch.ids.tolist() for batch in loader.batches(1)][1:]
