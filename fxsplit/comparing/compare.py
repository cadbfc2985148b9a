"""Compares training methods: does the runs, holds them against each other, and writes what there is to say."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from fxsplit.arguments import require
from fxsplit.comparing import runner
from fxsplit.comparing.arms import CONTROLS, Arm, read_arms
from fxsplit.comparing.asked import Asked
from fxsplit.comparing.budgets import fitted_epochs
from fxsplit.comparing.runs import figures, finished, folder_of, is_on_cpu, read_report
from fxsplit.comparing.tables import Reports, on_cpu, tables
from fxsplit.comparing.verdicts import RATIO_MARGIN
from fxsplit.comparing.writers import refuse_others, write_comparison
from fxsplit.comparison import Comparison, ComparisonObserver, ComparisonSpec, PlannedRun, Table
from fxsplit.errors import FxsplitError, UsageError
from fxsplit.paths import expanded
from fxsplit.report import RunReport
from fxsplit.spec import resolve


def compare(
    spec: ComparisonSpec,
    observer: ComparisonObserver | None = None,
    *,
    trust_code: bool = False,
    launch: runner.Launch | None = None,
) -> Comparison:
    """Do the runs of a comparison, and write its tables into its folder, as JSON, CSV, Markdown and HTML.

    Each run has a process of its own. Those that are finished in the folder are not done again, and one that was
    interrupted goes on.

    Args:
        spec: what to compare.
        observer: is called while the runs are done.
        trust_code: run code that comes with a model of Hugging Face.
        launch: starts the process of a run; by default that of `fxsplit train`.

    Raises UsageError when it cannot be done as asked, or its tables would replace those of other runs; CheckError when
    runs are of other data than each other's, and FxsplitError when runs have failed; then tables of the others are
    written.
    """
    require("spec", spec, ComparisonSpec, "a ComparisonSpec", "write fxsplit.ComparisonSpec(models=..., ...)")
    observer, launch = observer or ComparisonObserver(), launch or partial(runner.launch, trust_code=trust_code)
    if not spec.models:
        raise UsageError("no model is given to compare arms on")
    arms = _of_one_length(spec, read_arms(spec.arms, spec.run, spec.of_arms))
    runs = [run for model in spec.models for run in planned(spec, model, arms)]
    refuse_others(spec, [run.folder for run in runs])
    asked = Asked(spec)  # seeds and margin are fixed from here on
    faults = _do(spec, _interleaved(spec, runs), observer, launch)
    reports = {model: _reports(runs, model) for model in spec.models}
    found = tables(spec.matches[0], reports, margin=spec.margin)
    for match in spec.matches[1:]:
        runs = [run for model in spec.models for run in _fitted(spec, match, model, arms, reports[model], asked)]
        faults |= _do(spec, _interleaved(spec, runs), observer, launch)
        found += tables(match, {model: _reports(runs, model) for model in spec.models}, margin=spec.margin)
    comparison = _comparison(spec, asked, found, reports, missing=tuple(faults.values()))
    write_comparison(comparison, expanded(spec.output))
    if faults:
        raise FxsplitError("; ".join(f"the run in {folder!r} has failed: {fault}" for folder, fault in faults.items()))
    return comparison


def compare_folders(folders: Sequence[str], spec: ComparisonSpec) -> Comparison:
    """Compare finished runs, whose folders are given, and write the same files as `compare`.

    Runs of one model that differ by the seed alone are an arm. Raises UsageError when a folder holds no finished run,
    or the tables would replace those of other runs, and CheckError when runs are of other data than each other's.
    """
    models: dict[str, dict[str, dict[int, RunReport]]] = {}
    for given in folders:
        report = read_report(expanded(given))
        if report is None:
            raise UsageError(f"there is no finished run in {given!r}")
        arms = models.setdefault(str(report.spec["model"]), {})
        seed = int(report.spec["seed"])
        name = _name_of(report, arms)
        if seed in arms.setdefault(name, {}):
            raise UsageError(
                f"there are two runs of {name} with seed {seed}: {arms[name][seed].folder!r} and {given!r}"
            )
        arms[name][seed] = report
    refuse_others(spec, folders)
    for model, arms in models.items():  # what others are held against comes first
        models[model] = {name: arms[name] for name in sorted(arms, key=_rank)}
    lengths = {len(report.epochs) for arms in models.values() for runs in arms.values() for report in runs.values()}
    found = tables("epochs" if len(lengths) == 1 else "off", models, margin=spec.margin)
    comparison = _comparison(spec, None, found, models)
    write_comparison(comparison, expanded(spec.output))
    return comparison


def planned(spec: ComparisonSpec, model: str, arms: Sequence[Arm]) -> list[PlannedRun]:
    """Plan the runs of arms on a model, with every seed. Raises UsageError when an arm cannot be run as asked."""
    found = []
    for seed, label in runner.turned([arm.label for arm in arms], spec.seed_numbers):
        arm = next(each for each in arms if each.label == label)
        folder = folder_of(spec.output, model, label, seed)
        place = {"output": str(folder.parent), "experiment": folder.name}
        asked = arm.spec(spec.run, model=model, seed=seed, ensemble=True, dry_run=False, **place)
        name = label if "off" in spec.match else arm.name
        found.append(PlannedRun(model=model, arm=name, seed=seed, folder=str(folder), spec=asked))
    return found


def _of_one_length(spec: ComparisonSpec, arms: Sequence[Arm]) -> tuple[Arm, ...]:
    """Give all arms the same number of epochs, unless each is left as it is."""
    if "off" in spec.match:
        return tuple(arms)
    shared = resolve(spec.run, {"model": "any"})
    lengths = {arm.epochs for arm in arms if arm.epochs is not None} or {shared.epochs_total or shared.epochs}
    if len(lengths) > 1:
        raise UsageError(
            f"arms last {' and '.join(map(str, sorted(lengths)))} epochs; equal epochs need one length, and "
            "--match off leaves each as it is"
        )
    return tuple(arm.lasting(*lengths) for arm in arms)


def _fitted(
    spec: ComparisonSpec, match: str, model: str, arms: Sequence[Arm], reports: Reports, asked: Asked
) -> list[PlannedRun]:
    """Plan runs of arms that take the time, or the work, of the arm that is tried."""
    tried = next((arm for arm in reversed(arms) if arm.name not in CONTROLS), arms[-1])

    def runs_of(arm: Arm) -> list[RunReport]:
        return list(reports[arm.name].values())

    if not all(map(runs_of, arms)):
        return []  # a run has failed
    cpu = all(map(is_on_cpu, [report for arm in arms for report in runs_of(arm)]))
    lasting = []
    for arm in arms:
        own, others = ([figures(report, 0, "") for report in runs_of(each)] for each in (arm, tried))
        length = arm.epochs
        if arm is not tried:
            key = f"{match} {model} {arm.label} {tried.label}"
            length = asked.epochs(key, partial(fitted_epochs, match, own, others, on_cpu=cpu))
        lasting.append(arm.lasting(length))
    return planned(spec, model, lasting)


def _interleaved(spec: ComparisonSpec, runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Order runs by seed before model, so that what is done first compares all models."""
    return sorted(runs, key=lambda run: spec.seed_numbers.index(run.seed))


