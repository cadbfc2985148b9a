"""Runs the plain model as it is captured: its own gradient checkpoints are looked through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils import checkpoint

# Generators around the call of a checkpointed function, by the names of several versions of torch.
AROUND = ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")


@contextmanager
def looked_through() -> Iterator[None]:
    """Keep the activations of checkpointed functions, so that backward does not call them again.

    A second call moves the statistics of BatchNorm a second time, which partitions do not do.
    """
    with ExitStack() as stack:
        for name in AROUND:
            if hasattr(checkpoint, name):
                stack.enter_context(patch.object(checkpoint, name, _nothing_around))
        stack.enter_context(patch.object(checkpoint.CheckpointFunction, "apply", _called))
        yield


def _nothing_around(*_args: Any, **_kwargs: Any) -> Iterator[None]:
    yield


def _called(function: Callable[..., Any], _preserve: bool, *args: Any) -> Any:
    """Call a function of the reentrant kind, which gives no gradient where none of its inputs wants one."""
    wanting = [isinstance(each, Tensor) and each.requires_grad for each in args]
    if not any(wanting):
        with torch.no_grad():
            return function(*args)
    # It adds up the gradients of an argument inside, before they meet those from outside.
    return function(*(each.view_as(each) if wants else each for each, wants in zip(args, wanting, strict=True)))
