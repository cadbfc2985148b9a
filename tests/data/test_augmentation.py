"""Changes at random: those of torchvision and timm, by numbers that depend on the image and the epoch alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.mixup import Mixup, rand_bbox
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode, v2

from fxsplit.data.augmentation import erasing, mixing, resized_crop
from fxsplit.data.augmentation.changes import Changes
from fxsplit.data.augmentation.each_image import policy, seeded
from fxsplit.data.batch import Batch
from fxsplit.data.files import FileImages
from fxsplit.data.images import Data, ImageSet, MemoryImages
from fxsplit.data.loader import ImageSource, Loader
from fxsplit.data.randomness import random_stream
from fxsplit.errors import UsageError
from tests.cuda.simulated import SimulatedRecorder, Tape

# Python 3.12 warns of every fork in a process with threads, and the loader forks its workers.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

SIZE, COUNT = 16, 11
EVERYTHING: dict[str, Any] = {
    "augment": "resized-crop",
    "changes": Changes(interpolation="random", aa="rand-m9-mstd0.5-inc1", reprob=0.5, mixup=0.2, cutmix=1.0),
    "classes": 5,
    "mean": (0.4,),
    "std": (0.2,),
}
KINDS: dict[str, dict[str, Any]] = {
    "resized-crop": {"augment": "resized-crop", "changes": Changes(interpolation="random")},
    "flip-alternate": {"augment": "flip-alternate"},
    "hflip": {"changes": Changes(hflip=0.3)},
    "aa": {"augment": "crop-flip", "changes": Changes(aa="rand-m9-mstd0.5-inc1")},
    "trivial": {"changes": Changes(aa="trivial")},
    "augmix": {"augment": "crop-flip", "changes": Changes(aa="augmix-m5-w2")},
    "color-jitter": {"augment": "crop-flip", "changes": Changes(color_jitter=0.4)},
    "reprob": {"changes": Changes(reprob=0.5)},
    "mixup": {"changes": Changes(mixup=0.2), "classes": 5},
    "cutmix": {"changes": Changes(cutmix=1.0), "classes": 5},
    "everything": EVERYTHING,
}


def pixels(count: int = COUNT, height: int = SIZE, width: int = SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def memory(workers: int = 0, stored: int = SIZE) -> MemoryImages:
    return MemoryImages(
        pixels=pixels(height=stored, width=stored), labels=torch.arange(COUNT) % 5, img_size=SIZE, workers=workers
    )


@pytest.fixture
def folder(tmp_path: Path) -> list[str]:
    """Lossless images of different shapes."""
    paths = []
    for index in range(COUNT):
        image = v2.functional.to_pil_image(pixels(1, 20 + index, 33 - index)[0])
        paths.append(str(tmp_path / f"{index}.png"))
        image.save(paths[-1])
    return paths


def files(paths: list[str], workers: int = 0) -> FileImages:
    return FileImages(paths=paths, labels=torch.arange(COUNT) % 5, img_size=SIZE, workers=workers)


def parts(batch: Batch) -> list[Tensor]:
    return [batch.images, batch.labels, batch.ids, *([] if batch.soft_labels is None else [batch.soft_labels])]


def same(one: Batch, other: Batch) -> bool:
    return all(map(torch.equal, parts(one), parts(other)))


def test_which_images_change() -> None:
    plain = [batch.images for batch in Loader(memory(), batch_size=4).batches(0)]
    for kind, options in KINDS.items():
        if kind == "everything":
            continue
        first = [batch.images for batch in Loader(memory(), batch_size=4, seed=1, **options).batches(0)]
        second = [batch.images for batch in Loader(memory(), batch_size=4, seed=1, **options).batches(1)]
        assert not all(map(torch.equal, first, plain)), kind
        assert not all(map(torch.equal, first, second)), kind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["memory", "files"])
def test_workers_and_a_beginning_in_the_midst_change_nothing(kind: str, place: str, folder: list[str]) -> None:
    def batches(workers: int, epoch: int, first: int = 0) -> list[Batch]:
        images: ImageSet = memory(workers) if place == "memory" else files(folder, workers)
        source = ImageSource(Loader(images, batch_size=4, training=True, seed=3, **KINDS[kind]))
        return [source.fetch() for _ in source.put(epoch, first)]

    state = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    expected = {epoch: batches(0, epoch) for epoch in (0, 5)}
    for workers in (0, 1, 2):
        for epoch, whole in expected.items():
            assert all(map(same, batches(workers, epoch), whole))
        assert all(map(same, batches(workers, 5, 1), expected[5][1:]))
        assert len(whole) == 3
    assert random.getstate() == state[0]
    assert str(np.random.get_state()) == state[1]
    assert torch.equal(torch.get_rng_state(), state[2])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("mixup", "cutmix", "everything")])
@pytest.mark.parametrize("place", ["memory", "files"])
def test_an_image_changes_alike_in_any_company(kind: str, place: str, folder: list[str]) -> None:
    images: ImageSet = memory() if place == "memory" else files(folder)

    def by_id(batch_size: int, training: bool) -> dict[int, Tensor]:
        loader = Loader(images, batch_size=batch_size, training=training, seed=1, **KINDS[kind])
        return {
            int(index): image
            for batch in loader.batches(2)
            for index, image in zip(batch.ids, batch.images, strict=True)
        }

    large, small = by_id(11, training=False), by_id(3, training=True)
    assert len(small) == COUNT
    for index, image in small.items():
        torch.testing.assert_close(image, large[index], rtol=0, atol=1e-6)


@pytest.mark.parametrize("stored", [SIZE, 40])
def test_a_recorded_fetch_delivers_each_batch_of_each_epoch(stored: int) -> None:
    options = {**EVERYTHING, "changes": Changes(interpolation="random", reprob=0.5, mixup=0.2, cutmix=1.0)}
    loader = Loader(memory(stored=stored), batch_size=4, training=True, **options)
    source = ImageSource(loader)
    tape: Tape[list[Tensor]] | None = None
    for epoch in range(3):
        for expected, key in zip(loader.batches(epoch), source.put(epoch), strict=True):
            assert (key is None) == (len(expected) < 4)
            if key is not None:
                tape = tape or SimulatedRecorder().record(lambda: parts(source.fetch()))
                tape.replay()
                assert all(map(torch.equal, tape.result, parts(expected)))


# What torchvision and timm do by the same numbers


class Numbers:
    """Stands for Python's `random`, with given numbers in [0, 1)."""

    def __init__(self, numbers: Iterator[float]) -> None:
        self._numbers = numbers
        self.places = 0

    def random(self) -> float:
        return next(self._numbers)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._numbers)

    def randint(self, low: int, high: int) -> int:
        self.places += 1
        return low + int(next(self._numbers) * (high - low + 1))


