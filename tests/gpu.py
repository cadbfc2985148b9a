"""A GPU that is only pretended: its tensors have shapes and no numbers, so what reads one of them fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxsplit.data import staging

CUDA = torch.device("cuda", 0)


class Stream:
    """Work that is done at once, and the events of it."""

    def __init__(self, *_: object) -> None:
        pass

    wait_event = wait_stream = record = __init__


class _Dispatch(TorchDispatchMode):
    """Lets ops that have to do with the GPU run without numbers, and all others as they are."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_leaves((args, kwargs or {}))
        if any(isinstance(each, FakeTensor) or (isinstance(each, torch.device) and each == CUDA) for each in given):
            return function(*args, **(kwargs or {}))
        with unset_fake_temporarily():
            return function(*args, **(kwargs or {}))


@contextmanager
def pretended(patch: pytest.MonkeyPatch, *, free_bytes: int = 2**30) -> Iterator[torch.device]:
    """Inside, there is a GPU with so many bytes free. As on a real one, tensors of two devices do not go together."""
    rows_of = staging.rows_of

    def rows_in_plain_memory(tensor: Tensor, rows: Tensor, *, pinned: bool) -> Tensor:
        assert pinned
        return rows_of(tensor, rows, pinned=False)

    @contextmanager
    def on(_stream: Stream) -> Iterator[None]:
        yield

    for name, fake in {
        "Stream": Stream,
        "Event": Stream,
        "stream": on,
        "current_stream": Stream,
        "mem_get_info": lambda _device: (free_bytes, free_bytes),
        "memory_reserved": lambda _device: 0,
        "memory_allocated": lambda _device: 0,
        "synchronize": lambda _device: None,
    }.items():
        patch.setattr(torch.cuda, name, fake)
    patch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    for module in ("fxsplit.data.images", "fxsplit.caching.rows"):
        patch.setattr(f"{module}.rows_of", rows_in_plain_memory)
    with FakeTensorMode(allow_non_fake_inputs=True), _Dispatch():
        yield CUDA
