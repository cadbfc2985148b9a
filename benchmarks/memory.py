"""What the phases of a run really hold and take, beside standard training: measured steps of the plan that train makes.

    taskset -c 1 python benchmarks/memory.py timm:resnext50_32x4d --img-size 64 -b 64 -- --memory-budget 0.5
    taskset -c 1 python benchmarks/memory.py paper:cnn --img-size 32 -b 128

What follows `--` are further keys of a recipe, as options. Steps of every phase and of standard training alternate; the
activation peak is what torch's allocator hands out in a step, without the gradients of parameters. The last line is
the whole plan: each phase by its epochs, without a cache.
"""

from __future__ import annotations

import sys
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

import fxsplit
from fxsplit.assembly import choose_device
from fxsplit.measuring.phase_costs import measure_phases
from fxsplit.models import registry
from fxsplit.spec import RunSpec, from_text, read_values


def main(
    context: typer.Context,
    model: str,
    img_size: int = 64,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b")] = 64,
    epochs: int = 60,
    preset: str = "l2l",
    steps: int = 7,
    device: str = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    channels_last: Annotated[bool, typer.Option("--channels-last")] = False,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    names = [word.removeprefix("--").replace("-", "_") for word in context.args[::2]]
    more = {name: from_text(name, text) for name, text in zip(names, context.args[1::2], strict=True)}
    spec = RunSpec(
        model=model, img_size=img_size, batch_size=batch_size, epochs=epochs, preset=preset, **read_values(more)
    )
    plan = fxsplit.inspect(spec).plan
    place = choose_device(device)
    order = torch.channels_last if channels_last else torch.contiguous_format
    net = registry.build(model, num_classes=10, img_size=img_size).to(place, memory_format=order)  # type: ignore[call-overload]
    images = torch.rand(batch_size, 3, img_size, img_size, device=place).contiguous(memory_format=order)
    labels = (torch.arange(batch_size) % 10).to(place)

    def loss(net: nn.Module, part: int, parts: int) -> Tensor:
        return F.cross_entropy(net(images.chunk(parts)[part]), labels.chunk(parts)[part]) / parts

    executor = fxsplit.Executor(fxsplit.trace(net, (images,)), plan.partitions)
    everything = fxsplit.Phase(start=0, stop=len(plan.partitions), epochs=1)
    whole = fxsplit.Plan(schedule="standard", partitions=plan.partitions, phases=(everything, *plan.phases))
    standard, *phases = measure_phases(executor, whole, loss, make_optimizer=torch.optim.AdamW, steps=steps)
    print(
        f"{model}, {img_size}x{img_size}{', channels last' * channels_last}, batch {batch_size}, {place}, "
        f"{threads} threads, torch {torch.__version__}"
    )
    print(f"standard: step {standard.step_seconds:.4f} s, activations {standard.activation_bytes / 1e6:.1f} MB")
    for phase, found in zip(plan.phases, phases, strict=True):
        print(
            f"[{phase.start}, {phase.stop}) for {phase.epochs} epochs, recomputes up to {phase.recompute}, "
            f"{phase.micro_batches} micro-batches: time {found.step_cost:.3f}, "
            f"activations {found.activation_bytes / standard.activation_bytes:.3f}, "
            f"peak {found.peak_bytes / standard.peak_bytes:.3f}"
        )
    time = sum(phase.epochs * found.step_cost for phase, found in zip(plan.phases, phases, strict=True)) / plan.epochs
    activations = max(found.activation_bytes for found in phases) / standard.activation_bytes
    peak = max(found.peak_bytes for found in phases) / standard.peak_bytes
    print(f"whole plan: time {time:.3f}, activations {activations:.3f}, peak {peak:.3f}")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, help=__doc__)(main)
    sys.exit(app())
