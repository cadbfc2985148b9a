"""Records what a function does on a GPU as a CUDA graph, which is launched as a whole from then on.

    warm_up ──► warm_up ──► warm_up ──► record ──► replay ──► replay ──► ...
    runs, on a side stream              runs no    the same kernels on the same memory, without Python
                                        kernel

Kernels read and write the addresses that they had while they were recorded. A recording keeps the memory of all tensors
that it was given, and what it allocates itself comes from a pool that all recordings of a recorder share.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


class Recording(Protocol[T]):
    """A function that was recorded. `result` is what it returned then: its tensors are written by each replay."""

    result: T

    def replay(self) -> None:
        """Do again on the device what was recorded, with what memory holds now."""
        ...


class Recorder(Protocol):
    """Runs functions as they will be recorded, and records them."""

    def warm_up(self, function: Callable[[], T]) -> T:
        """Run a function."""
        ...

    def record(self, function: Callable[[], T]) -> Recording[T]:
        """Record a function that ran before; its Python code runs, but nothing is computed.

        Raises whatever keeps it from being recorded. The device and torch's random state are then as before.
        """
        ...


class CudaRecorder:
    """Records on one GPU.

    All recordings share a memory pool: what one has computed and returned may be overwritten by the replay of another.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Warm-up and recording share a stream: memory and the gradients' accumulators belong to the stream of their
        # first use.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        # A pool goes with its last graph and cannot be used again then; an empty graph keeps it.
        self._holder = torch.cuda.CUDAGraph()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
            with self._capture(self._holder):
                pass

    def _capture(self, graph: torch.cuda.CUDAGraph) -> torch.cuda.graph:
        # Other threads, which pin batches or read meters, may go on meanwhile.
        return torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")

    def warm_up(self, function: Callable[[], T]) -> T:
        """Run a function on the side stream, between the work before and after it on the present one."""
        present = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(present)
        try:
            with torch.cuda.stream(self._stream):
                return function()
        finally:
            present.wait_stream(self._stream)

    def record(self, function: Callable[[], T]) -> Recording[T]:
        """Record a function, as `Recorder` says."""
        present = torch.cuda.current_stream(self._device)
        random_state = torch.cuda.get_rng_state(self._device)
        graph, keeping = torch.cuda.CUDAGraph(), Keeping()
        torch.clear_autocast_cache()
        try:
            with torch.cuda.device(self._device), self._capture(graph), keeping:
                result = function()
        except BaseException:
            graph.reset()
            self._clean_up(present, random_state)
            raise
        finally:
            # Weights that were cast while recording hold no numbers until the replay.
            torch.clear_autocast_cache()
        return CudaRecording(graph, result, keeping.kept)

    def _clean_up(self, present: torch.cuda.Stream, random_state: Tensor) -> None:
        """Undo what torch leaves after a capture that was invalidated: stream, allocator and random generator."""
        torch.cuda.set_stream(present)
        index = present.device_index
        with suppress(RuntimeError):  # torch has done this where the capture itself was valid
            torch._C._cuda_endAllocateToPool(index, self._pool)
            torch._C._cuda_releasePool(index, self._pool)
        generator, fresh = torch.cuda.default_generators[index], torch.Generator(self._device)
        fresh.set_state(random_state)
        generator.graphsafe_set_state(fresh.graphsafe_get_state())


class CudaRecording(Generic[T]):
    """A CUDA graph, what the recorded function returned, and the memory from outside that the graph uses."""

    def __init__(self, graph: torch.cuda.CUDAGraph, result: T, kept: Sequence[torch.UntypedStorage]) -> None:
        self._graph, self.result, self._kept = graph, result, kept

    def replay(self) -> None:
        """Launch the graph on the present stream."""
        self._graph.replay()


class Keeping(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, keeps the memory of tensors that ops use, if it was there before."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: list[torch.UntypedStorage] = []
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        for storage in _storages((args, given)):
            if storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.kept.append(storage)
        result = func(*args, **given)
        # What an op returns is in use inside only, or was seen before.
        self._seen.update(storage._cdata for storage in _storages(result))
        return result


def _storages(value: Any) -> list[torch.UntypedStorage]:
    tensors = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.layout is torch.strided)
    return [tensor.untyped_storage() for tensor in tensors]