def attempts(row: np.ndarray[Any, Any], run: Callable[[Numbers], Any]) -> tuple[Any, int]:
    """Return what timm makes of a row of numbers, and how many attempts it takes.

    A row has the areas and shapes of ten attempts, and the place of the box. timm draws a place only when it has found
    a size, so the numbers of its draws depend on when that is.
    """
    for count in (*range(1, 11), 0):
        used = [number for attempt in range(count or 10) for number in (row[attempt], row[10 + attempt])]
        left = iter([*used, *row[-2:]] if count else used)
        given = Numbers(left)
        try:
            found = run(given)
        except StopIteration:
            continue
        if next(left, None) is None and given.places == (2 if count else 0):
            return found, count
    raise AssertionError


@pytest.mark.parametrize("sides", [(32, 32), (20, 33), (90, 14), (7, 90)])
def test_boxes_are_those_of_timm(sides: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    numbers = np.random.default_rng(0).random((300, 22), dtype=np.float32).astype(np.float64)
    image = torch.empty(3, *sides)

    def timm(given: Numbers) -> tuple[int, ...]:
        monkeypatch.setattr("timm.data.transforms.random", given)
        return tuple(RandomResizedCropAndInterpolation.get_params(image, scale, ratio))

    found = resized_crop.boxes(numbers, *sides, scale=scale, ratio=ratio)
    whole = 0
    for row, box in zip(numbers, found.tolist(), strict=True):
        expected, count = attempts(row, timm)
        assert tuple(box) == expected
        whole += count == 0
    assert (whole > 0) == (max(sides) > 5 * min(sides))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("sides", [(32, 32), (9, 50)])
def test_crops_of_a_batch_are_those_of_torchvision(interpolation: str, sides: tuple[int, int]) -> None:
    given = pixels(40, *sides)
    numbers = np.random.default_rng(1).random((40, 22))
    boxes = torch.from_numpy(resized_crop.boxes(numbers, *sides, scale=(0.08, 1.0), ratio=(0.75, 4 / 3)))
    flips = torch.arange(40)[:, None] % 2
    placed = torch.cat((boxes, flips, torch.full((40, 1), int(interpolation == "bicubic"))), dim=1)
    cropping = resized_crop.ResizedCrop(scale=(0.08, 1.0), ratio=(0.75, 4 / 3), chance=0.5, interpolation=interpolation)
    found = cropping.change(given, placed, size=SIZE)
    for image, box, flip, crop in zip(given, boxes.tolist(), flips, found, strict=True):
        mode = InterpolationMode(interpolation)
        expected = v2.functional.resized_crop(image.float(), *box, [SIZE, SIZE], mode, antialias=True).clamp(0, 255)
        expected = expected.flip(2) if flip else expected
        torch.testing.assert_close(crop, expected, rtol=0, atol=2e-3)


def test_crops_of_files_are_those_of_torchvision(folder: list[str]) -> None:
    images = files(folder)
    loader = Loader(images, batch_size=4, seed=5, augment="resized-crop", changes=Changes(interpolation="random"))
    cropping = resized_crop.ResizedCrop(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), chance=0.5, interpolation="random")
    numbers, marks = cropping.draw(images, random_stream("resized-crop", 5, 2))
    assert 0 < marks[:, 0].sum() < COUNT
    assert 0 < marks[:, 1].sum() < COUNT
    for batch in loader.batches(2):
        for index, found in zip(batch.ids.tolist(), batch.images, strict=True):
            with Image.open(folder[index]) as image:
                box = resized_crop.boxes(
                    numbers[index : index + 1].numpy(),
                    image.height,
                    image.width,
                    scale=(0.08, 1.0),
                    ratio=(3 / 4, 4 / 3),
                )
                mode = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)[int(marks[index, 1])]
                crop = v2.functional.resized_crop(image, *box[0].tolist(), [SIZE, SIZE], mode)
            expected = v2.functional.pil_to_tensor(crop) / torch.tensor(255.0)
            assert torch.equal(found, expected.flip(2) if marks[index, 0] else expected)


