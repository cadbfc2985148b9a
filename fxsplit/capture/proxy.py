"""Defines the proxy that stands for a value while a model is traced, and answers Python's questions about it."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily

from fxsplit.capture.questions import TracerInterface
from fxsplit.capture.user_code import user_line
from fxsplit.errors import UntraceableError
from fxsplit.objects.structure import map_tensors, tensors_in

# Attributes of tensors that are tensors.
TENSOR_ATTRIBUTES = ("data", "grad", "T", "mT", "H", "mH", "real", "imag")

# Methods of tensors that are for people and for copies.
UNRECORDED = ("__repr__", "__str__", "__format__", "__hash__", "__deepcopy__", "__reduce_ex__", "__dir__", "data_ptr")


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
        if callable(attribute) and name != "grad_fn":
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

    def __str__(self) -> str:
        return super().__str__() if isinstance(self.value, Tensor) else str(self.tracer.answer(self, "str"))

    def __format__(self, form: str) -> str:
        if isinstance(self.value, Tensor):
            return super().__format__(form)
        self.tracer.answer(self, "str")
        return format(self.value, form)

    def __hash__(self) -> int:
        # A number, a size or a dtype may be looked up in a dict or a set; then the comparison asks for more.
        if isinstance(self.value, Tensor):
            return super().__hash__()
        self.tracer.answer(self, "str")
        return hash(self.value)

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


class HeldTensors(TorchFunctionMode):
    """Records what forward does with tensors of the model that it reaches by no attribute, but by `parameters()`.

    Attributes are read through the tracer, which gives proxies. Here such tensors are replaced by proxies, too.
    """

    def __init__(self, tracer: TracerInterface) -> None:
        super().__init__()
        self._tracer = tracer

    def off(self) -> AbstractContextManager[Any]:
        """Take it off while the context is open, where it is the innermost mode: it then costs nothing."""
        depth = torch._C._len_torch_function_stack()
        is_innermost = depth and torch._C._get_function_stack_at(depth - 1) is self
        return _pop_mode_temporarily() if is_innermost else nullcontext()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tracer = self._tracer
        name = getattr(func, "__name__", "")
        if not tracer.is_recording:
            return func(*args, **kwargs)
        if name == "__set__" and tracer.held(args[0]) is not None:
            attribute = getattr(func.__self__, "__name__", "")
            error = UntraceableError(f"{user_line()} sets {attribute!r} of a tensor of the model")
            raise tracer.refused(error)
        if any(type(each) is ValueProxy for each in args):
            return func(*args, **kwargs)
        if name == "__get__":
            # Sizes, types and flags are those of the model; `data` and `T` are tensors.
            attribute = getattr(func.__self__, "__name__", "")
            proxy = tracer.held(args[0]) if attribute in TENSOR_ATTRIBUTES else None
            return func(*args, **kwargs) if proxy is None else getattr(proxy, attribute)
        given = [leaf for leaf in tensors_in((args, kwargs)) if tracer.held(leaf) is not None]
        if not given or name in UNRECORDED:
            return func(*args, **kwargs)
        if name.startswith("__"):
            # Python asks `len(tensor)`, for instance, and wants an answer that is no proxy.
            return getattr(tracer.held(args[0]), name)(*args[1:])

        def replaced(leaf: Tensor) -> Any:
            return leaf if (proxy := tracer.held(leaf)) is None else proxy

        proxies: tuple[Any, ...] = map_tensors(replaced, tuple(args))
        named: dict[str, Any] = map_tensors(replaced, dict(kwargs))
        return ValueProxy.__torch_function__(func, types, proxies, named)
