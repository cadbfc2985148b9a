"""Where a step gets its batch from: static tensors for full batches, the batch itself for others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fxsplit.data.batch import Batch
from fxsplit.data.images import MemoryImages
from fxsplit.data.loader import ImageSource, Loader
from fxsplit.data.source import PlainSource, StaticSource


def batches(epoch: int) -> Iterator[Batch]:
    """Three full batches and a smaller one, whose ids are views of one tensor, as those of a loader."""
    order = torch.arange(14) + 100 * epoch
    for ids in torch.split(order, 4):
        pixels = ids.float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous(memory_format=torch.channels_last)
        yield Batch(values=(pixels, None), labels=ids % 5, ids=ids)


def equal(one: Batch, other: Batch) -> bool:
    pairs = [*zip(one.values, other.values, strict=True), (one.labels, other.labels), (one.ids, other.ids)]
    return all(a is b is None or (torch.equal(a, b) and a.stride() == b.stride()) for a, b in pairs)


def test_a_static_source_delivers_the_same_batches_and_full_ones_from_one_place() -> None:
    static, plain = StaticSource(batches, batch_size=4), PlainSource(batches)
    keys, places = [], []
    for epoch in range(2):
        expected = list(batches(epoch))
        for batch, key, none in zip(expected, static.put(epoch), plain.put(epoch), strict=True):
            assert none is None
            assert equal(static.fetch(), batch)
            assert equal(plain.fetch(), batch)
            keys.append(key)
            places.append(static.fetch().values[0].data_ptr())
    full = [0, 1, 2, 4, 5, 6]
    assert len({keys[index] for index in full}) == 1
    assert len({places[index] for index in full}) == 1
    assert [index for index, key in enumerate(keys) if key is None] == [3, 7]


def test_another_layout_gets_a_key_and_memory_of_its_own() -> None:
    def changing(epoch: int) -> Iterator[Batch]:
        for batch in batches(epoch):
            yield batch
            yield Batch(values=(batch.values[0].contiguous(), None), cut=1, labels=batch.labels, ids=batch.ids)

    source = StaticSource(changing, batch_size=4)
    kept = [(key, source.fetch(), source.fetch().map(torch.clone)) for key in source.put(0) if key is not None]
    assert len({key for key, _, _ in kept}) == len(kept) == 6
    # Memory of a former key is not written into: a recording that still has it stays right.
    assert all(equal(static, then) for _, static, then in kept)


def recorded(source: ImageSource) -> Callable[[], list[Tensor]]:
    """Record the ops of `fetch`, to run them again on the memory that they read then, as a CUDA graph does."""

    def fetch() -> list[Tensor]:
        batch = source.fetch()
        return [*batch.values, batch.labels, batch.ids]

    return make_fx(fetch)()


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
    replay = None
    for epoch in range(3):
        for expected, key in zip(loader.batches(epoch), source.put(epoch), strict=True):
            assert (key is None) == (len(expected) < 4)
            replay = replay or recorded(source)
            values = [*expected.values, expected.labels, expected.ids]
            assert equal(source.fetch(), expected)
            if key is not None:
                assert all(map(torch.equal, replay(), values))


def test_an_epoch_goes_on_where_it_was_left() -> None:
    """Batches that are put and not fetched are passed over."""
    images = MemoryImages(pixels=torch.zeros(11, 3, 4, 4, dtype=torch.uint8), labels=torch.arange(11), img_size=4)
    loader = Loader(images, batch_size=4, training=True)
    source = ImageSource(loader)
    rest = [source.fetch().ids.tolist() for _ in islice(source.put(1), 1, None)]
    assert rest == [batch.ids.tolist() for batch in loader.batches(1)][1:]
