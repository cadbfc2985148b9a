"""Functions that are recorded after three calls, and those that stay as they are: what is noticed, and what is said."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxsplit.cuda.number import Number
from fxsplit.cuda.replay import Recordings, Replayed
from tests.cuda.simulated import SimulatedRecorder

CPU = torch.device("cpu")


def test_the_fourth_call_records_and_all_further_ones_replay() -> None:
    given, total, calls = torch.zeros(()), torch.zeros(()), []

    def function() -> Tensor:
        calls.append(float(given.numpy()))
        total.add_(given)
        return given * 2

    recorder, said = SimulatedRecorder(), list[str]()
    replayed = Replayed(function, recorder, CPU, refused=said.append)
    for number in range(1, 8):
        given.fill_(number)
        assert replayed() == 2 * number
    assert total == sum(range(1, 8))
    # Nothing was computed when Python ran for the fourth time.
    assert calls == [1, 2, 3, 4]
    assert (recorder.warm_ups, recorder.recordings, recorder.replays, said) == (3, 1, 4, [])


class Counts(nn.Module):
    """Keeps a number, a list, a generator or a tensor in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.number, self.items, self.generator = 0, [0], torch.Generator()
        self.register_buffer("mean", torch.zeros(3))
        self.table = {"a": torch.zeros(3)}

    def forward(self, kind: str) -> None:
        if kind == "number":
            self.number += 1
        elif kind == "list":
            self.items.append(1)
        elif kind == "generator":
            torch.rand(3, generator=self.generator)
        elif kind == "buffer":
            self.mean = self.mean + 1
        elif kind == "table":
            self.table["a"] = self.table["a"] + 1
        elif kind == "in place":
            assert isinstance(self.mean, Tensor)
            self.mean.add_(1)
            self.table["a"].add_(1)


@pytest.mark.parametrize("kind", ["number", "list", "generator", "buffer", "table"])
def test_what_changes_on_the_host_is_not_recorded(kind: str) -> None:
    module, recorder, said = nn.Sequential(Counts()), SimulatedRecorder(), list[str]()
    replayed = Replayed(lambda: module(kind), recorder, CPU, held=[module], refused=said.append)
    for _ in range(5):
        replayed()
    assert said == ["module '0' changes on the host"]
    assert recorder.recordings == 0


def test_what_changes_in_place_is_recorded() -> None:
    module, recorder, said = nn.Sequential(Counts()), SimulatedRecorder(), list[str]()
    replayed = Replayed(lambda: module("in place"), recorder, CPU, held=[module], refused=said.append)
    for _ in range(5):
        replayed()
    assert said == []
    assert torch.equal(module[0].mean, torch.full((3,), 5.0))
    assert torch.equal(module[0].table["a"], torch.full((3,), 5.0))


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["random", "numpy"])
def test_numbers_that_python_draws_are_not_recorded(draw: Callable[[], float]) -> None:
    said = list[str]()
    replayed = Replayed(lambda: torch.zeros(3).add_(draw()), SimulatedRecorder(), CPU, refused=said.append)
    for _ in range(4):
        replayed()
    name = "random" if draw is random.random else "numpy.random"
    assert said == [f"the generator {name!r} changes on the host"]


x, mask = torch.arange(4.0), torch.tensor([True, False, True, False])


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (lambda: x.sum().item(), "item"),
        (lambda: bool(x.sum() > 0), "item"),
        (lambda: torch.equal(x, x), "equal"),
        (lambda: x.nonzero(), "nonzero"),
        (lambda: x[mask], "index"),
        (lambda: x.masked_select(mask), "masked_select"),
        (lambda: x.clone().index_put_((mask,), x[:2]), "index_put_"),
        (lambda: x.unique(), "unique"),
        (lambda: torch.optim.SGD([nn.Parameter(x)], lr=0.1).zero_grad(), None),
        (lambda: x[torch.tensor([1, 0])], None),
        (lambda: x.clone().masked_fill_(mask, 0.0), None),
        (lambda: x.clone().__setitem__(mask, 0.0), None),
        (lambda: F.dropout(x, 0.5), None),
    ],
)
def test_ops_that_the_host_waits_for_are_named(function: Callable[[], Any], op: str | None) -> None:
    said, recorder = list[str](), SimulatedRecorder()
    replayed = Replayed(function, recorder, CPU, refused=said.append)
    for _ in range(4):
        replayed()
    assert said == ([] if op is None else [f"the host waits for the result of {op}"])
    assert recorder.recordings == (op is None)


