"""Pointwise convolutions as matrix products: where they are, what they deliver, and where the convolution stays."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxsplit.capture.tracing import trace
from fxsplit.execute.executor import Executor
from fxsplit.execute.passes import Pass
from fxsplit.execute.pointwise import pointwise_products
from fxsplit.measuring.op_costs import measure
from fxsplit.plan.partition import partition
from fxsplit.plan.schedule import Phase
from tests.execute.settled.test_prefix import Calls

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (4, 8, 6, 6)


def bottleneck() -> nn.Module:
    """Two pointwise convolutions about one that is not."""
    return nn.Sequential(
        nn.Conv2d(8, 4, 1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 16, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 36, 5),
    )


def executor(
    model: nn.Module, at: str = "3", passes: Sequence[Pass] = (pointwise_products,), backend: str | None = None
) -> Executor:
    captured = trace(model, (torch.empty(SHAPE),))
    return Executor(captured, partition(captured, at=[at]), passes=passes, backend=backend)


def channels_last(model: nn.Module) -> tuple[nn.Module, Tensor]:
    images = torch.randn(SHAPE).contiguous(memory_format=torch.channels_last)
    return model.to(memory_format=torch.channels_last), images  # type: ignore[call-overload]


def convolutions(net: nn.Module, images: Tensor) -> int:
    """Forward and backward."""
    with Calls() as calls:
        net(images).square().sum().backward()
    return calls.count("convolution")


@pytest.mark.parametrize("training", [True, False])
def test_in_channels_last_they_are_products_with_the_same_results(training: bool) -> None:
    model, images = channels_last(bottleneck().train(training))
    plain = copy.deepcopy(model)
    net = executor(model).train(training)
    ours, theirs = net(images), plain(images)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)
        assert mine.grad is not None
        assert mine.grad.shape == mine.shape
    assert convolutions(net, images) == 2  # the 3x3 one, and its backward
    assert convolutions(plain, images) == 6


@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize("training", [True, False])
def test_without_the_pass_nothing_is_a_product(training: bool, recompute: int) -> None:
    model, images = channels_last(bottleneck())
    plain = copy.deepcopy(model)
    net = executor(model, passes=())
    net.enter(Phase(start=0, stop=2, epochs=1, recompute=recompute))
    ours, theirs = (each.train(training)(images) for each in (net, plain))
    assert torch.equal(ours, theirs)
    for result in (ours, theirs):
        result.square().sum().backward()
    assert all(
        torch.equal(mine.grad, other.grad)  # type: ignore[arg-type]
        for mine, other in zip(model.parameters(), plain.parameters(), strict=True)
    )


def test_recomputed_segments_are_rewritten_too() -> None:
    model, images = channels_last(bottleneck())
    net = executor(model, at="7")
    net.enter(Phase(start=0, stop=2, epochs=1, recompute=1, segmented=True))
    assert len(net._recomputation.of(0, segmented=True)) > 1
    assert convolutions(net.train(), images) == 3  # the 3x3 one: forward, once more, and backward


@pytest.mark.parametrize(("passes", "count"), [((), 6 + 3 + 1), ((pointwise_products,), 2 + 1 + 1)])
def test_what_runs_is_what_is_timed(passes: Sequence[Pass], count: int) -> None:
    model, images = channels_last(bottleneck())
    captured = trace(model, (images,))
    with Calls() as calls:
        measure(captured, (images,), steps=1, passes=passes)
    # In training, in evaluation and settled; two steps of warm-up, a measured one, and one to see the workspaces.
    assert calls.count("convolution") == 4 * count


def test_values_stay_in_channels_last() -> None:
    model, images = channels_last(bottleneck())
    net = executor(model, at="5")
    seen: list[Tensor] = []
    with net.tapped(lambda _, values: seen.extend(values)):
        net(images)
    assert [value.is_contiguous(memory_format=torch.channels_last) for value in seen] == [True]


def test_in_the_usual_order_convolutions_stay_bit_for_bit() -> None:
    model, images = bottleneck(), torch.randn(SHAPE)
    plain = copy.deepcopy(model)
    net = executor(model)
    assert torch.equal(net(images), plain(images))
    assert convolutions(net, images) == convolutions(plain, images) == 6


def test_a_single_image_without_a_batch_is_taken() -> None:
    model, image = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU()), torch.randn(SHAPE[1:])
    plain = copy.deepcopy(model)
    captured = trace(model, (image,))
    net = Executor(captured, partition(captured, count=1), passes=(pointwise_products,))
    assert torch.equal(net(image), plain(image))


@pytest.mark.parametrize(
    "options",
    [{"stride": 2}, {"padding": 1}, {"groups": 2}, {"kernel_size": (1, 3)}],
    ids=lambda given: next(iter(given)),
)
def test_what_is_not_pointwise_stays_a_convolution(options: dict[str, Any]) -> None:
    model, images = channels_last(nn.Sequential(nn.Conv2d(8, 4, **{"kernel_size": 1, **options}), nn.ReLU()))
    plain = copy.deepcopy(model)
    net = executor(model, at="1")
    assert torch.equal(net(images), plain(images))
    assert convolutions(net, images) == 2


def test_in_autocast_convolutions_stay() -> None:
    model, images = channels_last(bottleneck())
    plain = copy.deepcopy(model)
    net = executor(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(images), plain(images))


def test_other_weights_and_hooks_are_heeded() -> None:
    model, images = channels_last(bottleneck())
    net = executor(model)
    with torch.no_grad():
        model.get_parameter("4.weight").zero_()
        model.get_parameter("4.bias").zero_()
        model.get_parameter("7.bias").zero_()
    assert not net(images).any()
    handle = model.get_submodule("4").register_forward_hook(lambda *heard: heard[-1] + 1)
    assert net(images).any()
    handle.remove()
    assert not net(images).any()
    model.get_submodule("4").forward = torch.ones_like  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="shape"):
        net(images)


@pytest.mark.parametrize(("order", "count"), [(torch.contiguous_format, 2), (torch.channels_last, 1)])
def test_settled_partitions_use_products_once_values_are_in_channels_last(
    order: torch.memory_format, count: int
) -> None:
    images = torch.randn(SHAPE).contiguous(memory_format=order)
    net = executor(bottleneck(), at="5")
    expected = net.eval().resume([images], stop=1)[0].detach()
    net.enter(Phase(start=1, stop=2, epochs=1))
    net.train()
    with Calls() as calls:
        (value,) = net.settle(images)
    assert calls.count("convolution") == count
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


# A warning of torch's compiler about its own doings.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_stage_does_the_same() -> None:
    model, images = channels_last(bottleneck())
    plain = copy.deepcopy(model)
    net = executor(model, backend="aot_eager")
    torch.testing.assert_close(net(images), plain(images), rtol=1e-5, atol=1e-5)
