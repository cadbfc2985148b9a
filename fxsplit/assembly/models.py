"""The model of a run: built, given weights, traced."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from fxsplit.assembly.images import CHANNELS, Kind, in_layout
from fxsplit.capture import tracing as capture
from fxsplit.capture.tracing import Trace
from fxsplit.data.reading.decoding import INTERPOLATIONS
from fxsplit.errors import UsageError, shown_path
from fxsplit.graph import Graph
from fxsplit.models import registry
from fxsplit.models.examples import Example, example, takes_images
from fxsplit.models.weights import load_weights, read_weights
from fxsplit.options import key
from fxsplit.report import Observer
from fxsplit.spec import RunSpec

# BatchNorm takes no statistics of a single image.
IMAGES_TRACED = 2
# Fields that pretrained weights decide where the user does not, and how these look then.
PREPARED, NOT_GIVEN = ("img_size", "interpolation", "mean", "std"), (None, ())


def with_preprocessing(spec: RunSpec, observer: Observer) -> RunSpec:
    """Add to a spec how images were prepared for its pretrained weights, where it does not say that itself.

    Raises what `registry.preprocessing` raises.
    """
    if not spec.pretrained or all(getattr(spec, name) not in NOT_GIVEN for name in PREPARED):
        return spec
    known = registry.preprocessing(spec.model)
    if known is None:
        if not spec.mean:
            observer.notice(
                f"it is not known how images were prepared for the weights of {spec.model!r}; give --mean and --std"
            )
        return spec
    wanted = {name: getattr(known, name) for name in PREPARED if getattr(spec, name) in NOT_GIVEN}
    if wanted.get("interpolation") not in INTERPOLATIONS:
        wanted.pop("interpolation", None)
    values = ", ".join(
        f"{key(name)} {','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in wanted.items()
    )
    if values:
        observer.notice(f"as the pretrained weights of {spec.model!r} want it, images have {values}; options win")
    return replace(spec, **wanted)


def model(spec: RunSpec, kind: Kind, device: torch.device, observer: Observer, *, goes_on: bool = False) -> nn.Module:
    """Build the model of a run, for the `kind` of its images.

    It starts from the weights that the spec names, unless the run `goes_on` and has others.

    Raises UsageError when it takes something other than images, and what `registry.build`, `read_weights` and
    `load_weights` raise.
    """
    observer.working(f"building {spec.model}")
    weights = None if goes_on or spec.initial_checkpoint is None else read_weights(spec.initial_checkpoint)
    model = registry.build(
        spec.model,
        num_classes=kind.classes,
        img_size=kind.img_size,
        pretrained=spec.pretrained and not goes_on,
        stem=spec.stem,
        drop_path=spec.drop_path,
    )
    if not takes_images(model):
        raise UsageError(
            f"train takes image classifiers, and {spec.model!r} takes no images; give it its own data in a loop of "
            "your own around fxsplit.Executor"
        )
    if weights is not None:
        observer.notice(load_weights(model, weights, source=str(spec.initial_checkpoint), num_classes=kind.classes))
    return in_layout(spec, model.to(device))


def trace(spec: RunSpec, model: nn.Module, kind: Kind, device: torch.device) -> Trace:
    """Capture the model of a run, with images as it trains on.

    Raises TraceError as `fxsplit.trace` does, and UsageError when the model returns anything but scores of at least so
    many classes as there are.
    """
    images = torch.empty(IMAGES_TRACED, CHANNELS, kind.img_size, kind.img_size, device=device)
    found = capture.trace(model, (in_layout(spec, images),))
    for graph in (found.train, found.eval):
        _refuse_other_than_scores(spec, kind, graph)
    return found


def _refuse_other_than_scores(spec: RunSpec, kind: Kind, graph: Graph) -> None:
    shapes = [graph.values[name].shape for name in graph.outputs]
    shape = shapes[0] if shapes else None
    if shapes and shape is None:
        return  # an object, such as an output class of Hugging Face, in which the first batch finds the scores
    if shape is None or len(shape) != 2 or shape[0] != IMAGES_TRACED:
        given = "no tensor" if shape is None else f"values of shape {' x '.join(map(str, shape)) or '()'}"
        raise UsageError(
            f"{shown_path(spec.model)} returns {given} for {IMAGES_TRACED} images, and train needs a score of each "
            "class for each image; end the model in pooling, a flattening and a linear layer"
        )
    if shape[1] < kind.classes:
        raise UsageError(
            f"{shown_path(spec.model)} gives {shape[1]} class scores, and {shown_path(spec.data)} has {kind.classes} "
            "classes; a factory that takes num_classes is told how many"
        )


def example_inputs(spec: RunSpec, model: nn.Module, img_size: int, device: torch.device) -> Example:
    """Make a batch of images as `train` would give them, or of whatever else the model takes."""
    if not takes_images(model):
        return example(spec.model, model, batch_size=spec.batch_size, img_size=img_size, training=True, device=device)
    return Example(args=(in_layout(spec, torch.rand(spec.batch_size, 3, img_size, img_size, device=device)),))
