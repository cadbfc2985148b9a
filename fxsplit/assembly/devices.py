"""The device of a run, and torch's settings for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fxsplit.distribute.processes import Processes, local_count, local_rank
from fxsplit.errors import UsageError

# Where TF32 is allowed for float32 numbers: products and convolutions on a GPU.
TF32: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)


def named_device(name: str) -> torch.device:
    """Return the device of that name, which need not be there; `auto` is CUDA where there is a GPU, else the CPU."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def choose_device(name: str) -> torch.device:
    """Find the device of that name, as `named_device` does.

    Of several processes on a machine each gets a GPU of its own. Raises UsageError when there is no such device.
    """
    device = named_device(name)
    if device.type == "cuda" and local_count() > 1:
        if device.index is not None or local_count() > torch.cuda.device_count():
            raise UsageError(
                f"{local_count()} processes on this machine share {torch.cuda.device_count()} CUDA devices, and each "
                "needs one of its own; start as many processes as there are, with --device auto"
            )
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"there is no device {name!r}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; "
            "use --device cpu, or auto"
        )
    return device


def seed_apart(seed: int, processes: Processes) -> None:
    """Seed every generator for the steps of one process of several: each draws for other images."""
    if processes.count > 1:
        from timm.utils.random import random_seed

        random_seed(seed, processes.rank)


@contextmanager
def determinism(seed: int, deterministic: bool) -> Iterator[None]:
    """Seed every generator, and inside choose kernels for a run; torch's settings are put back at the end.

    With `deterministic` torch refuses kernels that are not; without, a GPU uses TF32 for float32 numbers, and cuDNN
    looks for the fastest kernels, as in timm's train.py.
    """
    from timm.utils.random import random_seed  # timm takes most of a second to import, and inspections do without

    random_seed(seed)
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        # cuBLAS reads this when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        with _tf32(not deterministic):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Inside, allow TF32 or not, unless somebody has used torch's newer settings, with which these cannot be mixed."""
    try:
        before = [each.allow_tf32 for each in TF32]
    except RuntimeError:
        yield
        return
    for each in TF32:
        each.allow_tf32 = allowed
    try:
        yield
    finally:
        for each, setting in zip(TF32, before, strict=True):
            each.allow_tf32 = setting