def test_what_is_erased_is_what_timm_erases(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.random.default_rng(2).random((300, 22))
    boxes = torch.from_numpy(erasing.boxes(numbers, SIZE))
    images = torch.randn(300, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    found = erasing.erase(images.clone(), F.pad(boxes, (0, 1)), torch.zeros(2 * 3 * SIZE**2))
    theirs = RandomErasing(probability=1.0, mode="const", device="cpu")
    for row, image, erased in zip(numbers, images, found, strict=True):

        def timm(given: Numbers, image: Tensor = image) -> Tensor:
            monkeypatch.setattr(given, "random", lambda: 0.0)
            monkeypatch.setattr("timm.data.random_erasing.random", given)
            result: Tensor = theirs(image.clone())
            return result

        assert torch.equal(erased, attempts(row, timm)[0])


def test_noise_is_another_one_for_each_image() -> None:
    loader = Loader(memory(), batch_size=COUNT, changes=Changes(reprob=1.0), mean=(0.5,), std=(0.25,))
    plain = Loader(memory(), batch_size=COUNT, mean=(0.5,), std=(0.25,))
    (batch,), (given,) = loader.batches(0), plain.batches(0)
    noise = batch.images[batch.images != given.images]
    assert 0.02 < noise.numel() / batch.images.numel() < 0.34
    assert abs(float(noise.mean())) < 0.1
    assert abs(float(noise.std()) - 1) < 0.1
    assert noise.unique().numel() > 0.4 * noise.numel()


@pytest.mark.parametrize("use_cutmix", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.37, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixes_and_their_loss_are_those_of_timm(
    use_cutmix: bool, share: float, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(6, 3, SIZE, SIZE, generator=generator), torch.arange(6) % 5
    timm = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, label_smoothing=smoothing, num_classes=5)
    monkeypatch.setattr(timm, "_params_per_batch", lambda: (share, use_cutmix))
    monkeypatch.setattr(np.random, "randint", lambda *_, **__: 3)
    mixed, target = timm(images.clone(), labels)
    box = mixing.box_around(3, 3, size=SIZE, share=share) if use_cutmix else (0, 0, 0, 0)
    if use_cutmix:
        top, bottom, left, right = rand_bbox(images.shape, share)
        assert box == (top, bottom, left, right)
        share = 1 - (bottom - top) * (right - left) / SIZE**2
    ours, soft = mixing.mix(images, labels, torch.tensor([share], dtype=torch.float32), torch.tensor([box]), classes=5)
    torch.testing.assert_close(ours, mixed)
    logits = torch.randn(6, 5, generator=generator)
    torch.testing.assert_close(
        F.cross_entropy(logits, soft, label_smoothing=smoothing), SoftTargetCrossEntropy()(logits, target)
    )


def test_how_batches_are_mixed() -> None:
    stream = np.random.default_rng(0)
    shares, boxes = mixing.draw_mixes(4000, SIZE, Changes(mixup=0.2, cutmix=1.0), stream)
    is_cut = boxes[:, 1] > 0
    assert abs(float(is_cut.float().mean()) - 0.5) < 0.05
    # Of the beta distribution with both parameters 0.2, a third lies within 0.1 of either end.
    assert abs(float((shares[~is_cut] < 0.1).float().mean()) - 0.33) < 0.05
    area = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
    torch.testing.assert_close(shares[is_cut], 1 - area[is_cut] / SIZE**2)


def test_labels_of_mixed_images_are_those_of_the_larger_share() -> None:
    for kind in ("mixup", "cutmix"):
        for batch in Loader(memory(), batch_size=4, training=True, **KINDS[kind]).batches(1):
            assert batch.soft_labels is not None
            assert batch.targets is batch.soft_labels
            assert torch.equal(batch.soft_labels.argmax(1), batch.labels)
            torch.testing.assert_close(batch.soft_labels.sum(1), torch.ones(len(batch)))
            halves = list(batch.divided(2, batch_size=4))
            soft = [half.soft_labels for half in halves if half.soft_labels is not None]
            assert torch.equal(torch.cat(soft), batch.soft_labels)


@pytest.mark.parametrize("name", ["rand-m9-mstd0.5-inc1", "original", "v0-mstd0.5", "augmix-m5-w2"])
def test_policies_are_those_of_timm(name: str) -> None:
    """As timm's own transforms have them, of the same seeds."""
    mean = (0.485, 0.456, 0.406)
    timm = create_transform(64, is_training=True, auto_augment=name, mean=mean, interpolation="random")
    theirs = next(
        each for each in timm.transforms if "Augment" in type(each).__name__ or "AugMix" in type(each).__name__
    )
    ours = policy(Changes(aa=name), size=64, mean=mean)
    assert ours is not None
    image = v2.functional.to_pil_image(pixels(1, 64, 64)[0])
    for seed in range(20):
        with seeded(seed):
            found = ours(image)
        random.seed(seed)
        np.random.seed(seed)
        assert found.tobytes() == theirs(image).tobytes()


@pytest.mark.parametrize("name", ["rand-m10-inc1", "original", "augmix-m10"])
def test_a_policy_may_leave_no_colour(name: str) -> None:
    """Pillow refuses to keep no bits of a colour, which timm asks for."""
    found = policy(Changes(aa=name), size=64, mean=())
    nested = getattr(found, "policy", None)
    ops = found.ops if nested is None else [op for pair in nested for op in pair]  # type: ignore[union-attr]
    white = Image.new("RGB", (4, 4), "white")
    posterizing = [op for op in ops if op.name.startswith("Posterize")]
    assert posterizing
    for op in posterizing:
        assert op.aug_fn(white, 0).getextrema() == ((0, 0),) * 3
        assert op.aug_fn(white, 1).getextrema() == ((128, 128),) * 3
        assert op.aug_fn(white, 8).getextrema() == ((255, 255),) * 3


def test_a_policy_that_timm_does_not_know_is_refused() -> None:
    with pytest.raises(UsageError, match=r"aa is 'rand-q9', which timm does not read .*give one like rand-m9-mstd0.5"):
        Loader(memory(), batch_size=4, changes=Changes(aa="rand-q9")).batches(0).__next__()


def test_images_are_mirrored_by_turns() -> None:
    loader = Loader(memory(), batch_size=COUNT, augment="flip-alternate", seed=4)
    (plain,) = (batch.images for batch in Loader(memory(), batch_size=COUNT).batches(0))
    first, second, third = (next(loader.batches(epoch)).images for epoch in range(3))
    flipped = [torch.equal(image, own.flip(2)) for image, own in zip(first, plain, strict=True)]
    assert 0 < sum(flipped) < COUNT
    assert torch.equal(second, first.flip(3))
    assert torch.equal(third, first)


@pytest.mark.parametrize("augment", ["none", "crop-flip", "resized-crop"])
def test_chances_of_mirroring(augment: str) -> None:
    """Of images whose left half is dark: crops of whole images, by one pixel at most."""
    dark = torch.zeros(500, 3, SIZE, SIZE, dtype=torch.uint8)
    dark[:, :, :, SIZE // 2 :] = 200
    images = MemoryImages(pixels=dark, labels=torch.zeros(500).long(), img_size=SIZE)

    def share(**given: Any) -> float:
        changes = Changes(scale=(1.0, 1.0), ratio=(1.0, 1.0), **given)
        (batch,) = Loader(images, batch_size=500, augment=augment, changes=changes).batches(0)
        return float((batch.images[:, 0, 8, 3] > 0.5).float().mean())

    assert abs(share() - (0 if augment == "none" else 0.5)) < 0.07
    assert share(hflip=0.0) == 0
    assert share(hflip=1.0) == 1
    assert abs(share(hflip=0.2) - 0.2) < 0.06


@pytest.mark.parametrize("place", ["memory", "files"])
def test_the_middle_of_test_images_is_left(place: str, folder: list[str]) -> None:
    images: ImageSet = (memory(stored=24) if place == "memory" else files(folder)).cropped(0.8)
    (batch,) = Loader(images, batch_size=COUNT).batches(0)
    data = Data(train=images, test=images, classes=("a",), img_size=SIZE)
    assert data.test.to(torch.device("cpu")).subset(torch.arange(2)).crop_pct == 0.8
    for index, found in enumerate(batch.images):
        if place == "memory":
            whole = memory(stored=24).pixels[index]
            expected = v2.functional.center_crop(v2.functional.resize(whole, [20, 20], antialias=True), [SIZE, SIZE])
        else:
            with Image.open(folder[index]) as image:
                resized = v2.functional.resize(image, [20])
                expected = v2.functional.pil_to_tensor(v2.functional.center_crop(resized, [SIZE, SIZE]))
        assert torch.equal(found, expected / torch.tensor(255.0))
