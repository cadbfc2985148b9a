"""Tiny models, each with one hazard for capture, cutting or training. All take images (N, 3, 8, 8) and give (N, 5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Chain(nn.Module):
    """No hazard: convolution, BatchNorm, ReLU, twice, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.head(x.mean((2, 3)))


class LongSkip(Chain):
    """A value made at the start is needed again at the end, over every cut between."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(first)).relu()
        x = self.conv2(x).tanh()
        return self.head((x + first).mean((2, 3)))


class TiedWeight(nn.Module):
    """Two modules hold the same parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.second.weight = self.first.weight
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :2, :2].flatten(1)
        return self.head(self.second(self.first(x).relu()).relu())


class FunctionalDropout(Chain):
    """Dropout that `.eval()` does not reach once it is traced."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.norm1(self.conv1(x)).relu(), 0.5, self.training)
        x = self.norm2(self.conv2(x)).relu()
        if self.training:
            x = F.dropout(x, 0.25)
        return self.head(x.mean((2, 3)))


class InPlace(Chain):
    """Ops that overwrite their input: a module, a function and `+=`."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        first = self.act(self.norm1(self.conv1(x)))
        x = self.norm2(self.conv2(first))
        x += first
        x = self.conv2(F.relu(x, inplace=True))
        x.tanh_()
        return self.head(x.mean((2, 3)))


class RootParameter(Chain):
    """A parameter and a buffer on the model itself, and a buffer that forward moves."""

    calls: Tensor
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1, 6, 1, 1), 0.5))
        self.register_buffer("shift", torch.full((1, 6, 1, 1), 0.1))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls.add_(1)
        x = self.norm1(self.conv1(x)) * self.scale
        x = (self.conv2(x) + self.shift).relu()
        return self.head((x * self.scale).mean((2, 3)))


class SeveralOutputs(Chain):
    """A dict and a tuple come out; one of the values is made early."""

    def forward(self, x: Tensor) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        first = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(first)).relu()
        logits = self.head(x.mean((2, 3)))
        return {"logits": logits, "features": (first, x)}


class CalledTwice(Chain):
    """A convolution and a stateless module are entered twice."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm1(self.conv1(x)).relu())
        x = self.drop(self.conv2(self.conv2(x).relu()))
        return self.head(x.mean((2, 3)))


class NormTwice(Chain):
    """A BatchNorm whose statistics move twice in one forward."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm1(self.conv2(x)).relu()
        return self.head(self.conv2(x).mean((2, 3)))


class FunctionalNorm(Chain):
    """BatchNorm by function, as timm's fused norm and activation does it."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = FusedNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fused(self.conv1(x))
        return self.head(self.norm2(self.conv2(x)).relu().mean((2, 3)))


class FusedNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        assert self.num_batches_tracked is not None
        if self.training:
            self.num_batches_tracked.add_(1)
        normed = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )
        return normed.relu()


class BranchOnShape(Chain):
    """Python looks at sizes: a branch, a loop, a tuple of sizes and a factory."""

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, _ = x.shape
        if height > 6:
            x = F.avg_pool2d(x, 2)
        for _ in range(channels - 2):
            x = self.norm1(self.conv1(x)).relu()
        x = x + torch.zeros(batch, len(x[0]), 1, 1, device=x.device)
        x = self.conv2(x).reshape(batch, 6, -1)
        return self.head(x.mean(2))


class BranchOnTraining(Chain):
    """More ops in training than in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
        x = self.norm2(self.conv2(x)).relu()
        return self.head(x.mean((2, 3)))


class Gate(nn.Module):
    """A branch on data, inside a module and after one on a size."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu() if x.shape[1] > 2 and x.mean() > 0 else x.tanh()


class InnerBranchOnData(Chain):
    """The branch on data is in a module of its own, which can stay whole."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    def forward(self, x: Tensor) -> Tensor:
        x = self.gate(self.norm1(self.conv1(x)))
        return self.head(self.norm2(self.conv2(x)).relu().mean((2, 3)))


