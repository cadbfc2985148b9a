"""Finds the model of a run, and makes it ready to call: `load`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model
from torch import nn

from fxsplit.arguments import require
from fxsplit.assembly.devices import choose_device
from fxsplit.errors import DataError, UsageError, printable, reason, shown_path
from fxsplit.models import registry
from fxsplit.models.weights import WEIGHTS_FILE
from fxsplit.paths import expanded
from fxsplit.resuming import CHECKPOINTS, RECIPE
from fxsplit.saving.checkpoint import FORMAT, read_checkpoint
from fxsplit.saving.model_config import MODEL_CONFIG, ModelConfig, parse_model_config, read_model_config
from fxsplit.saving.run_state import load_model_state
from fxsplit.spec import read_values
from fxsplit.trained.model import TrainedModel
from fxsplit.trust import is_code, trusting_code

# What stands in a sentence of a library's error.
MOST_WORDS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """Says where a model is saved.

    Args:
        weights: the file of its weights: `model.safetensors`, or a checkpoint.
        folder: of its run, or where the file is.
        config: how it is used.
        is_checkpoint: whether the file is a checkpoint.
    """

    weights: Path
    folder: Path
    config: ModelConfig
    is_checkpoint: bool


def load(run: str | Path, device: str | torch.device = "cpu", *, trust_code: bool = False) -> TrainedModel:
    """Load the model of a run, ready to call: in evaluation mode, with its classes and the preparation of images.

    Args:
        run: the folder of a run, its `model.safetensors`, wherever that is now, or a file in its `checkpoints/`.
        device: where the model is to be, as `RunSpec.device`.
        trust_code: run the Python file or module that builds a model of `file.py:FACTORY`, and code that comes with a
            model of Hugging Face. No other model runs code.

    Raises UsageError when there is no such run, it ended without weights, it was made by a version that did not save
    how its model is used, or its model wants `trust_code`; DataError when a file is damaged or holds another model; and
    what building the model raises.
    """
    chosen = device if isinstance(device, torch.device) else choose_device(read_values({"device": device})["device"])
    saved = find(run)
    with torch.random.fork_rng(devices=[]):  # first weights are drawn, and loaded over
        model = _build(saved, trust_code=trust_code)
    _load_weights(model, saved)
    model.to(chosen)
    if saved.config.channels_last:
        model.to(memory_format=torch.channels_last)
    return TrainedModel(model, saved.config).eval()


def find(run: str | Path) -> Saved:
    """Find the weights of a run's model, and how it is used. Raises UsageError and DataError as `load` does."""
    require("run", run, (str, os.PathLike), "a path", "that of a run is in its report, as report.folder")
    path = expanded(run)
    if os.path.isfile(path):  # unlike Path.is_file, it takes a name that is too long for one that is not there
        return _of_file(path)
    if not os.path.isdir(path):
        raise UsageError(f"there is no run {shown_path(run)}; give the folder of a run, or its {WEIGHTS_FILE}")
    weights = path / WEIGHTS_FILE
    if not weights.is_file():
        raise UsageError(_without_weights(path))
    config = path / MODEL_CONFIG
    if not config.is_file():
        return _of_file(weights)
    return Saved(weights=weights, folder=path, config=read_model_config(config), is_checkpoint=False)


def _of_file(path: Path) -> Saved:
    metadata = _metadata(path)
    if metadata.get("format") == FORMAT:
        folder = path.resolve().parent.parent
        if not (folder / MODEL_CONFIG).is_file():
            raise UsageError(
                f"the folder {str(folder)!r} of the checkpoint {path.name!r} has no {MODEL_CONFIG}, which says how its "
                "model is used; a run of an older version gets one when it goes on by fxsplit train --resume"
            )
        return Saved(weights=path, folder=folder, config=read_model_config(folder / MODEL_CONFIG), is_checkpoint=True)
    if MODEL_CONFIG not in metadata:
        raise UsageError(
            f"{str(path)!r} does not say how its model is used, as those of older versions and of other programs; "
            "fxsplit train --initial-checkpoint takes its weights"
        )
    config = parse_model_config(metadata[MODEL_CONFIG], origin=str(path))
    return Saved(weights=path, folder=path.parent, config=config, is_checkpoint=False)


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(
            f"{str(path)!r} is no whole safetensors file ({printable(reason(error))[:MOST_WORDS]}); give the folder of "
            f"a run, its {WEIGHTS_FILE} or one of its {CHECKPOINTS}/"
        ) from error


def _without_weights(folder: Path) -> str:
    """Say why a folder has no weights, and what to do."""
    checkpoints = sorted((folder / CHECKPOINTS).glob("*.safetensors"))
    if checkpoints:
        return (
            f"the run {str(folder)!r} has not ended and has no {WEIGHTS_FILE}; go on by fxsplit train --resume "
            f"{folder}, or use its checkpoint {checkpoints[-1]}"
        )
    if (folder / RECIPE).is_file():
        return f"the run {str(folder)!r} has neither {WEIGHTS_FILE} nor checkpoints; it ended before anything was saved"
    return f"{str(folder)!r} is not the folder of a run: it has no {WEIGHTS_FILE}"


def _build(saved: Saved, *, trust_code: bool) -> nn.Module:
    config, spec = saved.config, saved.config.model
    if is_code(spec):
        source, _, factory = spec.partition(":")
        file = config.file if config.file and Path(config.file).is_file() else source
        if not trust_code:
            raise UsageError(
                f"the model {spec!r} is built by running {file!r}; if you trust that code, give trust_code=True, or "
                "--trust-code on the command line"
            )
        spec = f"{file}:{factory}"
    with trusting_code(trust_code):
        return registry.rebuild(
            spec,
            num_classes=len(config.classes),
            img_size=config.img_size,
            pretrained=config.pretrained,
            stem=config.stem,
            drop_path=config.drop_path,
        )


def _load_weights(model: nn.Module, saved: Saved) -> None:
    """Load all weights, each into its own tensor. Raises DataError when the file is damaged or of another model."""
    try:
        if saved.is_checkpoint:
            load_model_state(model, _model_state(saved.weights))
        else:
            load_model(model, saved.weights)
    except (SafetensorError, OSError, RuntimeError, UsageError) as error:
        said = printable(" ".join(str(error).split()))[:MOST_WORDS]
        raise DataError(
            f"the weights in {str(saved.weights)!r} are not those of {saved.config.model!r} as it is built now, or are "
            f"damaged: {said}"
        ) from error


def _model_state(path: Path) -> Any:
    """Read the weights of a checkpoint: averages where the run keeps some, by which it is tested."""
    state = read_checkpoint(path).get("state")
    if not isinstance(state, dict) or "model" not in state:
        raise DataError(f"{path.name} is no checkpoint of a run")
    means = state.get("training", {}).get("ema", {}).get("means", {})
    return {part: {name: means.get(name, each) for name, each in held.items()} for part, held in state["model"].items()}
