"""Builds a model from one line of text: `timm:NAME`, `torchvision:NAME`, `hf:TYPE`, `paper:NAME`, `file.py:FACTORY` or
`pkg.module:FACTORY`. Before the first colon stands the source, after it what to take from there.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxsplit.errors import DataError, NoModelError, UsageError, closest, nearest, reason, shown, shown_path
from fxsplit.models import huggingface
from fxsplit.models.downloads import expect_in_torch_hub, hub_or_its_cache
from fxsplit.models.paper import NETWORKS
from fxsplit.models.surgery import clear_classifier, fit_classifier, keep_small_images
from fxsplit.objects import factories

STEMS = ("original", "cifar")
FORMS = "timm:NAME, torchvision:NAME, hf:TYPE, hf:ORG/NAME, paper:NAME, file.py:FACTORY or pkg.module:FACTORY"
USUAL_SIZE = 224
HUB_CACHE = "Hugging Face's cache (HF_HOME)"
DROP_PATH, TORCHVISION_DROP_PATH = "drop_path_rate", "stochastic_depth_prob"
# What torchvision's builders change by themselves when they are asked for pretrained weights.
TORCHVISION_PRETRAINED: dict[str, dict[str, Any]] = {
    "googlenet": {"transform_input": True, "aux_logits": False},
    "inception_v3": {"transform_input": True},
}


def build(
    spec: str,
    *,
    num_classes: int,
    img_size: int,
    pretrained: bool = False,
    stem: str = "original",
    drop_path: float = 0.0,
) -> nn.Module:
    """Build the model that `spec` names, for images (N, 3, img_size, img_size).

    Args:
        spec: the line of text. A factory is called with those of `num_classes` and `img_size` that its signature has;
            `hf:TYPE` is a small model of that type (see `huggingface`).
        num_classes: classes of the model. torchvision's detectors count the background as one; its optical flow models
            and language models have none.
        img_size: side of the images in pixels; torchvision's detectors resize images to it.
        pretrained: take the weights of timm, torchvision or the repository `hf:ORG/NAME`; a classifier for another
            number of classes gets new ones. torchvision's quantized models are built before quantization. How images
            must be prepared for these weights, `preprocessing` tells.
        stem: "cifar" keeps the resolution of small images. The first convolution, if strided, becomes 3x3 with stride 1
            (a 3x3 kernel keeps its weights, a larger one gets new ones), and the first pooling after it the identity,
            unless a block of several convolutions comes before. timm's models for one image size get patches of 4
            pixels instead.
        drop_path: rate of stochastic depth in [0, 1), at which a residual branch is left out in training (Huang et al.,
            2016). timm's models and factories take it as `drop_path_rate`, torchvision's as `stochastic_depth_prob`, of
            the paper's networks `resnext`; others take none.

    Weights are drawn from torch's global random state, which is not seeded here.

    Raises UsageError when there is no such model, it cannot be built as asked, has no such stem or takes no
    `drop_path`, and DataError when it cannot be downloaded or read.
    """
    source, name = _split(spec)
    if stem not in STEMS:
        raise UsageError(f"there is no stem {stem!r}, only {' and '.join(STEMS)}{nearest(stem, STEMS)}")
    library = LIBRARIES.get(source)
    from_source = library.build if library else partial(_from_factory, source)
    with _drop_path_of(spec, drop_path):
        return from_source(
            name, num_classes=num_classes, img_size=img_size, pretrained=pretrained, stem=stem, drop_path=drop_path
        )


def rebuild(spec: str, *, num_classes: int, img_size: int, pretrained: bool, stem: str, drop_path: float) -> nn.Module:
    """Build a model as `build` did, for weights that are loaded into it afterwards.

    With `pretrained` it is the network that `build` makes for pretrained weights, which may be another one than without
    them; none are downloaded. Raises UsageError and DataError as `build` does.
    """
    library = LIBRARIES.get(_split(spec)[0])
    if not (pretrained and library and library.rebuild):
        return build(spec, num_classes=num_classes, img_size=img_size, stem=stem, drop_path=drop_path)
    _, name = _split(spec)
    return library.rebuild(name, num_classes=num_classes, img_size=img_size, stem=stem, drop_path=drop_path)


def sketch(spec: str, *, num_classes: int, img_size: int, stem: str = "original", drop_path: float = 0.0) -> nn.Module:
    """Build the model as `build` does, but on the meta device, without memory, if it can be built there."""
    make = partial(build, spec, num_classes=num_classes, img_size=img_size, stem=stem, drop_path=drop_path)
    try:
        with torch.device("meta"):
            return make()
    except Exception:
        # Some models compute while they are built, which the meta device cannot. Any other error is raised again.
        return make()


def native_size(spec: str) -> int:
    """Return the side in pixels of the images that the model is made for; 224 if it is not known."""
    source, name = _split(spec)
    library = LIBRARIES.get(source)
    return library.native_size(name) if library else USUAL_SIZE


def preprocessing(spec: str) -> Preprocessing | None:
    """Return how images were prepared for the pretrained weights of a model; None if its library does not tell.

    Raises UsageError and DataError as `build` does.
    """
    source, name = _split(spec)
    library = LIBRARIES.get(source)
    return library.preprocessing(name) if library else None


def expand(pattern: str) -> tuple[str, ...]:
    """List the full names of the models that match a spec such as `timm:resnet*`, in the library's order.

    A spec without wildcards (`*`, `?`, `[...]`) gives itself, whether there is such a model or not. Raises NoModelError
    when nothing matches, or when the source cannot be listed.
    """
    source, _, wanted = pattern.partition(":")
    if not set("*?[") & set(wanted):
        return (pattern,)
    if source not in LIBRARIES:
        raise NoModelError(
            f"the models of {source!r} cannot be listed, only those of {', '.join(LIBRARIES)}"
            f"{nearest(source, LIBRARIES)}; replace {wanted!r} by the name of a function"
        )
    known = LIBRARIES[source].names()
    names = [name for name in known if fnmatchcase(name, wanted)]
    if not names:
        raise NoModelError(f"no model of {source} matches {wanted!r}{nearest(wanted, known)}")
    return tuple(f"{source}:{name}" for name in names)


def families() -> dict[str, tuple[str, ...]]:
    """Group timm's models by the module that defines them: `{"beit": ("timm:beit_base_patch16_224", ...), ...}`."""
    import timm

    return {module: tuple(f"timm:{name}" for name in timm.list_models(module=module)) for module in timm.list_modules()}


