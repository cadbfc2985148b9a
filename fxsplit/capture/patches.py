"""Patches functions of Python and torch while a model is traced, so that the tracer sees calls that torch.fx misses.

Patches hold for the whole process. Each therefore checks who calls: in another thread, or while the tracer itself runs
an op, the original runs. Only one trace runs at a time.
"""

from __future__ import annotations

import builtins
import datetime
import gc
import importlib
import os
import random
import secrets
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from types import CellType, FrameType, ModuleType
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import fx, nn
from torch.utils import checkpoint

from fxsplit.capture.contexts import Context
from fxsplit.capture.questions import REAL_ISINSTANCE, TracerInterface
from fxsplit.errors import UntraceableError
from fxsplit.objects.effects import MISSING


def _methods_of(module: ModuleType, method: Any) -> tuple[str, ...]:
    """List the functions of a module that draw: methods of its global generator which do not read or set its state."""
    owner = method.__self__
    names = [name for name, value in vars(module).items() if getattr(value, "__self__", None) is owner]
    return tuple(name for name in names if name not in ("getstate", "setstate", "get_state", "set_state", "shuffle"))


# Held while a model is traced.
LOCK = threading.RLock()

# Creating a tensor dispatches on no argument, so torch.fx would run it once and keep the result as a constant.
FACTORIES = (
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace",
    "normal", "ones", "rand", "randint", "randn", "randperm", "tensor", "zeros",
)  # fmt: skip

# Functions that act on the process or on modules, which a graph of ops would lose.
REFUSED: dict[Any, tuple[str, ...]] = {
    torch.random: ("fork_rng",),
    torch.nn.attention: ("sdpa_kernel",),
    torch.backends.mkldnn: ("flags",),
    torch.backends.cudnn: ("flags",),
    random: ("shuffle", "setstate"),
    np.random: ("shuffle", "set_state"),
}

# Functions that give other numbers at each call, from generators and clocks, and those that seed generators.
DRAWS: dict[Any, tuple[str, ...]] = {
    random: _methods_of(random, random.random),
    np.random: (*_methods_of(np.random, np.random.rand), "ranf", "sample"),
    os: ("urandom", "times"),
    secrets: ("choice", "randbelow", "randbits", "token_bytes", "token_hex", "token_urlsafe"),
    uuid: ("uuid1", "uuid4"),
    torch: ("manual_seed", "seed", "initial_seed"),
    time: (
        "time", "time_ns", "perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "process_time",
        "process_time_ns", "thread_time", "thread_time_ns", "clock_gettime", "clock_gettime_ns",
        "localtime", "gmtime", "ctime", "asctime", "strftime",
    ),
}  # fmt: skip

# Classes written in C, whose methods cannot be patched, and the methods that read a clock.
CLOCKS: dict[Any, tuple[str, ...]] = {datetime.datetime: ("now", "utcnow", "today"), datetime.date: ("today",)}

# Functions that make a generator, which without a seed gives other numbers each time.
SEEDED: dict[Any, tuple[str, ...]] = {np.random: ("default_rng",)}

# Functions by which a forward can ask for the state of the contexts around it.
AMBIENT = (
    "is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "get_autocast_dtype",
    "is_autocast_cpu_enabled", "get_autocast_cpu_dtype", "get_autocast_gpu_dtype",
)  # fmt: skip

# Classes whose calls are recorded only when they are given the dtype of a traced value.
TYPE_LIMITS = ("finfo", "iinfo")

# torch lists its factories when a device context is first entered, and must not list our patches.
with torch.device("meta"):
    torch.empty(0)


@contextmanager
def watched(tracer: TracerInterface, functions: Iterable[Any] = ()) -> Iterator[None]:
    """Let the tracer record what torch.fx would miss, in this thread, while the context is open.

    It records calls of tensor factories, of the given `functions`, of scripted functions, of generators and clocks, and
    contexts. It refuses custom autograd functions and looks into checkpoints. `isinstance` takes a proxy for an
    instance of its value's class.
    """
    # torch imports it when some op first needs it, and it lists functions of torch: not our patches.
    importlib.import_module("torch._dynamo")
    patches = _Patches()
    try:
        _record_calls(patches, tracer, functions)
        _record_contexts(patches, tracer)
        _look_into_checkpoints(patches, tracer)
        patches.put(builtins, "isinstance", _isinstance_for(tracer.proxy_type))
        yield
    finally:
        patches.take_back()


