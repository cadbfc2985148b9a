"""Records the blocks of memory that torch allocates and frees on a device, in order, with marks between them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.autograd.profiler import profile, record_function

MARK = "fxsplit:"


class Event(NamedTuple):
    """A block allocated (`size` > 0) or freed (< 0) at an address, or a mark, whose size is 0."""

    size: int
    address: int = 0
    mark: str = ""


def mark(name: str) -> None:
    """Add a mark to the events that are being recorded."""
    with record_function(MARK + name):
        pass


@contextmanager
def recorded(device: torch.device) -> Iterator[list[Event]]:
    """Inside, record events; the list holds them once the `with` block is left.

    They come from the allocator itself, so they include memory that a kernel borrows and gives back. The free of a
    block that was allocated before the recording is in it only if an earlier recording saw the allocation.
    """
    # Without this the profiler's library writes to stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    events: list[Event] = []
    with profile(profile_memory=True, use_kineto=False) as profiler:
        yield events
    found = []
    results = profiler.kineto_results
    assert results is not None
    to_visit = list(results.experimental_event_tree())
    while to_visit:
        each = to_visit.pop()
        to_visit.extend(each.children)
        if each.name.startswith(MARK):
            found.append((each.start_time_ns, Event(0, mark=each.name.removeprefix(MARK))))
        elif each.name == "[memory]" and each.extra_fields.device.type == device.type:
            found.append((each.start_time_ns, Event(each.extra_fields.alloc_size, each.extra_fields.ptr)))
    events.extend(event for _, event in sorted(found, key=lambda pair: pair[0]))


def survivors(events: Sequence[Event]) -> set[int]:
    """Return the positions of the allocations that are not freed by the end."""
    alive: dict[int, int] = {}
    for position, event in enumerate(events):
        if event.size > 0:
            alive[event.address] = position
        elif event.size < 0:
            alive.pop(event.address, None)
    return set(alive.values())


def peak(events: Sequence[Event], *, without: frozenset[int] | set[int] = frozenset()) -> int:
    """Return the most bytes that are allocated at a time, beyond those at the start.

    Events at the positions `without` are left out.
    """
    used = most = 0
    for position, event in enumerate(events):
        if position not in without:
            used += event.size
            most = max(most, used)
    return most
