"""A recorder on the CPU that does what CUDA graphs do: it records ops with their memory, and replays them.

Numbers that Python knows are burnt in, as in a graph, and a replay runs no Python of the function. While it records, an
op that the host would wait for is an error; at the end of a recording, memory and random state are as before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
READING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class SimulatedRecorder:
    """Has the methods of `fxsplit.cuda.recorder.Recorder`, and counts what it did.

    Args:
        fails_at: the number of the op at which recording fails, as a capture that CUDA refuses.
        roomy: whether memory holds work beside a recording.
        most: how many recordings may exist at a time.
    """

    def __init__(self, *, fails_at: int | None = None, roomy: bool = True, most: int = 1) -> None:
        self.warm_ups = self.recordings = self.replays = 0
        self._fails_at, self._roomy = fails_at, roomy
        self._most, self._alive = most, WeakSet[Tape[Any]]()

    def warm_up(self, function: Callable[[], T]) -> T:
        self.warm_ups += 1
        return function()

    def has_room(self) -> bool:
        return self._roomy

    def record(self, function: Callable[[], T]) -> Tape[T]:
        assert len(self._alive) < self._most, "the former recording is still there"
        ops = _Ops(self._fails_at)
        state = torch.get_rng_state()
        try:
            with ops:  # type: ignore[no-untyped-call]
                result = function()
        finally:
            torch.set_rng_state(state)
            ops.put_back()
        self.recordings += 1
        tape = Tape(self, ops.done, result)
        self._alive.add(tape)
        return tape


class Tape(Generic[T]):
    def __init__(self, recorder: SimulatedRecorder, ops: list[tuple[Any, ...]], result: T) -> None:
        self._recorder, self._ops, self.result = recorder, ops, result
        self.is_gone = False

    @torch.no_grad()
    def replay(self) -> None:
        self._recorder.replays += 1
        for func, args, kwargs, before in self._ops:
            after = func(*args, **kwargs)
            given = {place(each) for each in tensors(args) + tensors(kwargs)}
            for old, new in zip(tensors(before), tensors(after), strict=True):
                if place(old) not in given:
                    old.copy_(new)


class _Ops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, fails_at: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.done: list[tuple[Any, ...]] = []
        self._fails_at = fails_at
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        has_mask = func.overloadpacket is torch.ops.aten.index and any(
            each is not None and each.dtype is torch.bool for each in args[1]
        )
        if len(self.done) == self._fails_at or has_mask or not READING.isdisjoint(set(func.tags) - _of_index(func)):
            raise RuntimeError("operation not permitted when stream is capturing")
        for each in tensors(args) + tensors(given):
            self._before.setdefault(place(each), (each.untyped_storage(), each.untyped_storage().clone()))
        result = func(*args, **given)
        if "empty" not in func.overloadpacket.__name__:
            self.done.append((func, args, given, result))
        return result

    def put_back(self) -> None:
        for storage, before in self._before.values():
            storage.copy_(before)


def _of_index(func: Any) -> set[torch.Tag]:
    return READING if func.overloadpacket is torch.ops.aten.index else set()


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() or id(tensor)
