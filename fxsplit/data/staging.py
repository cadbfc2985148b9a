"""Brings batches from the host to a device, beside the steps that run there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")
Read = TypeVar("Read")


class _Slot(NamedTuple):
    """Memory on the device for a batch on its way, and the events that tell its two users of each other."""

    buffers: list[Tensor]
    filled: torch.cuda.Event
    emptied: torch.cuda.Event


class Staging:
    """Copies batches into tensors that stay where they are, so that a recorded step finds each batch there.

    On CUDA batches come through two slots, filled by a stream of their own, so that a copy over the bus runs beside the
    step before:

        copies      (1)[slot 0]──.   (1)[slot 1]──.   (1)[slot 0]──.
        steps                 (2)└─[tensors] step 0 (2)└─[tensors] step 1 (2)└─[tensors] step 2
                                 (3)                   (3)

    (1) A slot is filled when the batch before last, which was in it, has left it; (2) and left when it has been filled;
    (3) which is noted for the next (1). Elsewhere nothing needs to be copied: batches are passed on.

    Args:
        device: where the steps run.
        batch_size: rows of a full batch.
    """

    def __init__(self, device: torch.device, batch_size: int) -> None:
        self._device, self._batch_size = device, batch_size
        self._tensors: list[Tensor] = []
        self._slots: list[_Slot] = []
        self._turn = 0
        self._rows = 0

    @property
    def is_static(self) -> bool:
        """Whether full batches are always in the same place."""
        return self._device.type == "cuda"

    def put(self, batch: Sequence[Tensor]) -> None:
        """Bring a batch: tensors (B, ...) on the CPU, of the same shapes and types as before but for B.

        Copies overlap with steps if the tensors are pinned, and the host never waits for them then. Steps must run on
        the current stream of this call, or on one that waits for it.
        """
        if not self.is_static:
            self._tensors, self._rows = [tensor.to(self._device) for tensor in batch], len(batch[0])
            return
        steps = torch.cuda.current_stream(self._device)
        if not self._slots:
            self._allocate(batch, steps)
        slot, self._turn, self._rows = self._slots[self._turn], 1 - self._turn, len(batch[0])
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(slot.emptied)  # (1)
            for buffer, tensor in zip(slot.buffers, batch, strict=True):
                buffer[: self._rows].copy_(tensor, non_blocking=True)
            slot.filled.record(self._copies)
        steps.wait_event(slot.filled)  # (2)
        for tensor, buffer in zip(self._tensors, slot.buffers, strict=True):
            tensor[: self._rows].copy_(buffer[: self._rows], non_blocking=True)
        slot.emptied.record(steps)  # (3)

    def _allocate(self, batch: Sequence[Tensor], steps: torch.cuda.Stream) -> None:
        def empty() -> list[Tensor]:
            return [tensor.new_empty((self._batch_size, *tensor.shape[1:]), device=self._device) for tensor in batch]

        self._copies: torch.cuda.Stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._tensors = empty()
        self._slots = [_Slot(empty(), *_events()) for _ in range(2)]
        # Steps that were launched before may still use this memory for what they have freed.
        self._copies.wait_stream(steps)

    def taken(self) -> list[Tensor]:
        """Return the tensors of the batch that was put last: on CUDA the ones that the next batch will be put into."""
        return [tensor[: self._rows] for tensor in self._tensors] if self.is_static else self._tensors


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]


def free_bytes(device: torch.device) -> int | None:
    """Return how many bytes of a GPU are free, or None for a device without memory of its own.

    What torch keeps without using it is given back first.
    """
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])


def write(into: Tensor, values: Tensor) -> None:
    """Copy values from the CPU into a tensor on any device. The host does not wait for it."""
    into.copy_(values.pin_memory() if into.is_cuda else values, non_blocking=True)


def rows_of(tensor: Tensor, rows: Tensor, *, pinned: bool) -> Tensor:
    """Copy `rows`, int64 (B,), out of a tensor (N, ...) on the CPU; into pinned memory if asked for."""
    found = torch.empty((len(rows), *tensor.shape[1:]), dtype=tensor.dtype, pin_memory=pinned)
    return torch.index_select(tensor, 0, rows, out=found)


def read_ahead(read: Callable[[Part], Read], parts: Sequence[Part]) -> Iterator[Read]:
    """Read the parts one after the other; a thread reads the next one meanwhile."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead: Future[Read] | None = None
        for part in (*parts, None):
            found, ahead = ahead, None if part is None else reader.submit(read, part)
            if found is not None:
                yield found.result()