def test_a_recording_that_fails_is_told_once_and_leaves_the_function_as_it_is() -> None:
    total, said = torch.zeros(()), list[str]()

    def function() -> None:
        total.add_(1)
        total.add_(1)

    replayed = Replayed(function, SimulatedRecorder(fails_at=1), CPU, refused=said.append)
    for _ in range(6):
        replayed()
    assert total == 12
    assert said == ["RuntimeError: operation not permitted when stream is capturing"]


def test_recordings_keep_one_at_a_time_and_let_other_steps_pass() -> None:
    """The simulated recorder refuses a second recording while the first one exists."""
    log, recorder = list[str](), SimulatedRecorder()
    notices = list[str]()
    recordings = Recordings(recorder, CPU, notice=notices.append)
    for key in ["a"] * 5 + [None] + ["a"] * 2 + ["b"] * 5 + ["a"] * 4:
        recordings.run("step", key, lambda key=key: log.append(str(key)))  # type: ignore[misc]
    assert log == ["a"] * 4 + ["None"] + ["b"] * 4 + ["a"] * 4
    recordings.forget()
    recordings.run("step", "a", lambda: log.append("again"))
    assert log[-1] == "again"
    recordings.give_up("they are wrong")
    recordings.refuse("they are wrong")
    for _ in range(5):
        recordings.run("step", "a", lambda: log.append("eager"))
    assert log[-5:] == ["eager"] * 5
    assert notices == ["steps run eagerly where they cannot be recorded as a CUDA graph: they are wrong"]


def test_steps_of_two_kinds_have_recordings_at_the_same_time() -> None:
    log, recorder = list[str](), SimulatedRecorder(most=2)
    recordings = Recordings(recorder, CPU, notice=str.upper)
    for _ in range(5):
        for kind in ("train", "test"):
            recordings.run(kind, "key", lambda kind=kind: log.append(kind))  # type: ignore[misc]
    assert log == ["train", "test"] * 4
    assert (recorder.recordings, recorder.replays) == (2, 4)
    # Another step of one kind needs the memory of both.
    recordings.run("train", "other", lambda: log.append("other"))
    recordings.run("test", "key", lambda: log.append("again"))
    assert log[-2:] == ["other", "again"]


def test_where_memory_is_short_the_recording_goes_before_what_runs_beside_it() -> None:
    recorder = SimulatedRecorder(roomy=False)
    recordings = Recordings(recorder, CPU, notice=str.upper)
    for key, counts in (("a", (3, 1, 2)), (None, (3, 1, 2)), ("a", (6, 2, 4))):
        for _ in range(1 if key is None else 5):
            recordings.run("step", key, lambda: None)
        assert (recorder.warm_ups, recorder.recordings, recorder.replays) == counts


def test_a_number_is_written_where_it_changes() -> None:
    host, device = Number(), Number(CPU)
    for value in (0.0, 0.25, 0.25, 0.5):
        host.set(value)
        device.set(value)
        assert host.value == value
        assert isinstance(device.value, Tensor)
        assert device.value == value
        assert device.value.data_ptr() == device._tensor.data_ptr()  # type: ignore[union-attr]
        assert device.value._version == [0.0, 0.25, 0.5].index(value)


def test_a_recording_that_went_with_another_one_is_made_again() -> None:
    """A recording that fails takes those with it whose memory it shares."""
    recorder, x, made = SimulatedRecorder(most=3), torch.zeros(3), list[Any]()

    def record(function: Callable[[], Any]) -> Any:
        made.append(SimulatedRecorder.record(recorder, function))
        return made[-1]

    recorder.record = record  # type: ignore[method-assign]
    replayed = Replayed(lambda: x.add_(1), recorder, CPU, refused=str.upper)
    for _ in range(6):
        replayed()
    made[0].is_gone = True
    for _ in range(6):
        replayed()
    assert torch.equal(x, torch.full((3,), 12.0))
    assert (recorder.warm_ups, recorder.recordings, recorder.replays) == (6, 2, 6)


def test_a_first_replay_that_fails_leaves_the_function_as_it_is() -> None:
    recorder, x, said = SimulatedRecorder(), torch.zeros(3), list[str]()

    class Failing:
        is_gone = False

        def replay(self) -> None:
            raise RuntimeError("out of memory\nand more")

    recorder.record = lambda _: Failing()  # type: ignore[method-assign, assignment, return-value]
    replayed = Replayed(lambda: x.add_(1), recorder, CPU, refused=said.append)
    for _ in range(6):
        replayed()
    assert torch.equal(x, torch.full((3,), 6.0))
    assert said == ["RuntimeError: out of memory"]
