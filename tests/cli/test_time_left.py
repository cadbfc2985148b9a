"""How long a run still takes: nothing before anything is known, and later phases as cheap as they are forecast."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fxsplit.plan.schedule import Plan
from fxsplit.report import EpochRecord, Inspection, StepRecord
from fxsplit_cli.time_left import TimeLeft


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def left(plan: Plan, inspection: Inspection, clock: Clock) -> TimeLeft:
    """Three phases of two epochs, the second of which costs a half of the first, and the third twice as much."""
    made = TimeLeft(plan, train_images=100, test_images=30, clock=clock)
    assert inspection.forecast is not None
    costs = zip(inspection.forecast.phases, (0.5, 0.25, 1.0), strict=True)
    phases = tuple(replace(phase, step_cost=cost) for phase, cost in costs)
    made.forecast_made(replace(inspection.forecast, phases=phases))
    return made


def step(phase: int, epoch: int, done: int) -> StepRecord:
    """After `done` of 10 steps, at 10 images a second."""
    return StepRecord(
        phase=phase,
        epoch=epoch,
        step=done,
        steps=10,
        train_loss=1.0,
        train_accuracy_pct=1.0,
        images_per_second=10.0,
        memory_bytes=0,
    )


def test_there_is_no_estimate_before_there_is_one(left: TimeLeft) -> None:
    assert left.seconds() is None
    assert left.share() == 0
    left.phase_started(0)
    assert left.seconds() is None


def test_the_first_steps_say_how_fast_it_is_and_the_forecast_what_comes(left: TimeLeft, clock: Clock) -> None:
    """An epoch of the first phase takes 10 s, one of the others 5 and 20 s, and a test a tenth of each."""
    left.phase_started(0)
    left.step_done(step(0, 1, 4))
    assert left.seconds() == pytest.approx((10 + 10 + 5 + 5 + 20 + 20) * 1.1 - 4)
    assert left.share() == pytest.approx(4 / 77)
    clock.now = 3
    assert left.seconds() == pytest.approx(70)
    clock.now = 1000
    assert left.seconds() == 0


def test_what_was_measured_counts_more_than_a_forecast(left: TimeLeft, epochs: tuple[EpochRecord, ...]) -> None:
    """An epoch takes 10 s and its test 1.5; in the second phase it takes 8 s, and not the 5 s of the forecast."""
    left.phase_started(0)
    left.epoch_done(epochs[0])
    assert left.seconds() == pytest.approx(10 + 5 + 5 + 20 + 20 + 5 * 1.5)
    left.epoch_done(epochs[1])
    left.phase_started(1)
    left.step_done(step(1, 3, 5))
    assert left.seconds() == pytest.approx(2.5 + 5 + 20 + 20 + 4 * 1.5)
    left.epoch_done(replace(epochs[2], train_seconds=8.0))
    # The third phase costs four times as much as the second.
    assert left.seconds() == pytest.approx(8 + 32 + 32 + 3 * 1.5)
    assert left.share() == pytest.approx(32.5 / (32.5 + 76.5))


def test_a_run_that_goes_on_has_less_to_do(left: TimeLeft, epochs: tuple[EpochRecord, ...]) -> None:
    left.phase_started(2)
    assert left.share() == pytest.approx(1.5 / 3.5)
    left.step_done(step(2, 6, 5))
    assert left.seconds() == pytest.approx(5 + 10 * 0.1)
    left.epoch_done(epochs[5])
    assert left.seconds() == 0
    assert left.share() == 1
