"""Models of timm, by the names that `timm.create_model` takes; `hf-hub:ORG/NAME` is one of them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from fxsplit.errors import NoModelError, nearest, shown
from fxsplit.models.downloads import expect_in_torch_hub, hub_or_its_cache
from fxsplit.models.libraries.library import (
    DROP_PATH,
    HUB_CACHE,
    USUAL_SIZE,
    Library,
    Preprocessing,
    drop_path_argument,
    errors_of,
)
from fxsplit.models.surgery import clear_classifier, keep_small_images


def families() -> dict[str, tuple[str, ...]]:
    """Group timm's models by the module that defines them: `{"beit": ("timm:beit_base_patch16_224", ...), ...}`."""
    import timm

    return {module: tuple(f"timm:{name}" for name in timm.list_models(module=module)) for module in timm.list_modules()}


def _build(name: str, *, num_classes: int, img_size: int, pretrained: bool, stem: str, drop_path: float) -> nn.Module:
    import timm

    if ":" not in name and not timm.is_model(name):
        raise NoModelError(f"timm has no model {shown(name)}{nearest(name, timm.list_models())}")
    settings: dict[str, Any] = {"num_classes": num_classes, **drop_path_argument(DROP_PATH, drop_path)}
    with errors_of("timm", name, settings, cache=HUB_CACHE):
        config = _config(name)
        one_size = bool(config.get("fixed_input_size"))
        if one_size:
            settings["img_size"] = img_size
            if stem == "cifar":
                settings["patch_size"] = 4
        with _download(name, config, pretrained):
            model: nn.Module = timm.create_model(name, pretrained=pretrained, **settings)
    if pretrained and num_classes != config.get("num_classes"):
        for head in _classifiers(model):
            clear_classifier(head, num_classes)
    if stem == "cifar" and not one_size:
        keep_small_images(model, f"timm:{name}")
    return model


def _classifiers(model: nn.Module) -> list[nn.Module]:
    """List the modules that timm calls a model's classifier; distilled ones have two."""
    found: Any = getattr(model, "get_classifier", tuple)()
    return [each for each in (found if isinstance(found, tuple | list) else (found,)) if isinstance(each, nn.Module)]


def _names() -> list[str]:
    import timm

    return list(timm.list_models())


def _native_size(name: str) -> int:
    with errors_of("timm", name, {}, cache=HUB_CACHE):
        return min(_config(name).get("input_size", (USUAL_SIZE,))[1:], default=USUAL_SIZE)


def _preprocessing(name: str) -> Preprocessing | None:
    from timm.data import resolve_data_config

    with errors_of("timm", name, {}, cache=HUB_CACHE):
        config = _config(name)
        if not config:
            return None
        found = resolve_data_config(pretrained_cfg=config)
    return Preprocessing(
        img_size=min(found["input_size"][1:]),
        mean=tuple(found["mean"]),
        std=tuple(found["std"]),
        interpolation=found["interpolation"],
    )


def _download(name: str, config: dict[str, Any], pretrained: bool) -> AbstractContextManager[None]:
    """Return a context in which timm finds out soon that there is no network, where it needs one."""
    if pretrained and not config.get("hf_hub_id"):
        if url := config.get("url"):
            expect_in_torch_hub(url)
    elif pretrained or _is_on_hub(name):
        return hub_or_its_cache()
    return nullcontext()


def _is_on_hub(name: str) -> bool:
    from timm import models

    return bool(models.parse_model_name(name)[0] == "hf-hub")


def _config(name: str) -> dict[str, Any]:
    """Read what timm says about the images of a model: whether it must be told their size, and how it got them."""
    from timm import models

    if _is_on_hub(name):
        with hub_or_its_cache():
            return dict(models.load_model_config_from_hf(models.parse_model_name(name)[1])[0])
    config = models.get_pretrained_cfg(name)
    return dict(config.to_dict()) if config else {}


LIBRARY = Library(build=_build, names=_names, native_size=_native_size, preprocessing=_preprocessing)