def smallest(specs: Iterable[str]) -> str:
    """Find the model with the fewest parameters, the first of equals."""

    def parameter_count(spec: str) -> int:
        model = sketch(spec, num_classes=1000, img_size=native_size(spec))
        return sum(parameter.numel() for parameter in model.parameters())

    return min(specs, key=parameter_count)


def _from_timm(
    name: str, *, num_classes: int, img_size: int, pretrained: bool, stem: str, drop_path: float
) -> nn.Module:
    import timm

    if ":" not in name and not timm.is_model(name):
        raise NoModelError(f"timm has no model {shown(name)}{nearest(name, timm.list_models())}")
    settings: dict[str, Any] = {"num_classes": num_classes, **_drop_path_argument(DROP_PATH, drop_path)}
    with _errors_of("timm", name, settings, cache=HUB_CACHE):
        config = _timm_config(name)
        one_size = bool(config.get("fixed_input_size"))
        if one_size:
            settings["img_size"] = img_size
            if stem == "cifar":
                settings["patch_size"] = 4
        with _timm_download(name, config, pretrained):
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


def _timm_names() -> list[str]:
    import timm

    return list(timm.list_models())


def _timm_size(name: str) -> int:
    with _errors_of("timm", name, {}, cache=HUB_CACHE):
        return min(_timm_config(name).get("input_size", (USUAL_SIZE,))[1:], default=USUAL_SIZE)


