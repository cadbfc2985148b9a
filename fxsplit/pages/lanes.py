"""The figures of each epoch as plots, which lie below the timeline of a plan: forecast, or measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from fxsplit.pages.charts import Axis, Kind, Plot, Rule, Series
from fxsplit.pages.figures import BYTES, ENERGY, NUMBER, PERCENT, SECONDS, Unit
from fxsplit.plan.forecast import Forecast
from fxsplit.plan.schedule import Plan
from fxsplit.report import EpochRecord

# An epoch takes the axis from its number less one to its number; its figure is in the middle.
EPOCH = Unit(write=lambda place: f"{place + 0.5:g}", brief=lambda edge: f"{edge + 1:g}", is_whole=True)
COST = Unit(write="{:.2f}".format, brief="{:g}".format)
# Ticks of a lane, which is low.
FEW = 2
# Of a run with more epochs, lanes show that many: there are no more pixels.
MOST_EPOCHS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What each epoch was expected to take, and what one of standard training would: of training, in seconds.

    A forecast without seconds says how phases compare. Then the first phase that has epochs gives the seconds of one,
    and the others follow from that.
    """

    phases: tuple[float, ...]
    standard: float

    @classmethod
    def of(cls, forecast: Forecast, epochs: Sequence[EpochRecord]) -> Expected | None:
        """Take the scale from epochs that were measured; None if there are none."""
        if not epochs:
            return None
        first = epochs[0].phase
        cost = forecast.phases[first].step_cost
        # The first epoch of a run also warms up, and the middle one of several does not.
        seconds = median(record.train_seconds for record in epochs if record.phase == first)
        standard = seconds / cost if cost else 0.0
        return cls(phases=tuple(phase.step_cost * standard for phase in forecast.phases), standard=standard)


def timeline(plan: Plan) -> Axis:
    """Make the axis that all lanes share; its ticks are the first epochs of phases, where there is room for them."""
    ticks: list[int] = []
    for index in range(len(plan.phases)):
        first = plan.first_epoch(index)
        if not ticks or 100 * (first - ticks[-1]) / plan.epochs >= 8:
            ticks.append(first)
    return Axis(name="epoch", unit=EPOCH, least=0, most=plan.epochs, ticks=tuple(map(float, ticks)))


def forecast_lanes(forecast: Forecast, plan: Plan) -> Iterator[Plot]:
    """Plot what every epoch will cost, with standard training as a line."""
    cost = _by_epoch(plan, [phase.step_cost for phase in forecast.phases])
    yield _lane("time of a step, of standard", plan, COST, {"plan": cost}, rules=(Rule(name="standard", at=1.0),))
    yield _lane("peak memory", plan, BYTES, {"plan": _peaks(forecast, plan)}, rules=(_standard_peak(forecast),))


def measured_lanes(epochs: Sequence[EpochRecord], plan: Plan, forecast: Forecast | None) -> Iterator[Plot]:
    """Plot what was measured of every epoch, the forecast beside it, and standard training as a line."""
    accuracies = {"training": [each.train_top1 for each in epochs], "test": [each.eval_top1 for each in epochs]}
    yield _curves("accuracy", plan, PERCENT, accuracies, dots=_ensemble(epochs))
    losses = {"training": [each.train_loss for each in epochs], "test": [each.eval_loss for each in epochs]}
    yield _curves("loss", plan, NUMBER, losses)
    yield _curves("learning rate", plan, NUMBER, {"learning rate": [each.lr for each in epochs]}, from_zero=True)

    seconds: dict[str, Sequence[float]] = {"measured": [each.train_seconds for each in epochs]}
    rules = []
    if forecast and (expected := Expected.of(forecast, epochs)):
        seconds["forecast"] = _by_epoch(plan, expected.phases)
        rules.append(Rule(name="standard", at=expected.standard))
    yield _lane("seconds to train", plan, SECONDS, seconds, rules=rules)

    joules = [each.joules_per_image for each in epochs if each.joules_per_image is not None]
    if joules and len(joules) == len(epochs):
        yield _lane("energy an image", plan, ENERGY, {"measured": joules})

    # Only a GPU says how much of its memory is in use. The peak of a process holds all that it ever took.
    allocated = [each.peak_allocated_bytes for each in epochs if each.peak_allocated_bytes is not None]
    peaks: dict[str, Sequence[float]] = {"measured": allocated} if len(allocated) == len(epochs) > 0 else {}
    rules = []
    if forecast:
        peaks["forecast"] = _peaks(forecast, plan)
        rules.append(_standard_peak(forecast))
    if peaks:
        name = "peak memory, CUDA" if "measured" in peaks else "peak memory, forecast"
        yield _lane(name, plan, BYTES, peaks, rules=rules)
    if "measured" not in peaks:
        yield _lane("peak memory, process", plan, BYTES, {"measured": [each.peak_resident_bytes for each in epochs]})


