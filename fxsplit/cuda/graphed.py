"""Steps of people's own training loops, recorded and replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxsplit.cuda.recorder import CudaRecorder, Recorder
from fxsplit.cuda.replay import Replayed
from fxsplit.errors import UsageError
from fxsplit.objects.structure import map_tensors

P = ParamSpec("P")
T = TypeVar("T")


def graphed(
    step: Callable[P, T], *held: nn.Module | Optimizer, notice: Callable[[str], None] = warnings.warn
) -> Callable[P, T]:
    """Make a step of a training loop one that is recorded as a CUDA graph and replayed, where it is given CUDA tensors.

    The first three calls with tensors of certain shapes run as they are, on a side stream; the next one is recorded,
    and all further ones are replays. On a CPU every call runs as it is. So does a step that cannot be recorded, because
    the host reads from the device in it or because something changes on the host, and one whose arguments require
    gradients. What the step returns is detached, and stays as it is when the next one runs.

    Recordings are dropped when parameters start or stop to train, modules change their mode, or a number in the
    groups of an optimizer changes; also when what does not train is written into, and when an optimizer loads a state.
    A learning rate that changes should be a tensor that is written into. An optimizer that counts its steps needs
    `capturable=True`; `fused=True` alone is not enough. Gradients are those of the last call, so an optimizer or a
    gradient scaler may step outside; a step that adds to gradients which are there before it is not recorded.

    Args:
        step: takes tensors, and values that are compared with `==`, and does all its work on the device of the tensors.
        held: the modules and optimizers that it uses.
        notice: is called with a sentence when the step cannot be recorded.

    Raises UsageError, when it is called, for arguments that are neither tensors nor hashable.
    """
    return Graphed(step, held, notice=notice, recorder_for=CudaRecorder)


# Shapes, and values of other arguments, that are recorded; a number that changes in each call would fill the memory.
MOST_SHAPES = 16
# Calls in a row before each of which something has changed.
MOST_CHANGES = 16


class _Shaped(NamedTuple):
    """The step for arguments of certain shapes: the tensors that it reads, and what is called."""

    static: list[Tensor]
    replayed: Replayed[Any]


class Graphed(Generic[P, T]):
    """Is what `graphed` returns; `recorder_for` makes the recorder of a device, and None if it has none."""

    def __init__(
        self,
        step: Callable[P, T],
        held: Sequence[nn.Module | Optimizer],
        *,
        notice: Callable[[str], None],
        recorder_for: Callable[[torch.device], Recorder],
        device_type: str = "cuda",
    ) -> None:
        self._step, self._held, self._notice = step, held, notice
        self._recorder_for, self._device_type = recorder_for, device_type
        self._recorders: dict[torch.device, Recorder] = {}
        self._state: Hashable = None
        self._by_shape: dict[Hashable, _Shaped] = {}
        self._changes = 0
        self._is_given_up = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """Take a step."""
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        device = tensors[0].device if tensors else torch.device("cpu")
        is_plain = device.type != self._device_type or any(each.requires_grad for each in tensors)
        if is_plain or self._is_given_up:
            return self._step(*args, **kwargs)
        state = _state_of(self._held)
        self._changes = self._changes + 1 if state != self._state else 0
        if state != self._state:
            self._by_shape.clear()
            self._state = state
        if self._changes == MOST_CHANGES:
            self._give_up("a mode, a number or a tensor that it uses is another one in each call")
            return self._step(*args, **kwargs)
        key = _shapes_of(args, kwargs)
        shaped = self._by_shape.get(key)
        if shaped is None and len(self._by_shape) == MOST_SHAPES:
            self._give_up(f"it was called with {MOST_SHAPES} shapes or values and is called with another one")
            return self._step(*args, **kwargs)
        if shaped is None:
            shaped = self._by_shape[key] = self._shaped(args, kwargs, device)
        for static, given in zip(shaped.static, tensors, strict=True):
            static.copy_(given, non_blocking=True)
        result, gradients = shaped.replayed()
        for parameter, gradient in zip(_parameters(self._held), gradients, strict=True):
            parameter.grad = gradient
        copied: T = map_tensors(Tensor.clone, result)
        return copied

    def _stepped(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[T, list[Tensor | None]]:
        """Take a step, and return what it returns and the gradients after it."""
        parameters = _parameters(self._held)
        before = [parameter.grad for parameter in parameters]
        result = map_tensors(Tensor.detach, self._step(*args, **kwargs))
        after = [parameter.grad for parameter in parameters]
        if any(one is not None and one is other for one, other in zip(before, after, strict=True)):
            self._give_up("it adds to gradients that are there before it")
        return result, after

    def _give_up(self, reason: str) -> None:
        if not self._is_given_up:
            self._is_given_up = True
            self._notice(f"a step runs eagerly, without a CUDA graph: {reason}")
        self._by_shape.clear()

    def _shaped(self, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device) -> _Shaped:
        if device not in self._recorders:
            self._recorders[device] = self._recorder_for(device)
        own_args, own_kwargs = (
            [_copied(each) for each in args],
            {name: _copied(each) for name, each in kwargs.items()},
        )
        return _Shaped(
            static=[each for each in (*own_args, *own_kwargs.values()) if isinstance(each, Tensor)],
            replayed=Replayed(
                lambda: self._stepped(own_args, own_kwargs),
                self._recorders[device],
                device,
                held=self._held,
                refused=lambda reason: self._notice(f"a step runs eagerly, without a CUDA graph: {reason}"),
            ),
        )


def _parameters(held: Sequence[nn.Module | Optimizer]) -> list[Tensor]:
    """List the parameters of modules and optimizers, each once."""
    found: dict[int, Tensor] = {}
    for each in held:
        groups = each.param_groups if isinstance(each, Optimizer) else [{"params": each.parameters()}]
        found |= {id(parameter): parameter for group in groups for parameter in group["params"]}
    return list(found.values())


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _shapes_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable:
    """Return what calls must have in common to share a recording: the layout of tensors, and all other values."""

    def of(value: Any) -> Any:
        return (value.shape, value.stride(), value.dtype, value.device) if isinstance(value, Tensor) else value

    shapes = tuple(map(of, args)), tuple((name, of(value)) for name, value in kwargs.items())
    try:
        hash(shapes)
    except TypeError as error:
        raise UsageError(f"a graphed step takes tensors and values that can be hashed: {error}") from error
    return shapes


def _state_of(held: Sequence[nn.Module | Optimizer]) -> Hashable:
    """Return what must stay as it is while recordings are used: places, modes, and numbers of optimizers."""
    state: list[Hashable] = []
    for each in held:
        if isinstance(each, Optimizer):
            values = (value for group in each.param_groups for value in group.values())
            state += [value for value in values if isinstance(value, int | float | tuple)]
            # Made in the first step, and others when a state is loaded.
            state += [id(kept) for values in each.state.values() for kept in values.values()]
        else:
            state += [(parameter.data_ptr(), parameter.requires_grad) for parameter in each.parameters()]
            # Written into, they change what was made from them, such as folded weights.
            state += [parameter._version for parameter in each.parameters() if not parameter.requires_grad]
            state += [module.training for module in each.modules()]
            still = (module for module in each.modules() if not module.training)
            state += [buffer._version for module in still for buffer in module.buffers(recurse=False)]
    return tuple(state)
