"""A model from one line of text: `timm:NAME`, `torchvision:NAME`, `paper:NAME`, `file.py:FACTORY` or
`pkg.module:FACTORY`. What stands before the first colon says where to look, the rest what to take there.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from fxsplit.capture.paper import NETWORKS
from fxsplit.errors import DataError, UsageError, nearest

STEMS = ("original", "cifar")
FORMS = "timm:NAME, torchvision:NAME, paper:NAME, file.py:FACTORY or pkg.module:FACTORY"


def build(spec: str, *, num_classes: int, img_size: int, pretrained: bool = False, stem: str = "original") -> nn.Module:
    """The model that `spec` names, for images (N, 3, img_size, img_size) of `num_classes` classes.

    A factory gets those of `num_classes` and `img_size` that its signature names. Pretrained weights come
    from timm or torchvision; a classifier for another number of classes starts anew.

    `stem="cifar"` keeps a stem made for large images from throwing small ones away. A strided first
    convolution becomes 3x3 at stride 1 (a 3x3 kernel keeps its weights, a larger one starts anew), and the
    first pooling after it the identity, unless a block of several convolutions comes between. timm's models
    that are built for one image size get patches of 4 pixels instead.

    Nothing is seeded here: weights are drawn from torch's global random state.

    Raises UsageError when there is no such model, it cannot be built as asked or has no such stem, and
    DataError when it cannot be downloaded or read.
    """
    source, _, name = spec.partition(":")
    if not (source and name):
        raise UsageError(f"{spec!r} is not the full name of a model{_full_names(spec) or f'; write {FORMS}'}")
    if stem not in STEMS:
        raise UsageError(f"there is no stem {stem!r}, only {' and '.join(STEMS)}{nearest(stem, STEMS)}")
    scheme = SCHEMES.get(source) or partial(_from_factory, source)
    return scheme(name, num_classes=num_classes, img_size=img_size, pretrained=pretrained, stem=stem)


def _from_timm(name: str, *, num_classes: int, img_size: int, pretrained: bool, stem: str) -> nn.Module:
    import timm

    if ":" not in name and not timm.is_model(name):
        raise UsageError(f"timm has no model {name!r}{nearest(name, timm.list_models())}")
    settings: dict[str, Any] = {"num_classes": num_classes}
    with _errors_of("timm", name, settings, cache="Hugging Face's cache (HF_HOME)"):
        one_size = _is_for_one_size(name)
        if one_size:
            settings["img_size"] = img_size
            if stem == "cifar":
                settings["patch_size"] = 4
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **settings)
    if stem == "cifar" and not one_size:
        _keep_small_images(model, f"timm:{name}")
    return model


def _is_for_one_size(name: str) -> bool:
    """Whether a timm model must be told the image size, which by timm's convention its configuration says."""
    from timm import models

    source, address = models.parse_model_name(name)
    if source == "hf-hub":
        return bool(models.load_model_config_from_hf(address)[0].get("fixed_input_size"))
    config = models.get_pretrained_cfg(name)
    return bool(config and config.fixed_input_size)


def _from_torchvision(name: str, *, num_classes: int, img_size: int, pretrained: bool, stem: str) -> nn.Module:
    from torchvision import models

    if name not in models.list_models():
        raise UsageError(f"torchvision has no model {name!r}{nearest(name, models.list_models())}")
    builder = models.get_model_builder(name)
    # these builders hide the argument behind **kwargs
    size_arguments: dict[str, dict[str, Any]] = {
        "torchvision.models.vision_transformer": {"image_size": img_size},
        "torchvision.models.maxvit": {"input_size": (img_size, img_size)},
    }
    sizes = size_arguments.get(builder.__module__, {})
    if sizes and stem == "cifar":
        raise UsageError(f"the stem of 'torchvision:{name}' cannot change, because all its layers depend on it")
    settings = {**sizes, **({"weights": "DEFAULT"} if pretrained else {"num_classes": num_classes})}
    if "weights_backbone" in inspect.signature(builder).parameters:
        settings["weights_backbone"] = None
    with (
        _errors_of("torchvision", name, settings, cache="torch's cache (TORCH_HOME)"),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "The default weight initialization of", FutureWarning)
        model: nn.Module = builder(**settings)
    if pretrained:
        weights = models.get_model_weights(name).DEFAULT
        _fit_classifier(model, f"torchvision:{name}", len(weights.meta.get("categories", ())), num_classes)
    if stem == "cifar":
        _keep_small_images(model, f"torchvision:{name}")
    return model


def _from_paper(name: str, *, num_classes: int, img_size: int, pretrained: bool, stem: str) -> nn.Module:
    spec = f"paper:{name}"
    if name not in NETWORKS:
        raise UsageError(f"the paper has no network {name!r}, only {', '.join(NETWORKS)}{nearest(name, NETWORKS)}")
    _refuse_pretrained(spec, pretrained)
    model = NETWORKS[name](num_classes, img_size, 3)
    if stem == "cifar":
        _keep_small_images(model, spec)
    return model