class _Patches:
    """Sets attributes to other values, and back."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def put(self, owner: Any, name: str, value: Any) -> None:
        before = owner.cell_contents if isinstance(owner, CellType) else vars(owner).get(name, MISSING)
        self._before.append((owner, name, before))
        setattr(owner, name, value)

    def take_back(self) -> None:
        while self._before:
            owner, name, value = self._before.pop()
            if value is MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def _record_calls(patches: _Patches, tracer: TracerInterface, functions: Iterable[Any]) -> None:
    def recorded(function: Any) -> Callable[..., Any]:
        @wraps(function, updated=())
        def call(*args: Any, **kwargs: Any) -> Any:
            if tracer.is_recording:
                return tracer.call_function(function, args, kwargs)
            return function(*args, **kwargs)

        return call

    def by_users(record: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> Callable[[Any], Any]:
        """Wrap functions so that calls by user code are recorded, and calls by libraries run as they are."""

        def wrap(function: Any) -> Callable[..., Any]:
            @wraps(function, updated=())
            def call(*args: Any, **kwargs: Any) -> Any:
                if tracer.is_recording and _is_user(sys._getframe(1)):
                    return record(function, args, kwargs)
                return function(*args, **kwargs)

            return call

        return wrap

    def draw(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tracer.call_impure(*_functions()[id(function)][1:3], args, kwargs)

    def refuse(function: Any, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> NoReturn:
        error = UntraceableError(f"it calls {function.__name__}, which acts on more than a recording shows")
        raise tracer.refused(error)

    def seeded(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if all(given is None for given in (*args, *kwargs.values())):
            error = UntraceableError(
                f"it calls {function.__name__} without a seed, which gives other numbers each time"
            )
            raise tracer.refused(error)
        return function(*args, **kwargs)

    def clock(kind: Any) -> type:
        def record(method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return tracer.call_impure(kind.__module__, f"{kind.__name__}.{method.__name__}", args, kwargs)

        return _with_methods(kind, {name: by_users(record)(getattr(kind, name)) for name in CLOCKS[kind]})

    def limits(kind: Any) -> Callable[..., Any]:
        record = recorded(kind)

        def make(*dtype: Any) -> Any:
            return record(*dtype) if dtype and type(dtype[0]) is tracer.proxy_type else kind(*dtype)

        return make

    for name in TYPE_LIMITS:
        patches.put(torch, name, limits(getattr(torch, name)))
    wrappers = {
        "factory": recorded,
        "drawing": by_users(draw),
        "ambient": by_users(tracer.ask_ambient),
        "refused": by_users(refuse),
        "seeded": by_users(seeded),
        "clock": clock,
    }
    replacing = {key: wrappers[kind](function) for key, (kind, _, _, function) in _functions().items()}
    for owner, name, function in [*_named_in_modules()]:
        patches.put(owner, name, replacing[id(function)])
    for function in functions:
        for owner, name in _owners_of(function, tracer.model):
            patches.put(owner, name, recorded(function))
    scripted = torch.jit.ScriptFunction
    call_scripted = scripted.__call__

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        if tracer.is_recording:
            return tracer.call_foreign(function, args, kwargs)
        return call_scripted(function, *args, **kwargs)

    patches.put(scripted, "__call__", call)
    for name in ("train", "requires_grad_"):
        patches.put(nn.Module, name, _refused_in_forward(tracer, getattr(nn.Module, name)))


def _with_methods(kind: Any, methods: dict[str, Callable[..., Any]]) -> type:
    """Make a class that makes and recognises instances of `kind`, with some class methods replaced by `methods`."""

    class Replacing(type(kind)):  # type: ignore[misc]
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return kind(*args, **kwargs)

        def __instancecheck__(cls, instance: Any) -> bool:
            return REAL_ISINSTANCE(instance, kind)

        def __subclasscheck__(cls, other: Any) -> bool:
            return issubclass(other, kind)

    return Replacing(kind.__name__, (kind,), {name: staticmethod(method) for name, method in methods.items()})


def _refused_in_forward(tracer: TracerInterface, method: Any) -> Callable[..., Any]:
    """Refuse calls, by the forward that is traced, of a method that changes how a module runs later."""

    @wraps(method)
    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if tracer.is_recording:
            raise tracer.refused(UntraceableError(f"its forward calls {method.__name__}() of a module"))
        return method(module, *args, **kwargs)

    return call


def _record_contexts(patches: _Patches, tracer: TracerInterface) -> None:
    """Tell the tracer which contexts are open. `torch.set_grad_enabled(...)` acts also without a `with`."""

    def watch(kind: Any, describe: Callable[[Any], Context], enter: Callable[[Any], Any] | None = None) -> None:
        plain_enter, plain_exit = kind.__enter__, kind.__exit__

        def entered(context: Any) -> Any:
            if not tracer.is_recording:
                return plain_enter(context)
            result = (enter or plain_enter)(context)
            tracer.context_opened(context, describe(context))
            return result

        def left(context: Any, *error: Any) -> Any:
            tracer.context_closed(context)
            return plain_exit(context, *error)

        patches.put(kind, "__enter__", entered)
        patches.put(kind, "__exit__", left)

    def enter_inference(context: Any) -> None:
        # Tensors made in real inference mode have no version, by which the tracer sees in-place writes.
        context._inference_mode_context = _GradMode(not context.mode)
        context._inference_mode_context.__enter__()

    watch(torch.no_grad, lambda _: Context(kind="grad", enabled=False))
    watch(torch.enable_grad, lambda _: Context(kind="grad", enabled=True))
    watch(torch.set_grad_enabled, lambda context: Context(kind="grad", enabled=context.mode))
    watch(torch.inference_mode, lambda context: Context(kind="inference", enabled=context.mode), enter_inference)
    watch(
        torch.autocast,
        lambda context: Context(
            kind="autocast",
            enabled=context._enabled,
            device=context.device,
            dtype=context.fast_dtype,
            cache=context._cache_enabled,
        ),
    )
    set_grad = torch.set_grad_enabled
    make, decorate, make_autocast = set_grad.__init__, set_grad.__call__, torch.autocast.__init__

    def made(context: Any, mode: Any) -> None:
        mode = bool(mode)
        make(context, mode)
        # torch's own contexts also make it; only the user's counts.
        if tracer.is_recording and _is_user(sys._getframe(1)):
            tracer.context_opened(context, Context(kind="grad", enabled=mode))

    def decorated(context: Any, function: Any) -> Any:
        tracer.context_closed(context)
        return decorate(context, function)

    def made_autocast(context: Any, device_type: Any, *args: Any, **kwargs: Any) -> None:
        if type(device_type) is tracer.proxy_type:
            device_type = tracer.answer(device_type, "str")
        make_autocast(context, device_type, *args, **kwargs)

    patches.put(set_grad, "__init__", made)
    patches.put(set_grad, "__call__", decorated)
    patches.put(torch.autocast, "__init__", made_autocast)


class _GradMode:
    """Switches gradients as inference mode does, and does nothing else of it."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled

    def __enter__(self) -> None:
        self._before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(self._enabled)

    def __exit__(self, *_: object) -> None:
        torch._C._set_grad_enabled(self._before)


