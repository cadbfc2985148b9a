"""What a training step through the executor costs, against a plain hand-written loop.

    python benchmarks/step.py

Both arms train a copy of the same model on the same synthetic images, step by step in turn, so that whatever else the
machine does falls on both. Printed are the medians and their ratio, executor to plain.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

import fxsplit
from fxsplit.assembly import choose_device
from fxsplit.measuring.meter import now
from fxsplit.models import registry


def stepper(net: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """One training step: forward, cross-entropy, backward, SGD with momentum."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()

    return step


def main(
    model: str = "timm:resnext50_32x4d",
    img_size: int = 64,
    batch_size: int = 32,
    parts: int = 8,
    steps: int = 15,
    device: str = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    place = choose_device(device)
    plain = registry.build(model, num_classes=10, img_size=img_size).to(place)
    ours = copy.deepcopy(plain)
    images = torch.rand(batch_size, 3, img_size, img_size, device=place)
    labels = torch.randint(10, (batch_size,), device=place)
    trace = fxsplit.trace(ours, (images,))
    net = fxsplit.Executor(trace, fxsplit.partition(trace, count=parts))
    arms = {"plain": stepper(plain.train(), images, labels), "executor": stepper(net.train(), images, labels)}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(steps + 2):
        for name in sorted(arms, reverse=bool(turn % 2)):
            began = now(place)
            arms[name]()
            if turn >= 2:
                seconds[name].append(now(place) - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    same = all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))
    print(f"{model}, {img_size}x{img_size}, batch {batch_size}, {parts} partitions, {place}, {threads} threads")
    for name, median in medians.items():
        print(f"  {name:9} {median:.4f} s a step (median of {steps}, {min(seconds[name]):.4f} at best)")
    print(f"  ratio     {medians['executor'] / medians['plain']:.4f}; weights equal bit for bit: {same}")


if __name__ == "__main__":
    typer.run(main)
