"""Whether numbers are finite, and which partition is the first that delivers some that are not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxsplit.data.batch import Batch
from fxsplit.distribute.layout import agreed, own_part
from fxsplit.execute.forward import Forward
from fxsplit.objects.structure import is_divided, tensors_in
from fxsplit.plan.partition import Partition


@torch.no_grad()
def are_finite(tensors: Iterable[Tensor | None]) -> bool:
    """Tell whether all floating-point numbers are finite; what is None has none. It waits for the device.

    Where tensors are divided among processes, all must ask, and are told the same.
    """
    given = [each for each in tensors if each is not None and each.is_floating_point()]
    found = [own_part(each).isfinite().all() for each in given]
    are_so = not found or bool(torch.stack([each.to(found[0].device) for each in found]).all())
    return agreed(are_so) if any(map(is_divided, given)) else are_so


@torch.no_grad()
def first_not_finite(forward: Forward, batch: Batch) -> str:
    """Run a batch forward again, and say which partition is the first whose output is not finite; "" if none is.

    Running statistics and random states move on by it.
    """
    executor, found = forward.executor, list[int]()

    def tap(index: int, values: Sequence[Any]) -> None:
        if not found and not _holds_finite(values):
            found.append(index)

    if not _holds_finite(batch.values):
        return "what the settled partitions deliver is not finite" if batch.cut else "the images are not finite"
    with executor.tapped(tap), forward.autocast():
        values = list(batch.values) if batch.cut else executor.settle(*batch.values)
        if not _holds_finite(values):
            return "what the settled partitions deliver is not finite"
        output = executor.resume(values)
    if not found and not _holds_finite([output]):
        found.append(len(executor.partitions) - 1)
    return f"the first output that is not finite is that of {named(executor.partitions, found[0])}" if found else ""


def named(partitions: Sequence[Partition], index: int) -> str:
    """Name a partition by its number, from 1, and its first module or op."""
    return f"partition {index + 1} of {len(partitions)}, {partitions[index].name!r}"


def _holds_finite(values: Any) -> bool:
    return are_finite(tensors_in(values))
