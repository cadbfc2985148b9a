"""All that changes the training images of a run, divided between the readers on the host and the device that trains.

    on the host, one image at a time                    on the device, a whole batch at a time
                                                        crop, mirror ──► normalize ──► erase ──► mix
    read ──► resized crop of a file's own pixels                         normalize ──► erase ──► mix
    read ──► crop, mirror ──► policy of timm's                           normalize ──► erase ──► mix

Cropping is on the device, unless the pixels of a file are needed for it, or a policy comes after it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from fxsplit.data.augmentation.changes import Changes
from fxsplit.data.augmentation.crops import Augmentation, augmentation, drawn
from fxsplit.data.augmentation.each_image import Policy, policy, seeded
from fxsplit.data.augmentation.erasing import draw_boxes, erase, noise
from fxsplit.data.augmentation.mixing import draw_mixes, mix
from fxsplit.data.images import ImageSet
from fxsplit.data.randomness import random_stream
from fxsplit.data.reading.decoding import INTERPOLATIONS
from fxsplit.data.reading.workers import OpenImage
from fxsplit.data.staging import write


class Augmenter:
    """Changes the images of one image set by draws for all of them, made anew for each epoch or view.

    Args:
        images: what is changed.
        name: of the augmentation.
        changes: what else is asked for.
        seed: what draws depend on, besides the epoch or view.
        interpolation: how images are resized that are changed on the host, one of INTERPOLATIONS.
        mean: of the channels, as for the loader.
        steps: batches of an epoch.
        classes: of the labels, to mix them; 0 without mixing.

    Raises UsageError when there is no such augmentation or policy.
    """

    def __init__(
        self,
        images: ImageSet,
        name: str,
        changes: Changes,
        *,
        seed: int,
        interpolation: str = INTERPOLATIONS[0],
        mean: Sequence[float] = (),
        steps: int = 0,
        classes: int = 0,
    ) -> None:
        self._images, self._name, self._changes, self._seed = images, name, changes, seed
        self._steps, self._classes = steps, classes
        self._crop = augmentation(name, changes)
        self._policy = policy(changes, size=images.img_size, mean=mean)
        self._of_image = ChangeImage(self._crop, self._policy, images.img_size, interpolation)
        self._noise: Tensor | None = None
        # What was drawn, in tensors on the device that stay where they are: for crops, for erasing, for mixing.
        self._kept: dict[str, list[Tensor]] = {}

    @property
    def resizes(self) -> bool:
        """Whether `crop` makes images of the right size from those of another one."""
        return self._crop.of_image is not None and not self.is_on_host

    @property
    def is_on_host(self) -> bool:
        """Whether images are changed on the host, one at a time, where they are read."""
        needs_files = self._crop.of_image is not None and self._images.stored_size is None
        return self._policy is not None or needs_files

    def draw(self, draw: int, epoch: int) -> OnHost | None:
        """Draw for all images, by the number of the view or epoch; and the mixes of an epoch's batches.

        Returns what readers are to do with each image, if anything.
        """
        images, seed = self._images, self._seed
        found = drawn(self._name, self._crop, images, seed=seed, draw=draw)
        on_host = None
        if self.is_on_host:
            seeds = random_stream("policy", seed, draw).integers(2**63, size=len(images))
            on_host = OnHost(self._of_image, [*found, torch.from_numpy(seeds)])
        else:
            self._keep("crop", found if self._crop.place is None else self._crop.place(images, *found))
        if self._changes.reprob:
            stream = random_stream("erase", seed, draw)
            chance = self._changes.reprob
            self._keep("erase", [draw_boxes(len(images), images.img_size, images.channels, stream, chance=chance)])
        if self._changes.mixes:
            stream = random_stream("mix", seed, epoch)
            self._keep("mix", draw_mixes(self._steps, images.img_size, self._changes, stream))
        return on_host

    def _keep(self, purpose: str, found: Sequence[Tensor]) -> None:
        if purpose not in self._kept:
            self._kept[purpose] = [torch.empty_like(each, device=self._images.device) for each in found]
        for into, each in zip(self._kept[purpose], found, strict=True):
            write(into, each)

    def crop(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """Crop and mirror the pixels (B, C, h, w) of the images `ids` (B,), unless that was done on the host."""
        if self.is_on_host:
            return pixels
        rows = (each.index_select(0, ids) for each in self._kept["crop"])
        size = {"size": self._images.img_size} if self.resizes else {}
        return self._crop.change(pixels, *rows, **size)

    def erase(self, images: Tensor, ids: Tensor) -> Tensor:
        """Erase parts of the normalized images (B, C, H, W) with these `ids` (B,), where that is asked for."""
        if not self._changes.reprob:
            return images
        if self._noise is None:
            field = noise(images.shape[1], self._images.img_size, random_stream("noise", self._seed))
            self._noise = field.to(images.device)
        return erase(images, self._kept["erase"][0].index_select(0, ids), self._noise)

    def mix(self, images: Tensor, labels: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Mix the images (B, C, H, W) of the batch with the number `step`, int64 (1,) on the device.

        Returns images; the labels, int64 (B,), of which most is in each; and soft labels (B, classes), or None where
        nothing is mixed.
        """
        if not self._changes.mixes:
            return images, labels, None
        share, box = (each.index_select(0, step) for each in self._kept["mix"])
        mixed, soft = mix(images, labels, share, box, classes=self._classes)
        return mixed, torch.where(share < 0.5, labels.flip(0), labels), soft


class OnHost:
    """Says what readers of images do with each one.

    Args:
        change: what is done with an image.
        rows: what `change` takes beside it, for all images: tensors (N, ...).
    """

    def __init__(self, change: ChangeImage, rows: Sequence[Tensor]) -> None:
        self.change, self._rows = change, rows

    def rows(self, ids: Tensor) -> list[np.ndarray]:
        """Return what `change` takes for these images: arrays (B, ...), to be sent to another process."""
        return [each[ids].numpy() for each in self._rows]


class ChangeImage:
    """Changes an image while it is read: crops it, mirrors it, and changes it by a policy.

    Args:
        crop: how images are cropped.
        policy: what changes them after that, or None.
        size: side of the images in pixels.
        interpolation: how they are resized, unless that is done by `crop`.
    """

    def __init__(self, crop: Augmentation, policy: Policy | None, size: int, interpolation: str) -> None:
        self._crop, self._policy, self._size, self._interpolation = crop, policy, size, interpolation

    def __call__(self, open_image: OpenImage, *rows: np.ndarray) -> Tensor:
        """Return the pixels of an image, uint8 (C, size, size); the last of its rows is the seed of the policy."""
        *drawn, seed = rows
        image = self._cropped(open_image, *drawn)
        if self._policy is not None:
            with seeded(int(seed)):
                image = self._policy(image)
        pixels: Tensor = transforms.pil_to_tensor(image)
        return pixels

    def _cropped(self, open_image: OpenImage, *drawn: np.ndarray) -> Image.Image:
        if self._crop.of_image is not None:
            return self._crop.of_image(open_image, *drawn, size=self._size)
        pixels = transforms.pil_to_tensor(open_image.square(self._size, self._interpolation))[None]
        rows: list[Tensor] = [torch.as_tensor(each)[None] for each in drawn]
        cropped: Image.Image = transforms.to_pil_image(self._crop.change(pixels, *rows)[0])
        return cropped