def _by_epoch(plan: Plan, figures: Sequence[float]) -> list[float]:
    """Repeat the figure of each phase for all its epochs."""
    return [figure for figure, phase in zip(figures, plan.phases, strict=True) for _ in range(phase.epochs)]


def _peaks(forecast: Forecast, plan: Plan) -> list[float]:
    return _by_epoch(plan, [phase.peak_bytes for phase in forecast.phases])


def _standard_peak(forecast: Forecast) -> Rule:
    return Rule(name="standard", at=forecast.standard.peak_bytes)


def _lane(
    name: str, plan: Plan, unit: Unit, kinds: Mapping[str, Sequence[float]], *, rules: Sequence[Rule] = ()
) -> Plot:
    """Draw figures as stairs from zero; the forecast, where there is one beside others, as an outline."""
    has_others = len(kinds) > 1
    series = [
        _series(kind, figures, plan, kind="outline", style="expected")
        if has_others and kind == "forecast"
        else _series(kind, figures, plan, kind="stairs", style="measured")
        for kind, figures in kinds.items()
    ]
    every = [*(figure for figures in kinds.values() for figure in figures), *(rule.at for rule in rules)]
    axis = Axis.over(every, name, unit, ticks=FEW, from_zero=True)
    return Plot(title=name, x=timeline(plan), y=axis, series=series, rules=rules)


def _curves(
    name: str,
    plan: Plan,
    unit: Unit,
    kinds: Mapping[str, Sequence[float]],
    *,
    from_zero: bool = False,
    dots: Sequence[Series] = (),
) -> Plot:
    series = [
        _series(kind, ys, plan, kind="line", style=kind if kind in ("training", "test") else "test")
        for kind, ys in kinds.items()
    ]
    every = [*(y for ys in kinds.values() for y in ys), *(y for each in dots for y in each.ys)]
    axis = Axis.over(every, name, unit, ticks=FEW, from_zero=from_zero)
    return Plot(title=name, x=timeline(plan), y=axis, series=[*series, *dots])


def _ensemble(epochs: Sequence[EpochRecord]) -> list[Series]:
    """Place the snapshot ensemble of a run that has one at the epochs that it was tested after."""
    found = [(each.epoch - 0.5, each.ensemble_top1) for each in epochs if each.ensemble_top1 is not None]
    if not found:
        return []
    xs, ys = zip(*found, strict=True)
    return [Series(name="snapshot ensemble", xs=xs, ys=ys, kind="dots", style="ensemble")]


def _series(name: str, figures: Sequence[float], plan: Plan, *, kind: Kind, style: str) -> Series:
    """Place the figures of epochs on the timeline: of all, or of every so many, each in the middle of those."""
    width = -(-plan.epochs // MOST_EPOCHS)
    width += 1 - width % 2  # odd, so that there is an epoch in the middle
    shown = range(min(width // 2, len(figures) - 1), len(figures), width) if figures else ()
    return Series(
        name=name,
        xs=tuple(index + 0.5 for index in shown),
        ys=tuple(figures[index] for index in shown),
        kind=kind,
        style=style,
        width=width,
    )
