"""Keeps settled weights on the host: those of each partition are on the device only while it runs.

               settled                    trains
    host       ▒▒▒▒▒▒ ▒▒▒▒▒▒ ▒▒▒▒▒▒
    device            ░░░░░░              ██████ ██████ ██████
                      └─ a copy, while the partition runs

Where what has settled is read from a cache, nothing of it is on the device at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxsplit.capture.tracing import Trace
from fxsplit.execute.ownership import first_names, users_of
from fxsplit.graph import EVALUATION, prefixes
from fxsplit.objects.structure import HOST, is_divided
from fxsplit.plan.partition import Partition


class _Kept(NamedTuple):
    """A parameter or buffer of a settled partition, under one of its names: the module that has it, and its key there.

    `first` is the first of its names.
    """

    name: str
    first: str
    module: nn.Module
    key: str

    @property
    def place(self) -> dict[str, Any]:
        """The dict of the module that has it."""
        own: dict[str, Any] = self.module._parameters
        return own if self.key in own else self.module._buffers


class Offload:
    """Moves the parameters and buffers of settled partitions to the host, and back where a partition trains again.

    What a partition that is not settled uses as well stays on its device. A tensor that moves remains the same object,
    as with `nn.Module.to`; while its partition runs, a copy on the device is in its place.

    Args:
        trace: of the model.
        partitions: all of this trace, in order.
    """

    def __init__(self, trace: Trace, partitions: Sequence[Partition]) -> None:
        self._users = users_of(trace, partitions)
        self._written = {
            training: [
                {name for op in program.graph.ops[part.span(training=training)] for name in op.mutates}
                for part in partitions
            ]
            for training, program in trace.programs.items()
        }
        # By partition, what of it lies on the host.
        self._kept: list[list[_Kept]] = []
        # By the first names of what was moved, where it came from.
        self._devices: dict[str, torch.device] = {}

    @torch.no_grad()
    def arrange(self, model: nn.Module, settled: int) -> None:
        """Let the state of the first `settled` partitions lie on the host, and that of the others where it was."""
        modules = dict(model.named_modules(remove_duplicate=False))
        self._kept = [[] for _ in range(settled)]
        tensors: dict[str, Tensor] = {}
        for name, first in first_names(model).items():
            path, _, key = name.rpartition(".")
            kept = _Kept(name, first, modules[path], key)
            users = self._users.get(first, set())
            tensor = tensors.setdefault(first, kept.place[key])
            if users and max(users) < settled and not is_divided(tensor):
                for index in users:
                    self._kept[index].append(kept)
        stay = {each.first for part in self._kept for each in part}
        for name in self._devices.keys() - stay:
            device = self._devices.pop(name)
            if name in tensors and not is_divided(tensors[name]):
                tensors[name].data = tensors[name].data.to(device)
        for name in stay:
            tensor = tensors[name]
            if tensor.device != HOST:
                self._devices[name] = tensor.device
                tensor.data = on_host(tensor.data, tensor.device)

    @contextmanager
    def placed(
        self, index: int, values: Sequence[Any], *, training: bool = EVALUATION, reads: AbstractSet[str] | None = None
    ) -> Iterator[None]:
        """Inside, a partition has its state on the device of `values`; what is written into it lasts.

        Args:
            index: of the partition. One that is not settled has its state there anyway.
            values: those at its start.
            training: the mode whose ops run.
            reads: paths of all that they read, of modules or of single tensors; None for all that the partition has.
        """
        device = device_of(values)
        if index >= len(self._kept) or device == HOST:
            yield
            return
        written = self._written[training][index]
        copies: dict[str, Tensor] = {}
        placed = []
        for each in self._kept[index]:
            if reads is None or not reads.isdisjoint(prefixes(each.name)):
                original = each.place[each.key]
                if each.first not in copies:
                    copies[each.first] = _copy(original, device)
                copy = copies[each.first]
                placed.append((each, original, copy, copy._version))
                each.place[each.key] = copy
        try:
            yield
        finally:
            with torch.no_grad():
                for each, original, copy, version in placed:
                    now = each.place[each.key]
                    each.place[each.key] = original if now is copy else now.to(HOST)
                    # Statistics of a norm are written by kernels that do not count it.
                    if each.first in written or copy._version != version:
                        original.copy_(copy)


def on_host(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor in memory of the host, from which a GPU can copy it to `device` while the host goes on."""
    host = tensor.to(HOST)
    return host.pin_memory() if device.type == "cuda" else host


def device_of(values: Sequence[Any]) -> torch.device:
    """Return the device of the first tensor among some values; without one, the host."""
    return next((value.device for value in values if isinstance(value, Tensor)), HOST)


def _copy(original: Tensor, device: torch.device) -> Tensor:
    # In inference mode tensors are not told when they are written into.
    with torch.inference_mode(False), torch.no_grad():
        copy = original.detach().to(device, non_blocking=True)
    return nn.Parameter(copy, requires_grad=False) if isinstance(original, nn.Parameter) else copy
