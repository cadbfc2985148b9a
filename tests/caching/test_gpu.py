"""Caches on a pretended GPU: rows are written and read there, or brought there, without reading anything back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fxsplit.caching.cache import CachePolicy
from fxsplit.data.images import MemoryImages
from fxsplit.data.loader import ImageSource, Loader
from fxsplit.execute.forward import Forward
from tests.gpu import pretended


def settle(images: Tensor) -> list[Any]:
    """Values in several types and layouts, and one that is not there."""
    first = images.to(torch.bfloat16, memory_format=torch.channels_last)
    return [first, None, images.sum((2, 3)) > 0, images.mean((1, 2, 3))]


FORWARD = SimpleNamespace(
    amp_dtype=torch.bfloat16,
    executor=SimpleNamespace(window=(2, 4), settled_dtype=None, settled_state=lambda _stop: {}, training=True),
    settle=lambda batch, _stop: settle(batch.images),
)


@pytest.mark.parametrize(
    ("medium", "views"), [("device", None), ("device", 2), ("ram", None), ("ram", 2), ("auto", None)]
)
def test_rows_go_to_and_fro(medium: str, views: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    # Comparing would read numbers.
    monkeypatch.setattr("fxsplit.caching.cache.repeats", lambda run, images, *_, **__: bool(run(list(images))))
    monkeypatch.setattr("fxsplit.caching.cache.reading_seconds", lambda *_, **__: 0.0)
    pixels, labels = torch.zeros(11, 3, 8, 8, dtype=torch.uint8), torch.zeros(11).long()
    with pretended(monkeypatch) as gpu:
        images = MemoryImages(pixels=pixels, labels=labels, img_size=8).to(gpu)
        loader = Loader(images, batch_size=4, training=True, augment="crop-flip" if views else "none", views=views)
        policy = CachePolicy(medium=medium)
        cache = policy.open(cast(Forward, FORWARD), ImageSource(loader), epochs=9, notice=pytest.fail)
        for epoch in range(4):
            # This alone is read back, between epochs.
            filled = torch.arange(11 * (views or 1)) < 11 * epoch
            monkeypatch.setattr(cache, "_filled_now", lambda filled=filled: filled)
            keys = []
            for key in cache.put(epoch):
                keys.append(key)
                batch = cache.fetch()
                wanted = settle(torch.zeros(len(batch), 3, 8, 8, device=gpu))
                for value, like in zip(batch.values, wanted, strict=True):
                    assert (value is None) == (like is None)
                    if value is not None:
                        assert (value.device, value.dtype, value.shape) == (gpu, like.dtype, like.shape)
                        assert value.stride() == like.stride()
                assert batch.labels.device == batch.ids.device == gpu
                assert batch.labels.dtype is batch.ids.dtype is torch.int64
            is_filling, is_eager = epoch < (views or 1), medium == "ram"
            assert [key is not None for key in keys] == [
                not (is_filling and (is_eager or not epoch)),
                not (is_filling and is_eager),
                False,
            ]
        assert cache.medium == ("ram" if medium == "ram" else "device")
        assert cache.resident_bytes == 11 * (views or 1) * (3 * 8 * 8 * 2 + 3 + 4)
