"""Defines what proxies and patches ask of the tracer and tell it, so that they need not import it.

user's forward ── len(x) ──► ValueProxy ── answer(x, "len") ──► ValueTracer ──► a Guard
               ── torch.zeros(2) ──► patch ── call_function(...) ──► ValueTracer ──► an op
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, fx, nn

from fxsplit.capture.contexts import Context
from fxsplit.errors import UntraceableError

QUESTIONS: dict[str, Callable[[Any], Any]] = {
    "bool": bool, "int": int, "float": float, "index": operator.index, "len": len, "str": str
}  # fmt: skip

# Python's own, which is patched while a model is traced.
REAL_ISINSTANCE = isinstance


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """Records an answer that decided how forward went on: to `question` about the value of `node`, at line `where`."""

    node: fx.Node
    question: str
    answer: Any
    where: str


class TracerInterface(Protocol):
    """Lists the members of `ValueTracer` that patches and proxies use."""

    model: nn.Module
    evaluating: bool
    checkpoints: bool

    @property
    def proxy_type(self) -> type[fx.Proxy]: ...

    @property
    def is_recording(self) -> bool: ...

    def held(self, tensor: Tensor) -> Any: ...

    def refused(self, error: UntraceableError) -> UntraceableError: ...

    def answer(self, proxy: Any, question: str) -> Any: ...

    def create_proxy(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...

    def call_function(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...

    def call_foreign(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...

    def call_impure(self, owner: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...

    def call_checkpointed(self, function: Callable[..., Any], args: Sequence[Any], *, reentrant: bool) -> Any: ...

    def ask_ambient(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...

    def context_opened(self, holder: object, context: Context) -> None: ...

    def context_closed(self, holder: object) -> None: ...
