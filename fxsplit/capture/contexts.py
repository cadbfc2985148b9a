"""Records the contexts that forward opens around its ops: gradients on or off, inference mode, autocast.

A context acts on the thread, not on a tensor, so a graph does not show it. Each node therefore lists the contexts in
which its op ran, in the order in which they were opened. The op runs in them again, wherever the graph is cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Describes one context. `device`, `dtype` and `cache` are arguments of autocast."""

    kind: Literal["grad", "inference", "autocast"]
    enabled: bool
    device: str = ""
    dtype: torch.dtype | None = None
    cache: bool | None = None

    def open(self) -> AbstractContextManager[object]:
        """Make the context manager of torch."""
        if self.kind == "grad":
            return torch.enable_grad() if self.enabled else torch.no_grad()
        if self.kind == "inference":
            return torch.inference_mode(self.enabled)
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.enabled, cache_enabled=self.cache)


@contextmanager
def opened(contexts: Sequence[Context]) -> Iterator[None]:
    """Open all `contexts`, the last one innermost."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context.open())
        yield


def contexts_of(node: fx.Node) -> tuple[Context, ...]:
    """Return the contexts in which the op of a node runs; most ops run in none."""
    found: tuple[Context, ...] = node.meta.get("contexts", ())
    return found
