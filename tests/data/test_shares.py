"""Several processes take every image of an epoch once, whatever the sizes."""

from __future__ import annotations

import pytest
import torch

from fxsplit.data.images import MemoryImages
from fxsplit.data.loader import Loader
from fxsplit.data.shares import Share, sizes

# (images, batch size, processes)
CASES = (
    (67, 16, 2), (64, 16, 4), (65, 16, 4), (10, 16, 2), (7, 3, 1), (33, 8, 4), (23, 6, 3), (22, 5, 2), (40, 6, 4),
    (9, 4, 4), (17, 4, 2), (101, 7, 3),
)  # fmt: skip


def loaders(images: int, batch_size: int, ranks: int, *, training: bool = True, **options: int) -> list[Loader]:
    labels = torch.arange(images)
    of = MemoryImages(pixels=torch.zeros(images, 1, 1, 1, dtype=torch.uint8), labels=labels, img_size=1)
    return [
        Loader(of, batch_size=batch_size, training=training, share=Share(rank, ranks), **options)
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("images", "batch_size", "ranks"), CASES)
def test_each_image_counts_once(images: int, batch_size: int, ranks: int, training: bool, shards: bool) -> None:
    every = loaders(images, batch_size, ranks, training=training)
    (alone,) = loaders(images, batch_size, 1, training=training)
    steps = alone.steps_per_epoch
    assert {loader.steps_per_epoch for loader in every} == {steps}
    for epoch in (0, 1):
        order = alone.order(epoch, shards=ranks if shards else 1)
        parts = [loader.order(epoch, shards=ranks if shards else 1).split(loader.own_batch_size) for loader in every]
        assert {len(each) for each in parts} == {steps}
        taken = []
        for step in range(steps):
            weights = [loader.weight(step) for loader in every]
            counted = [part[step] for part, weight in zip(parts, weights, strict=True) if weight]
            size = sum(map(len, counted))
            assert weights == [
                ranks * len(part[step]) / size if weight else 0 for part, weight in zip(parts, weights, strict=True)
            ]
            assert sum(weights) == pytest.approx(ranks)
            if training and batch_size >= 2 * ranks:
                assert min(len(part[step]) for part in parts) > 1
            taken.append(torch.cat(counted))
            # The same batches as in one process, but for one image where a third would stand alone with two.
            assert set(taken[-1].tolist()) <= set(order.split(batch_size)[step].tolist())
        whole = torch.cat(taken).tolist()
        no_room = training and batch_size == 2 * ranks > 2
        left_out = (len(order) % batch_size % 2) * no_room
        assert len(whole) == len(set(whole)) == len(order) - left_out


@pytest.mark.parametrize(("images", "batch_size", "ranks"), CASES)
def test_images_belong_to_one_process_for_good(images: int, batch_size: int, ranks: int) -> None:
    every = loaders(images, batch_size, ranks)
    own = [set(loader.own().tolist()) for loader in every]
    assert sorted(image for each in own for image in each) == list(range(images))
    orders = [[loader.order(epoch, shards=ranks) for epoch in (0, 1)] for loader in every]
    if images >= 2 * ranks:
        for mine, (first, second) in zip(own, orders, strict=True):
            assert set(first.tolist()) | set(second.tolist()) <= mine
    assert images < 20 or ranks == 1 or not torch.equal(*orders[0])
    kept = [loader.own() for loader in loaders(images, batch_size, ranks, training=False)]
    assert sorted(set(torch.cat(kept).tolist())) == list(range(images))


def test_parts_are_as_equal_as_can_be() -> None:
    assert sizes(8, 3) == [3, 3, 2]
    assert sizes(5, 3, least=2) == [3, 2, 0]
    assert sizes(1, 2, least=2) == [1, 0]
    assert sizes(3, 4) == [1, 1, 1, 0]
