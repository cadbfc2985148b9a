"""Defines the proxy that stands for a value while a model is traced, and answers Python's questions about it."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import fx

from fxsplit.capture.questions import TracerInterface
from fxsplit.capture.user_code import user_line
from fxsplit.errors import UntraceableError


class ValueProxy(fx.Proxy):
    """A torch.fx proxy that carries the value of its node, with tensors on the meta device."""

    tracer: TracerInterface  # type: ignore[assignment]

    @property
    def value(self) -> Any:
        """Return the value of the node."""
        return self.node.meta["value"]

    def __getattr__(self, name: str) -> Any:
        if name in ("keys", "values", "items") and isinstance(self.value, Mapping):
            items = {
                key: self.tracer.create_proxy("call_function", operator.getitem, (self, key), {}) for key in self.value
            }
            return getattr(items, name)
        try:
            attribute = getattr(self.value, name)
        except AttributeError as error:
            raise AttributeError(f"{type(self.value).__name__!r} object has no attribute {name!r}") from error
        if callable(attribute):
            return fx.proxy.Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            error = UntraceableError(f"{user_line()} sets the attribute {name!r} of a value that forward made")
            raise self.tracer.refused(error)
        super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.tracer.evaluating:
            # The copy is made to evaluate a module that forward has put this value into.
            return self.value
        return self.tracer.create_proxy("call_function", copy.deepcopy, (self,), {})

    def __bool__(self) -> bool:
        return bool(self.tracer.answer(self, "bool"))

    def __int__(self) -> int:
        return int(self.tracer.answer(self, "int"))

    def __float__(self) -> float:
        return float(self.tracer.answer(self, "float"))

    def __index__(self) -> int:
        return int(self.tracer.answer(self, "index"))

    def __len__(self) -> int:
        return int(self.tracer.answer(self, "len"))

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.value, Mapping):
            return iter(self.value)
        items = range(len(self))
        return (self.tracer.create_proxy("call_function", operator.getitem, (self, index), {}) for index in items)

    def __contains__(self, item: Any) -> bool:
        if isinstance(self.value, Mapping):
            return item in self.value
        return any(item is element or bool(item == element) for element in self)

    def __setitem__(self, key: Any, item: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, item), {})


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: ValueProxy, *others: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, *others), {})

    return method


# torch.fx records `x += y` as `x + y`, which loses the write into x's memory, and rounding would ask for a number.
for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(ValueProxy, f"__{_name}__", _recorded(getattr(operator, _name)))
for _name, _function in (("ceil", math.ceil), ("floor", math.floor), ("trunc", math.trunc), ("round", round)):
    setattr(ValueProxy, f"__{_name}__", _recorded(_function))
