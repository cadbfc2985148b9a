"""Makes many independent calls in several processes; each has a result even if its process dies."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch

Result = TypeVar("Result")


def call_each(
    call: Callable[[str], Result], names: Sequence[str], *, jobs: int, died: Callable[[str], Result]
) -> Iterator[Result]:
    """Give the result of `call` for every name, in the order in which calls end.

    Args:
        call: with several jobs it must be picklable.
        names: what it is called with.
        jobs: how many processes, each with one thread; 1 makes the calls in this process.
        died: makes the result for a name whose process dies.
    """
    if jobs == 1:
        yield from map(call, names)
        return
    unfinished = list(names)
    with _pool(min(jobs, len(names))) as pool:
        futures: dict[Future[Result], str] = {pool.submit(call, name): name for name in names}
        for future in as_completed(futures):
            try:
                result = future.result()
            except BrokenProcessPool:
                break
            unfinished.remove(futures[future])
            yield result
    # A process that dies breaks the pool for all. In a pool for each name it loses no call but its own.
    for name in unfinished:
        with _pool(1) as pool:
            try:
                yield pool.submit(call, name).result()
            except BrokenProcessPool:
                yield died(name)


def _pool(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
