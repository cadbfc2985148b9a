"""Keeps settled weights on the host: those of each partition are on the device only while it runs.

               settled                    trains
    host       ▒▒▒▒▒▒ ▒▒▒▒▒▒ ▒▒▒▒▒▒
    device            ░░░░░░              ██████ ██████ ██████
                      └─ a copy, while the partition runs

Where what has settled is read from a cache, nothing of it is on the device at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxsplit.capture.tracing import Trace
from fxsplit.execute.ownership import first_names, users_of
from fxsplit.graph import EVALUATION, prefixes
from fxsplit.objects.snapshot import HOSTED
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
    def present(self) -> Tensor:
        """What the module has there now."""
        tensor: Tensor = self._place[self.key]
        return tensor

    def put(self, tensor: Tensor) -> None:
        """Put another one there."""
        if isinstance(self.module, nn.RNNBase):
            # It keeps a list of its weights as well.
            setattr(self.module, self.key, tensor)
        else:
            self._place[self.key] = tensor

    @property
    def _place(self) -> dict[str, Any]:
        own: dict[str, Any] = self.module._parameters
        return own if self.key in own else self.module._buffers


class Offload:
    """Moves the parameters and buffers of settled partitions to the host, and back where a partition trains again.

    What a partition that is not settled uses as well stays on its device. A tensor that moves remains the same object,
    as with `nn.Module.to`; while its partition runs, a copy on the device is in its place. Where it came from is an
    attribute of the model, HOSTED, as long as anything is on the host: another executor, or one of a copy of the model,
    brings it back.

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

    @torch.no_grad()
    def arrange(self, model: nn.Module, settled: int) -> None:
        """Let the state of the first `settled` partitions lie on the host, and that of the others where it was."""
        self._kept = [[] for _ in range(settled)]
        modules = dict(model.named_modules(remove_duplicate=False))
        tensors: dict[str, Tensor] = {}
        stay: set[str] = set()
        for name, first in first_names(model).items():
            path, _, key = name.rpartition(".")
            kept = _Kept(name, first, modules[path], key)
            tensor = tensors.setdefault(first, kept.present)
            users = self._users.get(first, set())
            # Divided ones are moved when they are whole again.
            if users and max(users) < settled and not is_divided(tensor):
                stay.add(first)
                for index in users:
                    self._kept[index].append(kept)
        hosted: dict[str, torch.device] = vars(model).setdefault(HOSTED, {})
        _move_back(tensors, hosted, hosted.keys() - stay)
        for name in stay:
            tensor = tensors[name]
            if tensor.device != HOST:
                hosted[name] = tensor.device
                tensor.data = on_host(tensor.data, tensor.device)
        if not hosted:
            del vars(model)[HOSTED]

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
        read = [each for each in self._kept[index] if reads is None or not reads.isdisjoint(prefixes(each.name))]
        originals = [each.present for each in read]
        copies: dict[str, Tensor] = {}
        # Before any is put into its place: there may be no room for all.
        for each, original in zip(read, originals, strict=True):
            if each.first not in copies:
                copies[each.first] = _copy(original, device)
        versions = {name: copy._version for name, copy in copies.items()}
        for each in read:
            each.put(copies[each.first])
        try:
            yield
        finally:
            written = self._written[training][index]
            with torch.no_grad():
                for each, original in zip(read, originals, strict=True):
                    copy, now = copies[each.first], each.present
                    each.put(original if now is copy else now.to(HOST))
                    # Statistics of a norm are written by kernels that do not count it.
                    if each.first in written or copy._version != versions[each.first]:
                        original.copy_(copy)


@torch.no_grad()
def bring_back(model: nn.Module) -> None:
    """Move to its device what an executor that is gone has left on the host."""
    if HOSTED in vars(model):
        hosted: dict[str, torch.device] = vars(model)[HOSTED]
        _move_back({**dict(model.named_parameters()), **dict(model.named_buffers())}, hosted, list(hosted))
        del vars(model)[HOSTED]


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


def _move_back(tensors: Mapping[str, Tensor], hosted: dict[str, torch.device], names: Iterable[str]) -> None:
    """Move tensors back to where they came from, or to where the others are if none of these is there any more."""
    others = {tensor.device for name, tensor in tensors.items() if name not in hosted}
    for name in names:
        if name in tensors and not is_divided(tensors[name]):
            device = hosted[name]
            place = device if device in others or not others else min(others, key=str)
            tensors[name].data = tensors[name].data.to(place)
        # Not before: what finds no room there stays known.
        del hosted[name]