class Hooked(Chain):
    """A forward hook that changes what a module, which holds others, delivers."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(6, 6, 1), nn.Tanh())
        self.block.register_forward_hook(_halve)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.norm1(self.conv1(x)).relu())
        return self.head(self.norm2(self.conv2(x)).relu().mean((2, 3)))


def _halve(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
    return output / 2


class Average(nn.Module):
    """Keeps a moving average in a buffer by putting a new tensor in its place."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3))
        return x - self.mean.view(1, -1, 1, 1)


class AssignedBuffer(Chain):
    """A buffer is replaced, not written into; in a module of its own, which can stay whole."""

    def __init__(self) -> None:
        super().__init__()
        self.average = Average()

    def forward(self, x: Tensor) -> Tensor:
        x = self.average(self.norm1(self.conv1(x)))
        return self.head(self.norm2(self.conv2(x)).relu().mean((2, 3)))


class BatchSizeInPython(Chain):
    """Python learns the batch size, as a plain number, by len() and by int()."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        x = x.reshape(len(x), 6, 8, 8)
        half = x[: int(x.shape[0]) // 2].sum() / len(x)
        x = self.norm2(self.conv2(x)).reshape(2 * int(x.shape[0]), -1).reshape(x.shape) + half
        return self.head(x.mean((2, 3)))


@dataclass
class Answer:
    logits: Tensor
    features: Tensor | None = None


class DataclassOutput(Chain):
    """A dataclass comes out, with a None in it."""

    def forward(self, x: Tensor) -> Answer:  # type: ignore[override]
        return Answer(logits=super().forward(x))


class Pair(NamedTuple):
    logits: Tensor
    auxiliary: Tensor | None


class AuxiliaryHead(Chain):
    """In training a second head, early in the network, delivers one more output."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(6, 5))

    def forward(self, x: Tensor) -> Pair:  # type: ignore[override]
        x = self.norm1(self.conv1(x)).relu()
        early = self.auxiliary(x) if self.training else None
        x = self.conv2(self.norm2(self.conv2(x)).relu()).tanh()
        return Pair(self.head(x.mean((2, 3))), early)


class OnlyInEvaluation(Chain):
    """An op of evaluation alone, and a size that it needs from the start of the network."""

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        x = super().forward(x)
        return x if self.training else (x * height).softmax(1)


class StochasticDepth(Chain):
    """An op of training between ops that both modes have."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        branch = self.norm2(self.conv2(x))
        if self.training:
            branch = branch * torch.empty(x.shape[0], 1, 1, 1).bernoulli_(0.5)
        x = (x + branch).relu()
        return self.head(self.conv2(x).mean((2, 3)))


class MethodOnData(Chain):
    """A method of the model branches on data."""

    def pick(self, x: Tensor) -> Tensor:
        return self.norm2(x) if x.mean() > 0 else -self.norm2(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pick(self.norm1(self.conv1(x)))
        return self.head(self.conv2(x).relu().mean((2, 3)))


def largest(x: Tensor) -> Tensor:
    """A function that reads data."""
    return x * x.abs().max().item()


class FunctionOnData(Chain):
    """A function that forward calls reads data."""

    def forward(self, x: Tensor) -> Tensor:
        x = largest(self.norm1(self.conv1(x)))
        return self.head(self.norm2(self.conv2(x)).relu().mean((2, 3)))


class AssertsOnData(Chain):
    """Three ways of making sure of data."""

    def forward(self, x: Tensor) -> Tensor:
        if x.isnan().any() or not x.isfinite().all():
            raise ValueError("there are holes in the image")
        x = self.norm1(self.conv1(x)).relu()
        assert x.min() >= 0
        torch._assert(x.max() < 1e6, "too large")
        return self.head(self.norm2(self.conv2(x)).relu().mean((2, 3)))


class OtherTensors(Chain):
    """Tensors that are neither parameters nor buffers: in a list, and in an attribute that forward moves on."""

    def __init__(self) -> None:
        super().__init__()
        self.shifts = [torch.full((1, 6, 1, 1), 0.5), torch.full((1, 6, 1, 1), -0.5)]
        self.last = torch.zeros(6, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x) + self.shifts[1]).relu() + self.last
        self.last = x.detach().mean(0)
        return self.head(self.norm2(self.conv2(x) * self.shifts[0]).relu().mean((2, 3)))


class Counter(nn.Module):
    """Changes what it does with every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (1 + 1 / self.calls)


