"""What a training step costs once the first partitions are settled, against a plain step in which everything trains.

    taskset -c 1 python benchmarks/settled.py

All arms take their steps in turn, so that whatever else the machine does falls on all. `requires_grad` is the plain
model with the same layers frozen by `requires_grad_(False)`, as one would by hand. Printed are medians, and their
ratios to the first arm.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that everybody gives it

import fxsplit
from fxsplit.api import choose_device
from fxsplit.capture import models
from fxsplit.run.executor import Executor
from fxsplit.run.metrics import now


def stepper(forward: Callable[[], Tensor], net: nn.Module, labels: Tensor) -> Callable[[], None]:
    """One training step: forward, cross-entropy, backward, SGD with momentum."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(forward(), labels).backward()
        optimizer.step()

    return step


def executor(model: nn.Module, images: Tensor, at: list[str], settled: int) -> Executor:
    trace = fxsplit.trace(model, (images,))
    net = fxsplit.Executor(trace, fxsplit.partition(trace, at=at))
    net.enter(fxsplit.Phase(start=settled, stop=len(net.partitions), epochs=1))
    return net.train()


def main(
    model: str = "timm:resnext50_32x4d",
    at: Annotated[str, typer.Option(help="Where to cut.")] = "layer2,layer3,layer4",
    img_size: int = 64,
    batch_size: int = 32,
    steps: int = 15,
    device: str = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    place = choose_device(device)
    cuts = at.split(",")
    plain = models.build(model, num_classes=10, img_size=img_size).to(place).train()
    images = torch.rand(batch_size, 3, img_size, img_size, device=place)
    labels = torch.randint(10, (batch_size,), device=place)
    arms = {"plain": stepper(lambda net=plain: net(images), plain, labels)}
    everything = executor(copy.deepcopy(plain), images, cuts, 0)
    arms["executor"] = stepper(lambda: everything(images), everything, labels)
    for settled in range(1, len(cuts) + 1):
        net = executor(copy.deepcopy(plain), images, cuts, settled)
        arms[f"settled {settled}"] = stepper(lambda net=net: net(images), net, labels)
    by_hand = copy.deepcopy(plain)
    frozen = {name for part in net.partitions[:settled] for name in part.state}
    for name, parameter in by_hand.named_parameters():
        parameter.requires_grad_(name not in frozen)
    arms[f"requires_grad {settled}"] = stepper(lambda: by_hand(images), by_hand, labels)

    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(steps + 2):
        for name in sorted(arms, reverse=bool(turn % 2)):
            began = now(place)
            arms[name]()
            if turn >= 2:
                seconds[name].append(now(place) - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{model} cut at {at}, {img_size}x{img_size}, batch {batch_size}, {place}, {threads} threads")
    for name, median in medians.items():
        best = min(seconds[name])
        print(
            f"  {name:16} {median:.4f} s a step, ratio {median / medians['plain']:.3f}"
            f" (median of {steps}; at best {best:.4f}, {best / min(seconds['plain']):.3f})"
        )


if __name__ == "__main__":
    typer.run(main)
