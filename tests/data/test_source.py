"""Where a step gets its batch from: a recorded fetch delivers each batch, from tensors that stay where they are."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from torch import Tensor

from fxsplit.data.batch import Batch
from fxsplit.data.images import MemoryImages
from fxsplit.data.loader import ImageSource, Loader
from fxsplit.data.reading.workers import ReaderChange
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


class Watched(MemoryImages):
    """Images that are not resident, and tell which of them are read."""

    @property
    def resident(self) -> None:
        return None

    def read(
        self,
        order: Tensor,
        batch_size: int,
        change: ReaderChange | None = None,  # noqa: ARG002 - as images have it
    ) -> Iterator[Tensor]:
        for ids in torch.split(order, batch_size):
            self.labels.seen.extend(ids.tolist())  # type: ignore[attr-defined]
            yield self.pixels[ids]


@pytest.mark.parametrize("kind", [MemoryImages, Watched])
@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_an_epoch_goes_on_where_it_was_left(kind: type[MemoryImages], first: int) -> None:
    """Batches that are left out are not read; those that are put and not fetched are passed over."""
    pixels = torch.arange(11, dtype=torch.uint8)[:, None, None, None].expand(11, 3, 4, 4).contiguous()
    images = kind(pixels=pixels, labels=torch.arange(11), img_size=4)
    images.labels.seen = []  # type: ignore[attr-defined]
    loader = Loader(images, batch_size=4, training=True, augment="crop-flip")
    expected = list(loader.batches(1))
    images.labels.seen.clear()  # type: ignore[attr-defined]
    source = ImageSource(loader)
    rest = [source.fetch() for _ in source.put(1, first)]
    assert len(rest) == 3 - first
    assert all(map(equal, rest, expected[first:]))
    if kind is Watched:
        assert (
            images.labels.seen
            == [  # type: ignore[attr-defined]
                index for batch in expected[first:] for index in batch.ids.tolist()
            ]
        )
    left = [source.fetch() for _ in islice(source.put(1), first, None)]
    assert all(map(equal, left, expected[first:]))
