"""Autocast on the meta device, whose tensors it leaves alone: types are found on stand-ins that claim another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import _disable_current_modes

from fxsplit.objects.structure import map_tensors, tensors_in


def run(called: Callable[..., Any], args: Any, kwargs: Any, device: torch.device) -> Any:
    """Call it with tensors of the meta device; what comes back has the types that it would have on `device`.

    Where that is the meta device too, autocast is taken as it is for a CPU, or else for CUDA.
    """
    devices = [torch.device(each) for each in ("cpu", "cuda")] if device.type == "meta" else [device]
    enabled = [each for each in devices if torch.is_autocast_enabled(each.type)]
    if not enabled:
        return called(*args, **kwargs)
    try:
        value = called(*args, **kwargs)
    except RuntimeError:
        # Nothing is cast here, and many kernels refuse tensors of several types.
        value = called(*map_tensors(_in_full, args), **map_tensors(_in_full, kwargs))
    types = iter(_types(called, args, kwargs, enabled[0]) if tensors_in(value) else ())

    def retype(tensor: Tensor) -> Tensor:
        dtype = next(types, tensor.dtype)
        # What is not cast stays the very same tensor, which may share memory with an argument.
        return tensor if dtype is tensor.dtype else tensor.to(dtype)

    return map_tensors(retype, value)


def _in_full(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _types(called: Callable[..., Any], args: Any, kwargs: Any, device: torch.device) -> list[torch.dtype]:
    """Those of the tensors that it delivers on `device`; none when it looks at numbers, or at tensors of its own."""
    # It is slow to import, and most models never ask for it.
    from torch._subclasses.fake_tensor import FakeTensorMode

    def claim(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)

    try:
        with _disable_current_modes(), FakeTensorMode(allow_non_fake_inputs=True):
            args, kwargs = map_tensors(claim, (args, kwargs))
            if not isinstance(called, nn.Module):
                return [tensor.dtype for tensor in tensors_in(called(*args, **kwargs))]
            state = map_tensors(claim, {**dict(called.named_parameters()), **dict(called.named_buffers())})
            return [tensor.dtype for tensor in tensors_in(functional_call(called, state, args, kwargs))]
    except Exception:
        return []
