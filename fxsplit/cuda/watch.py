"""Finds what keeps a function from being recorded, while it runs: a replay would not do it again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from fxsplit.objects.contents import GLOBAL_GENERATORS, Remembered, generators_around

# Ops whose result Python has to look at: a number, or a shape that depends on numbers.
READING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# What people call these.
NAMES = {"_local_scalar_dense": "item", "_unique2": "unique"}
aten = torch.ops.aten
GATHERING = (aten.index,)
WRITING = (aten.index_put, aten.index_put_, aten._index_put_impl_)


class Watch:
    """As a context: `hindrance` says at the end, in words, what a replay would leave out or repeat; None if nothing.

    It sees ops that the host waits for, and what `held` keeps on the host: numbers, lists, generators, and tensors that
    are replaced instead of written into.

    Args:
        held: modules, optimizers and other objects that the function uses.
        device: where it computes; torch's generator for it is a part of recordings.
    """

    def __init__(self, held: Iterable[object], device: torch.device) -> None:
        self._ops = _HostReads()  # type: ignore[no-untyped-call]
        self._named = _named(held)
        known = {name: each for name, each in GLOBAL_GENERATORS.items() if name != "torch" or device.type != "cpu"}
        self._named |= {f"the generator {name!r}": [each] for name, each in known.items()}

    def __enter__(self) -> Watch:
        self._remembered = Remembered(self._named)
        self._ops.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ops.__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        if self._ops.found is None and (changed := self._remembered.changed()):
            self._ops.found = f"{changed[0]} changes on the host"

    @property
    def hindrance(self) -> str | None:
        """What keeps the function from being recorded, as the end of a sentence."""
        return self._ops.found


def _named(held: Iterable[object]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for each in held:
        if isinstance(each, nn.Module):
            named |= {f"module {path!r}" if path else "the model": vars(part) for path, part in each.named_modules()}
            named |= {f"the generator {name!r}": [one] for name, one in generators_around(each).items()}
        elif isinstance(each, Optimizer):
            named[f"the optimizer {type(each).__name__}"] = vars(each)
        else:
            named[type(each).__name__] = vars(each)
    return named


class _HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the first op that the host waits for."""

    found: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self.found is None and _is_read_by_host(func, args):
            name = func.overloadpacket.__name__
            self.found = f"the host waits for the result of {NAMES.get(name, name)}"
        return func(*args, **(kwargs or {}))


def _is_read_by_host(func: Any, args: Sequence[Any]) -> bool:
    if func.overloadpacket in WRITING:
        # A single number is written by a mask without counting what that selects.
        return _has_mask(args[1]) and not (args[2].numel() == 1 and args[2].device.type == "cpu")
    if func.overloadpacket in GATHERING:
        return _has_mask(args[1])
    return not READING.isdisjoint(func.tags)


def _has_mask(indices: Sequence[Tensor | None]) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
