"""What answers the faults of a run: memory that runs out, and numbers that are not finite."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from fxsplit.assembly.images import micro_batches
from fxsplit.assembly.plans import forecast, offloads
from fxsplit.assembly.steps import optimizer_of
from fxsplit.caching.media import GIB
from fxsplit.capture.tracing import Trace
from fxsplit.distribute.processes import ALONE, Processes
from fxsplit.plan.budget import fit
from fxsplit.plan.forecast import PhaseForecast
from fxsplit.plan.schedule import Plan
from fxsplit.saving.recorder import Recorder
from fxsplit.spec import RunSpec
from fxsplit.training.optimizers import slots_of
from fxsplit.training.recovery import Recovery, Whole
from fxsplit.training.trainer import Trainer

# By so much of the activations that a phase was forecast to hold when memory ran out, it is to need less next time; or,
# where no way of running it does, by the next share.
LESS = (0.3, 0.1, 0.0)


def recovery(spec: RunSpec, trace: Trace, trainer: Trainer, run: Recorder, processes: Processes) -> Recovery | Trainer:
    """Make what trains a run and answers its faults: of several processes, each of which has its own, none does."""
    if processes.count > 1:
        return trainer

    def saved() -> Whole | None:
        found = run.newest()
        return None if found is None else Whole(found.place, found.data["state"])

    return Recovery(
        trainer=trainer,
        state=run.state,
        saved=saved,
        memory=Forecasts(spec, trace),
        skips=spec.on_nan == "skip",
        keeps=spec.on_nan == "skip" or spec.memory_budget == "auto",
        replanned=run.replan,
    )


@dataclass(frozen=True)
class Forecasts:
    """Says what phases of a run need by the forecast, and plans them with less."""

    spec: RunSpec
    trace: Trace

    def words(self, plan: Plan, phase: int) -> str:
        """Say what the phase is forecast to need, and what else to try; the end of a sentence."""
        advice = ["a smaller --batch-size", "--amp", "more --parts", "--grad-accum-steps"]
        if self.spec.memory_budget is None:
            advice = ["--memory-budget auto, which recomputes or divides batches where memory runs out", *advice[:2]]
        needed = self._ahead(plan)[phase].peak_bytes
        return f"its steps are forecast to need {needed / GIB:.3g} GiB; try {', '.join(advice[:2])}, or {advice[2]}"

    def less(self, plan: Plan, phase: int) -> Plan | None:
        """Return the plan with less memory for the phase and those after it, or None where there is nothing to try."""
        if self.spec.memory_budget != "auto":
            return None
        before = self._ahead(plan)[phase]
        for share in LESS:
            budget = before.peak_bytes - 1 - share * before.activation_bytes
            found = self._within(plan, phase, budget)
            if self._ahead(found)[phase].peak_bytes <= budget:
                return found
        return None

    def _within(self, plan: Plan, phase: int, budget: float) -> Plan:
        """Return the plan whose phases from this one on take the fastest way within a budget, or what needs least."""
        fitting = fit(
            plan,
            self.trace,
            budget=budget,
            batch_size=self.spec.batch_size,
            micro_batches=micro_batches(self.spec, ALONE),
            optimizer_slots=slots_of(partial(optimizer_of, self.spec)),
            strict=False,
            offloads=offloads(self.spec),
        )
        ahead = self._ahead(plan)
        chosen = [
            new if index >= phase and ahead[index].peak_bytes > budget else old
            for index, (old, new) in enumerate(zip(plan.phases, fitting.phases, strict=True))
        ]
        return replace(plan, phases=tuple(chosen))

    def _ahead(self, plan: Plan) -> tuple[PhaseForecast, ...]:
        return forecast(self.spec, plan, self.trace, measured=False).phases
