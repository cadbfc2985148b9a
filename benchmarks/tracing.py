"""How tracing grows with the ops of a model: both modes, costs included, on the meta device, one thread.

python benchmarks/tracing.py
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

import fxsplit

OPS = (625, 1_250, 2_500, 5_000, 10_000)


class Deep(nn.Module):
    """Blocks of six ops, and a branch on a size."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)) for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y = block(x)
            x = (x + y).relu().reshape(x.shape)
            if x.shape[1] > 8:
                x = -x
        return x


def main() -> None:
    """Print a row for each size."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}\n   ops   seconds   seconds / 1,000 ops")
    for wanted in OPS:
        with torch.device("meta"):
            model, images = Deep(wanted // 6), torch.empty(2, 8, 16, 16)
        began = time.perf_counter()
        trace = fxsplit.trace(model, (images,))
        seconds = time.perf_counter() - began
        print(f"{len(trace.train):6,} {seconds:9.2f} {1000 * seconds / len(trace.train):13.2f}")


if __name__ == "__main__":
    main()
