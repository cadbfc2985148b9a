"""Starts a model from a file of weights. Reading one runs no code."""

from __future__ import annotations

import os
import re
import warnings
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fxsplit.errors import UsageError, nearest, printable, reason, shown_path
from fxsplit.paths import expanded

# Of a run's folder.
WEIGHTS_FILE = "model.safetensors"
# Where training scripts put the weights in what they save. Averages are taken only where there is nothing else.
NESTED = ("state_dict", "model", "state_dict_ema", "model_ema")
# What DistributedDataParallel and torch.compile put before names.
WRAPPERS = ("module.", "_orig_mod.")
# Of a model's tensors, the share that must be in a file of its weights. Unrelated models share a few by chance.
LEAST_SHARE = 0.5
# What stands in a sentence: so many names, and so many characters of them or of a library's error.
NAMED, MOST_WORDS = 3, 200


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors in a file, by name, to the CPU.

    The file is what `safetensors` or `torch.save` writes: tensors by name, or a dict that has them as `state_dict`,
    `model`, `state_dict_ema` or `model_ema`, the first of these. Of a run's folder it is model.safetensors.

    Raises UsageError when there is no such file, it is broken, reading it would run code, or it holds no tensors.
    """
    file = expanded(path)
    if os.path.isdir(file):
        file /= WEIGHTS_FILE
    if not os.path.isfile(file):
        beside = (each.name for each in file.parent.glob("*"))
        raise UsageError(f"there is no file of weights {shown_path(file)}{nearest(file.name, beside)}")
    found = _read(file)
    if isinstance(found, Mapping):
        found = next((found[key] for key in NESTED if isinstance(found.get(key), Mapping)), found)
        tensors = {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}
        if tensors:
            return tensors
    raise UsageError(f"{str(file)!r} holds no weights: it is no dict of tensors, and has none as {', '.join(NESTED)}")


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, source: str, num_classes: int) -> str:
    """Copy `weights` into the tensors of the same names in `model`, and return a sentence about what was copied.

    Names may begin with `module.` or `_orig_mod.`. Tensors that have another number of classes there start at zero, so
    that a new head sends no random gradients into pretrained weights (Kolesnikov et al., Big transfer, 2020). Those
    that are missing stay as they are.

    Args:
        model: is changed in place.
        weights: as `read_weights` returns them.
        source: where they are from, for the sentence and the error.
        num_classes: of the model.

    Raises UsageError, and leaves the model as it is, when the weights are those of another model: fewer than half of
    its tensors are there, or one has another shape for another reason than the number of classes.
    """
    own: dict[str, Tensor] = {
        name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)
    }
    given = {_without_wrappers(name, own): value for name, value in weights.items()}
    shared = [name for name in own if name in given]
    unlike = [name for name in shared if given[name].shape != own[name].shape]
    heads = [name for name in unlike if _is_head(own[name], given[name], num_classes)]
    fitting = {name: given[name] for name in shared if name not in unlike}
    # Tied tensors have several names, and a file may have only one of these.
    present = {id(own[name]) for name in shared}
    missing = [name for name, value in own.items() if id(value) not in present]
    unexpected = [name for name in given if name not in own]
    if len(missing) > (1 - LEAST_SHARE) * len(own):
        raise UsageError(
            f"{source!r} holds the weights of another model: of {len(own)} tensors {len(missing)} are missing "
            f"({_first(missing)}), and {len(unexpected)} are unexpected{_listed(unexpected)}"
        )
    if other := [name for name in unlike if name not in heads]:
        name = other[0]
        raise UsageError(
            f"{source!r} holds the weights of another model: {_first([name])} has the shape "
            f"{tuple(given[name].shape)} there and {tuple(own[name].shape)} here"
            f"{f', and {len(other) - 1} more differ' if len(other) > 1 else ''}"
        )
    try:
        model.load_state_dict(fitting, strict=False)
    except RuntimeError as error:  # of tensors without numbers, or a hook of the model's
        said = printable(" ".join(str(error).split()))
        raise UsageError(f"{source!r} cannot be loaded: {said[:MOST_WORDS]}") from error
    with torch.no_grad():
        for name in heads:
            own[name].zero_()
    sentences = [f"{len(own) - len(missing) - len(heads)} of {len(own)} tensors start from {source!r}"]
    if heads:
        sentences.append(f"those for another number of classes start at zero: {_first(heads)}")
    if missing:
        sentences.append(f"{len(missing)} are missing there: {_first(missing)}")
    if unexpected:
        sentences.append(f"{len(unexpected)} in the file are not the model's: {_first(unexpected)}")
    return "; ".join(sentences)


def _read(file: Path) -> Any:
    try:
        if file.suffix.lower() == ".safetensors":
            return safetensors.torch.load_file(file)
        # timm's training script saves its arguments beside the weights. A namespace only holds values.
        with warnings.catch_warnings(), torch.serialization.safe_globals([Namespace]):
            warnings.simplefilter("ignore")  # whatever is wrong is said below
            return torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        if wanted := re.search(r"GLOBAL (\S+)", str(error)):
            raise UsageError(
                f"{str(file)!r} is not read: it asks for {printable(wanted[1])}, which is code; save the weights "
                "alone, by torch.save(model.state_dict(), FILE) or as safetensors"
            ) from error
        raise _unreadable(file, "it is broken, or pickled otherwise") from error
    except Exception as error:  # every kind of broken file fails in its own way
        raise _unreadable(file, reason(error)) from error


def _unreadable(file: Path, why: str) -> UsageError:
    return UsageError(
        f"{str(file)!r} cannot be read; weights are what safetensors or torch.save writes "
        f"({printable(why)[:MOST_WORDS]})"
    )


def _without_wrappers(name: str, known: Mapping[str, Tensor]) -> str:
    while name not in known and name.startswith(WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def _is_head(own: Tensor, given: Tensor, num_classes: int) -> bool:
    """Whether two tensors of other shapes differ in nothing but the number of classes."""
    return own.dim() > 0 and own.shape[0] == num_classes and own.shape[1:] == given.shape[1:] and given.dim() > 0


def _first(names: Iterable[str]) -> str:
    listed = list(names)
    return printable(", ".join(listed[:NAMED]))[:MOST_WORDS] + (", ..." if len(listed) > NAMED else "")


def _listed(names: list[str]) -> str:
    return f" ({_first(names)})" if names else ""
