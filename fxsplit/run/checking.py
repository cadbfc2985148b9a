"""The proof that partitions compute exactly what the model computes: two copies, run side by side, compared bit by bit.

plain model ──► output, loss, gradients, buffers, random state ┐
                                                               ├── equal, in training and evaluation,
executor    ──► output, loss, gradients, buffers, random state ┘   at two batch sizes
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from fxsplit.capture import models
from fxsplit.capture.examples import Example, example
from fxsplit.capture.structure import tensors_in
from fxsplit.capture.tracing import trace
from fxsplit.errors import FxsplitError
from fxsplit.plan.cuts import cuts
from fxsplit.plan.partition import most_partitions, partition
from fxsplit.report import CheckRecord
from fxsplit.run.executor import Executor

CLASSES = 10
BATCH_SIZES = (2, 3)
SEED = 0


def check_model(spec: str, *, structure_only: bool, parts: int, img_size: int | None) -> CheckRecord:
    """Capture a model with random weights, cut it, and unless `structure_only` prove it equal to the plain model.

    Never raises for what is wrong with the model: the record says it.
    """
    began = perf_counter()
    try:
        record = _check(spec, structure_only=structure_only, parts=parts, img_size=img_size)
    except FxsplitError as error:
        record = CheckRecord(model=spec, refusal=str(error))
    except Exception as error:
        record = CheckRecord(model=spec, refusal=f"{type(error).__name__}: {' '.join(str(error).split())}")
    return record.after(perf_counter() - began)


def _check(spec: str, *, structure_only: bool, parts: int, img_size: int | None) -> CheckRecord:
    size = models.native_size(spec) if img_size is None else img_size

    def build() -> nn.Module:
        torch.manual_seed(SEED)
        make = models.sketch if structure_only else models.build
        return make(spec, num_classes=CLASSES, img_size=size)

    model = build()
    inputs = _inputs(spec, model, size, structure_only=structure_only)
    captured = trace(model, inputs[0].args, inputs[0].kwargs)
    most = most_partitions(captured.train, captured.eval)
    partitions = partition(captured.train, captured.eval, count=min(parts, most))
    differences: tuple[str, ...] = ()
    own = False
    if not structure_only:
        differences = tuple(differing(build(), Executor(captured, partitions), inputs))
        own = bool(differences) and bool(differing(build(), build(), inputs))
    return CheckRecord(
        model=spec,
        ops=len(captured.train),
        eval_ops=len(captured.eval),
        parameters=sum(part.parameters for part in partitions),
        opaque=captured.opaque,
        guards=len(captured.programs[True].guards.questions) + len(captured.programs[False].guards.questions),
        cuts=sum(cut.refusal is None for cut in cuts(captured.train, captured.eval)),
        partitions=len(partitions),
        batch_sizes=() if structure_only else tuple(map(_batch_size, inputs)),
        differences=differences,
        own_randomness=own,
    )


def _inputs(spec: str, model: nn.Module, size: int, *, structure_only: bool) -> list[Example]:
    """Two batches; the second has another size, unless the images come in a list, whose length is part of the call."""
    draw = partial(example, spec, model, img_size=size, training=True, device="meta" if structure_only else "cpu")
    first, second = (draw(batch_size=batch_size) for batch_size in BATCH_SIZES)
    counts = [len(tensors_in((given.args, given.kwargs))) for given in (first, second)]
    return [first, second if len(set(counts)) == 1 else draw(batch_size=BATCH_SIZES[0], seed=SEED + 1)]


def differing(plain: nn.Module, other: nn.Module, inputs: Sequence[Example]) -> Iterator[str]:
    """What differs between two modules with equal weights, in words: nothing, if they compute the same."""
    for training in (True, False):
        plain.train(training)
        other.train(training)
        for given in inputs:
            expected, found = (_outcome(module, given, training) for module in (plain, other))
            where = f"in {'training' if training else 'evaluation'}, batch of {_batch_size(given)}"
            for name in {**expected, **found}:
                if not _same(expected.get(name), found.get(name)):
                    yield f"{name} {where}"


def _outcome(module: nn.Module, given: Example, training: bool) -> dict[str, Any]:
    """All that a call leaves behind, by name."""
    given = copy.deepcopy(given)
    with _seeded():
        with torch.set_grad_enabled(training):
            output = module(*given.args, **given.kwargs)
        found: dict[str, Any] = {f"output {index}": leaf.detach() for index, leaf in enumerate(tensors_in(output))}
        found["type of the output"] = type(output)
        loss = _loss(output) if training else None
        if loss is not None:
            module.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            found["loss"] = loss.detach()
            found |= {f"gradient of {name}": parameter.grad for name, parameter in module.named_parameters()}
        found |= {f"buffer {name}": buffer.clone() for name, buffer in module.named_buffers()}
        found["random state of torch"] = torch.get_rng_state()
        found["random state of Python"] = random.getstate()
    return found


def _loss(output: Any) -> Tensor | None:
    """A number that depends on every element of the output, and on each one differently."""
    leaves = [leaf.float() for leaf in tensors_in(output) if leaf.requires_grad]
    if not leaves:
        return None
    return torch.stack([(leaf * torch.linspace(-1, 2, leaf.numel()).view_as(leaf)).mean() for leaf in leaves]).sum()


def _same(expected: Any, found: Any) -> bool:
    if isinstance(expected, Tensor) and isinstance(found, Tensor):
        # As bytes, so that not-a-number equals itself.
        return (
            expected.shape == found.shape
            and expected.dtype == found.dtype
            and torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (expected, found)))
        )
    return type(expected) is type(found) and bool(expected == found)


def _batch_size(given: Example) -> int:
    first = next(iter((*given.args, *given.kwargs.values())))
    return len(first)


@contextmanager
def _seeded() -> Iterator[None]:
    before = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        random.seed(SEED)
        try:
            yield
        finally:
            random.setstate(before)
