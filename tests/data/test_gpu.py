"""Batches on a pretended GPU: made there, without reading anything back."""

from __future__ import annotations

import pytest
import torch

from fxsplit.data.images import MemoryImages
from fxsplit.data.loader import ImageSource, Loader
from tests.gpu import pretended


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("augment", ["none", "crop-flip"])
@pytest.mark.parametrize("img_size", [16, 12])
@pytest.mark.parametrize("channels_last", [False, True])
def test_batches_are_made_on_the_gpu(
    fits: bool, augment: str, img_size: int, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = torch.zeros(11, 3, 16, 16, dtype=torch.uint8)
    with pretended(monkeypatch, free_bytes=4 * pixels.nbytes - (not fits)) as gpu:
        images = MemoryImages(pixels=pixels, labels=torch.zeros(11).long(), img_size=img_size).to(gpu)
        assert images.device == gpu
        assert images.pixels.device.type == ("cuda" if fits else "cpu")
        options = {"augment": augment, "channels_last": channels_last, "mean": (0.5,), "std": (0.5,)}
        source = ImageSource(Loader(images, batch_size=4, training=True, **options))
        for _epoch in range(2):
            keys = []
            for key in source.put(0):
                keys.append(key)
                batch = source.fetch()
                size = 4 if len(keys) < 3 else 3
                assert batch.images.device == batch.labels.device == batch.ids.device == gpu
                assert batch.images.shape == (size, 3, img_size, img_size)
                assert batch.images.dtype is torch.float32
                layout = torch.channels_last if channels_last else torch.contiguous_format
                assert batch.images.is_contiguous(memory_format=layout)
            assert keys == [source, source, None]
