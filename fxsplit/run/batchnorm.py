"""BatchNorm statistics taken anew: those of the weights as they are now, not a mix with those of earlier weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch.nn.modules.batchnorm import _BatchNorm

from fxsplit.run.executor import Executor

# Batches whose mean is taken: enough that more of them change nothing that could be seen.
BATCHES = 50


def norms_of(executor: Executor, stop: int) -> list[_BatchNorm]:
    """The BatchNorm modules of the partitions that train before cut `stop`, if they keep statistics."""
    window = executor.partitions[executor.window[0] : stop]
    paths = dict.fromkeys(name.rpartition(".")[0] for part in window for name in part.state)
    modules = map(executor.get_submodule, paths)
    return [module for module in modules if isinstance(module, _BatchNorm) and module.track_running_stats]


@contextmanager
def taken_anew(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Inside, each forward pass in training counts the same in the statistics, and none before it counts at all."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
