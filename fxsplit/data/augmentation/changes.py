"""How images to train on are changed at random: plain values, named as timm names its options."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Says by how much images are cropped, mirrored, coloured, erased and mixed.

    Args:
        scale: least and largest share of an image's area that a resized crop covers.
        ratio: least and largest width of such a crop, in heights.
        interpolation: how such a crop is resized: bilinear, bicubic, or random, which is one of the two.
        hflip: chance that an image is mirrored; None for that of the augmentation by itself.
        aa: a policy that changes colours and shapes, by timm's name, or "trivial"; None for none.
        color_jitter: by how much brightness, contrast and saturation change, each by a factor of 1 - x .. 1 + x.
        reprob: chance that a part of an image is erased.
        mixup: alpha of the beta distribution of the shares in which two images are mixed; 0 mixes none.
        cutmix: the same for areas, where a part of an image is replaced by that of another one.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"
    hflip: float | None = None
    aa: str | None = None
    color_jitter: float = 0.0
    reprob: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    @property
    def changes_images(self) -> bool:
        """Whether single images are changed, besides the augmentation that has a name."""
        return bool(self.hflip or self.aa or self.color_jitter or self.reprob)

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed with each other."""
        return bool(self.mixup or self.cutmix)


UNCHANGED = Changes()