def _do(
    spec: ComparisonSpec, runs: Sequence[PlannedRun], observer: ComparisonObserver, launch: runner.Launch
) -> dict[str, str]:
    observer.planned(runs, jobs=spec.jobs or max(1, len(spec.devices)))
    return runner.do_runs(runs, observer, jobs=spec.jobs, devices=spec.devices, launch=launch)


def _reports(runs: Sequence[PlannedRun], model: str) -> dict[str, dict[int, RunReport]]:
    found: dict[str, dict[int, RunReport]] = {}
    for run in (run for run in runs if run.model == model):  # arms of the first seed are in their order
        report = finished(run)
        found.setdefault(run.arm, {})
        if report is not None:
            found[run.arm][run.seed] = report
    return found


def _name_of(report: RunReport, arms: Mapping[str, Mapping[int, RunReport]]) -> str:
    """Name the arm of a run: like that of a run that differs by the seed alone, or after its schedule and length."""
    free = {"seed", "output", "experiment", "device", "workers", "data-dir", "log-interval"}

    def asked(each: RunReport) -> dict[str, object]:
        return {name: value for name, value in each.spec.items() if name not in free}

    for name, runs in arms.items():
        if asked(next(iter(runs.values()))) == asked(report):
            return name
    # Folders that a comparison made are named after arm and seed; others after the time.
    found = re.fullmatch(rf"(?!\d{{8}}-)(.+)-s{report.spec['seed']}", Path(report.folder).name)
    schedule = report.plan.schedule if report.plan.preset == "none" else report.plan.preset
    label = found[1] if found else f"{schedule}@{len(report.epochs)}"
    same = sum(name == label or re.fullmatch(rf"{re.escape(label)}-\d+", name) is not None for name in arms)
    return f"{label}-{same + 1}" if same else label


def _rank(name: str) -> int:
    """Say where an arm stands among those that others are held against; these come first."""
    return next((rank for rank, control in enumerate(CONTROLS) if name.startswith(control)), len(CONTROLS))


def _comparison(
    spec: ComparisonSpec,
    asked: Asked | None,
    found: Sequence[Table],
    models: Mapping[str, Reports],
    *,
    missing: tuple[str, ...] = (),
) -> Comparison:
    cpu = on_cpu(models)
    return Comparison(
        name=spec.name,
        margin=spec.margin,
        ratio_margin=RATIO_MARGIN,
        looks=() if asked is None else asked.looks,
        time="processor seconds" if cpu else "seconds",
        memory="peak memory of the process" if cpu else "peak memory of tensors on the GPU",
        tables=tuple(found),
        missing=missing,
    )
