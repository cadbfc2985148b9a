"""Builds a model from one line of text: `timm:NAME`, `torchvision:NAME`, `hf:TYPE`, `paper:NAME`, `file.py:FACTORY` or
`pkg.module:FACTORY`. Before the first colon stands the source, after it what to take from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import nn

from fxsplit.errors import NoModelError, UsageError, closest, nearest, shown
from fxsplit.models.libraries import huggingface, paper, timm, torchvision
from fxsplit.models.libraries.library import (
    DROP_PATH,
    USUAL_SIZE,
    Preprocessing,
    drop_path_argument,
    no_drop_path,
    refuse_pretrained,
)
from fxsplit.models.surgery import keep_small_images
from fxsplit.objects import factories

STEMS = ("original", "cifar")
FORMS = "timm:NAME, torchvision:NAME, hf:TYPE, hf:ORG/NAME, paper:NAME, file.py:FACTORY or pkg.module:FACTORY"
LIBRARIES = {
    "timm": timm.LIBRARY,
    "torchvision": torchvision.LIBRARY,
    "hf": huggingface.LIBRARY,
    "paper": paper.LIBRARY,
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


def smallest(specs: Iterable[str]) -> str:
    """Find the model with the fewest parameters, the first of equals."""

    def parameter_count(spec: str) -> int:
        model = sketch(spec, num_classes=1000, img_size=native_size(spec))
        return sum(parameter.numel() for parameter in model.parameters())

    return min(specs, key=parameter_count)


def _from_factory(
    source: str, name: str, *, num_classes: int, img_size: int, pretrained: bool, stem: str, drop_path: float
) -> nn.Module:
    spec = f"{source}:{name}"
    refuse_pretrained(spec, pretrained)
    offered = {"num_classes": num_classes, "img_size": img_size}
    others = factories.Others("library", LIBRARIES, NoModelError)
    model = factories.call(source, name, offered, drop_path_argument(DROP_PATH, drop_path), others=others)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{spec!r} returned {type(model).__name__}, not a torch.nn.Module")
    if stem == "cifar":
        keep_small_images(model, spec)
    return model


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
def _drop_path_of(spec: str, rate: float) -> Iterator[None]:
    """Turn the error of a builder that does not take the rate into UsageError. Only calling shows it: many hide it."""
    try:
        yield
    except (TypeError, UsageError) as error:
        cause = error if isinstance(error, TypeError) else error.__cause__
        for parameter in (DROP_PATH, torchvision.STOCHASTIC_DEPTH):
            # torchvision's Swin fixes the rate, and fails with a KeyError.
            if rate and isinstance(cause, TypeError | KeyError) and parameter in str(cause):
                raise no_drop_path(spec, parameter) from cause
        raise


def _full_names(name: str) -> str:
    """Suggest the model that is called `name`, or nearly so, in every library that has it."""
    libraries: dict[str, list[str]] = {}
    for source, library in LIBRARIES.items():
        with suppress(UsageError):  # of a library that is not installed
            libraries[source] = library.names()
    best = closest(name, sorted({model for known in libraries.values() for model in known}))[:1]
    full = [f"{source}:{model}" for model in best for source, known in libraries.items() if model in known]
    return f"; did you mean {' or '.join(map(repr, full))}?" if full else ""
