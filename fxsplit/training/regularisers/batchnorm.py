"""BatchNorm: running statistics estimated again for the present weights, and batches that are too small for it."""

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

# From so many batches statistics are estimated. More of them make no difference that could be measured.
BATCHES = 50


def recalibrate(forward: Forward, stop: int, batches: Iterable[Batch]) -> None:
    """Estimate BatchNorm statistics again, from the first BATCHES of `batches`.

    Only those of the partitions that train and lie before cut `stop` are estimated; only these run.
    """
    norms = norms_of(forward.executor, stop)
    if norms:
        with recalibrated(norms):
            forward.executor.train()
            with torch.no_grad(), forward.autocast():
                for batch in islice(batches, BATCHES):
                    forward(batch, stop=stop)


def norms_of(executor: Executor, stop: int) -> list[_BatchNorm]:
    """Find the BatchNorm modules of the partitions that train before cut `stop`, if they keep statistics."""
    training = executor.partitions[executor.window[0] : stop]
    paths = dict.fromkeys(name.rpartition(".")[0] for partition in training for name in partition.state)
    modules = map(executor.get_submodule, paths)
    return [module for module in modules if isinstance(module, _BatchNorm) and module.track_running_stats]


@contextmanager
def recalibrated(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Inside, forward passes in training build new statistics of `norms`, in which all of these passes count alike."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # to torch: the mean over all batches, not a moving average
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def check_batches(
    trace: Trace, plan: Plan, train_loader: Loader, test_loader: Loader, *, together: bool = False
) -> None:
    """Raise UsageError if a single image would reach a BatchNorm that needs two to take statistics from.

    In training that is so where every micro-batch of a phase has one image; a single image at the end of a batch is no
    fault, because micro-batches are then divided otherwise. Each of several processes has its part of a batch, unless
    BatchNorm takes its statistics from all of them `together`.
    """
    ranks = 1 if together else train_loader.share.ranks
    batch_size = train_loader.batch_size // ranks
    for number, phase in enumerate(plan.phases, start=1):
        count = phase.micro_batches
        if batch_size > count:
            continue
        for index, partition in enumerate(plan.partitions):
            trains = phase.role(index) == "training"
            if path := needs_two_images(trace, partition.span(training=trains), training=trains):
                taken = (
                    f"batches of {batch_size}" if ranks == 1 else f"{batch_size} of a batch in each of {ranks} parts"
                )
                raise UsageError(
                    f"BatchNorm {path!r} sees a single value a channel of an image, so it cannot run on one image, but "
                    f"phase {number} takes {taken}, in {count} micro-batch{'es' * (count > 1)}; leave two images to "
                    "each, by a larger batch-size or fewer micro-batches, or make the images larger"
                )
    tested, batch_size = len(test_loader.order(0)), test_loader.batch_size
    if (batch_size == 1 or tested % batch_size == 1) and (path := needs_two_images(trace, slice(None), training=False)):
        raise UsageError(
            f"BatchNorm {path!r} has no running statistics and sees a single value a channel of an image, so it cannot "
            f"run on one image, which batches of {batch_size} leave of {tested} to test on; "
            "take another batch-size"
        )


def needs_two_images(trace: Trace, span: slice, *, training: bool) -> str | None:
    """Find the path of the first BatchNorm among the ops of `span` that cannot run on a single image.

    It is one that takes statistics from the batch and sees a single value a channel of each image.
    """
    ops = (trace.train if training else trace.eval).ops[span]
    return next((op.single_value_norm for op in ops if op.single_value_norm is not None), None)
