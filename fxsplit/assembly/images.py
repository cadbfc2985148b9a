"""The images of a run, and the loaders that make batches of them."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import nn

from fxsplit.data import datasets
from fxsplit.data.augmentation.changes import UNCHANGED, Changes
from fxsplit.data.batch import micro_batch_count
from fxsplit.data.images import Data
from fxsplit.data.loader import Loader
from fxsplit.data.reading.decoding import INTERPOLATIONS
from fxsplit.data.shares import sizes
from fxsplit.distribute.processes import ALONE, Processes
from fxsplit.errors import UsageError
from fxsplit.report import Observer
from fxsplit.spec import RunSpec

CHANNELS = 3
Moved = TypeVar("Moved", nn.Module, torch.Tensor)


class Kind(NamedTuple):
    """Describes the images of a run before they are loaded: how many classes, and the side of each image in pixels."""

    classes: int
    img_size: int


def kind(spec: RunSpec) -> Kind:
    """Describe the images of a run without loading them. Raises UsageError and DataError as `datasets.load` does."""
    bad = spec.max_bad_samples
    return Kind(*datasets.describe(spec.data, img_size=spec.img_size, data_dir=spec.data_dir, max_bad_samples=bad))


def data(spec: RunSpec, observer: Observer) -> Data:
    """Load the images and labels of a run, on the CPU. Raises UsageError and DataError as `datasets.load` does."""
    observer.working(f"reading {spec.data}")
    loaded = datasets.load(
        spec.data,
        img_size=spec.img_size,
        interpolation=interpolation(spec),
        crop_pct=spec.crop_pct,
        # Crops of a file are cut out of all its pixels, and are sharper than those of a resized image.
        train_in_files=spec.augment == "resized-crop",
        data_dir=spec.data_dir,
        seed=spec.seed,
        train_limit=spec.train_limit,
        workers=spec.workers,
        max_bad_samples=spec.max_bad_samples,
        notice=observer.notice,
    )
    if not spec.guard:
        return loaded
    divided = loaded.holding_out(spec.guard, seed=spec.seed)
    assert divided.held_out is not None
    if len(divided.train) < 2:
        raise UsageError(
            f"guard is {spec.guard:g}, which holds out {len(divided.held_out):,} of {len(loaded.train):,} images to "
            "train on and leaves too few; hold out a smaller share"
        )
    observer.notice(f"of {len(loaded.train):,} images to train on {len(divided.held_out):,} are held out for the guard")
    return divided


def own_batch_size(spec: RunSpec, processes: Processes) -> int:
    """Return the most images of a batch to train on that a process takes."""
    return sizes(spec.batch_size, processes.replicas.count)[0]


def micro_batches(spec: RunSpec, processes: Processes, *, planned: int = 1) -> int:
    """Return in how many micro-batches the process that takes most images of a batch takes them.

    They are as many as are `planned` or asked for, or fewer where these would have too few images.
    """
    return micro_batch_count(own_batch_size(spec, processes), max(planned, spec.grad_accum_steps))


def loaders(spec: RunSpec, data: Data, processes: Processes = ALONE) -> tuple[Loader, Loader]:
    """Make the loaders of the images to train on and of those to test on."""
    train = Loader(
        data.train,
        batch_size=spec.batch_size,
        training=True,
        seed=spec.seed,
        augment=spec.augment,
        changes=changes(spec),
        classes=len(data.classes),
        views=views(spec),
        mean=spec.mean,
        std=spec.std,
        interpolation=interpolation(spec),
        channels_last=spec.channels_last,
        limit=1 if spec.dry_run else spec.train_batches_per_epoch,
        share=processes.replicas.share,
    )
    test = Loader(
        data.test,
        batch_size=spec.batch_size,
        mean=spec.mean,
        std=spec.std,
        interpolation=interpolation(spec),
        channels_last=spec.channels_last,
        limit=1 if spec.dry_run else None,
        share=processes.share,
    )
    return train, test


def changes(spec: RunSpec) -> Changes:
    """Say how much images to train on are changed at random."""
    # RunSpec has seen to it that there are two numbers, if any.
    (least, most), (narrow, wide) = spec.scale or UNCHANGED.scale, spec.ratio or UNCHANGED.ratio
    return Changes(
        scale=(least, most),
        ratio=(narrow, wide),
        interpolation=spec.train_interpolation or interpolation(spec),
        hflip=spec.hflip,
        aa=spec.aa,
        color_jitter=spec.color_jitter,
        reprob=spec.reprob,
        mixup=spec.mixup,
        cutmix=spec.cutmix,
    )


def views(spec: RunSpec) -> int | None:
    """Say how many views of each image a cache can keep; None where images are new in each epoch, or never change."""
    if spec.augment == "none" and not changes(spec).changes_images:
        return None
    if spec.augment == "flip-alternate" and not changes(spec).changes_images:
        return 2
    return spec.cache_views


def random_images(spec: RunSpec, kind: Kind, device: torch.device, processes: Processes) -> torch.Tensor:
    """Draw a batch of the size that a process trains on, to time its ops with; of two images at least."""
    shape = (max(2, own_batch_size(spec, processes)), CHANNELS, kind.img_size, kind.img_size)
    return in_layout(spec, torch.rand(shape, device=device))


def in_layout(spec: RunSpec, given: Moved) -> Moved:
    """Return a model or images in the memory format of the run: channels_last, where it is asked for."""
    return given.to(memory_format=torch.channels_last) if spec.channels_last else given


def interpolation(spec: RunSpec) -> str:
    """Say how images are resized."""
    return spec.interpolation or INTERPOLATIONS[0]
