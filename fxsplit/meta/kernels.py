"""torch's kernels on the meta device, each run once for the same shapes, and their floating-point operations.

They are written in Python, and slow: a BatchNorm takes a thousand calls to say that its output looks like its input.
What they deliver depends on shapes, strides, types and numbers alone, and models repeat themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fxsplit.meta.evaluate import storage_key

# Nothing in a call that looks like these can be another one's.
PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True, slots=True)
class _Form:
    """What a tensor with memory of its own looks like, on the meta device."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Result:
    """What a kernel delivers, in the nesting of its value, and the operations that it takes."""

    form: Any
    flops: int


class _UnknownFormError(Exception):
    """An argument or a result that cannot be known again."""


class Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is open, a kernel of the meta device whose result is known does not run again."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[Any, _Result | None] = {}
        self._flops: Counter[Any] = Counter()

    @contextmanager
    def counting(self) -> Iterator[Counter[Any]]:
        """Inside, the floating-point operations are counted by kernel, two for a multiply-add."""
        outer, self._flops = self._flops, Counter()
        try:
            with self:
                yield self._flops
        finally:
            self._flops = outer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload):
            return func(*args, **kwargs)
        if _is_composite(func):
            # Only in inference mode do these come undivided.
            with self:
                return func.decompose(*args, **kwargs)
        if not _makes_tensors(func):
            return self._run(func, args, kwargs)[0]
        try:
            key = func, _form_of(args), _form_of(kwargs)
        except _UnknownFormError:
            return self._run(func, args, kwargs)[0]
        known = self._known.get(key)
        if known is not None:
            self._count(func, known.flops)
            return _made(known.form)
        value, flops = self._run(func, args, kwargs)
        if key not in self._known:
            self._known[key] = _result(value, flops, (args, kwargs))
        return value

    def _run(self, func: OpOverload[..., Any], args: Any, kwargs: Any) -> tuple[Any, int]:
        value = func(*args, **kwargs)
        formula: Any = flop_registry.get(func.overloadpacket)
        flops = formula(*args, **kwargs, out_val=value) if formula else 0
        self._count(func, flops)
        return value, flops

    def _count(self, func: OpOverload[..., Any], flops: int) -> None:
        if flops:
            self._flops[func.overloadpacket] += flops


@cache
def _is_composite(func: OpOverload[..., Any]) -> bool:
    """Whether torch itself would divide it into others."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return key in func.py_kernels or torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)  # type: ignore[no-untyped-call]


@cache
def _makes_tensors(func: OpOverload[..., Any]) -> bool:
    """Whether it takes tensors and delivers nothing but new ones; running statistics may be written on the way."""
    schema = func._schema
    takes = any("Tensor" in str(argument.type) for argument in schema.arguments)
    return (
        takes
        and bool(schema.returns)
        and all(
            result.alias_info is None and str(result.type) in ("Tensor", "List[Tensor]") for result in schema.returns
        )
    )


def _form_of(argument: Any) -> Any:
    """Equal for two arguments for which a kernel delivers the same."""
    kind = type(argument)
    if kind is Tensor or kind is nn.Parameter:
        if argument.device.type != "meta" or argument.layout is not torch.strided or argument.is_conj():
            raise _UnknownFormError
        return argument.shape, argument.stride(), argument.storage_offset(), argument.dtype
    if kind in PLAIN:
        return kind, argument
    if kind is tuple or kind is list:
        return kind, *map(_form_of, argument)
    if kind is dict:
        return tuple((name, _form_of(each)) for name, each in argument.items())
    raise _UnknownFormError


def _result(value: Any, flops: int, given: Any) -> _Result | None:
    """None for what cannot be made again by its form, or is a view of what was given after all."""
    before, after = (
        {storage_key(leaf) for leaf in pytree.tree_leaves(of) if isinstance(leaf, Tensor)} for of in (given, value)
    )
    if before & after:
        return None
    try:
        return _Result(_form_of_result(value), flops)
    except _UnknownFormError:
        return None


def _form_of_result(value: Any) -> Any:
    if value is None:
        return None
    if type(value) is Tensor:
        form = _Form(tuple(value.shape), value.stride(), value.dtype)
        if _form_of(value)[2] or _made(form).untyped_storage().nbytes() != value.untyped_storage().nbytes():
            raise _UnknownFormError
        return form
    if type(value) in (tuple, list):
        return type(value)(map(_form_of_result, value))
    raise _UnknownFormError


def _made(form: Any) -> Any:
    if type(form) is _Form:
        return torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device="meta")
    return None if form is None else type(form)(map(_made, form))
