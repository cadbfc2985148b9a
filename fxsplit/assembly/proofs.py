"""The proof of the first batch of a run."""

from __future__ import annotations

from bisect import bisect_right
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from fxsplit.assembly.steps import loss
from fxsplit.capture.tracing import Trace
from fxsplit.measuring.meter import is_out_of_memory
from fxsplit.plan.forecast import forecast
from fxsplit.plan.schedule import Phase
from fxsplit.proving.first_batch import prove_batch
from fxsplit.proving.replays import differing_replays
from fxsplit.report import Observer
from fxsplit.spec import RunSpec
from fxsplit.training.trainer import Trainer


def prove_first_batch(spec: RunSpec, trace: Trace, trainer: Trainer, observer: Observer) -> float:
    """Prove on the first batch that the executor computes what the model computes; return the seconds that it took.

    As many of its images are taken as the memory holds that training needs. Compilers may round otherwise, so stages
    run uncompiled here: the proof is of what the compiler is given. Raises ProofError when the two differ.
    """
    began = perf_counter()
    trainer.executor.train()
    batch = next(trainer.feed.train_loader.batches(0))
    count = _images_within(trace, trainer, len(batch))
    images, labels = batch.images[:count], batch.labels[:count]
    with torch.compiler.set_stance("force_eager") if spec.torchcompile else nullcontext():
        proof = prove_batch(
            trace.model,
            trainer.executor,
            images,
            labels,
            micro_batches=trainer.plan.phases[0].micro_batches,
            batch_size=trainer.feed.train_loader.own_batch_size,
            loss=partial(loss, spec),
            autocast=trainer.forward.autocast,
            notice=observer.notice,
        )
    if proof is not None and proof.varying:
        observer.notice(
            f"two runs of the plain model differ in {len(proof.varying)} of {proof.compared} values of the first "
            "batch; the partitions were held to these within what they vary by themselves"
        )
    if trainer.work is not None:
        trainer.work.proof(count)
    if trainer.recordings is not None:
        _prove_replays(spec, trace, trainer, images, labels, observer)
    return perf_counter() - began


def _images_within(trace: Trace, trainer: Trainer, count: int) -> int:
    """Return of how many images, of `count`, the activations fit in those of the plan; at least two, for BatchNorm.

    In the proof everything trains, and nothing is recomputed. In a plan that saves memory no phase may be like that.
    """
    plan = trainer.plan
    everything = Phase(start=0, stop=len(plan.partitions), epochs=1, micro_batches=plan.phases[0].micro_batches)

    def activations(phases: tuple[Phase, ...], images: int) -> int:
        ahead = forecast(replace(plan, phases=phases), trace, batch_size=images)
        return max(phase.activation_bytes for phase in ahead.phases)

    most = activations(plan.phases, trainer.feed.train_loader.own_batch_size)
    if activations((everything,), count) <= most:
        return count
    return min(count, 2 + bisect_right(range(3, count), most, key=lambda images: activations((everything,), images)))


def _prove_replays(
    spec: RunSpec, trace: Trace, trainer: Trainer, images: Tensor, labels: Tensor, observer: Observer
) -> None:
    """Compare replayed steps with eager ones on a batch; where they differ, no step is recorded in this run."""
    assert trainer.recordings is not None
    try:
        wrong = differing_replays(
            trace.model,
            trainer.executor,
            images,
            labels,
            micro_batches=trainer.plan.phases[0].micro_batches,
            batch_size=trainer.feed.train_loader.own_batch_size,
            loss=partial(loss, spec),
            autocast=trainer.forward.autocast,
            recorder=trainer.recordings.recorder,
        )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        observer.notice("memory does not hold the comparison of replayed steps with eager ones: it is left out")
        return
    if wrong:
        trainer.recordings.give_up(f"replayed steps differ from eager ones in {wrong[0]}")
