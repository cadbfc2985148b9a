"""Replayed steps against eager ones: equal, or what differs is named; and everything is put back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxsplit.capture.tracing import trace
from fxsplit.execute.executor import Executor
from fxsplit.execute.forward import logits_of
from fxsplit.plan.partition import partition
from fxsplit.proving.equality import Difference
from fxsplit.proving.replays import differing_replays
from tests.cuda.simulated import SimulatedRecorder, Tape
from tests.networks import AssignedBuffer, Chain, FunctionalDropout, InPlace, SeveralOutputs

T = TypeVar("T")


def cross_entropy(output: Any, truth: Tensor) -> Tensor:
    return F.cross_entropy(logits_of(output), truth)


def compared(
    model: nn.Module,
    recorder: SimulatedRecorder,
    *,
    micro_batches: int = 1,
    loss: Callable[[Any, Tensor], Tensor] = cross_entropy,
) -> list[Difference]:
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 8, 8), torch.randint(5, (8,))
    found = trace(model, (images,))
    return differing_replays(
        model,
        Executor(found, partition(found, count=2)),
        images,
        labels,
        micro_batches=micro_batches,
        batch_size=8,
        loss=loss,
        autocast=nullcontext,
        recorder=recorder,
    )


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("kind", [Chain, FunctionalDropout, InPlace, SeveralOutputs])
def test_replays_equal_eager_steps_and_everything_is_put_back(kind: type[nn.Module], micro_batches: int) -> None:
    model, recorder = kind(), SimulatedRecorder()
    before = [value.clone() for value in model.state_dict().values()]
    assert compared(model, recorder, micro_batches=micro_batches) == []
    assert (recorder.warm_ups, recorder.recordings, recorder.replays) == (3, 1, 2)
    assert all(map(torch.equal, model.state_dict().values(), before))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_number_that_python_reads_is_noticed() -> None:
    """A clock that begins anew with each run, so that eager runs are equal; Python runs in four of the five steps."""
    ticks = list(range(1, 6))

    class Recorder(SimulatedRecorder):
        def record(self, function: Callable[[], T]) -> Tape[T]:
            tape = super().record(function)
            ticks[:] = range(1, 6)
            return tape

    def loss(output: Any, truth: Tensor) -> Tensor:
        tick = ticks.pop(0)
        ticks[:] = ticks or range(1, 6)
        return F.cross_entropy(output, truth) * tick

    recorder = Recorder()
    names = [each.name for each in compared(Chain(), recorder, loss=loss)]
    assert recorder.replays == 2
    assert "loss of step 5[0]" in names
    assert "loss of step 4[0]" not in names


def test_what_cannot_be_recorded_does_not_differ() -> None:
    recorder = SimulatedRecorder()
    assert compared(AssignedBuffer(), recorder) == []
    assert recorder.recordings == 0
