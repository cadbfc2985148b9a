"""Training: phases, epochs and batches of a plan through one executor, whatever the schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that everybody gives it
from torch.optim import Optimizer

from fxsplit.errors import FxsplitError
from fxsplit.plan.schedule import Phase, Plan
from fxsplit.report import EpochRecord, Observer, StepRecord
from fxsplit.run.cache import Cache, SettledBatch
from fxsplit.run.data import Batch
from fxsplit.run.executor import Executor
from fxsplit.run.exits import Exits
from fxsplit.run.loader import Loader
from fxsplit.run.metrics import Accuracy, Meter, Score, now
from fxsplit.run.optimizers import parameters_of


class MakeOptimizer(Protocol):
    """An optimizer over the parameters of the model that train now and those of `modules`, with what is worth keeping
    of the previous one.
    """

    def __call__(self, *modules: nn.Module, previous: Optimizer | None) -> Optimizer: ...


class Scheduler(Protocol):
    """Sets the learning rate from the number of optimizer steps done."""

    def step_update(self, num_updates: int) -> None: ...


class MakeScheduler(Protocol):
    """The learning rate of the whole run, for an optimizer of one phase."""

    def __call__(self, optimizer: Optimizer, *, steps_per_epoch: int) -> Scheduler: ...


class MakeCache(Protocol):
    """A cache of what the partitions deliver that are settled now, for the epochs of one phase."""

    def __call__(
        self,
        *,
        executor: Executor,
        loader: Loader,
        settle: Callable[[Tensor], list[Any]],
        epochs: int,
        notice: Callable[[str], None],
    ) -> Cache: ...


@dataclass(kw_only=True)
class Trainer:
    """Trains an executor by a plan: cross-entropy, one optimizer step a batch.

    `amp_dtype` turns on autocast, with loss scaling for float16. `grad_accum_steps` splits a batch into that many
    backward passes, with the gradient of the whole. `clip_grad` bounds the gradient's norm. Without `make_cache`, what
    is settled is computed anew for each batch. `exits` train beside the model: the loss that is reported is without
    theirs, so that runs with and without can be compared, and the trainable parameters are with them.

    Raises FxsplitError when there is nothing to train on, UsageError when the optimizer cannot be made.
    """

    executor: Executor
    plan: Plan
    loader: Loader
    make_optimizer: MakeOptimizer
    make_scheduler: MakeScheduler
    make_cache: MakeCache | None = None
    exits: Exits | None = None
    smoothing: float = 0.0
    clip_grad: float | None = None
    amp_dtype: torch.dtype | None = None
    grad_accum_steps: int = 1
    log_interval: int = 10
    observer: Observer = field(default_factory=Observer)

    def __post_init__(self) -> None:
        if not self.loader.steps_per_epoch:
            raise FxsplitError("there is no batch to train on: BatchNorm needs at least 2 training images")
        self.device = self.loader.device
        self._meter = Meter(self.device)
        self._optimizer: Optimizer | None = None
        self._cache: Cache | None = None
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype is torch.float16)
        # Unknown names and impossible values are refused here, before a run has left anything behind.
        self.make_scheduler(self.make_optimizer(previous=None), steps_per_epoch=self.loader.steps_per_epoch)

    def epochs(self) -> Iterator[EpochRecord]:
        """Train and test, an epoch at each step of the iterator. At its end everything may train again."""
        try:
            for index, phase in enumerate(self.plan.phases):
                began = now(self.device)
                optimizer, scheduler = self._enter(index, phase)
                for epoch in range(self.plan.first_epoch(index), self.plan.first_epoch(index) + phase.epochs):
                    record = self._epoch(epoch, optimizer, scheduler, began)
                    self.observer.epoch_done(record)
                    yield record
                    began = now(self.device)
        finally:
            self._close_cache()
            self.executor.release()

    def _enter(self, index: int, phase: Phase) -> tuple[Optimizer, Scheduler]:
        self.executor.enter(phase)
        if self._cache is None or self._cache.cut != phase.start:
            self._close_cache()
            if self.make_cache and phase.start:
                self._cache = self.make_cache(
                    executor=self.executor,
                    loader=self.loader,
                    settle=self._settle,
                    epochs=phase.epochs,
                    notice=self.observer.notice,
                )
        previous = None if phase.fresh_optimizer else self._optimizer
        if self.exits:
            self.exits.enter(phase, self.observer.notice)
        beside = [self.exits.modules] if self.exits else []
        self._optimizer = self.make_optimizer(*beside, previous=previous)
        self._meter.reset_peaks()
        self.observer.phase_started(index, phase)
        return self._optimizer, self.make_scheduler(self._optimizer, steps_per_epoch=self.loader.steps_per_epoch)

    def _epoch(self, epoch: int, optimizer: Optimizer, scheduler: Scheduler, began: float) -> EpochRecord:
        energy = self._meter.read().energy_joules
        trained = self._train(epoch, optimizer, scheduler, began)
        ended = now(self.device)
        tested = self.evaluate()
        finished = now(self.device)
        if not math.isfinite(trained.loss):
            self.observer.notice(
                f"the training loss of epoch {epoch} is {trained.loss}; a lower --lr or --clip-grad may help"
            )
        phase, partitions = self.plan.phase_at(epoch), self.plan.partitions
        cut = phase.cut(len(partitions))
        usage = self._meter.read()
        return EpochRecord(
            epoch=epoch,
            phase=self.plan.phase_index_at(epoch),
            start=phase.start,
            stop=phase.stop,
            cut="" if cut is None else partitions[cut].name,
            lr=float(optimizer.param_groups[0]["lr"]),
            train_loss=trained.loss,
            eval_loss=tested.loss,
            eval_top1=tested.top1_pct,
            eval_top5=tested.top5_pct,
            train_seconds=ended - began,
            eval_seconds=finished - ended,
            images_per_second=trained.count / (ended - began),
            trainable_parameters=sum(parameter.numel() for parameter in parameters_of(optimizer)),
            peak_resident_bytes=usage.peak_resident_bytes,
            peak_allocated_bytes=usage.peak_allocated_bytes,
            peak_reserved_bytes=usage.peak_reserved_bytes,
            device_bytes=usage.device_bytes,
            cache_resident_bytes=self._cache.resident_bytes if self._cache else None,
            cache_file_bytes=self._cache.file_bytes if self._cache else None,
            energy_joules=None if energy is None or usage.energy_joules is None else usage.energy_joules - energy,
        )

    def _train(self, epoch: int, optimizer: Optimizer, scheduler: Scheduler, began: float) -> Score:
        self.executor.train()
        accuracy = Accuracy(self.device)
        last = self.loader.steps_per_epoch
        for step, batch in enumerate(self._batches(epoch), start=1):
            scheduler.step_update(epoch * last + step - 1)
            self._step(batch, optimizer, accuracy)
            if step % self.log_interval == 0 or step == last:
                self._tell(epoch, step, accuracy, began)
        return accuracy.read()

    def _batches(self, epoch: int) -> Iterator[Batch | SettledBatch]:
        if self._cache:
            return self._cache.batches(epoch)
        settled = self.plan.phase_at(epoch).start > 0
        return iter(self.loader.training(epoch, view=self.loader.view(epoch) if settled else None))

    def _settle(self, images: Tensor) -> list[Any]:
        with self._autocast():
            return self.executor.settle(images)

    def _step(self, batch: Batch | SettledBatch, optimizer: Optimizer, accuracy: Accuracy) -> None:
        optimizer.zero_grad()
        for part, labels in zip(self._chunks(batch), batch.labels.chunk(self.grad_accum_steps), strict=True):
            with self._autocast():
                with self.executor.heard(self.exits.hear) if self.exits else nullcontext():
                    logits = logits_of(self.executor(part) if isinstance(part, Tensor) else self.executor.resume(part))
                loss = F.cross_entropy(logits, labels, label_smoothing=self.smoothing)
                total = self.exits.add_to(loss, labels, smoothing=self.smoothing) if self.exits else loss
            share = len(labels) / len(batch.labels)
            self._scaler.scale(total * share if share < 1 else total).backward()  # type: ignore[no-untyped-call]
            accuracy.update(loss, logits, labels)
        if self.clip_grad is not None:
            self._scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters_of(optimizer), self.clip_grad)
        self._scaler.step(optimizer)
        self._scaler.update()

    def _chunks(self, batch: Batch | SettledBatch) -> Iterable[Tensor | list[Any]]:
        """The parts of a batch: images, or values at the cut."""
        count = self.grad_accum_steps
        if isinstance(batch, Batch):
            return batch.images.chunk(count)
        parts = [[None] * count if value is None else value.chunk(count) for value in batch.values]
        return map(list, zip(*parts, strict=True))

    def _close_cache(self) -> None:
        if self._cache:
            self._cache.close()
        self._cache = None

    def _tell(self, epoch: int, step: int, accuracy: Accuracy, began: float) -> None:
        scores = accuracy.read()
        usage = self._meter.read()
        on_cuda = usage.peak_allocated_bytes
        self.observer.step_done(
            StepRecord(
                phase=self.plan.phase_index_at(epoch),
                epoch=epoch,
                step=step,
                steps=self.loader.steps_per_epoch,
                train_loss=scores.loss,
                train_accuracy_pct=scores.top1_pct,
                images_per_second=scores.count / (now(self.device) - began),
                memory_bytes=usage.resident_bytes if on_cuda is None else on_cuda,
            )
        )

    def evaluate(self) -> Score:
        """Accuracy and cross-entropy, without smoothing, on the test images."""
        self.executor.eval()
        accuracy = Accuracy(self.device)
        with torch.no_grad(), self._autocast():
            for batch in self.loader.testing():
                logits = logits_of(self.executor(batch.images))
                accuracy.update(F.cross_entropy(logits, batch.labels), logits, batch.labels)
        return accuracy.read()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)


def logits_of(output: Any) -> Tensor:
    """The class scores (N, classes) in what a classifier returns: a tensor, or the first in a tuple, dict or dataclass.

    Raises FxsplitError when there is none.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        parts: Any = list(output.values())
    elif is_dataclass(output):
        parts = [getattr(output, field.name) for field in fields(output)]
    else:
        parts = output
    if isinstance(parts, Sequence) and parts:
        return logits_of(parts[0])
    raise FxsplitError(f"the model returns {type(output).__name__}, and no class scores are found in it")
