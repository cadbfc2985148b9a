"""Tries whether the steps of an optimizer come out the same when they are recorded and replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxsplit.cuda.number import Number
from fxsplit.cuda.recorder import Recorder
from fxsplit.cuda.replay import Replayed, in_words

# What optimizers treat differently: convolutions, matrices, vectors and single numbers.
SHAPES = ((4, 3, 3, 3), (16, 8), (16,), ())
# Learning rates of the trial. They change at each step, and float32 holds them exactly.
RATES = tuple(2.0**-exponent for exponent in (7, 6, 8, 5, 7, 9, 6, 5, 8, 7, 4, 6, 9, 5, 8))
# The largest difference, relative to how far the weights have moved.
TOLERANCE = 1e-3


# Is given parameters, and whether what steps count is to be kept on the device.
MakeOptimizer = Callable[[Sequence[nn.Parameter], bool], Optimizer]


def why_not_replayed(make_optimizer: MakeOptimizer, recorder: Recorder, device: torch.device) -> str | None:
    """Hold recorded steps of an optimizer against eager ones, on a few numbers and under a changing learning rate.

    Args:
        make_optimizer: is given parameters, and whether what steps count is to be kept on the device.
        recorder: of the device.
        device: where the optimizer steps.

    Returns why its steps cannot be replayed, the end of a sentence, or None when they come out the same.
    """
    reasons: list[str] = []

    def replayed(optimizer: Optimizer) -> Callable[[], object]:
        return Replayed(optimizer.step, recorder, device, held=[optimizer], refused=reasons.append)

    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            expected, first = _stepped(make_optimizer, device, None)
            found, _ = _stepped(make_optimizer, device, replayed)
    except Exception as error:
        return in_words(error)
    if reasons:
        return reasons[0]
    moved = max(float((after - before).abs().max()) for after, before in zip(expected, first, strict=True))
    wrong = max(float((one - other).abs().max()) for one, other in zip(expected, found, strict=True))
    return None if wrong <= TOLERANCE * moved else "its replayed steps differ from eager ones"


def _stepped(
    make_optimizer: MakeOptimizer, device: torch.device, replayed: Callable[[Optimizer], Callable[[], object]] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Take a step at each of the RATES; return the parameters at the end, and as they were at the beginning."""
    random = torch.Generator().manual_seed(0)

    def drawn() -> list[Tensor]:
        return [torch.randn(shape, generator=random).to(device) for shape in SHAPES]

    first = drawn()
    parameters = [nn.Parameter(each.clone()) for each in first]
    optimizer = make_optimizer(parameters, replayed is not None)
    rates = [Number(None if replayed is None else device) for _ in optimizer.param_groups]
    step = optimizer.step if replayed is None else replayed(optimizer)
    gradients = [torch.zeros_like(each) for each in first]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    for value in RATES:
        torch._foreach_copy_(gradients, drawn())
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            rate.set(value)
            group["lr"] = rate.value
        step()
    return [parameter.detach() for parameter in parameters], first
