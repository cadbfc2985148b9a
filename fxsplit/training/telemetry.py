"""Measures a run and writes its records: times, memory and energy beside loss and accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import nn

from fxsplit.caching.feed import Feed
from fxsplit.measuring.meter import Meter, now, processor_seconds
from fxsplit.plan.forecast import StepWork
from fxsplit.plan.schedule import Phase, Plan
from fxsplit.report import EpochRecord, StepRecord
from fxsplit.training.accuracy import Score
from fxsplit.training.phase_optimizer import PhaseOptimizer


class Telemetry:
    """Measures epochs, and makes the records of steps and epochs.

    Args:
        device: does the work; it is waited for before a time is taken.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._meter = Meter(device)
        self._began = self._trained = 0.0
        # Of the present epoch, before the run was interrupted.
        self._earlier_seconds, self._earlier_joules, self._earlier_processor = 0.0, 0.0, 0.0
        self._processor_began = 0.0
        self._energy_began: float | None = None
        self._energy_trained: float | None = None

    def epoch_begins(self) -> None:
        """Start the clock of an epoch, or go on with that of an epoch that was interrupted."""
        self._began = now(self._device) - self._earlier_seconds
        joules = self._meter.read().energy_joules
        self._energy_began = None if joules is None else joules - self._earlier_joules
        self._processor_began = processor_seconds() - self._earlier_processor
        self._earlier_seconds, self._earlier_joules, self._earlier_processor = 0.0, 0.0, 0.0

    def phase_begins(self) -> None:
        """Begin the peaks of CUDA memory anew."""
        self._meter.reset_peaks()

    def training_ends(self) -> None:
        """Note that the training of the epoch is over, and testing begins."""
        self._trained = now(self._device)
        self._energy_trained = self._meter.read().energy_joules

    def step(self, *, phase: int, epoch: int, step: int, steps: int, score: Score) -> StepRecord:
        """Make the record of a step: number `step`, from 1, of the `steps` of `epoch`, from 0, in phase `phase`.

        `score` is over the epoch so far, and has just come from the device, which is not waited for.
        """
        return StepRecord(
            phase=phase,
            epoch=epoch + 1,
            step=step,
            steps=steps,
            train_loss=score.loss,
            train_accuracy_pct=score.top1_pct,
            images_per_second=score.count / (perf_counter() - self._began),
            memory_bytes=self._meter.memory_bytes(),
        )

    def epoch(
        self,
        plan: Plan,
        *,
        phase: int,
        epoch: int,
        optimizer: PhaseOptimizer,
        feed: Feed,
        reduced_bytes: int | None,
        gathered_bytes: int | None = None,
        sent_bytes: int | None = None,
        trained: Score,
        tested: Score,
        held_out_pct: float | None = None,
        multiply_adds: int | None = None,
        ensemble_top1: float | None = None,
    ) -> EpochRecord:
        """Make the record of an epoch that ends now.

        Args:
            plan: that of the run.
            phase: index of the phase.
            epoch: from 0.
            optimizer: for the learning rate and how many parameters train.
            feed: for the size of its caches.
            reduced_bytes: of the gradients of a step.
            gathered_bytes: of the weights of a step.
            sent_bytes: of the values and gradients that stages of a pipeline sent each other in a step.
            trained: score on the training images.
            tested: score on the test images.
            held_out_pct: accuracy on held-out training images, if there are any.
            multiply_adds: of the training, if they are counted.
            ensemble_top1: accuracy of the snapshot ensemble, if there is one.
        """
        ended, usage = now(self._device), self._meter.read()
        began, energy_began, self._began, self._energy_began = self._began, self._energy_began, 0.0, None
        entered = plan.phases[phase]
        cut = entered.cut(len(plan.partitions))
        return EpochRecord(
            epoch=epoch + 1,
            phase=phase,
            start=entered.start,
            stop=entered.stop,
            cut="" if cut is None else plan.partitions[cut].name,
            lr=optimizer.rate,
            train_loss=trained.loss,
            train_top1=trained.top1_pct,
            eval_loss=tested.loss,
            eval_top1=tested.top1_pct,
            eval_top5=tested.top5_pct,
            held_out_top1=held_out_pct,
            train_seconds=self._trained - began,
            eval_seconds=ended - self._trained,
            images_per_second=trained.count / (self._trained - began),
            trainable_parameters=optimizer.parameters,
            peak_resident_bytes=usage.peak_resident_bytes,
            peak_allocated_bytes=usage.peak_allocated_bytes,
            peak_reserved_bytes=usage.peak_reserved_bytes,
            device_bytes=usage.device_bytes,
            cache_resident_bytes=feed.resident_bytes,
            cache_file_bytes=feed.file_bytes,
            reduced_bytes=reduced_bytes,
            gathered_bytes=gathered_bytes,
            sent_bytes=sent_bytes,
            energy_joules=_difference(usage.energy_joules, energy_began),
            train_energy_joules=_difference(self._energy_trained, energy_began),
            processor_seconds=processor_seconds() - self._processor_began,
            multiply_adds=multiply_adds,
            ensemble_top1=ensemble_top1,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what the present epoch has cost so far, in seconds, joules and seconds of processors."""
        joules = _difference(self._meter.read().energy_joules, self._energy_began)
        is_begun = bool(self._began)
        return {
            "seconds": now(self._device) - self._began if is_begun else 0.0,
            "joules": joules or 0.0,
            "processor": processor_seconds() - self._processor_began if is_begun else 0.0,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned, to go on from it in the next `epoch_begins`."""
        self._earlier_seconds, self._earlier_joules = state["seconds"], state["joules"]
        self._earlier_processor = state["processor"]


class Work:
    """Adds up multiply-adds until they are taken for the record of an epoch. Tests are not counted.

    Args:
        count: says what a step takes for an image, by phase of a plan.
        plan: that of the run.
    """

    def __init__(self, count: Callable[[Plan], Sequence[StepWork]], plan: Plan) -> None:
        self._count_steps = count
        self._phases = count(plan)
        everything = Phase(start=0, stop=len(plan.partitions), epochs=1)
        (self._whole,) = count(replace(plan, phases=(everything,)))
        self._forward = [partition.macs for partition in plan.partitions]
        self._count = 0

    def follow(self, plan: Plan) -> None:
        """Count the steps from now on as those of another plan of the same partitions."""
        self._phases = self._count_steps(plan)

    def step(self, phase: int, images: int, *, start: int, exits: Iterable[nn.Linear] = ()) -> None:
        """Count a step on so many images, for which the settled partitions ran from the cut `start` on.

        A linear layer of an exit is gone through forward, and backward for its input and for its weights.
        """
        work = self._phases[phase]
        of_exits = sum(3 * exit_.in_features * exit_.out_features for exit_ in exits)
        settled = work.settled - sum(self._forward[:start])
        self._count += images * (work.rest + settled + of_exits)

    def forward(self, images: int, *, start: int, stop: int) -> None:
        """Count a forward pass of partitions [start, stop) beside the steps."""
        self._count += images * sum(self._forward[start:stop])

    def proof(self, images: int) -> None:
        """Count the proof: a step of the model and one of its partitions, in which everything trains."""
        self._count += 2 * images * self._whole.rest

    def take(self) -> int:
        """Return the count, and begin anew."""
        taken, self._count = self._count, 0
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Return the count so far."""
        return {"count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a count."""
        self._count = state["count"]


def _difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before
