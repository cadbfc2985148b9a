"""Models of torchvision, by the names that `torchvision.models.get_model` takes."""

from __future__ import annotations

import inspect
import warnings
from functools import partial
from typing import Any

from torch import nn

from fxsplit.errors import NoModelError, UsageError, nearest, shown
from fxsplit.models.downloads import expect_in_torch_hub
from fxsplit.models.libraries.library import USUAL_SIZE, Library, Preprocessing, drop_path_argument, errors_of
from fxsplit.models.surgery import fit_classifier, keep_small_images

STOCHASTIC_DEPTH = "stochastic_depth_prob"
# What the builders change by themselves when they are asked for pretrained weights.
PRETRAINED: dict[str, dict[str, Any]] = {
    "googlenet": {"transform_input": True, "aux_logits": False},
    "inception_v3": {"transform_input": True},
}


def _build(
    name: str,
    *,
    num_classes: int,
    img_size: int,
    pretrained: bool,
    stem: str,
    drop_path: float,
    downloads: bool = True,
) -> nn.Module:
    from torchvision import models

    kind = module_of(name)
    builder = models.get_model_builder(name)
    sizes = _size_arguments(kind, img_size)
    if stem == "cifar" and {"image_size", "input_size"} & set(sizes):
        raise UsageError(f"the stem of 'torchvision:{name}' cannot change, because all its layers depend on it")
    has_classes = not kind.startswith("optical_flow.")
    settings: dict[str, Any] = {**sizes, **drop_path_argument(STOCHASTIC_DEPTH, drop_path)}
    weights = _weights(name) if pretrained else None
    known_classes = len(weights.meta.get("categories", ())) if weights else num_classes
    if pretrained and downloads:
        settings["weights"] = "DEFAULT"
    elif has_classes:
        settings["num_classes"] = known_classes
        settings |= PRETRAINED.get(name, {}) if pretrained else {}
    if "weights_backbone" in inspect.signature(builder).parameters:
        settings["weights_backbone"] = None
    with (
        errors_of("torchvision", name, settings, cache="torch's cache (TORCH_HOME)"),
        warnings.catch_warnings(),
    ):
        if weights and downloads:
            expect_in_torch_hub(weights.url)
        warnings.filterwarnings("ignore", "The default weight initialization of", FutureWarning)
        model: nn.Module = builder(**settings)
    if weights and has_classes:
        fit_classifier(model, f"torchvision:{name}", known_classes, num_classes)
    if stem == "cifar":
        keep_small_images(model, f"torchvision:{name}")
    return model


def _size_arguments(kind: str, img_size: int) -> dict[str, Any]:
    """Return the argument by which a builder takes the image size, if it does; its signature hides it in `**kwargs`."""
    if kind == "vision_transformer":
        return {"image_size": img_size}
    if kind == "maxvit":
        return {"input_size": (img_size, img_size)}
    if kind.startswith("detection.") and not kind.startswith("detection.ssd"):
        return {"min_size": img_size}
    return {}


def module_of(name: str) -> str:
    """Name the module below `torchvision.models` that defines a model, such as "resnet" or "detection.ssd"."""
    from torchvision import models

    if name not in models.list_models():
        raise NoModelError(f"torchvision has no model {shown(name)}{nearest(name, models.list_models())}")
    return str(models.get_model_builder(name).__module__).removeprefix("torchvision.models.")


def _names() -> list[str]:
    from torchvision import models

    return list(models.list_models())


def _native_size(name: str) -> int:
    from torchvision import models

    module_of(name)
    transforms = [weights.transforms for weights in models.get_model_weights(name)]
    crops = [known.keywords.get("crop_size", ()) for known in transforms if isinstance(known, partial)]
    return min((crop if isinstance(crop, int) else crop[0] for crop in crops if crop), default=USUAL_SIZE)


def _weights(name: str) -> Any:
    """Return the weights that `pretrained` means, None if there are none."""
    from torchvision import models

    return getattr(models.get_model_weights(name), "DEFAULT", None)


def _preprocessing(name: str) -> Preprocessing | None:
    from torchvision.transforms._presets import ImageClassification

    module_of(name)
    weights = _weights(name)
    found = weights.transforms() if weights else None
    if not isinstance(found, ImageClassification):
        return None
    return Preprocessing(
        img_size=found.crop_size[0],
        mean=tuple(found.mean),
        std=tuple(found.std),
        interpolation=found.interpolation.value,
    )


LIBRARY = Library(
    build=_build,
    names=_names,
    native_size=_native_size,
    preprocessing=_preprocessing,
    rebuild=partial(_build, pretrained=True, downloads=False),
)