class CountsCalls(Chain):
    """A module in it counts its calls, so that no recording of one call serves another."""

    def __init__(self) -> None:
        super().__init__()
        self.counter = Counter()

    def forward(self, x: Tensor) -> Tensor:
        x = self.counter(self.norm1(self.conv1(x)))
        return self.head(self.norm2(self.conv2(x)).relu().mean((2, 3)))


class NumbersOfTypes(Chain):
    """Types are asked for; a number follows from one; a power has a plain exponent; a size is rounded."""

    def forward(self, x: Tensor) -> Tensor:
        if not (isinstance(x, Tensor) and isinstance(x.shape[2], int)):
            raise TypeError(f"{x!r} is no image")
        x = self.norm1(self.conv1(x))
        x = x.masked_fill(x < 0, torch.finfo(x.dtype).eps)
        x = 0.5 * x * (1.0 + torch.tanh(x + torch.pow(x, 3.0)))
        x = x[:, :, : math.ceil(x.shape[2] / 1.5)]
        return self.head(self.norm2(self.conv2(x)).relu().mean((2, 3)))


class OddNames(Chain):
    """Modules and buffers whose names are keywords, mark-up, code or no letters at all."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.ModuleDict({name: nn.Conv2d(6, 6, 1) for name in ODD_NAMES})
        for name in ODD_NAMES:
            self.odd[name].register_buffer(name, torch.full((1, 6, 1, 1), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        for name, conv in self.odd.items():
            x = x + conv(x) * conv.get_buffer(name)
        return self.head(self.norm2(self.conv2(x)).relu().mean((2, 3)))


ODD_NAMES = (
    *("global", "class", "None", "model", "v0", "c0", "it's", 'a "quoted" one', "two\nlines", "back\\slash"),
    *(
        "{0}",
        "%s",
        "<b>&amp;",
        "[red]",
        "naïve 名",
        "\x1b]0;title\x07\x1b[31m",
        "\u202e",
        " ",
        "# no comment",
    ),
    'x\'] or setattr(__import__("sys"), "ran_from_a_name", True)  # ',
    'x", setattr(__import__("sys"), "ran_from_a_name", True), "',
)


class Regions(Chain):
    """Ops in regions with their own gradients and types, nested and decorated; a convolution is cast once for two."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Conv2d(6, 6, 1) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        with torch.autocast("cpu", torch.bfloat16):
            y = self.inner[0](x)
            with torch.no_grad():
                weight = self.inner[1](y).sigmoid()
                with torch.enable_grad():
                    y = self.inner[2](y)
            y = y * weight
            with torch.autocast("cpu", enabled=False):
                y = self.inner[3](y.float())
            y = self.conv2(self.conv2(y))
        x = x + self.fixed(y.float()) + y
        return self.head(self.norm2(self.conv2(x)).relu().mean((2, 3)))

    @torch.no_grad()
    def fixed(self, x: Tensor) -> Tensor:
        return self.inner[4](x)


class BranchOnData(Chain):
    """A branch on data in the first statement of all: this cannot be captured, and must be refused well."""

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            x = x.relu()
        x = self.norm1(self.conv1(x))
        return self.head(self.norm2(self.conv2(x)).relu().mean((2, 3)))


# Options of timm's networks: fewer blocks, of the same kinds.
SHORTER: dict[str, dict[str, Any]] = {
    "resnext50_32x4d": {"layers": (1, 2, 1, 1)},
    "densenet121": {"block_config": (2, 3, 2, 2)},
    "vit_tiny_patch16_224": {"depth": 4},
}

HAZARDS: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind
    for kind in (
        Chain,
        OddNames,
        Regions,
        LongSkip,
        TiedWeight,
        FunctionalDropout,
        InPlace,
        RootParameter,
        SeveralOutputs,
        CalledTwice,
        NormTwice,
        FunctionalNorm,
        BranchOnShape,
        BranchOnTraining,
        InnerBranchOnData,
        AssignedBuffer,
        Hooked,
        BatchSizeInPython,
        DataclassOutput,
        AuxiliaryHead,
        OnlyInEvaluation,
        StochasticDepth,
        MethodOnData,
        FunctionOnData,
        AssertsOnData,
        OtherTensors,
        CountsCalls,
        NumbersOfTypes,
    )
}
