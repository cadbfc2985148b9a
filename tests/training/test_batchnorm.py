"""Batches of one image: planned around, or refused before the run, where BatchNorm needs two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxsplit.caching.cache import CachePolicy
from fxsplit.capture.tracing import trace
from fxsplit.data.loader import Loader
from fxsplit.data.shares import WHOLE, Share
from fxsplit.errors import UsageError
from fxsplit.plan.partition import partition
from fxsplit.plan.schedule import Phase, Plan
from fxsplit.training.regularisers.batchnorm import check_batches
from tests.training.test_trainer import images, trainer


class Functional(nn.Module):
    """A norm without a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(x, self.mean, self.variance, training=self.training)


class Whole(nn.Module):
    """A norm in a module that stays one op, since it branches on data; another one there has many values."""

    def __init__(self) -> None:
        super().__init__()
        self.maps, self.norm = nn.BatchNorm2d(1), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maps(x[:, None, :, None])[:, 0, :, 0]
        return self.norm(x) if x.sum() < 1e9 else x


class Method(Whole):
    """The same in a method that stays one op."""

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._normed(x) * 2


def pooled(norm: nn.Module) -> nn.Sequential:
    """A norm of maps, and one that sees a value a channel of each image, in four partitions with one op to train."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), norm, nn.Linear(4, 5)
    )  # fmt: skip


def check(
    model: nn.Module,
    phase: Phase,
    *,
    batch_size: int,
    test_images: int = 8,
    test_limit: int | None = None,
    share: Share = WHOLE,
    together: bool = False,
) -> None:
    captured = trace(model, (torch.empty(2, 3, 8, 8),))
    parts = partition(captured, at=["1", "4", "5"])
    train_loader = Loader(images(10, 0), batch_size=batch_size, training=True, share=share)
    test_loader = Loader(images(test_images, 1), batch_size=batch_size, limit=test_limit)
    plan = Plan(schedule="mine", partitions=parts, phases=(Phase(start=0, stop=2, epochs=1), phase))
    check_batches(captured, plan, train_loader, test_loader, together=together)


@pytest.mark.parametrize("norm", [lambda: nn.BatchNorm1d(4), Functional, Whole, Method])
@pytest.mark.parametrize(
    ("batch_size", "micro_batches", "words"),
    [(1, 1, "1 micro-batch;"), (4, 4, "4 micro-batches"), (6, 8, "8 micro-batches")],
)
def test_micro_batches_of_one_image_are_refused_where_a_norm_takes_one_value_of_it(
    norm: Any, batch_size: int, micro_batches: int, words: str
) -> None:
    given = {"batch_size": batch_size}
    with pytest.raises(UsageError, match=rf"^BatchNorm '4(.norm)?' sees a single value .* phase 2 .* {words}.*larger"):
        check(pooled(norm()), Phase(start=0, stop=4, epochs=1, micro_batches=micro_batches), **given)
    # Settled or frozen it has its statistics, and the other norm has many values.
    for start, stop in ((3, 4), (0, 2)):
        check(pooled(norm()), Phase(start=start, stop=stop, epochs=1, micro_batches=micro_batches), **given)
    check(pooled(nn.LayerNorm(4)), Phase(start=0, stop=4, epochs=1, micro_batches=micro_batches), **given)


def test_the_part_of_a_process_counts_unless_statistics_are_those_of_all() -> None:
    phase, halves = Phase(start=0, stop=4, epochs=1, micro_batches=2), Share(0, 2)
    with pytest.raises(UsageError, match="phase 2 takes 2 of a batch in each of 2 parts, in 2 micro-batches"):
        check(pooled(nn.BatchNorm1d(4)), phase, batch_size=4, share=halves)
    check(pooled(nn.BatchNorm1d(4)), phase, batch_size=4, share=halves, together=True)
    check(pooled(nn.BatchNorm1d(4)), phase, batch_size=6, share=halves)


def test_a_norm_without_statistics_is_refused_one_image_settled_too() -> None:
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    for start, stop in ((0, 4), (3, 4), (0, 2)):
        with pytest.raises(UsageError, match="BatchNorm '4' sees a single value"):
            check(pooled(norm), Phase(start=start, stop=stop, epochs=1, micro_batches=4), batch_size=4)
        check(pooled(norm), Phase(start=start, stop=stop, epochs=1, micro_batches=2), batch_size=4)


def test_a_norm_without_statistics_is_refused_a_last_test_image() -> None:
    model, phase = pooled(nn.BatchNorm1d(4, track_running_stats=False)), Phase(start=0, stop=4, epochs=1)
    with pytest.raises(
        UsageError, match=r"^BatchNorm '4' has no running statistics .* batches of 4 leave of 9 to test"
    ):
        check(model, phase, batch_size=4, test_images=9)
    check(model, phase, batch_size=4, test_images=9, test_limit=2)
    check(model, phase, batch_size=4, test_images=10)
    check(pooled(nn.BatchNorm1d(4)), phase, batch_size=4, test_images=9)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("count", "batch_size", "parts"), [(10, 4, 2), (11, 4, 2), (13, 6, 2), (9, 4, 2), (16, 5, 2)])
def test_batches_that_leave_an_image_over_train(
    count: int, batch_size: int, parts: int, cached: bool, tmp_path: Path
) -> None:
    """Before and after the pooled norm is settled; with the statistics that are taken when it is."""
    seen: list[int] = []
    model = pooled(nn.BatchNorm1d(4))
    model[4].register_forward_pre_hook(lambda norm, given: seen.append(len(given[0])) if norm.training else None)
    run = trainer(
        model,
        loader={"train": images(count, 0), "test": images(9, 1), "batch_size": batch_size},
        plan=(
            Phase(start=0, stop=4, epochs=1, micro_batches=parts),
            Phase(start=1, stop=4, epochs=2, micro_batches=parts),
        ),
        cache=CachePolicy(medium="ram", folder=str(tmp_path)) if cached else None,
        recalibrate=True,
    )
    seen.clear()
    assert len(list(run.epochs())) == 3
    assert min(seen) > 1
