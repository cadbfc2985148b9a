"""Finds the dtypes that autocast would give meta tensors, which it leaves alone, by running ops on fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import _disable_current_modes

from fxsplit.objects.structure import map_tensors, tensors_in


def run(called: Callable[..., Any], args: Any, kwargs: Any, device: torch.device) -> Any:
    """Call `called` with meta tensors, and give its results the dtypes that they would have on `device`.

    If `device` is the meta device too, autocast's setting for the CPU counts, or else that for CUDA.
    """
    devices = [torch.device(each) for each in ("cpu", "cuda")] if device.type == "meta" else [device]
    enabled = [each for each in devices if torch.is_autocast_enabled(each.type)]
    if not enabled:
        return called(*args, **kwargs)
    try:
        value = called(*args, **kwargs)
    except RuntimeError:
        # Autocast would have cast them; without it many kernels refuse tensors of several dtypes.
        value = called(*map_tensors(_in_full, args), **map_tensors(_in_full, kwargs))
    dtypes = iter(_dtypes(called, args, kwargs, enabled[0]) if tensors_in(value) else ())

    def retype(tensor: Tensor) -> Tensor:
        dtype = next(dtypes, tensor.dtype)
        # What is not cast stays the very same tensor, which may share memory with an argument.
        return tensor if dtype is tensor.dtype else tensor.to(dtype)

    return map_tensors(retype, value)


def _in_full(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _dtypes(called: Callable[..., Any], args: Any, kwargs: Any, device: torch.device) -> list[torch.dtype]:
    """List the dtypes of the tensors that a call returns on `device`; none if it fails there, as without numbers."""
    # Imported here because it is slow, and most models open no autocast.
    from torch._subclasses.fake_tensor import FakeTensorMode

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)

    try:
        with _disable_current_modes(), FakeTensorMode(allow_non_fake_inputs=True):
            args, kwargs = map_tensors(fake, (args, kwargs))
            if not isinstance(called, nn.Module):
                return [tensor.dtype for tensor in tensors_in(called(*args, **kwargs))]
            state = map_tensors(fake, {**dict(called.named_parameters()), **dict(called.named_buffers())})
            return [tensor.dtype for tensor in tensors_in(functional_call(called, state, args, kwargs))]
    except Exception:
        return []
