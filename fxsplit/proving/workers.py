"""Many independent calls in several processes, each answered even if its process dies."""

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
    """`call` of every name, in the order in which they are done. A name whose process dies yields `died` of it.

    With one job the calls happen here. Otherwise `call` must be picklable, and each process uses one thread.
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
    # A process that dies takes all others with it: alone, only its own call is lost.
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
