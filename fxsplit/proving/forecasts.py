"""Compares forecasts with measurements: every phase of a plan is forecast from single ops, then run and measured."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from fxsplit.capture.tracing import trace
from fxsplit.execute.executor import Executor
from fxsplit.execute.forward import logits_of
from fxsplit.execute.passes import passes_for
from fxsplit.measuring.op_costs import measure
from fxsplit.measuring.phase_costs import measure_phases, update_seconds
from fxsplit.models import registry
from fxsplit.models.examples import Example, example
from fxsplit.plan.forecast import forecast
from fxsplit.plan.partition import most_partitions, partition
from fxsplit.plan.schedule import schedule as make_plan
from fxsplit.proving.refusals import never_raises
from fxsplit.report import ForecastRecord, PhaseCheck

CLASSES = 10
SEED = 0
# How the phases share the epochs depends on it, but not what a step of theirs costs.
EPOCHS = 30


@never_raises(ForecastRecord)
def check_forecast(
    spec: str,
    *,
    schedule: str,
    parts: int,
    img_size: int | None,
    batch_size: int,
    device: torch.device,
    channels_last: bool = False,
) -> ForecastRecord:
    """Forecast and measure the phases of a model with random weights, trained by AdamW.

    Never raises for what is wrong with the model: the record says it.

    Args:
        spec: names the model.
        schedule: one of those of `fxsplit.schedule`.
        parts: how many partitions, or as many as the model allows.
        img_size: side of its images in pixels; None for the size that it was made for.
        batch_size: images in a step.
        device: what runs it.
        channels_last: run it as `train` does with that option.
    """
    torch.manual_seed(SEED)
    size = registry.native_size(spec) if img_size is None else img_size
    model = registry.build(spec, num_classes=CLASSES, img_size=size).to(device)
    given = example(spec, model, batch_size=batch_size, img_size=size, training=True, device=device)
    if channels_last:
        model, given = model.to(memory_format=torch.channels_last), given.in_channels_last()
    passes = passes_for(device, channels_last=channels_last)
    captured = trace(model, given.args, given.kwargs)
    partitions = partition(captured, count=min(parts, most_partitions(captured)))
    plan = make_plan(schedule, partitions=partitions, epochs=EPOCHS)
    measured = measure(captured, given.args, given.kwargs, device=device, passes=passes)
    ahead = forecast(
        plan,
        measured,
        batch_size=batch_size,
        optimizer_slots=2,
        update_seconds=update_seconds(model.parameters(), make_optimizer=_adamw),
    )
    net = Executor(captured, partitions, passes=passes)
    found = measure_phases(net, plan, partial(_loss, given), make_optimizer=_adamw)
    return ForecastRecord(
        model=spec,
        batch_size=batch_size,
        partitions=len(partitions),
        phases=tuple(
            PhaseCheck(start=phase.start, stop=phase.stop, forecast=predicted, measured=real)
            for phase, predicted, real in zip(plan.phases, ahead.phases, found, strict=True)
        ),
    )


def _adamw(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters)


def _loss(given: Example, net: nn.Module, _index: int, _count: int) -> Tensor:
    """Compute the cross-entropy with class 0, of an image or of each of its pixels; there is one micro-batch."""
    scores = logits_of(net(*given.args, **given.kwargs))
    return F.cross_entropy(scores, scores.new_zeros((len(scores), *scores.shape[2:]), dtype=torch.long))
