"""Proves that partitions compute exactly what the model computes: two copies run side by side, compared bit by bit.

plain model ──► output, loss, gradients, buffers, random state ┐
                                                               ├── equal, in training and evaluation,
executor    ──► output, loss, gradients, buffers, random state ┘   at two batch sizes

If anything differs, two further copies, both plain, are compared as well. Where these two differ in the same value, the
model itself is not deterministic there.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from fxsplit.capture.tracing import trace
from fxsplit.execute.executor import Executor
from fxsplit.execute.passes import passes_for
from fxsplit.execute.pointwise import held_to_convolutions
from fxsplit.models import registry
from fxsplit.models.examples import Example, example
from fxsplit.objects.structure import tensors_in
from fxsplit.plan.cuts import cuts
from fxsplit.plan.partition import most_partitions, partition
from fxsplit.proving.checkpoints import looked_through
from fxsplit.proving.equality import Difference, differences, loss_of, outcome, random_states, set_random_states
from fxsplit.proving.refusals import never_raises
from fxsplit.report import CheckRecord

CLASSES = 10
BATCH_SIZES = (2, 3)
SEED = 0


@never_raises(CheckRecord)
def check_model(
    spec: str, *, structure_only: bool, parts: int, img_size: int | None, channels_last: bool = False
) -> CheckRecord:
    """Capture a model with random weights, cut it, and prove it equal to the plain model.

    Never raises for what is wrong with the model: the record says it.

    Args:
        spec: names the model.
        structure_only: capture and cut it on the meta device, and run nothing.
        parts: how many partitions, or as many as the model allows.
        img_size: side of its images in pixels; None for the size that it was made for.
        channels_last: run it as `train` does with that option, and compare each matrix product with its convolution.
    """
    size = registry.native_size(spec) if img_size is None else img_size

    def build() -> nn.Module:
        torch.manual_seed(SEED)
        make = registry.sketch if structure_only else registry.build
        made = make(spec, num_classes=CLASSES, img_size=size)
        return made.to(memory_format=torch.channels_last) if channels_last else made

    model = build()
    inputs = _inputs(spec, model, size, structure_only=structure_only)
    if channels_last:
        inputs = [each.in_channels_last() for each in inputs]
    captured = trace(model, inputs[0].args, inputs[0].kwargs)
    partitions = partition(captured, count=min(parts, most_partitions(captured)))
    found: list[Difference] = []
    own: set[tuple[str, bool]] = set()
    if not structure_only:
        net = Executor(captured, partitions, passes=passes_for(torch.device("cpu"), channels_last=channels_last))
        with held_to_convolutions():
            found = list(differing(build(), net, inputs))
        if found:
            own = {_what(each) for each in differing(build(), build(), inputs)}
    return CheckRecord(
        model=spec,
        ops=len(captured.train),
        eval_ops=len(captured.eval),
        parameters=sum(part.parameters for part in partitions),
        opaque=captured.opaque,
        guards=sum(len(program.guards.questions) for program in captured.programs.values()),
        cuts=sum(cut.refusal is None for cut in cuts(captured)),
        partitions=len(partitions),
        batch_sizes=() if structure_only else tuple(map(_batch_size, inputs)),
        differences=tuple(str(each) for each in found if _what(each) not in own),
        own_differences=tuple(str(each) for each in found if _what(each) in own),
    )


def _inputs(spec: str, model: nn.Module, size: int, *, structure_only: bool) -> list[Example]:
    """Make two batches of different size; of the same if images come in a list, whose length the trace has fixed."""
    draw = partial(example, spec, model, img_size=size, training=True, device="meta" if structure_only else "cpu")
    first, second = (draw(batch_size=batch_size) for batch_size in BATCH_SIZES)
    counts = [len(tensors_in((given.args, given.kwargs))) for given in (first, second)]
    return [first, second if len(set(counts)) == 1 else draw(batch_size=BATCH_SIZES[0], seed=SEED + 1)]


def differing(plain: nn.Module, other: nn.Module, inputs: Sequence[Example]) -> Iterator[Difference]:
    """Run two modules with equal weights on `inputs`, in training and evaluation, and give all in which they differ."""
    for training in (True, False):
        plain.train(training)
        other.train(training)
        for given in inputs:
            expected, found = (_outcome(module, given, training) for module in (plain, other))
            where = f"in {'training' if training else 'evaluation'}, batch of {_batch_size(given)}"
            for each in differences(expected, found):
                yield replace(each, name=f"{each.name} {where}")


def _outcome(net: nn.Module, given: Example, training: bool) -> dict[str, Any]:
    """Run a call, with its backward in training, and return all that it leaves behind, by name."""
    given = copy.deepcopy(given)

    def step(net: nn.Module) -> Iterator[tuple[str, Any]]:
        with torch.set_grad_enabled(training):
            output = net(*given.args, **given.kwargs)
        yield "output", output
        yield "input", tensors_in((given.args, given.kwargs))
        loss = loss_of(output) if training else None
        if loss is not None:
            yield "loss", loss
            loss.backward()  # type: ignore[no-untyped-call]

    with _seeded(), looked_through():
        return outcome(net, step)


def _what(difference: Difference) -> tuple[str, bool]:
    """Return what must be alike for a difference between two plain models to excuse this one.

    That is its name, and whether it is one of numbers: random numbers do not excuse another shape.
    """
    return difference.name, math.isinf(difference.size)


def _batch_size(given: Example) -> int:
    first = next(iter((*given.args, *given.kwargs.values())))
    return len(first)


@contextmanager
def _seeded() -> Iterator[None]:
    before = random_states()
    torch.manual_seed(SEED)
    random.seed(SEED)
    np.random.seed(SEED)
    try:
        yield
    finally:
        set_random_states(before)
