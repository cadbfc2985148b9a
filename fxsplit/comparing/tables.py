"""Makes the tables of a comparison from the reports of its runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from statistics import fmean

from fxsplit.comparing.comparable import refuse_other_data, unequal
from fxsplit.comparing.runs import figures, is_on_cpu, memory_of, time_of
from fxsplit.comparing.statistics import Paired
from fxsplit.comparing.verdicts import QUANTITIES, Pair, differences
from fxsplit.comparison import ArmFigures, Difference, Estimate, RunFigures, Table
from fxsplit.report import RunReport

# The reports of runs by arm and seed.
Reports = Mapping[str, Mapping[int, RunReport]]


def tables(match: str, models: Mapping[str, Reports], *, margin: float) -> list[Table]:
    """Make a table for each model. An arm without a run is left out.

    Each arm is compared with those before it that last as long, and with the first.

    Args:
        match: what is equal in all arms.
        models: reports by model, arm and seed.
        margin: within which accuracies are level, in points.

    Raises CheckError when runs are of other data than each other's.
    """
    arms_of: dict[str, list[ArmFigures]] = {}
    for model, reports in models.items():
        refuse_other_data(reports)
        arms_of[model] = [_arm(arm, by_seed) for arm, by_seed in reports.items() if by_seed]
    compared = _differences(arms_of, match=match, margin=margin, on_cpu=on_cpu(models))
    return [
        Table(
            model=model,
            match=match,
            arms=tuple(arms_of[model]),
            differences=tuple(compared[model]),
            unequal=tuple(
                unequal(models[model], {arm.arm: arm.runs[0].updates for arm in arms_of[model]}, match=match)
            ),
        )
        for model in models
        if arms_of[model]
    ]


def on_cpu(models: Mapping[str, Reports]) -> bool:
    """Tell whether all runs computed on CPUs."""
    every = [report for reports in models.values() for by_seed in reports.values() for report in by_seed.values()]
    return all(map(is_on_cpu, every))


def _arm(arm: str, by_seed: Mapping[int, RunReport]) -> ArmFigures:
    cpu = all(map(is_on_cpu, by_seed.values()))
    runs = tuple(figures(report, seed, report.folder) for seed, report in sorted(by_seed.items()))

    def mean(read: Callable[[RunFigures], float | None]) -> Estimate | None:
        values = [value for run in runs if (value := read(run)) is not None]
        return _estimate(values) if len(values) == len(runs) else None

    return ArmFigures(
        arm=arm,
        epochs=round(fmean(run.epochs for run in runs)),
        runs=runs,
        accuracy=_estimate([run.accuracy_pct for run in runs]),
        time=_estimate([time_of(run, cpu) for run in runs]),
        memory=_estimate([memory_of(run, cpu) for run in runs]),
        ensemble=mean(lambda run: run.ensemble_pct),
        multiply_adds=mean(lambda run: run.multiply_adds),
        energy=mean(lambda run: run.energy_joules),
    )


def _estimate(values: Sequence[float]) -> Estimate:
    summary = Paired.of(values)
    half = summary.half_width(0.95)
    return Estimate(mean=summary.mean, low=summary.mean - half, high=summary.mean + half)


def _differences(
    arms_of: Mapping[str, Sequence[ArmFigures]], *, match: str, margin: float, on_cpu: bool
) -> dict[str, list[Difference]]:
    """Compare arms, by model; the same two on several models count as one family of tests."""
    found: dict[str, list[Difference]] = {model: [] for model in arms_of}
    names = list(dict.fromkeys(arm.arm for arms in arms_of.values() for arm in arms))
    for against, arm in combinations(names, 2):
        for quantity in QUANTITIES:
            pairs: dict[str, Pair] = {}
            for model, arms in arms_of.items():
                by_name = {each.arm: each for each in arms}
                if {arm, against} <= by_name.keys() and (
                    against == names[0] or match != "off" or by_name[arm].epochs == by_name[against].epochs
                ):
                    pair = _pair(by_name[arm], by_name[against], quantity, on_cpu)
                    if pair.values and all(map(math.isfinite, (*pair.values, *pair.others))):
                        pairs[model] = pair
            for model, difference in zip(pairs, differences(list(pairs.values()), margin=margin), strict=True):
                found[model].append(difference)
    return found


def _pair(arm: ArmFigures, against: ArmFigures, quantity: str, on_cpu: bool) -> Pair:
    read: dict[str, Callable[[RunFigures], float]] = {
        "accuracy": lambda run: run.accuracy_pct,
        "time": lambda run: time_of(run, on_cpu),
        "memory": lambda run: memory_of(run, on_cpu),
    }
    own, others = ({run.seed: read[quantity](run) for run in each.runs} for each in (arm, against))
    seeds = sorted(own.keys() & others.keys())
    return Pair(arm.arm, against.arm, quantity, [own[seed] for seed in seeds], [others[seed] for seed in seeds])
