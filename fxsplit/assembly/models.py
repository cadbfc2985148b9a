"""The model of a run: built, given weights, traced."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from fxsplit.assembly.images import in_layout
from fxsplit.capture import tracing as capture
from fxsplit.capture.tracing import Trace
from fxsplit.data import datasets
from fxsplit.data.decoding import INTERPOLATIONS
from fxsplit.data.images import Data
from fxsplit.errors import UsageError
from fxsplit.models import registry
from fxsplit.models.examples import Example, example, takes_images
from fxsplit.models.weights import load_weights, read_weights
from fxsplit.options import key
from fxsplit.report import Observer
from fxsplit.spec import RunSpec

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


def model(spec: RunSpec, device: torch.device, observer: Observer, *, goes_on: bool = False) -> nn.Module:
    """Build the model of a run, for the classes and sizes of its data, which are not loaded for that.

    It starts from the weights that the spec names, unless the run `goes_on` and has others.

    Raises UsageError when it takes something other than images, and what `registry.build`, `read_weights`,
    `load_weights` and `datasets.describe` raise.
    """
    observer.working(f"building {spec.model}")
    weights = None if goes_on or spec.initial_checkpoint is None else read_weights(spec.initial_checkpoint)
    classes, img_size = datasets.describe(spec.data, img_size=spec.img_size)
    model = registry.build(
        spec.model,
        num_classes=classes,
        img_size=img_size,
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
        observer.notice(load_weights(model, weights, source=str(spec.initial_checkpoint), num_classes=classes))
    return in_layout(spec, model.to(device))


def trace(spec: RunSpec, model: nn.Module, data: Data) -> Trace:
    """Capture the model of a run, with images as it trains on.

    Raises TraceError as `fxsplit.trace` does, and UsageError when the model has fewer class scores than there are
    classes.
    """
    images = torch.empty(2, data.channels, data.img_size, data.img_size, device=data.train.device)
    found = capture.trace(model, (in_layout(spec, images),))
    values = found.train.values
    shape = next((values[name].shape for name in found.train.outputs), None)
    if shape is not None and len(shape) == 2 and shape[1] < len(data.classes):
        raise UsageError(
            f"{spec.model!r} gives {shape[1]} class scores, and {spec.data!r} has {len(data.classes)} classes; a "
            "factory that takes num_classes is told how many"
        )
    return found


def example_inputs(spec: RunSpec, model: nn.Module, img_size: int, device: torch.device) -> Example:
    """Make a batch of images as `train` would give them, or of whatever else the model takes."""
    if not takes_images(model):
        return example(spec.model, model, batch_size=spec.batch_size, img_size=img_size, training=True, device=device)
    return Example(args=(in_layout(spec, torch.rand(spec.batch_size, 3, img_size, img_size, device=device)),))
