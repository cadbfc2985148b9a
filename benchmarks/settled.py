"""What a training step costs once the first partitions are settled, against a plain step in which everything trains.

    taskset -c 1 python benchmarks/settled.py --channels-last

All arms take their steps in turn, so that whatever else the machine does falls on all. `by hand` is the plain model
with the same layers frozen by `requires_grad_(False)`; `bfloat16` runs the settled partitions in that precision;
`cached` reads what they deliver from a file. With --channels-last all arms but `plain` have images and weights in that
order. Printed are the median seconds, and the median over all turns of the ratio to the plain step of the same turn.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

import fxsplit
from fxsplit.assembly import choose_device
from fxsplit.caching.cache import CachePolicy
from fxsplit.data.images import MemoryImages
from fxsplit.data.loader import ImageSource, Loader
from fxsplit.data.source import batches_of
from fxsplit.execute.executor import Executor
from fxsplit.execute.forward import Forward
from fxsplit.execute.passes import passes_for
from fxsplit.measuring.meter import now
from fxsplit.models import registry

BATCHES = 4


def stepper(net: nn.Module, feed: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """One training step: forward, cross-entropy, backward, SGD with momentum; `feed` gives scores and labels."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(*feed()).backward()
        optimizer.step()

    return step


def executor(
    model: nn.Module, images: Tensor, at: list[str], settled: int, dtype: torch.dtype | None = None
) -> Executor:
    """Of a copy of the model, as `train` makes it, with the first partitions settled."""
    trace = fxsplit.trace(copy.deepcopy(model), (images,))
    channels_last = not images.is_contiguous()
    passes = passes_for(images.device, channels_last=channels_last)
    net = fxsplit.Executor(trace, fxsplit.partition(trace, at=at), passes=passes, settled_dtype=dtype)
    net.enter(fxsplit.Phase(start=settled, stop=len(net.partitions), epochs=1))
    return net.train()


def cached(net: Executor, loader: Loader, folder: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores and labels, over and over, with all rows in a file before the first."""
    forward = Forward(net, loader.device)
    cache = CachePolicy(medium="disk", folder=folder).open(forward, ImageSource(loader), epochs=1000, notice=print)
    for _ in batches_of(cache, 0):
        pass
    epoch = 0
    while True:
        epoch += 1
        for batch in batches_of(cache, epoch):
            assert batch.cut
            yield forward.logits(batch), batch.labels


def main(
    model: str = "timm:resnext50_32x4d",
    at: Annotated[str, typer.Option(help="Where to cut.")] = "layer2,layer3,layer4",
    img_size: int = 64,
    batch_size: int = 32,
    steps: int = 15,
    device: str = "auto",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="All but the plain arm.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    place, cuts = choose_device(device), at.split(",")
    plain = registry.build(model, num_classes=10, img_size=img_size).to(place).train()
    pixels = torch.randint(256, (BATCHES * batch_size, 3, img_size, img_size), dtype=torch.uint8)
    data = MemoryImages(pixels=pixels, labels=torch.randint(10, (len(pixels),)), img_size=img_size).to(place)
    loader = Loader(data, batch_size=batch_size, training=True, channels_last=channels_last)
    batch = next(loader.batches(0))
    images, labels = batch.images, batch.labels
    own = plain
    if channels_last:
        own = copy.deepcopy(plain).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def run(net: nn.Module, images: Tensor = images) -> Callable[[], None]:
        return stepper(net, lambda: (net(images), labels))

    nets = [executor(own, images, cuts, settled) for settled in range(len(cuts) + 1)]
    by_hand, frozen = copy.deepcopy(own), nets[-1].settled_state()
    for name, parameter in by_hand.named_parameters():
        parameter.requires_grad_(name not in frozen)
    low = executor(own, images, cuts, len(cuts), torch.bfloat16)
    from_cache = executor(own, images, cuts, len(cuts))
    with tempfile.TemporaryDirectory(dir=".") as folder:
        arms = {
            "plain": run(plain, images.contiguous()),
            "all train": run(nets[0]),
            **{f"{settled} settled": run(net) for settled, net in enumerate(nets) if settled},
            f"{len(cuts)} by hand": run(by_hand),
            f"{len(cuts)} bfloat16": run(low),
            f"{len(cuts)} cached": stepper(from_cache, partial(next, cached(from_cache, loader, folder))),
        }
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(steps + 2):
            for name in sorted(arms, reverse=bool(turn % 2)):
                began = now(place)
                arms[name]()
                if turn >= 2:
                    seconds[name].append(now(place) - began)
    print(f"{model} cut at {at}, {img_size}x{img_size}, batch {batch_size}, {place}, {threads} threads, {steps} steps")
    for name, taken in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(taken, seconds["plain"], strict=True))
        print(f"  {name:12} {statistics.median(taken):.4f} s a step (at best {min(taken):.4f}), ratio {ratio:.3f}")


if __name__ == "__main__":
    typer.run(main)
