"""The recorder of CUDA graphs, with torch.cuda replaced by something that writes down what is called."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from fxsplit.cuda.recorder import CudaRecorder, Keeping

DEVICE = torch.device("cuda", 0)
POOL = (0, 7)
STATE = torch.arange(3, dtype=torch.uint8)


class Log(list[Any]):
    """What was called, the stream that is current, and bytes of memory."""

    stream = "main"
    reserved = allocated = free = 0


class Stream:
    def __init__(self, log: Log, name: str) -> None:
        self.log, self.name, self.device_index = log, name, 0

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class Graph:
    def __init__(self, log: Log) -> None:
        self.log = log

    def replay(self) -> None:
        self.log.append("replay")

    def reset(self) -> None:
        self.log.append("reset")


class Generator:
    state = torch.zeros(3, dtype=torch.uint8)

    def __init__(self, _: torch.device | None = None) -> None: ...

    def set_state(self, state: torch.Tensor) -> None:
        self.state = state

    def graphsafe_get_state(self) -> Generator:
        return self

    def graphsafe_set_state(self, other: Generator) -> None:
        self.state = other.state


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    side, main = Stream(log, "side"), Stream(log, "main")
    numbers = count(7)
    of_graph = inspect.signature(torch.cuda.graph.__init__)

    @contextmanager
    def stream(given: Stream) -> Iterator[None]:
        before, log.stream = log.stream, given.name
        yield
        log.stream = before

    @contextmanager
    def graph(cuda_graph: Graph, **options: Any) -> Iterator[None]:
        of_graph.bind(None, cuda_graph, **options)
        assert isinstance(cuda_graph, Graph)
        log.append((options.pop("stream").name, options))
        log.stream = "side"
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError("operation failed due to a previous error during capture") from error
        log.reserved += 10
        log.stream = "main"  # as in torch: not where the capture ends with an error

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: main)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda given: log.append(f"set {given.name}"))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(log))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, next(numbers)))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: log.reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: log.allocated)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (log.free, 100))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _: STATE)
    monkeypatch.setattr(torch.cuda, "default_generators", [Generator()])
    monkeypatch.setattr(torch, "Generator", Generator)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        assert hasattr(torch._C, name)
        monkeypatch.setattr(torch._C, name, lambda index, pool, name=name: log.append((name, index, pool)))
    return log


def capture(pool: tuple[int, int] = POOL) -> tuple[str, dict[str, Any]]:
    return "side", {"pool": pool, "capture_error_mode": "thread_local"}


def test_warm_up_and_recording_share_a_stream(log: Log) -> None:
    recorder = CudaRecorder(DEVICE)

    def function() -> str:
        log.append(log.stream)
        return "result"

    assert recorder.warm_up(function) == "result"
    assert log == ["side waits for main", "side", "main waits for side"]
    log.clear()
    recording = recorder.record(function)
    assert recording.result == "result"
    recording.replay()
    assert log == [capture(), "side", "replay"]


def test_recordings_that_exist_share_a_pool(log: Log) -> None:
    recorder = CudaRecorder(DEVICE)
    one, other = (recorder.record(lambda: None) for _ in range(2))
    assert log == [capture(), capture()]
    log.clear()
    del one
    one = recorder.record(lambda: None)
    assert log == [capture()]
    log.clear()
    del one, other
    recorder.record(lambda: None)
    assert log == [capture((0, 8))]


@pytest.mark.parametrize(
    ("free", "allocated", "fits"), [(9, 30, False), (10, 30, True), (9, 29, True), (0, 20, True), (0, 21, False)]
)
def test_there_is_room_for_as_much_as_recordings_hold(log: Log, free: int, allocated: int, fits: bool) -> None:
    log.reserved, log.allocated, log.free = 30, allocated, free
    recorder = CudaRecorder(DEVICE)
    kept = recorder.record(lambda: None)
    assert (log.reserved, recorder.has_room()) == (40, fits)
    del kept
    log.free = 0
    assert recorder.has_room()


def test_a_failed_recording_gives_stream_memory_and_random_state_back(log: Log) -> None:
    recorder = CudaRecorder(DEVICE)
    log.clear()

    def function() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        recorder.record(function)
    assert log == [
        capture(),
        "reset",
        "set main",
        ("_cuda_endAllocateToPool", 0, POOL),
        ("_cuda_releasePool", 0, POOL),
    ]
    assert torch.cuda.default_generators[0].state is STATE  # type: ignore[attr-defined]


def test_weights_that_autocast_has_cast_do_not_outlive_a_recording(log: Log) -> None:
    weight, x = torch.ones(2, 2, requires_grad=True), torch.ones(1, 2)
    recorder = CudaRecorder(DEVICE)

    def function() -> torch.Tensor:
        log.append("linear")
        return torch.nn.functional.linear(x, weight)

    with torch.autocast("cpu", torch.bfloat16):
        first = function()
        with torch.no_grad():
            weight.mul_(2)
        assert torch.equal(function(), first)  # from the cache
        assert torch.equal(recorder.record(function).result, 2 * first)
        with torch.no_grad():
            weight.mul_(2)
        assert torch.equal(function(), 4 * first)


def test_versions_tell_what_a_replay_writes(log: Log) -> None:
    weight, total, read = nn.Parameter(torch.ones(3)), torch.zeros(()), torch.ones(3)
    optimizer = torch.optim.AdamW([weight], lr=torch.tensor(0.5), fused=True)
    tensors = {"weight": weight, "total": total, "read": read}

    def function() -> None:
        log.append("step")
        optimizer.zero_grad()
        (weight * read).sum().backward()
        optimizer.step()
        total.add_(1)

    function()
    recording = CudaRecorder(DEVICE).record(function)
    kept = tensors | {name: each for name, each in optimizer.state[weight].items() if isinstance(each, torch.Tensor)}
    before = {name: each._version for name, each in kept.items()}
    recording.replay()
    assert {name for name, each in kept.items() if each._version != before[name]} == {
        "weight", "total", "step", "exp_avg", "exp_avg_sq",
    }  # fmt: skip


def test_memory_from_outside_is_kept_and_no_other() -> None:
    outside, view = torch.ones(3), torch.ones(4, 4)[1:]
    inside: list[StorageWeakRef] = []
    with Keeping() as keeping:  # type: ignore[no-untyped-call]
        made = outside * 2
        inside.append(StorageWeakRef(made.untyped_storage()))
        made = made + view.sum()
        torch._foreach_add_([made], [outside])
    refs = [StorageWeakRef(each.untyped_storage()) for each in (outside, view)]
    assert inside[0].expired()
    assert len(keeping.kept) == 2
    del outside, view
    assert not any(each.expired() for each in refs)
    keeping.kept.clear()
    assert all(each.expired() for each in refs)
