"""Mixup and CutMix: each image of a batch is mixed with another one of it, and so are their labels.

Sources: Zhang et al., mixup: beyond empirical risk minimization, 2018; Yun et al., CutMix, 2019. The numbers are drawn
as timm's Mixup draws them for a batch: one share, and one box, for all of its images; image i is mixed with image
B - 1 - i.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fxsplit.data.augmentation.changes import Changes

# With both, each batch is mixed in one of the two ways.
SWITCH = 0.5


def draw_mixes(steps: int, size: int, changes: Changes, stream: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw how the batches of an epoch are mixed.

    Returns for each the share of an image's own pixels, float32 (steps,), and the box that comes from the other image:
    top, bottom, left, right, int64 (steps, 4), empty for mixup.
    """
    found = [_mix(size, changes, stream) for _ in range(steps)]
    shares, boxes = zip(*found, strict=True) if found else ((), ())
    return torch.tensor(shares, dtype=torch.float32), torch.tensor(boxes, dtype=torch.int64).view(steps, 4)


def _mix(size: int, changes: Changes, stream: np.random.Generator) -> tuple[float, tuple[int, int, int, int]]:
    has_both = changes.mixup > 0 and changes.cutmix > 0
    is_cut = stream.random() < SWITCH if has_both else changes.cutmix > 0
    alpha = changes.cutmix if is_cut else changes.mixup
    share = float(stream.beta(alpha, alpha))
    if not is_cut:
        return share, (0, 0, 0, 0)
    box = box_around(*stream.integers(size, size=2).tolist(), size=size, share=share)
    return 1 - (box[1] - box[0]) * (box[3] - box[2]) / size**2, box


def box_around(y: int, x: int, *, size: int, share: float) -> tuple[int, int, int, int]:
    """Return the box with 1 - `share` of a square image's area around a point, as far as it lies in the image."""
    side = int(size * math.sqrt(1 - share))
    top, left = y - side // 2, x - side // 2
    top, bottom, left, right = (
        min(max(each, 0), size) for each in (top, y + (side + 1) // 2, left, x + (side + 1) // 2)
    )
    return top, bottom, left, right


def mix(images: Tensor, labels: Tensor, share: Tensor, box: Tensor, *, classes: int) -> tuple[Tensor, Tensor]:
    """Mix the images (B, C, H, W) of a batch, and their labels (B,).

    Args:
        images: normalized.
        labels: int64.
        share: of an image's own pixels, (1,).
        box: that comes from the other image, (1, 4); empty to mix all pixels by the share.
        classes: how many labels there are.

    Returns images, and soft labels float32 (B, classes).
    """
    top, bottom, left, right = box[0]
    rows = torch.arange(images.shape[2], device=images.device)[:, None]
    columns = torch.arange(images.shape[3], device=images.device)
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    own = torch.where(bottom > top, 1 - inside.float(), share)
    soft = (labels[:, None] == torch.arange(classes, device=labels.device)).float()
    # Products first, as in timm: the sum is rounded alike.
    return images * own + images.flip(0) * (1 - own), soft * share + soft.flip(0) * (1 - share)
