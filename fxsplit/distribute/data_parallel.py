"""Data parallelism: each process takes its part of a batch, and gradients are the means over all processes.

    phase       settled            trains
    process 0   ░░░░░░░░ ──► ███████████ ──► loss ──► gradients ─┐
    process 1   ░░░░░░░░ ──► ███████████ ──► loss ──► gradients ─┴─ reduced: of what trains, and of nothing else

torch's DistributedDataParallel looks at construction at what trains, and never again: it fails when a parameter stops
training, and says nothing when one begins to, which then drifts apart. So each phase has a new one.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from fxsplit.data.batch import Batch
from fxsplit.distribute.processes import Processes
from fxsplit.distribute.sync_norms import SyncNorms
from fxsplit.execute.executor import Executor
from fxsplit.execute.forward import Engine

# The option that leaves buffers alone has another name in newer versions of torch.
BUFFERS = "forward_sync_buffers"
STAY = BUFFERS if BUFFERS in inspect.signature(DistributedDataParallel).parameters else "broadcast_buffers"


class DataParallel(Engine):
    """Runs forward passes whose gradients are reduced over all processes while backward goes on.

    All processes must have entered the same phase, and have the same weights.

    Args:
        executor: is run.
        processes: those of the run.
        norms: the pass of the executor that synchronises BatchNorm; None where each process has its own statistics.
    """

    def __init__(self, executor: Executor, processes: Processes, *, norms: SyncNorms | None = None) -> None:
        super().__init__(executor)
        self._processes, self._norms = processes, norms
        self._called: nn.Module = _Called(executor, ())
        self._wrapped: DistributedDataParallel | None = None
        self._traffic = _Traffic()
        self._accumulates = False

    def enter(self, *beside: nn.Module, cut: int = 0) -> None:  # noqa: ARG002 - each process has all partitions
        self.leave()
        self._called = _Called(self.executor, beside)

    def leave(self, *, alone: bool = False) -> None:  # noqa: ARG002 - nothing is sent for it
        if self._norms is not None:
            self._norms.counting = None
        if self._wrapped is not None:
            self._wrapped = None
            # Its hooks at the parameters go when it goes, and cycles keep it until then.
            gc.collect()

    @property
    def bytes_per_step(self) -> int:  # type: ignore[override]
        if measured := self._traffic.bytes_per_step:
            return measured
        # A run that goes on after the last step of an epoch has taken none yet.
        return sum(each.nbytes for each in self._called.parameters() if each.requires_grad)

    def together(self, micro_batches: int) -> int:
        return micro_batches if self._norms is None else self._processes.most(micro_batches)

    def __call__(self, batch: Batch, stop: int | None = None) -> Any:
        if self._norms is not None:
            self._norms.counting = bool(batch.counted)
        if not torch.is_grad_enabled():
            return super().__call__(batch, stop)
        if self._accumulates:
            return self._called(batch.cut, *batch.values)
        # Not made before the first micro-batch whose gradients are reduced: with a static graph it would count the
        # others of its first step as well, and then reduce nothing in later ones, without a word.
        self._wrapped = self._wrapped or self._wrap()
        return self._wrapped(batch.cut, *batch.values)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        # Without the forward pass of the wrapper its hooks leave gradients to this process, as in its own `no_sync`.
        self._accumulates = True
        try:
            yield
        finally:
            self._accumulates = False

    def _wrap(self) -> DistributedDataParallel:
        options: dict[str, Any] = {STAY: False}  # each process has its own statistics of BatchNorm
        # What is settled may lie on the host, on which torch would insist for all. Its own function for this marks the
        # parameters, too, and for good; they may train again.
        frozen = [name for name, each in self._called.named_parameters() if not each.requires_grad]
        vars(self._called)["_ddp_params_and_buffers_to_ignore"] = frozen
        wrapped = DistributedDataParallel(
            self._called,
            init_sync=False,  # the weights are the same already
            gradient_as_bucket_view=True,
            static_graph=True,  # that of the trace, in each step
            **options,
        )
        self._traffic = _Traffic()
        wrapped.register_comm_hook(self._traffic, lambda traffic, bucket: traffic.reduce(bucket))
        return wrapped


class _Traffic:
    """Reduces gradients, and counts their bytes."""

    def __init__(self) -> None:
        self._bytes = self._steps = 0

    def reduce(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Start to add up the gradients of a bucket over all processes."""
        self._bytes += bucket.buffer().nbytes
        self._steps += bucket.is_last()
        return allreduce_hook(distributed.group.WORLD, bucket)  # type: ignore[arg-type]

    @property
    def bytes_per_step(self) -> int:
        """Bytes that were reduced in a step; 0 before the first."""
        return round(self._bytes / self._steps) if self._steps else 0


class _Called(nn.Module):
    """What DistributedDataParallel wraps: an executor from a cut on, with all whose parameters train beside it."""

    def __init__(self, executor: Executor, beside: tuple[nn.Module, ...]) -> None:
        super().__init__()
        self.executor, self.beside = executor, nn.ModuleList(beside)

    def forward(self, cut: int, *values: Any) -> Any:
        return self.executor.resume(list(values)) if cut else self.executor(*values)