def _look_into_checkpoints(patches: _Patches, tracer: TracerInterface) -> None:
    """Trace checkpointed functions like any others, and refuse other custom autograd functions."""
    original_apply: Any = vars(torch.autograd.Function)["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not tracer.is_recording:
            return original_apply.__get__(None, cls)(*args, **kwargs)
        if cls is checkpoint.CheckpointFunction:
            function, _preserve, *given = args
            return tracer.call_checkpointed(function, given, reentrant=True)
        raise tracer.refused(UntraceableError(f"it calls the custom autograd function {cls.__name__}"))

    patches.put(torch.autograd.Function, "apply", classmethod(apply))
    for name in ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl"):
        if not hasattr(checkpoint, name):
            continue
        around = getattr(checkpoint, name)

        def unchecked(*args: Any, _around: Any = around, **kwargs: Any) -> Iterator[None]:
            if not tracer.is_recording:
                yield from _around(*args, **kwargs)
                return
            tracer.checkpoints = True
            yield

        patches.put(checkpoint, name, unchecked)


def _is_user(caller: FrameType) -> bool:
    """Whether user code calls: not Python's library, which reads clocks, nor torch, which asks for contexts."""
    return _is_users_module(caller.f_globals.get("__name__", ""))


@cache
def _is_users_module(name: str) -> bool:
    top = name.partition(".")[0]
    return top not in sys.stdlib_module_names and top not in ("torch", "numpy", "fxsplit")


@cache
def _functions() -> dict[int, tuple[str, str, str, Any]]:
    """List the functions to patch, by id: which wrapper they get, their owner, their name and the function itself.

    Called only after torch._dynamo is imported, which replaces some of them.
    """
    clocks = {datetime: tuple(kind.__name__ for kind in CLOCKS)}
    return {
        id(getattr(owner, name)): (kind, owner.__name__, name, getattr(owner, name))
        for kind, owners in (
            *(("factory", {torch: FACTORIES}), ("drawing", DRAWS), ("clock", clocks)),
            *(("ambient", {torch: AMBIENT}), ("refused", REFUSED), ("seeded", SEEDED)),
        )
        for owner, names in owners.items()
        for name in names
    }


# By module: how many names it had when it was searched, and what was found.
_found: WeakKeyDictionary[ModuleType, tuple[int, list[tuple[str, Any]]]] = WeakKeyDictionary()


def _named_in_modules() -> Iterator[tuple[Any, str, Any]]:
    """Yield every module attribute that is one of these functions: in their own modules, and in user code."""
    functions = _functions()
    for name, module in list(sys.modules.items()):
        space = getattr(module, "__dict__", None)
        if space is None or not (_is_users_module(name) or module in (torch, datetime, *DRAWS, *REFUSED, *SEEDED)):
            continue
        size, found = _found.get(module, (-1, []))
        if size != len(space):
            found = [(key, value) for key, value in list(space.items()) if id(value) in functions]
            _found[module] = len(space), found
        for key, function in found:
            if space.get(key) is function:
                yield module, key, function


def _owners_of(function: Any, model: nn.Module) -> list[tuple[Any, str]]:
    """List everything that holds the function: Python modules, classes, modules of the model, and closures."""
    modules = list(model.modules())
    classes = {base for module in modules for base in type(module).__mro__}
    owners = [owner for owner in (*list(sys.modules.values()), *classes, *modules) if hasattr(owner, "__dict__")]
    named = [(owner, name) for owner in owners for name, value in list(vars(owner).items()) if value is function]
    cells = [each for each in gc.get_referrers(function) if type(each) is CellType]
    return [*named, *((cell, "cell_contents") for cell in cells)]


def _isinstance_for(proxy_type: Any) -> Callable[[Any, Any], bool]:
    """Make an `isinstance` that takes a proxy for an instance of its value's class.

    A `__class__` property on the proxy is no way: torch's C code would trust it and read memory that is no tensor.
    """

    def check(instance: Any, classinfo: Any) -> bool:
        if type(instance) is proxy_type:
            if REAL_ISINSTANCE(instance.value, classinfo):
                return True
            if classinfo is fx.Proxy and _is_user(sys._getframe(1)) and instance.tracer.knows(instance):
                # A model asks this to skip a branch on data when it is traced. These numbers are known: it need not.
                return False
        return REAL_ISINSTANCE(instance, classinfo)

    return check
