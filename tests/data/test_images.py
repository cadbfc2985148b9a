"""Batches: what is in them, in which order, and that nothing but the seed and the epoch decides it."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from fxsplit.data.augmentation.crops import crop_flip, windows
from fxsplit.data.batch import Batch, micro_batch_count, micro_batch_sizes
from fxsplit.data.files import FileImages
from fxsplit.data.images import Data, MemoryImages
from fxsplit.data.loader import Loader
from fxsplit.data.randomness import random_stream
from fxsplit.data.reading.decoding import decode
from fxsplit.data.reading.workers import _outlive_signals
from fxsplit.errors import DataError, UsageError

# Python 3.12 warns of every fork in a process with threads, and the loader forks its workers.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def noise(count: int = 11, size: int = 16) -> MemoryImages:
    generator = torch.Generator().manual_seed(count)
    return MemoryImages(
        pixels=torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator),
        labels=torch.randint(5, (count,), generator=generator),
        img_size=size,
    )


def same(left: Iterable[Batch], right: Iterable[Batch]) -> bool:
    pairs = list(zip(left, right, strict=True))
    assert pairs
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(parts(one), parts(other), strict=True))


def parts(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.images, batch.labels, batch.ids


def by_id(found: Iterable[Batch]) -> dict[int, Tensor]:
    return {int(index): image for batch in found for index, image in zip(batch.ids, batch.images, strict=True)}


@pytest.fixture
def files(tmp_path: Path) -> FileImages:
    """Seven lossless images, two of which have another size."""
    stream = np.random.default_rng(0)
    paths = []
    for index in range(7):
        shape = (12, 18, 3) if index % 4 == 3 else (16, 16, 3)
        paths.append(str(tmp_path / f"{index}.png"))
        Image.fromarray(stream.integers(256, size=shape, dtype=np.uint8)).save(paths[-1])
    return FileImages(paths=paths, labels=torch.arange(7) % 3, img_size=16, workers=0)


def with_workers(files: FileImages, workers: int) -> FileImages:
    return FileImages(paths=files.paths, labels=files.labels, img_size=files.img_size, workers=workers)


def test_a_plain_epoch_is_every_image_in_order_over_255() -> None:
    images = noise()
    found = list(Loader(images, batch_size=4).batches(0))
    assert [len(batch.labels) for batch in found] == [4, 4, 3]
    assert torch.equal(torch.cat([batch.ids for batch in found]), torch.arange(11))
    assert torch.equal(torch.cat([batch.labels for batch in found]), images.labels)
    assert torch.equal(torch.cat([batch.images for batch in found]), images.pixels.float() / 255)
    assert {batch.images.dtype for batch in found} == {torch.float32}
    assert {batch.ids.dtype for batch in found} == {batch.labels.dtype for batch in found} == {torch.int64}


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.25,)), ((0.1, 0.5, 0.9), (0.25, 1.0, 2.0))])
def test_mean_and_std_are_of_each_channel(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    images = noise()
    (batch,) = Loader(images, batch_size=11, mean=mean, std=std).batches(0)
    for channel in range(3):
        index = channel % len(mean)
        plain = images.pixels[:, channel].float() / 255
        assert torch.equal(batch.images[:, channel], (plain - mean[index]) / std[index])


@pytest.mark.parametrize("channels_last", [False, True])
def test_batches_are_those_worked_out_image_by_image(channels_last: bool) -> None:
    images, mean, std = noise(), np.float32([0.1, 0.5, 0.9]), np.float32([0.3, 0.7, 1.1])
    options: dict[str, Any] = {"augment": "crop-flip", "mean": mean.tolist(), "std": std.tolist()}
    loader = Loader(images, batch_size=4, training=True, seed=3, channels_last=channels_last, **options)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    order = random_stream("order", 3, 5).permutation(11)
    stream = random_stream("crop-flip", 3, 5)
    corners, flips = stream.integers(5, size=(11, 2)), stream.random(11) < 0.5
    found = list(loader.batches(5))
    assert torch.cat([batch.ids for batch in found]).tolist() == order.tolist()
    for batch in found:
        assert batch.images.is_contiguous(memory_format=layout)
        assert torch.equal(batch.labels, images.labels[batch.ids])
        for index, image in zip(batch.ids.tolist(), batch.images.numpy(), strict=True):
            top, left = corners[index]
            crop = np.pad(images.pixels[index].numpy(), ((0, 0), (2, 2), (2, 2)))[:, top : top + 16, left : left + 16]
            scaled = (crop[:, :, ::-1] if flips[index] else crop).astype(np.float32) / np.float32(255)
            assert np.array_equal(image, (scaled - mean[:, None, None]) / std[:, None, None])


def test_pixels_that_do_not_fit_on_the_device_are_brought_there(monkeypatch: pytest.MonkeyPatch) -> None:
    images, meta = noise(), torch.device("meta")
    size = images.pixels.nbytes
    for free, fits in ((4 * size, True), (4 * size - 1, False)):
        monkeypatch.setattr("fxsplit.data.images.free_bytes", lambda _device, free=free: free)
        moved = images.to(meta)
        assert moved.device == moved.labels.device == meta
        assert (moved.resident is not None) == fits
        assert moved.pixels.device.type == ("meta" if fits else "cpu")
        assert [batch.images.device.type for batch in Loader(moved, batch_size=4).batches(0)] == ["meta"] * 3


class OnHost(MemoryImages):
    """Pixels that do not lie where batches are made."""

    resident = None


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_images_from_the_host_are_those_on_the_device(augment: str) -> None:
    images = noise()
    host = OnHost(pixels=images.pixels, labels=images.labels, img_size=16)
    loaders = [Loader(each, batch_size=4, training=True, augment=augment) for each in (images, host)]
    for epoch in range(2):
        assert same(*(loader.batches(epoch) for loader in loaders))


def test_batches_leave_the_pixels_as_they_were() -> None:
    images = noise()
    before = images.pixels.clone()
    list(Loader(images, batch_size=4, augment="crop-flip", mean=(0.5,), std=(0.5,)).batches(0))
    assert torch.equal(images.pixels, before)


def test_seed_and_epoch_alone_decide_a_shuffled_augmented_epoch() -> None:
    images = noise()

    def epoch(seed: int, epoch: int) -> list[Batch]:
        return list(Loader(images, batch_size=4, training=True, seed=seed, augment="crop-flip").batches(epoch))

    first = epoch(3, 5)
    torch.manual_seed(99)
    assert same(first, epoch(3, 5))
    epochs = [epoch(*key) for key in ((3, 5), (5, 3), (3, 6), (4, 5))]
    orders = {tuple(torch.cat([batch.ids for batch in found]).tolist()) for found in epochs}
    assert len(orders) == 4
    assert all(sorted(order) == list(range(11)) for order in orders)
    assert not torch.equal(by_id(first)[0], by_id(epoch(3, 6))[0])
    for batch in first:
        assert torch.equal(batch.labels, images.labels[batch.ids])


@pytest.mark.parametrize("workers", [None, 0, 1])
def test_global_random_states_are_neither_used_nor_changed(files: FileImages, workers: int | None) -> None:
    images = noise() if workers is None else with_workers(files, workers)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    list(Loader(images, batch_size=4, training=True, augment="crop-flip").batches(0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


def test_a_sample_is_cropped_alike_in_any_batch() -> None:
    images = noise()
    large = by_id(Loader(images, batch_size=11, augment="crop-flip", seed=1).batches(2))
    small = by_id(Loader(images, batch_size=3, augment="crop-flip", seed=1, training=True).batches(2))
    assert large.keys() == small.keys() == set(range(11))
    assert all(torch.equal(large[index], small[index]) for index in large)


def test_every_sample_has_its_own_crop_and_flip() -> None:
    one = noise(1, size=32)
    images = MemoryImages(pixels=one.pixels.repeat(600, 1, 1, 1), labels=torch.zeros(600).long(), img_size=32)
    (batch,) = Loader(images, batch_size=600, augment="crop-flip").batches(0)
    padded = torch.nn.functional.pad(one.pixels[0], (4, 4, 4, 4)).float() / 255
    kinds = {
        (padded[:, top : top + 32, left : left + 32].flip(2) if flip else padded[:, top : top + 32, left : left + 32])
        .numpy()
        .tobytes(): (top, left, flip)
        for top in range(9)
        for left in range(9)
        for flip in (False, True)
    }
    drawn = [kinds[image.numpy().tobytes()] for image in batch.images]
    tops, lefts, flips = zip(*drawn, strict=True)
    assert set(tops) == set(lefts) == set(range(9))
    assert 240 < sum(flips) < 360
    assert len(set(drawn)) > 130  # of 162 kinds; 600 draws leave out 4 on average


def test_crop_flip_equals_a_loop_over_samples() -> None:
    pixels = noise(6, size=10).pixels[:, :, :, :7]
    corners = torch.tensor([[0, 0], [4, 4], [2, 2], [0, 4], [3, 1], [1, 0]])
    flips = torch.tensor([False, True, True, False, True, False])
    expected = []
    for image, (top, left), flip in zip(pixels, corners.tolist(), flips.tolist(), strict=True):
        canvas = torch.zeros(3, 14, 11, dtype=torch.uint8)
        canvas[:, 2:12, 2:9] = image
        crop = canvas[:, top : top + 10, left : left + 7]
        expected.append(crop.flip(-1) if flip else crop)
    assert torch.equal(crop_flip(pixels, windows(corners, flips, width=7), padding=2), torch.stack(expected))


def test_an_unknown_augmentation_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no augmentation 'cropflip'.*did you mean 'crop-flip'"):
        next(Loader(noise(), batch_size=4, augment="cropflip").batches(0))


@pytest.mark.parametrize(
    ("samples", "batch_size", "training", "limit", "expected"),
    [
        (8, 4, False, None, [4, 4]),
        (9, 4, False, None, [4, 4, 1]),
        (9, 4, True, None, [4, 4]),
        (10, 4, True, None, [4, 4, 2]),
        (3, 1, True, None, [1, 1, 1]),
        (3, 4, True, None, [3]),
        (1, 4, True, None, []),
        (10, 4, False, 2, [4, 4]),
        (10, 4, False, 3, [4, 4, 2]),
        (10, 4, False, 9, [4, 4, 2]),
    ],
)
def test_steps_tells_the_batches(
    samples: int, batch_size: int, training: bool, limit: int | None, expected: list[int]
) -> None:
    loader = Loader(noise(samples, 2), batch_size=batch_size, training=training, limit=limit)
    assert [len(batch) for batch in loader.batches(0)] == expected
    assert loader.steps_per_epoch == len(expected)
    assert len(loader.order(0)) == sum(expected)


def test_a_batch_is_divided_without_leaving_an_image_alone() -> None:
    for batch_size in range(1, 17):
        for parts in range(1, batch_size + 1):
            for samples in range(1, batch_size + 1):
                sizes = micro_batch_sizes(samples, parts, batch_size=batch_size)
                usual = [len(part) for part in torch.arange(samples).chunk(parts)]
                assert sum(sizes) == samples
                assert len(sizes) <= parts
                if batch_size == parts:
                    assert sizes == [1] * samples
                elif 1 not in usual or samples == 1:
                    assert sizes == usual
                else:
                    assert min(sizes) > 1
                    assert max(sizes) <= max(3, *usual)


def test_a_full_batch_is_divided_into_just_as_many_micro_batches_as_are_counted() -> None:
    assert [micro_batch_count(9, most) for most in range(1, 11)] == [1, 2, 3, 3, 3, 3, 3, 3, 9, 9]
    for samples in range(1, 33):
        for most in range(1, samples + 2):
            count = micro_batch_count(samples, most)
            sizes = micro_batch_sizes(samples, count, batch_size=samples)
            assert len(sizes) == count <= most
            assert max(sizes) == -(-samples // count)


def test_pixels_of_another_size_are_resized() -> None:
    flat = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
    ramp = torch.arange(0, 256, 32, dtype=torch.uint8).expand(1, 3, 8, 8)
    images = MemoryImages(pixels=torch.cat((flat, ramp)), labels=torch.zeros(6).long(), img_size=16)
    (batch,) = Loader(images, batch_size=6).batches(0)
    assert batch.images.shape == (6, 3, 16, 16)
    assert torch.equal(batch.images[:5] * 255, torch.arange(5.0)[:, None, None, None].expand(-1, 3, 16, 16))
    # Bilinear: between two pixels 32 apart lie a quarter and three quarters of the way.
    assert (batch.images[5, 0, 0, 1:5] * 255).round().tolist() == [8, 24, 40, 56]
    (batch,) = Loader(images, batch_size=6, interpolation="bicubic").batches(0)
    resized = v2.functional.resize(images.pixels, [16, 16], v2.InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(batch.images, resized / 255)


@pytest.mark.parametrize("workers", [0, 2])
def test_files_are_resized_as_they_are_asked_for(files: FileImages, workers: int) -> None:
    def opened(interpolation: str) -> FileImages:
        return FileImages(
            paths=files.paths, labels=files.labels, img_size=16, workers=workers, interpolation=interpolation
        )

    expected = torch.stack([decode(path, 16, "bicubic") for path in files.paths])
    assert not torch.equal(expected, files.in_memory().pixels)
    for images in (opened("bicubic"), opened("bicubic").to(torch.device("cpu"))):
        assert torch.equal(images.in_memory().pixels, expected)
        assert torch.equal(torch.cat(list(images.read(torch.arange(7), 4))), expected)
        assert torch.equal(images.subset(torch.tensor([3])).in_memory().pixels, expected[3:4])


def test_a_subset_has_ids_of_its_own(files: FileImages) -> None:
    chosen = torch.tensor([5, 0, 3])
    for images in (noise(), files):
        everything = by_id(Loader(images, batch_size=4).batches(0))
        (batch,) = Loader(images.subset(chosen), batch_size=4).batches(0)
        assert batch.ids.tolist() == [0, 1, 2]
        assert torch.equal(batch.labels, images.labels[chosen])
        assert torch.equal(batch.images, torch.stack([everything[index] for index in chosen.tolist()]))


def test_data_moves_as_a_whole(files: FileImages) -> None:
    data = Data(train=noise(), test=files, classes=("a", "b"), img_size=16).to(torch.device("meta"))
    assert data.train.device.type == data.test.device.type == "meta"
    assert (len(data.train), len(data.test)) == (11, 7)
    (batch,) = Loader(data.train, batch_size=11, training=True, augment="crop-flip", mean=(0.5,), std=(0.5,)).batches(0)
    assert {part.device.type for part in parts(batch)} == {"meta"}


# Of a machine with one core, torch says that two workers are too many.
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_files_give_the_batches_of_memory(files: FileImages, workers: int) -> None:
    streamed = with_workers(files, workers)
    memory = streamed.in_memory()
    for epoch in (0, 1):
        for augment in ("none", "crop-flip"):
            assert same(
                Loader(streamed, batch_size=4, training=True, seed=7, augment=augment).batches(epoch),
                Loader(memory, batch_size=4, training=True, seed=7, augment=augment).batches(epoch),
            )


def test_an_epoch_that_was_left_early_does_not_leak_into_the_next(files: FileImages) -> None:
    streamed = with_workers(files, 1)
    next(Loader(streamed, batch_size=2).batches(0))
    assert same(Loader(streamed, batch_size=2).batches(0), Loader(streamed.in_memory(), batch_size=2).batches(0))


def test_decoded_pixels_are_those_in_the_files(files: FileImages) -> None:
    assert len(files.paths) == 7
    pixels = files.in_memory().pixels
    for index in (0, 1, 2, 4, 5, 6):
        with Image.open(files.paths[index]) as image:
            assert np.array_equal(pixels[index].permute(1, 2, 0).numpy(), np.asarray(image))


def test_a_large_image_is_resized_by_its_short_side_and_cropped_in_the_middle(tmp_path: Path) -> None:
    wide = np.zeros((20, 60, 3), dtype=np.uint8)
    wide[:, 20:40] = (10, 200, 30)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    pixels = decode(tmp_path / "wide.png", 10)
    assert pixels.shape == (3, 10, 10)
    assert pixels[:, 5, 2:8].unique(dim=1).T.tolist() == [[10, 200, 30]]
    Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    assert torch.equal(decode(tmp_path / "tall.png", 10), pixels.transpose(1, 2))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_every_colour_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.tif"
    Image.new("RGB", (6, 6), (102, 102, 102)).convert(mode).save(path)
    pixels = decode(path, 6)
    assert torch.equal(pixels, torch.full((3, 6, 6), 102, dtype=torch.uint8))


def complaint(read: Callable[[], object]) -> str:
    """What a DataError says. Nothing may keep its traceback: workers freed by the garbage collector take 5 s to end."""
    try:
        read()
    except DataError as error:
        return str(error)
    pytest.fail("nothing was raised")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["text", "truncated", "gone"])
def test_a_broken_file_is_named_in_one_sentence(files: FileImages, workers: int, damage: str) -> None:
    broken = Path(files.paths[4])
    if damage == "gone":
        broken.unlink()
    else:
        broken.write_bytes(b"text" if damage == "text" else broken.read_bytes()[:300])
    streamed = with_workers(files, workers)
    for read in (lambda: list(Loader(streamed, batch_size=2).batches(0)), streamed.in_memory):
        sentence = complaint(read)
        assert str(broken) in sentence
        assert "\n" not in sentence


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_workers_outlive_signals_of_their_group(files: FileImages, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that they read for goes on with its step, and saves the run."""
    monkeypatch.setattr("fxsplit.data.reading.workers.GRACE_SECONDS", 600)
    streamed, order = with_workers(files, 1), torch.arange(7)
    expected = list(files.read(order, 2))
    others = multiprocessing.active_children()
    found = []
    for pixels in streamed.read(order, 2):
        if not found:
            (worker,) = (child for child in multiprocessing.active_children() if child not in others)
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGINT)
            os.kill(worker.pid, signal.SIGTERM)
        found.append(pixels)
    assert all(map(torch.equal, found, expected))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_worker_is_gone_a_while_after_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxsplit.data.reading.workers.GRACE_SECONDS", 1)
    here, there = multiprocessing.Pipe()

    def work() -> None:
        _outlive_signals(0)
        there.send("ready")
        time.sleep(600)

    worker = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    worker.start()
    assert here.recv() == "ready"
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(300)
    assert worker.exitcode == -signal.SIGALRM
