"""Divides a model among several processes, and forecasts the memory of the one that needs most.

fsdp        a part of weights, gradients and optimizer of what trains; its weights are whole while a partition runs
pipeline    gradients, optimizer and activations of some neighbouring partitions; the weights of all
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from fxsplit.plan.forecast import CostModel, PhaseForecast
from fxsplit.plan.schedule import Phase

# Of weights that are divided, the partitions that are whole at a time: the one that runs, and the next.
WHOLE_AT_A_TIME = 2


@dataclass(frozen=True, slots=True)
class Division:
    """Says how processes divide a model, and how many they are.

    Args:
        kind: fsdp or pipeline.
        count: of the processes.
        keeps_all: whether a pipeline may have all micro-batches on their way at a time, as with schedules other than
            1f1b; else no more than there are processes behind.
    """

    kind: Literal["fsdp", "pipeline"]
    count: int
    keeps_all: bool = False

    def __call__(self, costs: CostModel, phase: Phase, whole: PhaseForecast) -> PhaseForecast:
        """Forecast the memory of a step in the process that needs most; `whole` is that of an undivided model."""
        return self._sharded(costs, phase, whole) if self.kind == "fsdp" else self._staged(costs, phase, whole)

    def _sharded(self, costs: CostModel, phase: Phase, whole: PhaseForecast) -> PhaseForecast:
        trained = [costs.trained_bytes(index, phase) for index in range(phase.start, phase.stop)]
        at_a_time = sum(sorted(trained)[-WHOLE_AT_A_TIME:])
        part = whole.gradient_bytes // self.count
        return _summed(
            replace(
                whole,
                parameter_bytes=whole.parameter_bytes - whole.gradient_bytes + part + at_a_time,
                gradient_bytes=part,
                optimizer_bytes=whole.optimizer_bytes // self.count,
            )
        )

    def _staged(self, costs: CostModel, phase: Phase, whole: PhaseForecast) -> PhaseForecast:
        count = min(self.count, len(costs.partitions))
        groups = pairwise(balanced(costs, phase, count, starts=range(len(costs.partitions))))
        ranks = []
        for rank, own in enumerate(groups):
            trained = sum(costs.trained_bytes(index, phase) for index in range(*own))
            found = replace(
                whole,
                activation_bytes=_kept(costs, phase, range(*own), self._on_their_way(phase, count - rank)),
                gradient_bytes=trained,
                optimizer_bytes=costs.optimizer_slots * trained,
            )
            ranks.append(_summed(found))
        most = max(ranks, key=lambda each: each.peak_bytes)
        # Those that keep most may be of another process, and they are what a phase can save.
        return replace(most, activation_bytes=max(each.activation_bytes for each in ranks))

    def _on_their_way(self, phase: Phase, processes: int) -> int:
        return phase.micro_batches if self.keeps_all else min(phase.micro_batches, processes)


def _kept(costs: CostModel, phase: Phase, own: range, on_their_way: int) -> int:
    """Return the bytes that partitions keep for backward, of the micro-batches that are on their way.

    The first process has as many of these as there are processes, the last one has one. Of a partition that recomputes
    they keep what it begins with, and one micro-batch at a time all that it saves.
    """
    training = [costs.partitions[index] for index in own if index >= phase.start]
    again = [each for each in training if each.index < phase.recompute]
    kept = sum(each.boundary_bytes if each in again else each.activation_bytes for each in training)
    of_sample = on_their_way * kept + max((each.activation_bytes for each in again), default=0)
    return of_sample * -(-costs.batch_size // phase.micro_batches)


def _summed(forecast: PhaseForecast) -> PhaseForecast:
    """Set the peak to the sum of all: when gradients arrive in divided memory is not followed op by op."""
    parts = (forecast.parameter_bytes, forecast.buffer_bytes, forecast.gradient_bytes, forecast.optimizer_bytes)
    return replace(forecast, peak_bytes=sum(parts) + forecast.activation_bytes)


def balanced(costs: CostModel, phase: Phase, parts: int, *, starts: Sequence[int]) -> list[int]:
    """Divide partitions into so many neighbouring groups, of which the slowest takes least time in a phase.

    Groups begin with partitions in `starts`, which are at least `parts`, the first one among them. Returns where they
    begin, and the end.
    """
    loads = [sum(each) for each in costs.times_by_partition(phase)]
    ends = [*starts, len(loads)]
    return [ends[index] for index in _balanced([sum(loads[slice(*pair)]) for pair in pairwise(ends)], parts)]


def _balanced(loads: Sequence[float], parts: int) -> list[int]:
    """Divide loads into neighbouring groups whose largest sum is least; return where they begin, and the end."""
    before = [0.0]
    for load in loads:
        before.append(before[-1] + load)
    count = len(loads)
    # By the number of groups so far, and their end: the least largest sum, and where the last group begins.
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for part in range(1, parts + 1):
        found = {}
        for stop in range(part, count - (parts - part) + 1):
            starts = ((max(worst, before[stop] - before[start]), start) for start, (worst, _) in best[-1].items())
            found[stop] = min(each for each in starts if each[1] < stop)
        best.append(found)
    cuts = [count]
    for found in reversed(best[1:]):
        cuts.append(found[cuts[-1]][1])
    return cuts[::-1]
