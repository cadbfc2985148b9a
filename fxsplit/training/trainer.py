"""Training: phases, epochs and batches of a plan through one executor, whatever the schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that everybody gives it
from torch.optim import Optimizer

from fxsplit.data.images import Batch, part_sizes
from fxsplit.data.loader import Loader
from fxsplit.errors import FxsplitError
from fxsplit.execute.executor import Executor
from fxsplit.measuring.meter import Meter, now
from fxsplit.plan.schedule import Plan
from fxsplit.report import EpochRecord, Observer, StepRecord
from fxsplit.training.accuracy import Accuracy, Score
from fxsplit.training.batchnorm import BATCHES
from fxsplit.training.cache import Cache, SettledBatch
from fxsplit.training.endings import Endings
from fxsplit.training.exits import Exits
from fxsplit.training.optimizers import anneal, parameters_of, split_by_end
from fxsplit.training.plasticity import QUIET_WINDOWS, Plasticity
from fxsplit.training.soft_targets import SoftTargets


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
        beside: Cache | None = None,
        exact: bool = False,
    ) -> Cache: ...


@dataclass(kw_only=True)
class Trainer:
    """Trains an executor by a plan: cross-entropy, one optimizer step a batch.

    Besides the labels it can learn from `soft_targets`; those of the mean are worked out in the middle of the run.
    `anneal` lets the learning rate of each partition fall to zero over that share of the run before the partition stops
    training. With `recalibrate` the BatchNorm statistics of partitions are taken anew before these settle; with `veto`
    partitions whose weights still move settle later than planned. Each partition ends its training with the mean of its
    weights over the last `average` share of its steps.

    `amp_dtype` turns on autocast, with loss scaling for float16. `grad_accum_steps` splits a batch into that many
    backward passes, with the gradient of the whole; the micro-batches of a phase split each of them further. No part
    of a batch holds a single image, unless all do.
    `clip_grad` bounds the gradient's norm. Without `make_cache`, what is settled is computed anew for each batch.
    `exits` train beside the model: the loss that is reported is without theirs, so that runs with and without can be
    compared, and the trainable parameters are with them.

    Raises FxsplitError when there is nothing to train on, UsageError when the optimizer cannot be made.
    """

    _optimizer: Optimizer = field(init=False, repr=False)
    _scheduler: Scheduler = field(init=False, repr=False)

    executor: Executor
    plan: Plan
    loader: Loader
    make_optimizer: MakeOptimizer
    make_scheduler: MakeScheduler
    make_cache: MakeCache | None = None
    exits: Exits | None = None
    smoothing: float = 0.0
    soft_targets: SoftTargets | None = None
    anneal: float = 0.0
    average: float = 0.0
    recalibrate: bool = False
    veto: bool = False
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
        self._index: int | None = None
        self._cache: Cache | None = None
        self._test_cache: Cache | None = None
        self._steps = self.plan.epochs * self.loader.steps_per_epoch
        of_mean = self.soft_targets is not None and self.soft_targets.of_mean
        self._endings = Endings(
            self.executor,
            self.plan,
            steps_per_epoch=self.loader.steps_per_epoch,
            average=self.average,
            recalibrate=self.recalibrate,
            gathering=self.plan.epochs // 2 if of_mean and self.plan.epochs > 1 else None,
        )
        self._plasticity = self._watch() if self.veto else None
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype is torch.float16)
        # Unknown names and impossible values are refused here, before a run has left anything behind.
        self.make_scheduler(self.make_optimizer(previous=None), steps_per_epoch=self.loader.steps_per_epoch)

    def epochs(self) -> Iterator[EpochRecord]:
        """Train and test, an epoch at each step of the iterator. At its end everything may train again."""
        try:
            for epoch in range(self.plan.epochs):
                began = now(self.device)
                index = self._next_phase(epoch)
                if index != self._index:
                    self._enter(index, epoch)
                elif epoch == self._endings.gathering:
                    self._finish(epoch, [])
                record = self._epoch(epoch, index, began)
                self.observer.epoch_done(record)
                yield record
        finally:
            self._close_caches()
            self.executor.release()

    def _next_phase(self, epoch: int) -> int:
        """The phase that the plan has for an epoch, or the last before it that settles nothing which still moves."""
        planned = self.plan.phase_index_at(epoch)
        if self._index is None or self._plasticity is None:
            return planned
        start = self.plan.phases[self._index].start
        for index in range(planned, self._index, -1):
            if all(map(self._plasticity.is_quiet, range(start, self.plan.phases[index].start))):
                return index
        if planned > self._index and epoch == self.plan.first_epoch(planned):
            name = self.plan.partitions[self.plan.phases[planned].start].name
            self.observer.notice(f"what lies before {name} still learns and settles later than in epoch {epoch}")
        return self._index

    def _enter(self, index: int, epoch: int) -> None:
        phase = self.plan.phases[index]
        if self._index is not None:
            self._finish(epoch, [i for i in range(*self.executor.window) if not phase.start <= i < phase.stop])
        self._index = index
        self._parts = self.grad_accum_steps * phase.micro_batches
        self.executor.enter(phase)
        if self._cache is None or self._cache.cut != phase.start:
            self._close_caches()
            if self.make_cache and phase.start:
                make = partial(
                    self.make_cache,
                    executor=self.executor,
                    settle=self._settle,
                    epochs=self.plan.first_epoch(index) + phase.epochs - epoch,
                    notice=self.observer.notice,
                )
                self._cache = make(loader=self.loader)
                self._test_cache = make(loader=self.loader.for_testing(), beside=self._cache, exact=True)
        if self.exits:
            self.exits.enter(phase, self.observer.notice)
        previous = None if phase.fresh_optimizer else getattr(self, "_optimizer", None)
        self._optimizer = self.make_optimizer(*([self.exits.modules] if self.exits else []), previous=previous)
        if self.anneal:
            split_by_end(self._optimizer, self._last_steps())
        self._scheduler = self.make_scheduler(self._optimizer, steps_per_epoch=self.loader.steps_per_epoch)
        self._meter.reset_peaks()
        self.observer.phase_started(index, phase)

    def _last_steps(self) -> dict[Tensor, int]:
        """The step at which each parameter stops training by the plan, an exit's with those of its partition."""
        partitions = [list(parameters) for parameters in self.executor.owned]
        for name, each in self.exits.modules.items() if self.exits else ():
            partitions[int(name)] += each.parameters()
        return {
            parameter: end * self.loader.steps_per_epoch
            for parameters, end in zip(partitions, self._endings.epochs, strict=True)
            for parameter in parameters
        }

    def _watch(self) -> Plasticity:
        # Quiet for as long as an epoch.
        window = max(1, self.loader.steps_per_epoch // QUIET_WINDOWS)
        return Plasticity(self.executor.owned, window=window)

    def _finish(self, epoch: int, partitions: Sequence[int]) -> None:
        """Let partitions whose training ends have what they are to keep; at the gathering, keep soft targets."""

        def forward(stop: int) -> None:
            self.executor.train()
            with torch.no_grad(), self.autocast():
                for batch in islice(self._batches(epoch), BATCHES):
                    values = self._settle(batch.images) if isinstance(batch, Batch) else batch.values
                    self.executor.resume(values, stop)

        gather = epoch == self._endings.gathering
        self._endings.finish(partitions, forward, gather=gather)
        if gather and self.soft_targets:
            self.executor.eval()
            with torch.no_grad(), self.autocast():
                for batch in self._batches(epoch):
                    self.soft_targets.keep(logits_of(self._run(_given(batch))), batch.ids)

    def _epoch(self, epoch: int, index: int, began: float) -> EpochRecord:
        energy = self._meter.read().energy_joules
        trained = self._train(epoch, began)
        if self.average and epoch + 1 == self.plan.epochs:
            self._finish(epoch, range(*self.executor.window))
        ended = now(self.device)
        tested = self.evaluate()
        finished = now(self.device)
        if not math.isfinite(trained.loss):
            self.observer.notice(
                f"the training loss of epoch {epoch} is {trained.loss}; a lower --lr or --clip-grad may help"
            )
        phase, partitions = self.plan.phases[index], self.plan.partitions
        cut = phase.cut(len(partitions))
        usage = self._meter.read()
        caches = [cache for cache in (self._cache, self._test_cache) if cache]
        return EpochRecord(
            epoch=epoch,
            phase=index,
            start=phase.start,
            stop=phase.stop,
            cut="" if cut is None else partitions[cut].name,
            lr=max(float(group["lr"]) for group in self._optimizer.param_groups),
            train_loss=trained.loss,
            eval_loss=tested.loss,
            eval_top1=tested.top1_pct,
            eval_top5=tested.top5_pct,
            train_seconds=ended - began,
            eval_seconds=finished - ended,
            images_per_second=trained.count / (ended - began),
            trainable_parameters=sum(parameter.numel() for parameter in parameters_of(self._optimizer)),
            peak_resident_bytes=usage.peak_resident_bytes,
            peak_allocated_bytes=usage.peak_allocated_bytes,
            peak_reserved_bytes=usage.peak_reserved_bytes,
            device_bytes=usage.device_bytes,
            cache_resident_bytes=sum(cache.resident_bytes for cache in caches) if caches else None,
            cache_file_bytes=sum(cache.file_bytes for cache in caches) if caches else None,
            energy_joules=None if energy is None or usage.energy_joules is None else usage.energy_joules - energy,
        )

    def _train(self, epoch: int, began: float) -> Score:
        self.executor.train()
        accuracy = Accuracy(self.device)
        last = self.loader.steps_per_epoch
        for step, batch in enumerate(self._batches(epoch), start=1):
            done = epoch * last + step - 1
            if self.anneal:
                anneal(self._optimizer, done, steps=self.anneal * self._steps)
            self._scheduler.step_update(done)
            self._step(batch, done, accuracy)
            self._endings.step_done(done + 1)
            if self._plasticity:
                self._plasticity.step_done()
            if step % self.log_interval == 0 or step == last:
                self._tell(epoch, step, accuracy, began)
        return accuracy.read()

    def _batches(self, epoch: int) -> Iterator[Batch | SettledBatch]:
        if self._cache:
            return self._cache.batches(epoch)
        settled = self.executor.window[0] > 0
        return self.loader.training(epoch, view=self.loader.view(epoch) if settled else None)

    def _test_batches(self) -> Iterator[Batch | SettledBatch]:
        """From the cache where training images come from one."""
        if self._cache and self._cache.has_rows and self._test_cache:
            return self._test_cache.batches(0)
        return self.loader.for_testing().training(0)

    def _settle(self, images: Tensor) -> list[Any]:
        with self.autocast():
            return self.executor.settle(images)

    def _step(self, batch: Batch | SettledBatch, done: int, accuracy: Accuracy) -> None:
        optimizer = self._optimizer
        optimizer.zero_grad()
        sizes = part_sizes(len(batch.labels), self._parts, batch_size=self.loader.batch_size)
        targets = (torch.split(each, sizes) for each in (batch.labels, batch.ids))
        for part, labels, ids in zip(self._chunks(batch), *targets, strict=True):
            with self.autocast():
                with self.executor.tapped(self.exits.hear) if self.exits else nullcontext():
                    logits = logits_of(self._run(part))
                loss = self._loss(logits, labels, ids, done / self._steps)
                total = self.exits.add_to(loss, labels, smoothing=self.smoothing) if self.exits else loss
            if not total.requires_grad:
                raise FxsplitError(
                    "the loss depends on no parameter that trains now, so nothing would be learnt: the model's forward "
                    "runs under torch.no_grad, or what trains is not used"
                )
            share = len(labels) / len(batch.labels)
            self._scaler.scale(total * share if share < 1 else total).backward()  # type: ignore[no-untyped-call]
            accuracy.update(loss, logits, labels)
        if self.clip_grad is not None:
            self._scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters_of(optimizer), self.clip_grad)
        self._scaler.step(optimizer)
        self._scaler.update()

    def _run(self, part: Tensor | list[Any]) -> Any:
        """Of images, or of values at the cut."""
        return self.executor(part) if isinstance(part, Tensor) else self.executor.resume(part)

    def _loss(self, logits: Tensor, labels: Tensor, ids: Tensor, progress: float) -> Tensor:
        if self.soft_targets:
            return self.soft_targets.loss(logits, labels, ids, progress=progress, smoothing=self.smoothing)
        return F.cross_entropy(logits, labels, label_smoothing=self.smoothing)

    def _chunks(self, batch: Batch | SettledBatch) -> Iterable[Tensor | list[Any]]:
        """The parts of a batch: images, or values at the cut. A small batch has fewer."""
        sizes = part_sizes(len(batch.labels), self._parts, batch_size=self.loader.batch_size)
        if isinstance(batch, Batch):
            return torch.split(batch.images, sizes)
        parts = [[None] * len(sizes) if value is None else torch.split(value, sizes) for value in batch.values]
        return map(list, zip(*parts, strict=True))

    def _close_caches(self) -> None:
        for cache in (self._cache, self._test_cache):
            if cache:
                cache.close()
        self._cache = self._test_cache = None

    def _tell(self, epoch: int, step: int, accuracy: Accuracy, began: float) -> None:
        scores = accuracy.read()
        usage = self._meter.read()
        on_cuda = usage.peak_allocated_bytes
        self.observer.step_done(
            StepRecord(
                phase=self._index or 0,
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
        with torch.no_grad(), self.autocast():
            for batch in self._test_batches():
                logits = logits_of(self._run(_given(batch)))
                accuracy.update(F.cross_entropy(logits, batch.labels), logits, batch.labels)
        return accuracy.read()

    def autocast(self) -> torch.autocast:
        """What forward runs in."""
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)


def _given(batch: Batch | SettledBatch) -> Tensor | list[Any]:
    return batch.images if isinstance(batch, Batch) else batch.values


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
