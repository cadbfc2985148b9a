"""Policies that change one image at a time, by the code of timm and torchvision themselves."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from fxsplit.data.augmentation.changes import Changes
from fxsplit.errors import UsageError

TRIVIAL = "trivial"
# How far timm shifts images at most, as a share of their side: in pixels, or of each image.
SHIFT, MIXED_SHIFT = 0.45, 0.3
GREY = 128

Policy = Callable[[Image.Image], Image.Image]


def policy(changes: Changes, *, size: int, mean: Sequence[float]) -> Policy | None:
    """Make what changes an image by `aa`, or else by `color_jitter`; None where neither is asked for.

    As in timm, the colours of a policy are not jittered besides. The policy draws from the global random states, see
    `seeded`.

    Args:
        changes: what is asked for.
        size: side of the images in pixels.
        mean: of the channels, 0 to 1, or (): the colour that shifted images get where they were.

    Raises UsageError when timm does not know the policy.
    """
    if changes.aa is not None:
        return _named(changes.aa, size, mean)
    if changes.color_jitter:
        by = changes.color_jitter
        jitter: Policy = v2.ColorJitter(brightness=by, contrast=by, saturation=by)
        return jitter
    return None


def _named(name: str, size: int, mean: Sequence[float]) -> Policy:
    fill = tuple(min(255, round(255 * each)) for each in mean) or (GREY,)
    fill = fill * 3 if len(fill) == 1 else fill
    if name == TRIVIAL:
        trivial: Policy = v2.TrivialAugmentWide(fill=list(fill))
        return trivial
    from timm.data import auto_augment  # takes seconds to import

    made = auto_augment.auto_augment_transform
    shift: dict[str, float] = {"translate_const": int(size * SHIFT)}
    if name.startswith("rand"):
        made = auto_augment.rand_augment_transform
    elif name.startswith("augmix"):
        made, shift = auto_augment.augment_and_mix_transform, {"translate_pct": MIXED_SHIFT}
    try:
        found: Any = made(name, {**shift, "img_mean": fill})
    except (AssertionError, ValueError, KeyError) as error:
        raise UsageError(
            f"aa is {name!r}, which timm does not read ({error}); give one like rand-m9-mstd0.5, original, v0, "
            f"augmix-m5-w4 or {TRIVIAL}"
        ) from error
    nested = getattr(found, "policy", None)
    for op in found.ops if nested is None else [op for pair in nested for op in pair]:
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = _posterize
    made_by_timm: Policy = found
    return made_by_timm


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """Keep so many bits of each colour, as timm does. It may keep none, which Pillow refuses since version 13."""
    from timm.data import auto_augment

    if bits > 0:
        posterized: Image.Image = auto_augment.posterize(image, bits)
        return posterized
    return image.point(lambda _colour: 0)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the global random states of Python, numpy and torch's CPU follow from `seed`; then they are as before."""
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])
