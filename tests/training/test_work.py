"""Multiply-adds of training, counted by hand: steps, caches, recomputation, exits, recalibration, the proof."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxsplit
from fxsplit.plan.forecast import StepWork, step_work
from fxsplit.plan.partition import partition
from fxsplit.plan.schedule import Phase, Plan
from fxsplit.training.telemetry import Work

# Multiply-adds of an image through the linear layers of the model below.
LAYERS = (4 * 8, 8 * 16, 16 * 10)
FIRST, SECOND, THIRD = LAYERS


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 16), nn.Linear(16, 10))


def work_of(*phases: Phase) -> tuple[StepWork, ...]:
    trace = fxsplit.trace(layers(), (torch.randn(2, 4),))
    parts = partition(trace, at=["1", "2"])
    return step_work(Plan(schedule="any", partitions=parts, phases=phases), trace)


def test_a_step_by_hand() -> None:
    everything, rest, last, recomputed, frozen = work_of(
        Phase(start=0, stop=3, epochs=1),
        Phase(start=1, stop=3, epochs=1),
        Phase(start=2, stop=3, epochs=1),
    ) + work_of(Phase(start=0, stop=3, epochs=1, recompute=2), Phase(start=0, stop=2, epochs=1))
    # Backward takes as much for the gradient of the weights as for that of the input, which the images do without.
    assert everything == StepWork(settled=0, rest=2 * FIRST + 3 * SECOND + 3 * THIRD)
    assert rest == StepWork(settled=FIRST, rest=2 * SECOND + 3 * THIRD)
    assert last == StepWork(settled=FIRST + SECOND, rest=2 * THIRD)
    assert recomputed.rest == everything.rest + FIRST + SECOND
    assert frozen.rest == 2 * FIRST + 3 * SECOND + 2 * THIRD


def test_what_is_added_up() -> None:
    given = Phase(start=0, stop=3, epochs=1), Phase(start=1, stop=3, epochs=1)
    phases = work_of(*given)
    trace = fxsplit.trace(layers(), (torch.randn(2, 4),))
    plan = Plan(schedule="any", partitions=partition(trace, at=["1", "2"]), phases=given)
    work = Work(partial(step_work, modes=trace), plan)
    work.proof(8)
    assert work.take() == 2 * 8 * phases[0].rest
    later = Work(partial(step_work, modes=trace), replace(plan, phases=given[1:]))
    later.proof(8)  # in which everything trains, also what has settled in the first phase
    assert later.take() == 2 * 8 * phases[0].rest
    work.step(1, 5, start=0)
    work.step(1, 5, start=1)
    assert work.take() == 5 * (FIRST + 2 * phases[1].rest)
    work.step(0, 1, start=0, exits=[nn.Linear(16, 10)])
    assert work.take() == phases[0].rest + 3 * 160
    work.forward(3, start=1, stop=3)
    assert work.state_dict() == {"count": 3 * (SECOND + THIRD)}
    other = Work(partial(step_work, modes=trace), plan)
    other.load_state_dict(work.state_dict())
    assert other.take() == work.take() == 3 * (SECOND + THIRD)
    assert work.take() == 0
    work.follow(replace(plan, phases=(replace(given[0], recompute=1), given[1])))
    work.step(0, 1, start=0)
    assert work.take() == phases[0].rest + FIRST


MODEL = """
from torch import nn


def small(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, num_classes),
    )
"""
CONV1, CONV2, HEAD = 8 * 8 * 27 * 4, 8 * 8 * 36 * 4, 4 * 10


def counts(folder: Path, **options: Any) -> list[int | None]:
    (folder / "small.py").write_text(MODEL, encoding="utf-8")
    given = {
        "model": f"{folder / 'small.py'}:small", "data": "synthetic", "img_size": 8, "train_limit": 32,
        "batch_size": 16,
        "epochs": 4, "device": "cpu", "output": str(folder / "output"), "at": ("2", "5"), "prove": False,
    }  # fmt: skip
    report = fxsplit.train(fxsplit.RunSpec(**{**given, **options}))
    return [each.multiply_adds for each in report.epochs]


WHOLE = 2 * CONV1 + 3 * CONV2 + 3 * HEAD
SETTLING = {"schedule": "settle", "settle_from": 0.25, "settle_until": 0.26, "settle_share": 0.5}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [32 * WHOLE] * 4),
        ({"prove": True}, [(32 + 2 * 16) * WHOLE, *[32 * WHOLE] * 3]),
        # The first epoch of the phase fills the cache, and the others read it.
        (
            {**SETTLING, "cache": "ram"},
            [32 * WHOLE, 32 * (CONV1 + 2 * CONV2 + 3 * HEAD), *[32 * (2 * CONV2 + 3 * HEAD)] * 2],
        ),
        ({**SETTLING, "cache": "off"}, [32 * WHOLE, *[32 * (CONV1 + 2 * CONV2 + 3 * HEAD)] * 3]),
        # BatchNorm is in the partition that settles, up to which the images of an epoch run once more.
        (
            {**SETTLING, "cache": "off", "recalibrate": True},
            [32 * WHOLE, 32 * (CONV1 + CONV1 + 2 * CONV2 + 3 * HEAD), *[32 * (CONV1 + 2 * CONV2 + 3 * HEAD)] * 2],
        ),
        # At the midpoint every image is looked at once more.
        (
            {"soft_targets": 0.5, "soft_from": "mean"},
            [32 * WHOLE] * 2 + [32 * (WHOLE + CONV1 + CONV2 + HEAD), 32 * WHOLE],
        ),
        ({"exits": 1}, [32 * (WHOLE + 3 * 40)] * 4),
    ],
    ids=["standard", "proof", "cache", "no cache", "recalibration", "soft targets", "exits"],
)
def test_the_work_of_runs_by_hand(tmp_path: Path, options: dict[str, Any], expected: list[int]) -> None:
    assert counts(tmp_path, **options) == expected
