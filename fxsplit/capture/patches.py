"""What Python and torch do by themselves, put under the tracer's eyes for as long as a model is traced."""

from __future__ import annotations

import builtins
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from types import FunctionType
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import nn

if TYPE_CHECKING:
    from fxsplit.capture.tracer import ValueTracer

# Creating a tensor dispatches on no argument, so torch.fx would run it once and keep the result as a constant.
FACTORIES = (
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace",
    "ones", "rand", "randint", "randn", "randperm", "tensor", "zeros",
)  # fmt: skip


# torch lists its factories when a device context is first entered, and must not find ours there.
with torch.device("meta"):
    torch.empty(0)

# Classes, of which only an instance for the type of some value is recorded.
TYPE_LIMITS = ("finfo", "iinfo")


REAL_ISINSTANCE = isinstance


class UntraceableError(Exception):
    """Something that cannot be recorded; the module around it becomes one op. The message is the reason."""


@contextmanager
def watched(tracer: ValueTracer, functions: Iterable[FunctionType] = ()) -> Iterator[None]:
    """Inside, torch's tensor factories and the given functions and methods are recorded, custom autograd functions are
    refused rather than lost, and a proxy passes for an instance of its value's class.
    """

    # torch imports it as soon as some op needs it; what it then lists of torch must not be ours.
    importlib.import_module("torch._dynamo")

    def recorded(function: Any) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if tracer.evaluating:
                return function(*args, **kwargs)
            return tracer.call_function(function, args, kwargs)

        return call

    def limits(kind: type) -> Callable[..., Any]:
        def make(*dtype: Any) -> Any:
            return recorded(kind)(*dtype) if dtype and type(dtype[0]) is tracer.proxy_type else kind(*dtype)

        return make

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if tracer.evaluating:
            return original_apply.__get__(None, cls)(*args, **kwargs)
        raise UntraceableError(f"it calls the custom autograd function {cls.__name__}")

    original_apply: Any = vars(torch.autograd.Function)["apply"]
    patches: list[Any] = [
        *(patch.object(torch, name, recorded(getattr(torch, name))) for name in FACTORIES),
        *(patch.object(torch, name, limits(getattr(torch, name))) for name in TYPE_LIMITS),
        *(
            patch.object(owner, name, recorded(function))
            for function in functions
            for owner, name in _owners_of(function, tracer.model)
        ),
        patch.object(torch.autograd.Function, "apply", classmethod(apply)),
        patch.object(builtins, "isinstance", _isinstance_for(tracer.proxy_type)),
    ]
    with ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        yield


def _owners_of(function: FunctionType, model: nn.Module) -> list[tuple[Any, str]]:
    """All places from which the function is called: the modules that imported it, the classes whose method it is."""
    classes = {base for module in model.modules() for base in type(module).__mro__}
    owners = [owner for owner in (*list(sys.modules.values()), *classes) if hasattr(owner, "__dict__")]
    return [(owner, name) for owner in owners for name, value in list(vars(owner).items()) if value is function]


def _isinstance_for(proxy_type: Any) -> Callable[[Any, Any], bool]:
    """A `__class__` on the proxy would do as well, if torch's C code did not believe it and read foreign memory."""

    def check(instance: Any, classinfo: Any) -> bool:
        if type(instance) is proxy_type and REAL_ISINSTANCE(instance.value, classinfo):
            return True
        return REAL_ISINSTANCE(instance, classinfo)

    return check
