"""Random numbers by purpose: the same on every device, and without torch's, numpy's or Python's global state."""

from __future__ import annotations

import numpy as np


def random_stream(purpose: str, *numbers: int) -> np.random.Generator:
    """Make a generator whose numbers depend on nothing but the arguments; two purposes never share a stream."""
    return np.random.default_rng([*purpose.encode(), *numbers])