def _from_factory(source: str, name: str, *, num_classes: int, img_size: int, pretrained: bool, stem: str) -> nn.Module:
    spec = f"{source}:{name}"
    _refuse_pretrained(spec, pretrained)
    is_file = source.endswith(".py")
    with _importable(Path(source).expanduser().parent if is_file else Path()):
        module = _import_file(source) if is_file else _import_module(source, spec)
        factory = getattr(module, name, None)
        if not callable(factory):
            callables = [key for key, value in vars(module).items() if callable(value)]
            raise UsageError(f"{source!r} has no function or class {name!r}{nearest(name, callables)}")
        try:
            named = inspect.signature(factory).parameters
            offered = {"num_classes": num_classes, "img_size": img_size}
            model = factory(**{key: value for key, value in offered.items() if key in named})
        except Exception as error:
            raise UsageError(f"{spec!r} raised {type(error).__name__}: {_reason(error)}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{spec!r} returned {type(model).__name__}, not a torch.nn.Module")
    if stem == "cifar":
        _keep_small_images(model, spec)
    return model


SCHEMES: dict[str, Callable[..., nn.Module]] = {
    "timm": _from_timm,
    "torchvision": _from_torchvision,
    "paper": _from_paper,
}


def _import_file(source: str) -> ModuleType:
    path = Path(source).expanduser()
    if not path.is_file():
        beside = (file.name for file in path.parent.glob("*.py"))
        raise UsageError(f"there is no file {source!r}{nearest(path.name, beside)}")
    path = path.resolve()
    # a name of its own, so that a file called torch.py hides nothing; pickle and dataclasses look it up
    name = f"{path.stem}_{sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UsageError(f"{source!r} cannot be imported: {type(error).__name__}: {_reason(error)}") from error
    return module


def _import_module(source: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(source)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{source}.".startswith(f"{missing}."):
            raise UsageError(
                f"{source!r} in {spec!r} is no library ({', '.join(SCHEMES)}), no .py file and no module "
                f"that can be imported{nearest(source, SCHEMES)}"
            ) from error
        raise UsageError(f"{source!r} cannot be imported: {type(error).__name__}: {_reason(error)}") from error


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let a user's code import what lies beside it, as `python file.py` and `python -m` do."""
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


def _fit_classifier(model: nn.Module, spec: str, known_classes: int, num_classes: int) -> None:
    """Replace the last linear layer of a pretrained model, in place, unless its classes are those wanted."""
    if known_classes == num_classes:
        return
    linears = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linears or linears[-1][1].out_features != known_classes:
        raise UsageError(
            f"the pretrained {spec!r} does not end in a linear layer that could be replaced by one of "
            f"{num_classes} classes; build it without pretrained weights"
        )
    path, last = linears[-1]
    model.set_submodule(path, nn.Linear(last.in_features, num_classes, bias=last.bias is not None))


def _keep_small_images(model: nn.Module, spec: str) -> None:
    """Give `model`, in place, the stem that `build` describes as "cifar"."""
    convolutions = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    if not convolutions or max(convolutions[0][1].stride) == 1:
        raise UsageError(f"{spec!r} has no stem to change: it does not begin with a strided convolution")
    path, conv = convolutions[0]
    if hasattr(model.get_submodule(path.rpartition(".")[0]), "patch_size"):
        raise UsageError(f"the stem of {spec!r} cannot change, because all its layers depend on its patches")
    if conv.kernel_size == (3, 3):
        conv.stride = conv.padding = (1, 1)
    else:
        bias = conv.bias is not None
        small = type(conv)(conv.in_channels, conv.out_channels, 3, stride=1, padding=1, groups=conv.groups, bias=bias)
        model.set_submodule(path, small)
    if pooling := _stem_pooling(model, path):
        model.set_submodule(pooling, nn.Identity())


def _stem_pooling(model: nn.Module, conv_path: str) -> str | None:
    """Path of the first pooling that is registered after the first convolution and before any block."""
    modules: list[tuple[str, nn.Module]] = list(model.named_modules())
    start = [path for path, _ in modules].index(conv_path) + 1
    for path, module in modules[start:]:
        if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            return path
        if sum(isinstance(inner, nn.Conv2d) for inner in module.modules()) > 1:
            return None
    return None


@contextmanager
def _errors_of(library: str, name: str, settings: dict[str, Any], *, cache: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"'{library}:{name}' cannot be downloaded or read ({_reason(error)}); connect to the network, "
            f"copy its files into {cache}, or do without pretrained weights"
        ) from error
    except Exception as error:
        asked = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        raise UsageError(f"{library} cannot build {name!r} with {asked}: {_reason(error)}") from error


def _refuse_pretrained(spec: str, pretrained: bool) -> None:
    if pretrained:
        raise UsageError(f"{spec!r} has no pretrained weights; only models of timm and torchvision have")


def _full_names(name: str) -> str:
    """A hint naming the model that is called `name`, or nearly so, in every library that has it."""
    import timm
    from torchvision import models

    libraries = {"paper": list(NETWORKS), "timm": timm.list_models(), "torchvision": models.list_models()}
    best = get_close_matches(name, sorted({model for known in libraries.values() for model in known}), n=1)
    full = [f"{library}:{model}" for model in best for library, known in libraries.items() if model in known]
    return f"; did you mean {' or '.join(map(repr, full))}?" if full else ""


def _reason(error: Exception) -> str:
    """The first line of what `error` says, fit to stand inside a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
