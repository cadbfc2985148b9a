"""Caches torch's kernels on the meta device, and counts their floating-point operations.

Meta kernels are written in Python and slow: a BatchNorm takes a thousand calls to find that its output has the shape of
its input. Results depend on shapes, strides, dtypes and plain arguments alone, and models repeat layers.
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
from torch.autograd.graph import increment_version
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fxsplit.meta.evaluate import storage_key

# Arguments of these types are compared by value.
PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True, slots=True)
class _Form:
    """Describes a meta tensor with memory of its own."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Result:
    """Describes the result of a kernel, as nested forms, and its floating-point operations."""

    form: Any
    flops: int


class _UnknownFormError(Exception):
    """An argument or a result has no form by which the cache could find it."""


class Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode in which a meta kernel runs once for equal arguments; later calls get an equal result."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[Any, _Result | None] = {}
        self._flops: Counter[Any] = Counter()

    @contextmanager
    def counting(self) -> Iterator[Counter[Any]]:
        """Count floating-point operations by kernel while it is open, two for a multiply-add."""
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
            # Only in inference mode do these arrive without being decomposed.
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
        if func._schema.is_mutable:
            # In a dispatch mode torch notes no write into the tensors of a list.
            given = zip(func._schema.arguments, args, strict=False)
            increment_version(
                [each for argument, value in given if _is_written_list(argument, value) for each in value]
            )
        formula: Any = flop_registry.get(func.overloadpacket)
        flops = formula(*args, **kwargs, out_val=value) if formula else 0
        self._count(func, flops)
        return value, flops

    def _count(self, func: OpOverload[..., Any], flops: int) -> None:
        if flops:
            self._flops[func.overloadpacket] += flops


def _is_written_list(argument: Any, value: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, list | tuple)


@cache
def _is_composite(func: OpOverload[..., Any]) -> bool:
    """Whether torch would decompose it into other ops."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return key in func.py_kernels or torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)  # type: ignore[no-untyped-call]


@cache
def _makes_tensors(func: OpOverload[..., Any]) -> bool:
    """Whether it takes tensors and returns new ones only; it may write to arguments such as running statistics."""
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
    """Make a key for arguments, equal where a kernel gives the same result. Raises _UnknownFormError without one."""
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
    """Describe a result; None if it has no form, or is a view of an argument in spite of its schema."""
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
