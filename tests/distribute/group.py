"""A process of a test, together with others of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed


@contextmanager
def together(rank: int, count: int, store: str) -> Iterator[None]:
    """Inside, this process is one of so many that meet at the file `store`; each has one thread."""
    torch.set_num_threads(1)
    os.environ["RANK"] = str(rank)
    distributed.init_process_group(
        "gloo", f"file://{store}", timeout=timedelta(seconds=300), rank=rank, world_size=count
    )
    yield
    distributed.destroy_process_group()
