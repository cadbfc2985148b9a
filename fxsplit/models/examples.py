"""Makes random inputs that suit a model, with which `inspect` and `check` call it without data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxsplit.models import registry
from fxsplit.models.libraries import torchvision
from fxsplit.objects.structure import map_tensors, tensors_in

TOKENS = 16
TOKEN_IDS = "input_ids"  # what transformers calls them
VOCABULARY = range(2, 64)  # every vocabulary has these; what comes before is padding and the like in small models
FRAMES = 16  # of a clip: what torchvision's video models are trained on


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """Holds the arguments of one call of a model."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def in_channels_last(self) -> Example:
        """Copy the call with images (N, C, H, W) in torch's channels-last memory format."""

        def relaid(tensor: Tensor) -> Tensor:
            return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

        return Example(args=map_tensors(relaid, self.args), kwargs=map_tensors(relaid, self.kwargs))


def example(
    spec: str,
    model: nn.Module,
    *,
    batch_size: int,
    img_size: int | None = None,
    training: bool = False,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Example:
    """Make inputs for the model that `registry.build` made of `spec`.

    Args:
        batch_size: number of samples. Some models need two to train: BatchNorm over one value has no variance.
        img_size: side of the images in pixels, which must be that with which the model was built;
            `registry.native_size(spec)` if None.
        training: give detectors their targets too.
        device: where the tensors are; on the meta device they have no numbers.
        seed: determines the numbers, which are the same on every device.

    A user's model may provide inputs by Lightning's convention: `example_input_array`, a tensor, or a tuple or dict of
    arguments. Tensors in it with as many rows as the first one are repeated or cut to `batch_size` rows, and `img_size`
    is ignored.
    """
    given = getattr(model, "example_input_array", None)
    if given is not None:
        return _resized(given, batch_size, torch.device(device))
    draw = _Draw(torch.device(device), seed)
    side = registry.native_size(spec) if img_size is None else img_size
    source, _, name = spec.partition(":")
    if source == "torchvision":
        return _for_torchvision(name, draw, batch_size, side, training)
    if source == "hf":
        return _for_huggingface(model, draw, batch_size, side)
    return Example(args=(draw.normal(batch_size, 3, side, side),))


def takes_images(model: nn.Module) -> bool:
    """Whether a model takes a batch of images (N, C, H, W) and nothing else, as far as it tells."""
    given = tensors_in(getattr(model, "example_input_array", None))
    if given:
        return len(given) == 1 and given[0].dim() == 4
    return getattr(model, "main_input_name", None) != TOKEN_IDS


class _Draw:
    """Makes random tensors on a device, drawn on the CPU so that every device gets the same."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(shape, device="meta")
        return torch.randn(shape, generator=self.generator).to(self.device)

    def tokens(self, *shape: int) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(shape, dtype=torch.int64, device="meta")
        return torch.randint(VOCABULARY.start, VOCABULARY.stop, shape, generator=self.generator).to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(shape, device="meta")
        return torch.rand(shape, generator=self.generator).to(self.device)


def _for_torchvision(name: str, draw: _Draw, batch_size: int, side: int, training: bool) -> Example:
    kind = torchvision.module_of(name)
    if kind.startswith("video."):
        return Example(args=(draw.normal(batch_size, 3, FRAMES, side, side),))
    if kind.startswith("optical_flow."):
        return Example(args=(draw.normal(batch_size, 3, side, side), draw.normal(batch_size, 3, side, side)))
    if kind.startswith("detection."):
        images = [draw.uniform(3, side, side) for _ in range(batch_size)]
        return Example(args=(images, [_target(kind, draw, side) for _ in images]) if training else (images,))
    return Example(args=(draw.normal(batch_size, 3, side, side),))


def _for_huggingface(model: Any, draw: _Draw, batch_size: int, side: int) -> Example:
    if model.main_input_name != TOKEN_IDS:
        return Example(kwargs={model.main_input_name: draw.normal(batch_size, 3, side, side)})
    names = [TOKEN_IDS, "decoder_input_ids"] if model.config.is_encoder_decoder else [TOKEN_IDS]
    return Example(kwargs={name: draw.tokens(batch_size, TOKENS) for name in names})


def _target(kind: str, draw: _Draw, side: int, objects: int = 3, keypoints: int = 17) -> dict[str, Tensor]:
    """Make the target of a detector for one image; every object is of class 1, since 0 is the background."""
    corners = draw.uniform(objects, 2) * side / 2
    sizes = (1 + draw.uniform(objects, 2)) * side / 4
    target = {
        "boxes": torch.cat([corners, corners + sizes], dim=1),
        "labels": torch.ones(objects, dtype=torch.int64, device=draw.device),
    }
    if kind == "detection.mask_rcnn":
        target["masks"] = (draw.uniform(objects, side, side) > 0.5).to(torch.uint8)
    if kind == "detection.keypoint_rcnn":
        within = corners[:, None] + sizes[:, None] * draw.uniform(objects, keypoints, 2)
        target["keypoints"] = torch.cat([within, torch.ones_like(within[..., :1])], dim=2)
    return target


def _resized(given: Any, batch_size: int, device: torch.device) -> Example:
    """Copy the user's own inputs with another batch size."""
    arguments = given if isinstance(given, tuple | dict) else (given,)
    values = arguments.values() if isinstance(arguments, dict) else arguments
    rows = next((len(value) for value in values if isinstance(value, Tensor) and value.ndim), 0)

    def resize(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.ndim and len(value) == rows:
            value = value[torch.arange(batch_size, device=value.device) % rows]
        return value.to(device)

    if isinstance(arguments, dict):
        return Example(kwargs={key: resize(value) for key, value in arguments.items()})
    return Example(args=tuple(resize(value) for value in arguments))
