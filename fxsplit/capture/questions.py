"""What is asked and noted while a model is traced, and of whom: where patches, proxies and the tracer meet.

user's forward ── len(x) ──► ValueProxy ── answer(x, "len") ──► ValueTracer ──► a Guard
               ── torch.zeros(2) ──► patch ── call_function(...) ──► ValueTracer ──► an op
               ── self.seen = x ──► an Assignment
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import fx, nn

from fxsplit.capture.contexts import Context

QUESTIONS: dict[str, Callable[[Any], Any]] = {
    "bool": bool, "int": int, "float": float, "index": operator.index, "len": len, "str": str
}  # fmt: skip

# While a model is traced, another one stands in the place of Python's own.
REAL_ISINSTANCE = isinstance

MISSING = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """An answer that fixed a path: `question` was asked of the value of `node` at the user's line `where`."""

    node: fx.Node
    question: str
    answer: Any
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """A forward that put `value` (nodes in it) into `owner`, the buffers or attributes of the module `path`."""

    path: str
    owner: dict[str, Any]
    name: str
    before: Any
    value: Any

    def undo(self) -> None:
        """Put back what was there."""
        if self.before is MISSING:
            del self.owner[self.name]
        else:
            self.owner[self.name] = self.before


class Asked(Protocol):
    """What patches and proxies ask of the tracer, and tell it: see `ValueTracer`."""

    model: nn.Module
    evaluating: bool
    checkpoints: bool

    @property
    def proxy_type(self) -> type[fx.Proxy]: ...

    @property
    def is_recording(self) -> bool: ...

    def answer(self, proxy: Any, question: str) -> Any: ...

    def create_proxy(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...

    def call_function(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...

    def call_external(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...

    def call_outside(self, owner: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...

    def call_checkpointed(self, function: Callable[..., Any], args: Sequence[Any], *, reentrant: bool) -> Any: ...

    def ask_ambient(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...

    def context_opened(self, holder: object, context: Context) -> None: ...

    def context_closed(self, holder: object) -> None: ...
