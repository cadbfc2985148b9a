"""BatchNorm: statistics estimated again for the weights as they are now, and batches from which none can be taken."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from fxsplit.capture.tracing import Trace
from fxsplit.data.batch import Batch
from fxsplit.data.loader import Loader
from fxsplit.errors import UsageError
from fxsplit.execute.executor import Executor
from fxsplit.execute.forward import Forward
from fxsplit.plan.schedule import Plan

# Batches that statistics are estimated from: enough that more of them change nothing that could be seen.
BATCHES = 50


def recalibrate(forward: Forward, stop: int, batches: Iterable[Batch]) -> None:
    """Estimate the statistics of the partitions that train before cut `stop` again, from the first of `batches`."""
    norms = norms_of(forward.executor, stop)
    if norms:
        with recalibrated(norms):
            forward.executor.train()
            with torch.no_grad(), forward.autocast():
                for batch in islice(batches, BATCHES):
                    forward(batch, stop=stop)


def norms_of(executor: Executor, stop: int) -> list[_BatchNorm]:
    """Find the BatchNorm modules of the partitions that train before cut `stop`, if they keep statistics."""
    window = executor.partitions[executor.window[0] : stop]
    paths = dict.fromkeys(name.rpartition(".")[0] for part in window for name in part.state)
    modules = map(executor.get_submodule, paths)
    return [module for module in modules if isinstance(module, _BatchNorm) and module.track_running_stats]


@contextmanager
def recalibrated(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Inside, each forward pass in training counts the same in the statistics, and none before it counts at all."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def check_batches(trace: Trace, plan: Plan, train_loader: Loader, test_loader: Loader) -> None:
    """Raise UsageError if a single image would reach a BatchNorm that needs two to take statistics from.

    Where a batch only leaves one image over, it is divided otherwise; here are those of which no part has two.
    """
    for number, phase in enumerate(plan.phases, start=1):
        parts = phase.micro_batches
        if train_loader.batch_size > parts:
            continue
        for index, part in enumerate(plan.partitions):
            trains = phase.role(index) == "training"
            start, stop = (part.start, part.stop) if trains else (part.eval_start, part.eval_stop)
            if path := needs_two_images(trace, start, stop, training=trains):
                raise UsageError(
                    f"BatchNorm {path!r} sees a single value a channel of an image, so it cannot run on one image, but "
                    f"phase {number} takes batches of {train_loader.batch_size} in {parts} part{'s' * (parts > 1)}; "
                    "leave two images to a part, by a larger batch-size or fewer parts, or make the images larger"
                )
    tested, batch_size = len(test_loader.order(0)), test_loader.batch_size
    if (batch_size == 1 or tested % batch_size == 1) and (
        path := needs_two_images(trace, 0, len(trace.eval), training=False)
    ):
        raise UsageError(
            f"BatchNorm {path!r} has no running statistics and sees a single value a channel of an image, so it cannot "
            f"run on one image, which batches of {batch_size} leave of {tested} to test on; "
            "take another batch-size"
        )


def needs_two_images(trace: Trace, start: int, stop: int, *, training: bool) -> str | None:
    """Find the path of the first BatchNorm among ops [start, stop) that cannot run on a single image.

    It takes statistics from the batch, of which each image has one value a channel.
    """
    ops = (trace.train if training else trace.eval).ops[start:stop]
    return next((op.single_value_norm for op in ops if op.single_value_norm is not None), None)
