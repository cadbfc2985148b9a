"""A forecast held against what it foretells: every phase of a plan forecast from single ops, then run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from fxsplit.capture.tracing import trace
from fxsplit.errors import FxsplitError, NoModelError
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
from fxsplit.report import ForecastRecord, PhaseCheck

CLASSES = 10
SEED = 0
# Only the share of the epochs depends on it.
EPOCHS = 30


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
    """Forecast the phases of a model with random weights, trained by AdamW, and run each on `device`.

    With `channels_last` the model and its images have that order, and what runs is rewritten as `train` does then.

    Never raises for what is wrong with the model: the record says it.
    """
    began = perf_counter()
    try:
        record = _check(spec, schedule, parts, img_size, batch_size, device, channels_last)
    except FxsplitError as error:
        record = ForecastRecord(model=spec, refusal=str(error), unknown=isinstance(error, NoModelError))
    except Exception as error:
        record = ForecastRecord(model=spec, refusal=f"{type(error).__name__}: {' '.join(str(error).split())}")
    return replace(record, seconds=perf_counter() - began)


def _check(
    spec: str,
    schedule: str,
    parts: int,
    img_size: int | None,
    batch_size: int,
    device: torch.device,
    channels_last: bool,
) -> ForecastRecord:
    # A wildcard is here because it means no model.
    registry.expand(spec)
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
        phases=tuple(
            PhaseCheck(start=phase.start, stop=phase.stop, forecast=told, measured=real)
            for phase, told, real in zip(plan.phases, ahead.phases, found, strict=True)
        ),
    )


def _adamw(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters)


def _loss(given: Example, net: nn.Module, _index: int, _count: int) -> Tensor:
    """Cross-entropy with the first class, of an image or of each of its pixels. The batch is taken whole."""
    scores = logits_of(net(*given.args, **given.kwargs))
    return F.cross_entropy(scores, scores.new_zeros((len(scores), *scores.shape[2:]), dtype=torch.long))
