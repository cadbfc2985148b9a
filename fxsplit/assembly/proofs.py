"""The proof of the first batch of a run."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from time import perf_counter

import torch

from fxsplit.assembly.steps import loss
from fxsplit.capture.tracing import Trace
from fxsplit.data.batch import Batch
from fxsplit.measuring.meter import is_out_of_memory
from fxsplit.proving.first_batch import prove_batch
from fxsplit.proving.replays import differing_replays
from fxsplit.report import Observer
from fxsplit.spec import RunSpec
from fxsplit.training.trainer import Trainer


def prove_first_batch(spec: RunSpec, trace: Trace, trainer: Trainer, observer: Observer) -> float:
    """Prove on the first batch that the executor computes what the model computes; return the seconds that it took.

    Compilers may round otherwise, so stages run uncompiled here: the proof is of what the compiler is given. Raises
    ProofError when the two differ.
    """
    began = perf_counter()
    trainer.executor.train()
    batch = next(trainer.feed.train_loader.batches(0))
    with torch.compiler.set_stance("force_eager") if spec.torchcompile else nullcontext():
        proof = prove_batch(
            trace.model,
            trainer.executor,
            batch.images,
            batch.labels,
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
        trainer.work.proof(len(batch))
    if trainer.recordings is not None:
        _prove_replays(spec, trace, trainer, batch, observer)
    return perf_counter() - began


def _prove_replays(spec: RunSpec, trace: Trace, trainer: Trainer, batch: Batch, observer: Observer) -> None:
    """Compare replayed steps with eager ones on a batch; where they differ, no step is recorded in this run."""
    assert trainer.recordings is not None
    try:
        wrong = differing_replays(
            trace.model,
            trainer.executor,
            batch.images,
            batch.labels,
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
