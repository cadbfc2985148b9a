"""Whether settled partitions deliver the same for an image each time, whichever batch it comes in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# The relative error of a float32 product whose factors CUDA rounds to TF32.
TF32_EPSILON = 2.0**-10


def repeats(
    run: Callable[[list[Any]], list[Any]],
    given: Sequence[Any],
    values: Sequence[Any],
    *,
    precisions: Sequence[torch.dtype] = (),
) -> bool:
    """Tell whether images give the same `values` in other batches too, and without random numbers.

    Other batches have the same size, since for another one other kernels may run, which round otherwise:

        given               0 1 2 3 4 5
        in other company    2 2 1 1 0 0  and  5 5 4 4 3 3

    So each image runs again, in another place, before and after others than it was, beside itself, and without half of
    the batch. What depends on the place differs, as a running sum does; and so does what depends on the batch as a
    whole, as its mean does, which is the same in every order of the same images.

    Args:
        run: computes the values for images.
        given: the images (B, C, H, W), or what there is of them at an earlier cut: tensors (B, ...), or None.
        values: what `run` returned for them: tensors (B, ...), or None.
        precisions: in which `run` computes, beside the types of the values.
    """
    first_given = next(each for each in given if each is not None)
    count, device = len(first_given), first_given.device
    places, half = torch.arange(count, device=device).flip(0), count // 2
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for first, length in ((0, half), (half, count - half)):
            others = first + places * length // count
            before = torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)
            # In the same memory layout.
            found = run([None if each is None else torch.empty_like(each).copy_(each[others]) for each in given])
            after = torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)
            if not all(map(torch.equal, before, after)):
                return False
            pairs = [(a, b[others]) for a, b in zip(found, values, strict=True) if b is not None]
            if not all(are_alike(a, b, precisions=precisions) for a, b in pairs):
                return False
    return True


def are_alike(one: Tensor, other: Tensor, *, precisions: Sequence[torch.dtype] = ()) -> bool:
    """Tell whether the rows of two tensors are equal, or apart by no more than rounding.

    Where factors are rounded to a short type and sums are kept in float32, as in mixed precision, the error of a row is
    about half the epsilon of that type. In float32 and float64 it grows with the sums.
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if torch.equal(one, other):
        return True
    if not one.is_floating_point():
        return False
    epsilon = max(torch.finfo(dtype).eps for dtype in (one.dtype, *precisions))
    if one.is_cuda and one.dtype is torch.float32:
        epsilon = max(epsilon, TF32_EPSILON)
    bound = epsilon if epsilon > torch.finfo(torch.float32).eps else 32 * epsilon
    apart, size = (
        torch.linalg.vector_norm(each.flatten(1) if each.dim() > 1 else each[:, None], dim=1, dtype=torch.float64)
        for each in (one - other, other)
    )
    # A row whose values all but cancel has the error of its larger neighbours.
    return bool((apart <= bound * size.clamp(min=float(size.square().mean().sqrt()))).all())
