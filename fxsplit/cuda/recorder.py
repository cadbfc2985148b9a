"""Records what a function does on a GPU as a CUDA graph, which is launched as a whole from then on.

    warm_up ──► warm_up ──► warm_up ──► record ──► replay ──► replay ──► ...
    runs, on a side stream              runs no    the same kernels on the same memory, without Python
                                        kernel

Kernels read and write the addresses that they had while they were recorded. A recording keeps the memory of all tensors
from outside that it uses, and what it allocates itself comes from a pool of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


class Recording(Protocol[T]):
    """A function that was recorded. `result` is what it returned then: its tensors are written by each replay."""

    result: T
    is_gone: bool

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

    def has_room(self) -> bool:
        """Tell whether the function can run once more beside its recording, whose memory nothing else can use."""
        ...


class CudaRecorder:
    """Records on one GPU.

    Recordings that exist at the same time share their memory: what one has computed and returned may be overwritten by
    the replay of another.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Warm-up and recording share a stream: memory and the gradients' accumulators belong to the stream of their
        # first use.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._alive: WeakSet[CudaRecording[Any]] = WeakSet()

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
        # A pool can be used as long as one of its graphs exists; without any, its memory is free for all.
        pool = next((each.pool for each in self._alive if not each.is_gone), None) or torch.cuda.graph_pool_handle()
        graph, keeping = torch.cuda.CUDAGraph(), Keeping()
        present, random_state = torch.cuda.current_stream(self._device), torch.cuda.get_rng_state(self._device)
        first: list[BaseException] = []
        torch.clear_autocast_cache()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self._device)
        # Other threads, which pin batches or read meters, may go on meanwhile.
        capture = torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local")
        try:
            with torch.cuda.device(self._device), capture, keeping, _noted(first):
                result = function()
        except BaseException as error:
            # Resetting a graph frees the workspaces of its stream, which all graphs of this recorder use.
            for each in list(self._alive):
                each.drop()
            graph.reset()
            self._clean_up(present, pool, random_state)
            raise (first.pop() if first else error) from None  # to end a broken capture is an error, too
        finally:
            # Weights that were cast while recording hold no numbers until the replay.
            torch.clear_autocast_cache()
        taken = torch.cuda.memory_reserved(self._device) - before
        recording = CudaRecording(graph, result, keeping, pool=pool, size=taken)
        self._alive.add(recording)
        return recording

    def _clean_up(self, present: torch.cuda.Stream, pool: torch.cuda._POOL_HANDLE, random_state: Tensor) -> None:
        """Undo what torch leaves after a capture that was invalidated: stream, allocator and random generator."""
        torch.cuda.set_stream(present)
        index = present.device_index
        with suppress(RuntimeError):  # torch has done this where the capture itself was valid
            torch._C._cuda_endAllocateToPool(index, pool)
            torch._C._cuda_releasePool(index, pool)
        generator, fresh = torch.cuda.default_generators[index], torch.Generator(self._device)
        fresh.set_state(random_state)
        generator.graphsafe_set_state(fresh.graphsafe_get_state())

    def has_room(self) -> bool:
        """Tell whether as much memory is free as recordings hold."""
        held = sum(each.size for each in self._alive if not each.is_gone)
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device) - held
        free, _ = torch.cuda.mem_get_info(self._device)
        return free + max(0, cached) >= held


class CudaRecording(Generic[T]):
    """A CUDA graph, what the recorded function returned, and the memory that the graph uses.

    Args:
        graph: the graph.
        result: what the function returned.
        keeping: memory from outside.
        pool: where the graph's own memory is.
        size: how many bytes that is.
    """

    def __init__(
        self,
        graph: torch.cuda.CUDAGraph,
        result: T,
        keeping: Keeping,
        *,
        pool: torch.cuda._POOL_HANDLE,
        size: int,
    ) -> None:
        self._graph, self.result = graph, result
        self._kept, self._written = keeping.kept, keeping.written
        self.pool, self.size = pool, size
        self.is_gone = False

    def drop(self) -> None:
        """Give up the graph, which can no longer be launched."""
        self._graph.reset()
        self.is_gone = True

    def replay(self) -> None:
        """Launch the graph on the present stream."""
        self._graph.replay()
        # For who compares versions, to see whether a tensor has changed.
        torch.autograd.graph.increment_version(self._written)


@contextmanager
def _noted(errors: list[BaseException]) -> Iterator[None]:
    """Add an error that is raised inside to a list, and let it go on."""
    try:
        yield
    except BaseException as error:
        errors.append(error)
        raise


class Keeping(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, keeps the memory of tensors that were there before and that ops use, and lists those that ops write into.

    `kept` is that memory; `written` has a tensor for each part of it that is written into.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: dict[int, torch.UntypedStorage] = {}
        self._written: dict[int, Tensor] = {}
        self._inside: set[int] = set()

    @property
    def written(self) -> list[Tensor]:
        """The tensors from outside that ops write into."""
        return list(self._written.values())

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        for _, storage in _places((args, given)):
            if storage._cdata not in self._inside:
                self.kept.setdefault(storage._cdata, storage)
        for argument, value in (*zip(func._schema.arguments, args, strict=False), *_named(func, given)):
            if argument.alias_info is not None and argument.alias_info.is_write:
                found = {storage._cdata: tensor for tensor, storage in _places(value)}
                self._written |= {place: tensor for place, tensor in found.items() if place in self.kept}
        result = func(*args, **given)
        # What an op returns is in use inside only, or was seen before.
        self._inside.update(storage._cdata for _, storage in _places(result) if storage._cdata not in self.kept)
        return result


def _named(func: Any, kwargs: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    return [(argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs]


def _places(value: Any) -> list[tuple[Tensor, torch.UntypedStorage]]:
    tensors = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.layout is torch.strided)
    return [(tensor, tensor.untyped_storage()) for tensor in tensors]
