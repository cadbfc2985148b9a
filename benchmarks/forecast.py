"""A forecast against what it foretells: step time and memory of every phase of a plan, on a dozen models.

    python benchmarks/forecast.py

The ops of a model are measured one by one in `standard`; from these figures alone every phase is forecast, then run. A
row has the forecast, the measurement and their ratio: of the step's time to that of `standard`, of the most that
activations hold, and of the most of everything.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, NamedTuple

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that everybody gives it

import fxsplit
from fxsplit.api import choose_device
from fxsplit.capture import models
from fxsplit.capture.measuring import measure
from fxsplit.plan.forecast import forecast
from fxsplit.run.measuring import measure_phases, update_seconds

MODELS = (
    "timm:resnext50_32x4d",
    "timm:densenet121",
    "timm:vgg16_bn",
    "timm:vit_tiny_patch16_224",
    "timm:convnext_atto",
    "timm:efficientnet_b0",
    "timm:mobilenetv3_small_100",
    "paper:cnn",
    "paper:vgg16",
    "paper:resnext",
    "paper:densenet",
    "benchmarks/forecast.py:unet",
)
CLASSES = 10


def unet(num_classes: int) -> nn.Module:
    """A small U-Net: images (N, 3, H, W) to maps (N, num_classes, H, W)."""
    return UNet(num_classes)


class UNet(nn.Module):
    """Three levels down and up again, what was made on the way down joined on the way up."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.down1, self.down2, self.down3 = _double(3, 16), _double(16, 32), _double(32, 64)
        self.bottom = _double(64, 128)
        self.up3, self.up2, self.up1 = _double(192, 64), _double(96, 32), _double(48, 16)
        self.head = nn.Conv2d(16, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        third = self.down3(F.max_pool2d(second, 2))
        y = self.bottom(F.max_pool2d(third, 2))
        for skip, up in ((third, self.up3), (second, self.up2), (first, self.up1)):
            y = up(torch.cat([skip, F.interpolate(y, scale_factor=2.0)], 1))
        maps: Tensor = self.head(y)
        return maps


def _double(channels: int, filters: int) -> nn.Module:
    return nn.Sequential(
        *(
            layer
            for width in (channels, filters)
            for layer in (nn.Conv2d(width, filters, 3, padding=1), nn.BatchNorm2d(filters), nn.ReLU(inplace=True))
        )
    )


class Row(NamedTuple):
    """Ratios of forecast to measurement in one phase of a model."""

    time: float
    activations: float
    peak: float


OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], int]] = {
    "adamw": (torch.optim.AdamW, 2),
    "momentum": (partial(torch.optim.SGD, lr=1e-3, momentum=0.9), 1),
    "sgd": (partial(torch.optim.SGD, lr=1e-3), 0),
}


def rows(model: str, schedule: str, place: torch.device, *, img_size: int, batch: int, parts: int, steps: int,
         opt: str, by_work: bool) -> Iterator[Row]:  # fmt: skip
    """The phases of a model, each printed as it is found."""
    torch.manual_seed(0)
    net = models.build(model, num_classes=CLASSES, img_size=img_size).to(place)
    images = torch.rand(batch, 3, img_size, img_size, device=place)
    trace = fxsplit.trace(net, (images,))
    partitions = fxsplit.partition(trace, count=parts)
    plan = fxsplit.schedule(schedule, partitions=partitions, epochs=30)
    make_optimizer, slots = OPTIMIZERS[opt]
    known, update = trace, None
    if not by_work:
        known = measure(trace, (images,), device=place, steps=steps)
        update = update_seconds(net.parameters(), make_optimizer=make_optimizer, steps=steps)
    told = forecast(plan, known.train, known.eval, batch_size=batch, optimizer_slots=slots, update_seconds=update)

    def loss(output: Tensor) -> Tensor:
        labels = torch.zeros((batch, *output.shape[2:]), dtype=torch.long, device=place)
        return F.cross_entropy(output, labels)

    executor = fxsplit.Executor(trace, partitions)
    found = measure_phases(executor, plan, (images,), loss, make_optimizer=make_optimizer, steps=steps)
    for phase, ahead, real in zip(plan.phases, told.phases, found, strict=True):
        row = Row(
            ahead.step_cost / real.step_cost,
            ahead.activation_bytes / real.activation_bytes,
            ahead.peak_bytes / real.peak_bytes,
        )
        pairs = {
            "time": (ahead.step_cost, real.step_cost),
            "activations, MB": (ahead.activation_bytes / 1e6, real.activation_bytes / 1e6),
            "peak, MB": (ahead.peak_bytes / 1e6, real.peak_bytes / 1e6),
        }
        figures = [f"{name} {told:8.3f} {found:8.3f} {told / found:.3f}" for name, (told, found) in pairs.items()]
        print(f"{model:28} [{phase.start}, {phase.stop})  {'   '.join(figures)}", flush=True)
        yield row


def main(
    model: Annotated[list[str] | None, typer.Argument(help="Models; a dozen if none is named.")] = None,
    schedule: str = "settle",
    img_size: int = 64,
    batch_size: int = 32,
    parts: int = 8,
    steps: int = 5,
    opt: str = "adamw",
    device: str = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    by_work: Annotated[bool, typer.Option(help="Forecast from shapes alone; measure no op.")] = False,
) -> None:
    torch.set_num_threads(threads)
    place = choose_device(device)
    print(
        f"{schedule}, {img_size}x{img_size}, batch {batch_size}, {parts} partitions, {opt}, {place}, {threads} threads"
    )
    found = [
        row
        for name in model or MODELS
        for row in rows(name, schedule, place, img_size=img_size, batch=batch_size, parts=parts, steps=steps, opt=opt,
                        by_work=by_work)
    ]  # fmt: skip
    print(f"{len(found)} phases; |forecast / measurement - 1|:")
    for field in Row._fields:
        off = [abs(getattr(row, field) - 1) for row in found]
        print(f"  {field:12} median {statistics.median(off):6.1%}  worst {max(off):6.1%}")


if __name__ == "__main__":
    typer.run(main)
