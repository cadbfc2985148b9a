"""What a forward pass through the executor costs the host, against the plain model.

    taskset -c 0 python benchmarks/host.py

Both are given a batch of no images, so that kernels have nothing to compute and Python and the dispatcher are what
remains. The two take turns in one process, and the best times are compared. Lookups, the calls of
`nn.Module.__getattr__` in a forward pass, do not depend on the machine.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Callable
from functools import partial
from time import perf_counter
from types import FrameType
from typing import Annotated, Any

import torch
import typer
from torch import nn

import fxsplit
from fxsplit.models import registry

MODELS = "timm:densenet121,timm:resnext50_32x4d,timm:resnet18,timm:vit_tiny_patch16_224,paper:cnn"


def lookups(run: Callable[[], object]) -> int:
    """Count the attributes of modules that are looked up in `_parameters`, `_buffers` and `_modules`."""
    found = 0

    def count(frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal found
        found += event == "call" and frame.f_code is nn.Module.__getattr__.__code__

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def main(
    models: str = MODELS,
    parts: int = 8,
    turns: int = 300,
    evaluation: Annotated[bool, typer.Option("--evaluation", help="In evaluation, without gradients.")] = False,
) -> None:
    torch.set_num_threads(1)
    print(f"{'':28} {'lookups':>13} {'milliseconds':>17} {'ratio of':>8} {'of':>8}")
    print(f"{'model':28} {'plain':>6} {'ours':>6} {'plain':>8} {'ours':>8} {'bests':>8} {'medians':>8}")
    for name in models.split(","):
        torch.manual_seed(0)
        img_size = registry.native_size(name) if "vit" in name else 32
        plain = registry.build(name, num_classes=10, img_size=img_size)
        ours = copy.deepcopy(plain)
        trace = fxsplit.trace(ours, (torch.empty(2, 3, img_size, img_size),))
        net = fxsplit.Executor(trace, fxsplit.partition(trace, count=min(parts, len(trace.train))))
        nothing = torch.empty(0, 3, img_size, img_size)
        arms = {"plain": plain.train(not evaluation), "ours": net.train(not evaluation)}
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        with torch.set_grad_enabled(not evaluation):
            for turn in range(turns + 2):
                for arm in sorted(arms, reverse=bool(turn % 2)):
                    began = perf_counter()
                    arms[arm](nothing)
                    if turn >= 2:
                        seconds[arm].append(perf_counter() - began)
            counts = {arm: lookups(partial(module, nothing)) for arm, module in arms.items()}
        best, median = ({arm: of(each) for arm, each in seconds.items()} for of in (min, statistics.median))
        print(
            f"{name:28} {counts['plain']:6} {counts['ours']:6} {best['plain'] * 1e3:8.3f} {best['ours'] * 1e3:8.3f} "
            f"{best['ours'] / best['plain']:8.3f} {median['ours'] / median['plain']:8.3f}"
        )


if __name__ == "__main__":
    typer.run(main)
