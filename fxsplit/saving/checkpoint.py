"""A checkpoint: nested plain data with tensors in one safetensors file, which says itself whether it is whole.

    {"step": 3, "betas": (0.9, 0.99), "mean": tensor}
              │                          │
              ▼                          ▼
    JSON, in the file's metadata    the file's tensors: dense, each storage once        sha256 of both, in the metadata

No code is run when it is read. Names of tensors are where they stand in the data, for other tools to find.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxsplit.errors import DataError
from fxsplit.saving.files import replacing

FORMAT = "fxsplit checkpoint 1"
# The longest header that is read: more than any checkpoint has, and no danger for memory.
MOST_HEADER_BYTES = 100_000_000
DTYPES = {name: each for name, each in vars(torch).items() if isinstance(each, torch.dtype)}


def write_checkpoint(path: Path, data: Mapping[str, Any], *, summary: Mapping[str, Any]) -> None:
    """Write plain data with tensors as a file, whole or not at all.

    Args:
        path: of the file.
        data: dicts, lists, tuples, text, numbers, booleans, None, types of tensors, and tensors on any device.
        summary: JSON that `read_summary` finds without reading the rest.

    Raises TypeError for anything else, which is named, and OSError when the file cannot be written.
    """
    writer = _Writer()
    text = json.dumps({"summary": dict(summary), "data": writer.plain(data, "")}, allow_nan=False)
    metadata = {"format": FORMAT, "data": text, "sha256": _digest(text, writer.tensors)}
    try:
        with replacing(path) as part:
            save_file(writer.tensors, part, metadata=metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `write_checkpoint` wrote; tensors are on the CPU. Raises DataError when the file is not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies: the file may be replaced while they are used.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path.name} cannot be read: {_reason(error)}") from error
    if metadata.get("format") != FORMAT:
        raise DataError(f"{path.name} is no checkpoint that this version reads")
    text = metadata.get("data", "")
    if metadata.get("sha256") != _digest(text, tensors):
        raise DataError(f"{path.name} is damaged: its checksum is another")
    try:
        data: dict[str, Any] = _read(json.loads(text)["data"], tensors)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
        # Its checksum is right, so somebody else wrote it.
        raise DataError(f"{path.name} is no checkpoint that this version reads") from error
    return data


def read_summary(path: Path) -> dict[str, Any]:
    """Read the summary of a checkpoint alone, unchecked. Raises DataError when it cannot be read."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, MOST_HEADER_BYTES)))
        summary = dict(json.loads(header["__metadata__"]["data"])["summary"])
    except (OSError, ValueError, KeyError, TypeError, struct.error, RecursionError) as error:
        raise DataError(f"{path.name} cannot be read: {_reason(error)}") from error
    return summary


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):  # safetensors' own has no words of the system
        return "it is not there"
    return getattr(error, "strerror", None) or "it is no whole safetensors file"


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the checksum of a checkpoint's JSON and of its tensors: names, types, shapes and bytes."""
    found = hashlib.sha256(text.encode("utf-8"))
    for name, tensor in sorted(tensors.items()):
        found.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


class _Writer:
    """Turns plain data with tensors into JSON, in which tensors stand by name.

    What JSON lacks is an object with a single key, its kind: {"tuple": [...]}, {"dict": [[key, value], ...]},
    {"float": "nan"}, {"dtype": "float16"}, {"tensor": ...}. So no other object is written, and each is read back as it
    was.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        # By place in memory, what stands for a tensor. The tensor is there too, so that no other one can get its place.
        self._written: dict[tuple[object, ...], tuple[Any, Tensor]] = {}
        self._storages: set[int] = set()

    def plain(self, value: Any, path: str) -> Any:
        """Return `value`, which stands at `path`, as JSON."""
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"float": repr(float(value))}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if isinstance(value, Mapping):
            return {"dict": [[self.plain(key, path), self.plain(each, f"{path}/{key}")] for key, each in value.items()]}
        if isinstance(value, list | tuple):
            items = [self.plain(each, f"{path}/{index}") for index, each in enumerate(value)]
            return {"tuple": items} if isinstance(value, tuple) else items
        raise TypeError(f"{path.lstrip('/')} is a {type(value).__name__}, which a checkpoint cannot hold")

    def _tensor(self, tensor: Tensor, path: str) -> Any:
        tensor = tensor.detach()
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in self._written:
            return self._written[place][0]
        # In the order in which its dimensions lie in memory: kernels may read the state of an optimizer by address.
        order = sorted(range(tensor.dim()), key=tensor.stride().__getitem__, reverse=True)
        dense = tensor.permute(order).cpu().contiguous()
        kind = None
        if dense.dtype is torch.complex128:  # which safetensors lacks
            dense, kind = torch.view_as_real(dense), "complex128"
        if (storage := dense.untyped_storage().data_ptr()) in self._storages:
            dense = dense.clone()
        self._storages.add(storage)
        name = path.lstrip("/")
        while name in self.tensors:
            name += "'"
        self.tensors[name] = dense
        found = {"tensor": [name, order, kind]}
        self._written[place] = found, tensor
        return found


def _read(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Read the JSON that `_Writer` wrote."""
    if isinstance(value, list):
        return [_read(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "float":
        return float(content)
    if kind == "dtype":
        return DTYPES[content]
    if kind == "tuple":
        return tuple(_read(each, tensors) for each in content)
    if kind == "dict":
        return {_read(key, tensors): _read(each, tensors) for key, each in content}
    name, order, dtype = content
    dense = tensors[name] if dtype is None else torch.view_as_complex(tensors[name])
    return dense.permute([order.index(dimension) for dimension in range(len(order))])
