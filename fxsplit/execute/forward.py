"""The forward pass of a batch, of images or of values at a cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxsplit.data.batch import Batch
from fxsplit.errors import FxsplitError
from fxsplit.execute.executor import Executor


class Engine:
    """Runs what trains forward and backward, here in this process alone.

    Others do so together with other processes. Either each takes a part of every batch, and gradients are the means
    over all; or each trains some of the partitions, whose home it is, and batches go through all of them; or both.
    """

    # Bytes of gradients of what trains that a step has exchanged since `enter`; None where nothing is exchanged. All
    # processes ask for them together.
    bytes_per_step: int | None = None
    # Bytes of weights that a step has gathered since `enter`; None where weights are whole.
    gathered_per_step: int | None = None
    # Bytes of values and gradients that a step on a full batch sends from stage to stage; None without stages.
    sent_per_step: int | None = None
    # By partition, the process of the pipeline that trains it since `enter`; None without a pipeline.
    homes: Sequence[int] | None = None
    # Whether the loss of a batch is computed in this process, since `enter`.
    has_loss: bool = True

    def __init__(self, executor: Executor) -> None:
        self.executor = executor

    def enter(self, *beside: nn.Module, cut: int = 0) -> None:
        """Begin a phase that the executor has entered; parameters of the modules `beside` train, too.

        Batches will come as values at a `cut` that is settled: what lies before it need not be fast.
        """

    def is_outdated(self, cut: int) -> bool:  # noqa: ARG002 - nothing is divided
        """Tell whether `enter` would divide partitions otherwise if batches came at this cut; all ask for it."""
        return False

    def leave(self, *, alone: bool = False) -> None:
        """End the phase: nothing that `enter` made is left at the parameters.

        `alone` says that other processes do not do so, because something has failed here.
        """

    def __call__(self, batch: Batch, stop: int | None = None) -> Any:
        """Return what the model returns for a batch; of values where training begins, or later, those at `stop`."""
        if batch.cut or stop is not None:
            return self.executor.resume(list(batch.values), stop, cut=batch.cut)
        # Called as a whole, so that hooks of the model itself are called, too.
        return self.executor(*batch.values)

    def backward(self, micro_batches: Sequence[Batch], loss: Callable[[Batch], Tensor]) -> None:
        """Add up the gradients of micro-batches; `loss` runs one forward and returns its share of the loss ().

        Where a micro-batch goes through several processes, the one that has the last partitions calls `loss`.
        """
        *earlier, last = micro_batches
        for micro_batch in earlier:
            with self.accumulating():
                loss(micro_batch).backward()  # type: ignore[no-untyped-call]
        loss(last).backward()  # type: ignore[no-untyped-call]

    def gradient_norm(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return the norm () of the gradients of all these parameters, those of other processes included."""
        return nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])

    def keeps(self, name: str) -> bool:  # noqa: ARG002 - all of them
        """Tell whether this process trains a parameter of the model, by its name, and has its optimizer's state."""
        return True

    def gathered(self, state: Mapping[str, Any], wanted: Callable[[str], bool] | None = None) -> Mapping[str, Any]:  # noqa: ARG002
        """Return the state of an optimizer, by parameter, that all processes together have; all of them ask for it.

        Each gets what is `wanted` of it, by name. None is for what the first process writes: it gets all of it.
        """
        return state

    def together(self, micro_batches: int) -> int:
        """Return how many forward passes a step takes that has so many micro-batches here."""
        return micro_batches

    def accumulating(self) -> AbstractContextManager[Any]:
        """Inside, forward and backward of a micro-batch add to its gradients, and others follow."""
        return nullcontext()


class Forward:
    """Runs batches through an executor: images from the first partition on, values from their cut on.

    Args:
        executor: its phase must settle all partitions that a batch has been through.
        device: where batches are.
        amp_dtype: the precision of `autocast`; None runs without it.
        engine: runs what trains; None for this process alone.
    """

    def __init__(
        self,
        executor: Executor,
        device: torch.device,
        *,
        amp_dtype: torch.dtype | None = None,
        engine: Engine | None = None,
    ) -> None:
        self.executor, self.device, self.amp_dtype = executor, device, amp_dtype
        self.engine = engine or Engine(executor)

    def autocast(self) -> torch.autocast:
        """Make the context in which forward passes and losses are computed."""
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)

    def __call__(self, batch: Batch, *, stop: int | None = None) -> Any:
        """Return what the model returns for a batch, or the values at cut `stop`, where something trains."""
        start = self.executor.window[0]
        if 0 < batch.cut < start or stop is not None:
            batch = replace(batch, values=tuple(self._settled(batch, start)), cut=start)
        return self.engine(batch, stop)

    def logits(self, batch: Batch) -> Tensor:
        """Return the class scores (B, classes) of a batch. Raises FxsplitError when the model returns none."""
        return logits_of(self(batch))

    def settle(self, batch: Batch, stop: int, *, amp_dtype: torch.dtype | None = None) -> list[Any]:
        """Run settled partitions in autocast, and return the values of a batch at cut `stop`, not before its own.

        `amp_dtype`, unless None, is the precision instead of that of `autocast`.
        """
        with self.autocast() if amp_dtype is None else torch.autocast(self.device.type, amp_dtype):
            return self._settled(batch, stop)

    def _settled(self, batch: Batch, stop: int) -> list[Any]:
        if batch.cut:
            return self.executor.settle_on(batch.values, batch.cut, stop)
        if stop == self.executor.window[0]:
            return self.executor.settle(*batch.values)
        return self.executor.settle_to(stop, *batch.values)


def logits_of(output: Any) -> Tensor:
    """Find the class scores (B, classes) in what a classifier returns.

    That is a tensor, or the first one in a tuple, dict or dataclass. Raises FxsplitError when there is none.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        items: Any = list(output.values())
    elif is_dataclass(output):
        items = [getattr(output, field.name) for field in fields(output)]
    else:
        items = output
    if isinstance(items, Sequence) and items:
        return logits_of(items[0])
    raise FxsplitError(f"the model returns {type(output).__name__}, and no class scores are found in it")
