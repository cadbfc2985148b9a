"""Batches on their way to a device, on streams that are simulated: any order of work that events allow is tried."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fxsplit.data.staging import Staging, read_ahead, rows_of


class Event:
    """Counts how often it was recorded, on the host, and how many of these records streams have passed."""

    def __init__(self) -> None:
        self.recorded = self.passed = 0

    def record(self, stream: Stream) -> None:
        self.recorded += 1
        stream.work.append((lambda: True, self._pass))

    def _pass(self) -> None:
        self.passed += 1


class Stream:
    """Work in the order in which it was launched, each with what it has to wait for."""

    def __init__(self, _device: object = None) -> None:
        self.work: list[tuple[Callable[[], bool], Callable[[], object]]] = []
        Machine.streams.append(self)

    def wait_event(self, event: Event) -> None:
        last = event.recorded  # later records do not matter
        self.work.append((lambda: event.passed >= last, lambda: None))

    def wait_stream(self, other: Stream) -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)


class Machine(TorchDispatchMode):
    """Inside, copies between tensors are work of the current stream, which `run` does in a random order."""

    streams: list[Stream]

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        Machine.streams = []
        self.current = self.steps = Stream()
        for name, fake in {
            "Stream": Stream,
            "Event": Event,
            "stream": self.on,
            "current_stream": lambda _device: self.current,
        }.items():
            patch.setattr(torch.cuda, name, fake)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.copy_.default:
            self.current.work.append((lambda: True, lambda: function(*args, **(kwargs or {}))))
            return args[0]
        return function(*args, **(kwargs or {}))

    def run(self, seed: int) -> None:
        chance = random.Random(seed)
        while busy := [stream for stream in Machine.streams if stream.work]:
            ready = [stream for stream in busy if stream.work[0][0]()]
            assert ready, "streams wait for each other"
            chance.choice(ready).work.pop(0)[1]()


class OnDevice(Staging):
    """Stages as on a GPU."""

    is_static = True


def batches() -> list[list[Tensor]]:
    return [
        [torch.full((rows, 2), float(index)), torch.full((rows,), index)] for index, rows in enumerate([4] * 7 + [3])
    ]


@pytest.mark.parametrize("seed", range(40))
def test_each_step_finds_its_batch_however_streams_go(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    staging, found, places = OnDevice(torch.device("cpu"), 4), [], set()

    def step(tensors: Sequence[Tensor]) -> Callable[[], None]:
        return lambda: found.append([tensor.clone() for tensor in tensors])

    with Machine(monkeypatch) as machine:
        for batch in batches():
            staging.put(batch)
            tensors = staging.taken()
            places.add(tensors[0].data_ptr())
            machine.steps.work.append((lambda: True, step(tensors)))
        assert not found  # the host runs ahead, and waits for nothing
    machine.run(seed)
    assert len(places) == 1
    for expected, batch in zip(batches(), found, strict=True):
        assert all(map(torch.equal, expected, batch))


def test_elsewhere_batches_are_passed_on() -> None:
    staging = Staging(torch.device("cpu"), 4)
    for batch in batches():
        staging.put(batch)
        assert all(one is other for one, other in zip(staging.taken(), batch, strict=True))
    meta = Staging(torch.device("meta"), 4)
    meta.put(batches()[0])
    assert {tensor.device.type for tensor in meta.taken()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.bfloat16, torch.float32, torch.int64])
def test_rows_are_copied_out(dtype: torch.dtype) -> None:
    for shape in ((5,), (5, 2, 3)):
        tensor = torch.randint(2, shape).to(dtype)
        rows = torch.tensor([4, 0, 4])
        found = rows_of(tensor, rows, pinned=False)
        assert torch.equal(found, tensor[rows])
        found.zero_()
        assert torch.equal(rows_of(tensor, rows, pinned=False), tensor[rows])


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_reading_ahead_keeps_the_order(count: int) -> None:
    assert list(read_ahead(lambda part: part * 2, range(count))) == [2 * part for part in range(count)]


def test_an_error_of_reading_ahead_is_raised_where_it_is_read() -> None:
    def read(part: int) -> int:
        if part == 2:
            raise OSError("gone")
        return part

    found = read_ahead(read, range(5))
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(OSError, match="gone"):
        next(found)