def _timm_preprocessing(name: str) -> Preprocessing | None:
    from timm.data import resolve_data_config

    with _errors_of("timm", name, {}, cache=HUB_CACHE):
        config = _timm_config(name)
        if not config:
            return None
        found = resolve_data_config(pretrained_cfg=config)
    return Preprocessing(
        img_size=min(found["input_size"][1:]),
        mean=tuple(found["mean"]),
        std=tuple(found["std"]),
        interpolation=found["interpolation"],
    )


def _timm_download(name: str, config: dict[str, Any], pretrained: bool) -> AbstractContextManager[None]:
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


def _timm_config(name: str) -> dict[str, Any]:
    """Read what timm says about the images of a model: whether it must be told their size, and how it got them."""
    from timm import models

    if _is_on_hub(name):
        with hub_or_its_cache():
            return dict(models.load_model_config_from_hf(models.parse_model_name(name)[1])[0])
    config = models.get_pretrained_cfg(name)
    return dict(config.to_dict()) if config else {}


def _from_torchvision(
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

    kind = torchvision_module(name)
    builder = models.get_model_builder(name)
    sizes = _torchvision_sizes(kind, img_size)
    if stem == "cifar" and {"image_size", "input_size"} & set(sizes):
        raise UsageError(f"the stem of 'torchvision:{name}' cannot change, because all its layers depend on it")
    has_classes = not kind.startswith("optical_flow.")
    settings: dict[str, Any] = {**sizes, **_drop_path_argument(TORCHVISION_DROP_PATH, drop_path)}
    weights = _torchvision_weights(name) if pretrained else None
    known_classes = len(weights.meta.get("categories", ())) if weights else num_classes
    if pretrained and downloads:
        settings["weights"] = "DEFAULT"
    elif has_classes:
        settings["num_classes"] = known_classes
        settings |= TORCHVISION_PRETRAINED.get(name, {}) if pretrained else {}
    if "weights_backbone" in inspect.signature(builder).parameters:
        settings["weights_backbone"] = None
    with (
        _errors_of("torchvision", name, settings, cache="torch's cache (TORCH_HOME)"),
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


def _torchvision_sizes(kind: str, img_size: int) -> dict[str, Any]:
    """Return the argument by which a builder takes the image size, if it does; its signature hides it in `**kwargs`."""
    if kind == "vision_transformer":
        return {"image_size": img_size}
    if kind == "maxvit":
        return {"input_size": (img_size, img_size)}
    if kind.startswith("detection.") and not kind.startswith("detection.ssd"):
        return {"min_size": img_size}
    return {}


def torchvision_module(name: str) -> str:
    """Name the module below `torchvision.models` that defines a model, such as "resnet" or "detection.ssd"."""
    from torchvision import models

    if name not in models.list_models():
        raise NoModelError(f"torchvision has no model {shown(name)}{nearest(name, models.list_models())}")
    return str(models.get_model_builder(name).__module__).removeprefix("torchvision.models.")


def _torchvision_names() -> list[str]:
    from torchvision import models

    return list(models.list_models())


def _torchvision_size(name: str) -> int:
    from torchvision import models

    torchvision_module(name)
    transforms = [weights.transforms for weights in models.get_model_weights(name)]
    crops = [known.keywords.get("crop_size", ()) for known in transforms if isinstance(known, partial)]
    return min((crop if isinstance(crop, int) else crop[0] for crop in crops if crop), default=USUAL_SIZE)


def _torchvision_weights(name: str) -> Any:
    """Return the weights that `pretrained` means, None if there are none."""
    from torchvision import models

    return getattr(models.get_model_weights(name), "DEFAULT", None)


def _torchvision_preprocessing(name: str) -> Preprocessing | None:
    from torchvision.transforms._presets import ImageClassification

    torchvision_module(name)
    weights = _torchvision_weights(name)
    found = weights.transforms() if weights else None
    if not isinstance(found, ImageClassification):
        return None
    return Preprocessing(
        img_size=found.crop_size[0],
        mean=tuple(found.mean),
        std=tuple(found.std),
        interpolation=found.interpolation.value,
    )


def _from_huggingface(
    name: str, *, num_classes: int, img_size: int | None, pretrained: bool, stem: str, drop_path: float
) -> nn.Module:
    if not huggingface.is_repository(name):
        _refuse_pretrained(f"hf:{name}", pretrained)
    if drop_path:
        raise _no_drop_path(f"hf:{name}", DROP_PATH)
    settings = {"num_classes": num_classes, "img_size": img_size}
    with _errors_of("hf", name, settings, cache=HUB_CACHE), _huggingface_download(name):
        model = huggingface.build(name, num_classes=num_classes, img_size=img_size, pretrained=pretrained)
    if stem == "cifar":
        keep_small_images(model, f"hf:{name}")
    return model


def _huggingface_again(name: str, **settings: Any) -> nn.Module:
    """Build a model as for pretrained weights: their image size is that of the configuration."""
    return _from_huggingface(name, **settings | {"img_size": None, "pretrained": False})


def _huggingface_size(name: str) -> int:
    with _errors_of("hf", name, {}, cache=HUB_CACHE), _huggingface_download(name):
        return huggingface.native_size(name) or USUAL_SIZE


def _huggingface_download(name: str) -> AbstractContextManager[None]:
    is_local = name.startswith((".", "/")) or Path(name).is_dir()
    return hub_or_its_cache() if huggingface.is_repository(name) and not is_local else nullcontext()


def _from_paper(
    name: str, *, num_classes: int, img_size: int, pretrained: bool, stem: str, drop_path: float
) -> nn.Module:
    spec = f"paper:{name}"
    if name not in NETWORKS:
        raise NoModelError(
            f"the paper has no network {shown(name)}, only {', '.join(NETWORKS)}{nearest(name, NETWORKS)}"
        )
    _refuse_pretrained(spec, pretrained)
    model = NETWORKS[name](num_classes, img_size, 3, **_drop_path_argument(DROP_PATH, drop_path))
    if stem == "cifar":
        keep_small_images(model, spec)
    return model


def _from_factory(
    source: str, name: str, *, num_classes: int, img_size: int, pretrained: bool, stem: str, drop_path: float
) -> nn.Module:
    spec = f"{source}:{name}"
    _refuse_pretrained(spec, pretrained)
    offered = {"num_classes": num_classes, "img_size": img_size}
    others = factories.Others("library", LIBRARIES, NoModelError)
    model = factories.call(source, name, offered, _drop_path_argument(DROP_PATH, drop_path), others=others)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{spec!r} returned {type(model).__name__}, not a torch.nn.Module")
    if stem == "cifar":
        keep_small_images(model, spec)
    return model


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """Describes the images that weights were trained on.

    They are `img_size` pixels wide, made so by `interpolation` ("bilinear", "bicubic" or another that torchvision
    knows). `mean` and `std` of each channel normalise pixels in [0, 1].
    """

    img_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """Describes a source of named models: how to build one, list them all, and find the image size of one.

    `preprocessing` tells how images were prepared for pretrained weights. `rebuild` builds without them what `build`
    makes for them, where that is another network than without.
    """

    build: Callable[..., nn.Module]
    names: Callable[[], list[str]]
    native_size: Callable[[str], int]
    preprocessing: Callable[[str], Preprocessing | None] = lambda _name: None
    rebuild: Callable[..., nn.Module] | None = None


LIBRARIES = {
    "timm": Library(build=_from_timm, names=_timm_names, native_size=_timm_size, preprocessing=_timm_preprocessing),
    "torchvision": Library(
        build=_from_torchvision,
        names=_torchvision_names,
        native_size=_torchvision_size,
        preprocessing=_torchvision_preprocessing,
        rebuild=partial(_from_torchvision, pretrained=True, downloads=False),
    ),
    "hf": Library(
        build=_from_huggingface,
        names=huggingface.names,
        native_size=_huggingface_size,
        rebuild=_huggingface_again,
    ),
    "paper": Library(build=_from_paper, names=lambda: list(NETWORKS), native_size=lambda _name: 32),
}


def _split(spec: str) -> tuple[str, str]:
    """Split a spec into source and name. Raises an error that suggests names where one of the two is missing."""
    source, _, name = spec.partition(":")
    if factories.is_file(source) and not name:
        found = ", ".join(f"{source}:{factory}" for factory in factories.names(source))
        raise UsageError(
            f"{source!r} is a file; name the function or class of it that builds the model: "
            f"{found or 'it defines none'}"
        )
    if not (source and name):
        raise NoModelError(f"{shown(spec)} is not the full name of a model{_full_names(spec) or f'; write {FORMS}'}")
    return source, name


@contextmanager
def _errors_of(library: str, name: str, settings: dict[str, Any], *, cache: str) -> Iterator[None]:
    """Turn the errors of a library into DataError and UsageError."""
    try:
        yield
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise UsageError(
                f"{shown_path(f'{library}:{name}')} comes with Python code of its own, which is not run; if you trust "
                "it, add --trust-code"
            ) from error
        if isinstance(error, ValueError):
            raise _cannot_build(library, name, settings, error) from error
        raise DataError(
            f"{shown_path(f'{library}:{name}')} cannot be downloaded or read ({reason(error)}); connect to the "
            f"network, copy its files into {cache}, start from a file of them by --initial-checkpoint, or do without"
        ) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # code that comes with a model may call sys.exit
        raise _cannot_build(library, name, settings, error) from error


def _cannot_build(library: str, name: str, settings: dict[str, Any], error: BaseException) -> UsageError:
    asked = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    return UsageError(f"{library} cannot build {shown(name)}{asked and f' with {asked}'}: {reason(error)}")


def _drop_path_argument(parameter: str, rate: float) -> dict[str, float]:
    """Return the argument for stochastic depth: none for a rate of 0, so that the builder's default holds."""
    return {parameter: rate} if rate else {}


@contextmanager
def _drop_path_of(spec: str, rate: float) -> Iterator[None]:
    """Turn the error of a builder that does not take the rate into UsageError. Only calling shows it: many hide it."""
    try:
        yield
    except (TypeError, UsageError) as error:
        cause = error if isinstance(error, TypeError) else error.__cause__
        for parameter in (DROP_PATH, TORCHVISION_DROP_PATH):
            # torchvision's Swin fixes the rate, and fails with a KeyError.
            if rate and isinstance(cause, TypeError | KeyError) and parameter in str(cause):
                raise _no_drop_path(spec, parameter) from cause
        raise


def _no_drop_path(spec: str, parameter: str) -> UsageError:
    return UsageError(f"{spec!r} takes no {parameter}, the rate of stochastic depth; leave out drop-path")


def _refuse_pretrained(spec: str, pretrained: bool) -> None:
    if pretrained:
        raise UsageError(f"{spec!r} has no pretrained weights; only models of timm, torchvision and hf:ORG/NAME have")


def _full_names(name: str) -> str:
    """Suggest the model that is called `name`, or nearly so, in every library that has it."""
    libraries: dict[str, list[str]] = {}
    for source, library in LIBRARIES.items():
        with suppress(UsageError):  # of a library that is not installed
            libraries[source] = library.names()
    best = closest(name, sorted({model for known in libraries.values() for model in known}))[:1]
    full = [f"{source}:{model}" for model in best for source, known in libraries.items() if model in known]
    return f"; did you mean {' or '.join(map(repr, full))}?" if full else ""
