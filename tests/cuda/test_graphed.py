"""A step of an own loop, recorded and replayed: it ends as the plain loop does, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsplit
from fxsplit.cuda.graphed import Graphed
from fxsplit.errors import UsageError
from tests.cuda.simulated import SimulatedRecorder
from tests.networks import FunctionalDropout

# An own loop may have recordings of several shapes.
Many = partial(SimulatedRecorder, most=10)


def batches(count: int, *sizes: int) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(0)
    return [
        (torch.randn(sizes[i % len(sizes)], 3, 8, 8, generator=random), torch.arange(sizes[i % len(sizes)]) % 5)
        for i in range(count)
    ]


def loop(
    wrap: Callable[..., Any],
    given: list[tuple[Tensor, Tensor]],
    between: Callable[..., None],
    device: str = "cpu",
) -> list[Tensor]:
    torch.manual_seed(0)
    net = FunctionalDropout().to(device)
    found = fxsplit.trace(net, (given[0][0].to(device),))
    executor = fxsplit.Executor(found, fxsplit.partition(found, count=3))
    rate = torch.tensor(2.0**-7, device=device)
    capturable = device == "cuda"
    optimizer = torch.optim.AdamW(executor.parameters(), lr=rate, fused=True, capturable=capturable)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(executor(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    wrapped = wrap(step, executor, optimizer)
    losses = []
    for number, (images, labels) in enumerate(given):
        rate.fill_(2.0 ** -(5 + number % 3))
        between(number, executor, optimizer)
        losses.append(wrapped(images.to(device), labels.to(device)))
    drawn = torch.rand(3, device=device)
    return [torch.stack([each.detach() for each in losses]), *net.state_dict().values(), drawn]


def on(recorder: SimulatedRecorder, said: list[str]) -> Callable[..., Any]:
    def wrap(step: Callable[..., Any], *held: Any) -> Any:
        return Graphed(step, held, notice=said.append, recorder_for=lambda _: recorder, device_type="cpu")

    return wrap


def plain(step: Callable[..., Any], *_: Any) -> Any:
    return step


def nothing(*_: Any) -> None:
    pass


def settles(number: int, executor: Any, optimizer: Any) -> None:
    executor.enter(fxsplit.Phase(start=0 if number < 6 else 1, stop=3, epochs=1), optimizer)


def evaluates(number: int, executor: Any, _: Any) -> None:
    if number % 3 == 2:
        executor.eval()
        with torch.no_grad():
            executor(torch.zeros(2, 3, 8, 8, device=next(executor.parameters()).device))
        executor.train()


def decays(number: int, _: Any, optimizer: Any) -> None:
    optimizer.param_groups[0]["weight_decay"] = 0.1 if number < 6 else 0.5


@pytest.mark.parametrize(
    ("sizes", "between", "counts"),
    [
        # The first call makes the optimizer's state, and does not count as one of the three before a recording.
        ((4,), nothing, (4, 1, 8)),
        ((4, 6), nothing, (7, 2, 5)),
        ((4,), settles, (7, 2, 5)),
        ((4,), evaluates, (4, 1, 8)),
        ((4,), decays, (7, 2, 5)),
    ],
)
def test_a_graphed_loop_ends_as_the_plain_one(
    sizes: tuple[int, ...], between: Callable[..., None], counts: tuple[int, int, int]
) -> None:
    given, recorder, said = batches(12, *sizes), Many(), list[str]()
    expected = loop(plain, copy.deepcopy(given), between)
    found = loop(on(recorder, said), given, between)
    assert all(map(torch.equal, expected, found))
    assert said == []
    assert (recorder.warm_ups, recorder.recordings, recorder.replays) == counts


def test_on_a_cpu_a_graphed_step_is_the_plain_call() -> None:
    given = batches(5, 4)
    assert all(map(torch.equal, loop(fxsplit.graphed, given, nothing), loop(plain, given, nothing)))


def test_plain_values_have_recordings_of_their_own_and_others_are_refused() -> None:
    recorder = Many()
    step = Graphed(
        lambda x, *, scale: x * scale, (), notice=str.upper, recorder_for=lambda _: recorder, device_type="cpu"
    )
    x = torch.arange(3.0)
    for _ in range(5):
        assert torch.equal(step(x, scale=2.0), 2 * x)
        assert torch.equal(step(x, scale=3.0), 3 * x)
    assert recorder.recordings == 2
    with pytest.raises(UsageError, match="values that can be hashed: unhashable type: 'list'"):
        step(x, scale=[1.0])


def test_arguments_that_want_gradients_get_them() -> None:
    recorder, x = Many(), nn.Parameter(torch.ones(3))
    step = Graphed(lambda x: x.sum(), (), notice=str.upper, recorder_for=lambda _: recorder, device_type="cpu")
    for _ in range(5):
        step(x).backward()
    assert torch.equal(x.grad, torch.full((3,), 5.0))  # type: ignore[arg-type]
    assert recorder.warm_ups == 0


def test_a_step_that_cannot_be_recorded_says_so_once() -> None:
    said, x = list[str](), torch.ones(3)
    step = Graphed(lambda x: x.sum().item(), (), notice=said.append, recorder_for=lambda _: Many(), device_type="cpu")
    assert [step(x) for _ in range(5)] == [3.0] * 5
    assert said == ["a step runs eagerly, without a CUDA graph: the host waits for the result of item"]


def step_outside(
    wrap: Callable[..., Any], given: list[tuple[Tensor, Tensor]], *, inside: bool, set_to_none: bool
) -> list[Tensor]:
    """A loop whose optimizer steps outside of what is recorded, and clears gradients `inside` of it or outside."""
    torch.manual_seed(0)
    net = FunctionalDropout()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.125, momentum=0.5)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        if inside:
            optimizer.zero_grad(set_to_none)
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        return loss.detach()

    wrapped = wrap(step, net, optimizer)
    for images, labels in given:
        if not inside:
            optimizer.zero_grad(set_to_none)
        wrapped(images, labels)
        optimizer.step()
    return list(net.state_dict().values())


@pytest.mark.parametrize("sizes", [(4,), (4, 4, 4, 4, 4, 2)])
@pytest.mark.parametrize("inside", [True, False])
def test_an_optimizer_may_step_outside(sizes: tuple[int, ...], inside: bool) -> None:
    given, recorder, said = batches(18, *sizes), Many(), list[str]()
    expected = step_outside(plain, given, inside=inside, set_to_none=True)
    found = step_outside(on(recorder, said), given, inside=inside, set_to_none=True)
    assert all(map(torch.equal, expected, found))
    assert said == []
    assert recorder.replays


@pytest.mark.parametrize("inside", [True, False])
def test_a_step_that_adds_to_gradients_from_before_is_not_recorded(inside: bool) -> None:
    given, recorder, said = batches(8, 4), Many(), list[str]()
    expected = step_outside(plain, given, inside=inside, set_to_none=False)
    found = step_outside(on(recorder, said), given, inside=inside, set_to_none=False)
    assert all(map(torch.equal, expected, found))
    assert said == ["a step runs eagerly, without a CUDA graph: it adds to gradients that are there before it"]
    assert not recorder.recordings


def scales(number: int, executor: Any, optimizer: Any) -> None:
    """Write into what is settled, as loading weights does."""
    settles(10, executor, optimizer)
    if number == 8:
        with torch.no_grad():
            next(parameter for parameter in executor.parameters() if not parameter.requires_grad).mul_(1.5)


def loads(number: int, _: Any, optimizer: Any) -> None:
    if number == 8:
        state = copy.deepcopy(optimizer.state_dict())
        for values in state["state"].values():
            values["exp_avg"].mul_(2)
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("between", [scales, loads])
def test_what_is_loaded_into_frozen_weights_or_an_optimizer_is_followed(between: Callable[..., None]) -> None:
    given, recorder, said = batches(14, 4), Many(), list[str]()
    expected = loop(plain, copy.deepcopy(given), between)
    found = loop(on(recorder, said), given, between)
    assert all(map(torch.equal, expected, found))
    assert recorder.recordings == 2


@pytest.mark.parametrize("numbers", [range(40), [0.5] * 40])
def test_a_number_that_changes_in_each_call_is_not_recorded(numbers: Any) -> None:
    said, x, recorder = list[str](), torch.ones(3), Many()
    step = Graphed(
        lambda x, number: x * number, (), notice=said.append, recorder_for=lambda _: recorder, device_type="cpu"
    )
    for number in numbers:
        assert torch.equal(step(x, number), x * number)
    assert len(said) == (numbers == range(40))
    assert len(step._by_shape) == (numbers != range(40))


def test_a_rate_that_is_a_float_and_changes_in_each_call_is_said() -> None:
    weight, said, recorder = nn.Parameter(torch.ones(3)), list[str](), Many()
    optimizer = torch.optim.SGD([weight], lr=0.5)

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        (weight * x).sum().backward()
        optimizer.step()
        return weight

    wrapped = on(recorder, said)(step, optimizer)
    for number in range(40):
        optimizer.param_groups[0]["lr"] = 1 / (number + 1)
        wrapped(torch.ones(3))
    assert len(said) == 1
    assert said[0].endswith("a mode, a number or a tensor that it uses is another one in each call")
    assert torch.allclose(weight, 1 - sum(torch.tensor(1 / (number + 1)) for number in range(40)))
