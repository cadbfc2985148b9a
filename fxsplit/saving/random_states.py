"""The states of all random number generators that a model may draw from, as plain data."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import distributed


def random_states() -> dict[str, Any]:
    """Return the states of the global generators of Python, numpy, torch, and of each GPU of this process."""
    name, keys, *rest = np.random.get_state(legacy=True)  # keys are uint32, of which torch cannot pickle tensors
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).view(np.int32)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(index) for index in _gpus()],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Set what `random_states` returned. States of GPUs that are not here are left out."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().view(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    for index, state in zip(_gpus(), states["cuda"], strict=False):
        torch.cuda.set_rng_state(state, index)


def _gpus() -> list[int]:
    """List the GPUs that this process uses: one where there are other processes, else any."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.current_device()] if distributed.is_initialized() else list(range(torch.cuda.device_count()))
