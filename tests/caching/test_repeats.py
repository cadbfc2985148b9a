"""What depends on the batch that an image comes in is found, and rounding is not taken for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxsplit.caching import repeats as module
from fxsplit.caching.repeats import are_alike

pytestmark = pytest.mark.usefixtures("one_thread")


def images(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(count)).to(dtype)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()


def by_places(weights: Callable[[int], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: x * weights(len(x)).view(-1, 1, 1, 1)


class Calls(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def repeats(run: Callable[[Tensor], list[Any]], x: Tensor, values: list[Any], **options: Any) -> bool:
    return module.repeats(lambda given: run(given[0]), [x], values, **options)


DEPENDENT: dict[str, Callable[[Tensor], Tensor]] = {
    "a running sum": lambda x: x + x.cumsum(0),
    "a running sum of little weight": lambda x: x + 1e-3 * x.cumsum(0),
    "a running sum from both ends": lambda x: x + x.cumsum(0) + x.flip(0).cumsum(0).flip(0),
    "the mean of the batch": lambda x: x - x.mean(0),
    "statistics of the batch": lambda x: F.batch_norm(x, None, None, training=True),
    "the largest of the batch": lambda x: x / x.amax(),
    "the image before": lambda x: x + x.roll(1, 0),
    "both neighbours": lambda x: x + x.roll(1, 0) + x.roll(-1, 0),
    "the image at the other end": lambda x: x + 0.1 * x.flip(0),
    "the other of a pair": lambda x: x + torch.cat([x[1::2], x[::2]])[: len(x)],
    "attention between images": lambda x: (x.flatten(1) @ x.flatten(1).T).softmax(1) @ x.flatten(1),
    "even and odd places": by_places(lambda count: 1.0 + torch.arange(count) % 2),
    "the distance from the middle": by_places(lambda count: 1 + (torch.arange(count) - (count - 1.1) / 2).abs()),
    "the first place": by_places(lambda count: 1.0 + (torch.arange(count) == 0)),
    "the last place": by_places(lambda count: 1.0 + (torch.arange(count) == count - 1)),
    "the rank in the batch": lambda x: x.mean((1, 2, 3)).argsort().argsort(),
    "random numbers": lambda x: x + torch.rand_like(x),
    "random numbers that do nothing": lambda x: x + 0 * torch.rand_like(x),
    "earlier batches": Calls(),
}


@pytest.mark.parametrize("name", DEPENDENT)
@pytest.mark.parametrize("count", [2, 3, 4, 7, 16, 128])
def test_what_depends_on_the_batch_is_found(name: str, count: int) -> None:
    def run(x: Tensor) -> list[Any]:
        return [None, DEPENDENT[name](x)]

    x = images(count)
    assert not repeats(run, x, run(x))


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 2, 5, 32])
def test_what_depends_on_the_image_alone_repeats(amp: torch.dtype | None, count: int) -> None:
    model = net()

    @torch.no_grad()
    def run(x: Tensor) -> list[Any]:
        with torch.autocast("cpu", amp, enabled=amp is not None):
            y = model(x)
        return [y, None, y > 0, y.argmax(1), torch.arange(len(x)) * 0]

    state = torch.get_rng_state()
    assert repeats(run, images(count), run(images(count)), precisions=[amp] if amp else [])
    assert torch.equal(torch.get_rng_state(), state)


def test_other_batches_have_the_size_and_layout_of_the_first_and_hold_each_image() -> None:
    """Kernels are chosen by these."""
    given = images(7).contiguous(memory_format=torch.channels_last)
    seen = []

    def run(x: Tensor) -> list[Any]:
        seen.append(x)
        return [x]

    assert repeats(run, given, [given])
    assert {(x.shape, x.stride()) for x in seen} == {(given.shape, given.stride())}
    places = [[next(index for index in range(7) if torch.equal(image, given[index])) for image in x] for x in seen]
    assert places == [[2, 2, 1, 1, 0, 0, 0], [6, 5, 5, 4, 4, 3, 3]]


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_statistics_of_the_batch_are_found_in_mixed_precision(amp: torch.dtype) -> None:
    model = net().train()

    @torch.no_grad()
    def run(x: Tensor) -> list[Any]:
        with torch.autocast("cpu", amp):
            return [model(x)]

    # As in photographs, brightness varies from image to image.
    x = images(128) * torch.rand(128, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    assert not repeats(run, x, run(x), precisions=[amp])


def test_rows_may_be_apart_by_rounding_of_the_precision_that_computes() -> None:
    torch.manual_seed(0)
    exact = torch.randn(64, 500)
    short = exact.bfloat16().float()
    assert are_alike(exact, exact * (1 + 1e-6))
    assert not are_alike(exact, short)
    assert are_alike(exact, short, precisions=[torch.bfloat16])
    assert not are_alike(exact, exact.half().float() * 1.003, precisions=[torch.float16])
    assert not are_alike(exact, exact * 1.01, precisions=[torch.bfloat16])
    assert are_alike(exact.bfloat16(), (exact * 1.001).bfloat16())
    # One row is as much as all of them.
    one = exact.clone()
    one[17] *= 1.00001
    assert not are_alike(exact, one)
    # All but cancelled, a row has the error of those beside it.
    small = exact.clone()
    small[3] *= 1e-7
    assert are_alike(small, small + 1e-6)


def test_other_types_shapes_and_numbers_are_not_alike() -> None:
    numbers = torch.arange(4)
    assert are_alike(numbers, numbers.clone())
    assert not are_alike(numbers, numbers.flip(0))
    assert not are_alike(numbers, numbers.float())
    assert not are_alike(numbers.float(), numbers[:3].float())
    nan = torch.tensor([float("nan"), 1.0])
    assert not are_alike(nan, nan.clone())


def test_values_at_an_earlier_cut_are_taken_to_other_places_together() -> None:
    x, y = images(6), torch.arange(6.0)

    def run(given: list[Any]) -> list[Any]:
        return [given[0] * given[2][:, None, None, None], None]

    assert module.repeats(run, [x, None, y], run([x, None, y]))
    assert not module.repeats(run, [x, None, y], run([x, None, y.flip(0)]))
