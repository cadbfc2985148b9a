"""Goes on after a fault: with less memory where it ran out, without a step whose numbers are not finite.

                          fault
    kept ──► step ──► step ─ X              (1) every so often the state of the run is kept
     ▲                      │
     └──────────────────────┘              (2) after a fault everything goes back there, as in a run that is resumed
    kept ──► step ──► step ──► step ──►    (3) and the same steps are taken again, in another way

So a step that failed half-way leaves nothing behind.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fxsplit.errors import NotFiniteError, OutOfMemoryError
from fxsplit.measuring.meter import is_out_of_memory
from fxsplit.plan.schedule import Plan
from fxsplit.report import EpochRecord
from fxsplit.saving.checkpoints import Place
from fxsplit.saving.run_state import Stateful
from fxsplit.training.trainer import Pause, Trainer, no_pause

# Steps from one state that is kept in memory to the next.
KEEP_EVERY = 100
# So many steps are taken again, at most, to find where numbers stop being finite.
MOST_AGAIN = 2000
# When so many steps in a row are left out, the weights themselves are the cause.
MOST_IN_A_ROW = 10


class Whole(NamedTuple):
    """A state of the run that it can go back to, and where that is."""

    place: Place
    state: Mapping[str, Any]


class Memory(Protocol):
    """Knows what phases need, by their index in the plan."""

    def words(self, plan: Plan, phase: int) -> str:
        """Say what the phase is forecast to need, and what else to try; the end of a sentence."""
        ...

    def less(self, plan: Plan, phase: int) -> Plan | None:
        """Return the plan with less memory for the phase and those after it, or None where there is nothing to try."""
        ...


@dataclass(kw_only=True)
class Recovery:
    """Trains as a trainer does, and answers its faults.

    Args:
        trainer: takes the steps.
        state: of the run, that of the trainer included.
        saved: reads the newest checkpoint, to go back to where no state is kept in memory; None if there is none.
        memory: says what to do when memory runs out.
        skips: leave out steps whose loss or gradients are not finite; else they end the run.
        keeps: keep a copy of the state in memory, every KEEP_EVERY steps and after each epoch. Without it a run does
            not go on when memory runs out, and steps cannot be left out; only its first state is kept, for an epoch.
        replanned: is called with the new plan when phases are to take less memory.
    """

    trainer: Trainer
    state: Stateful
    saved: Callable[[], Whole | None]
    memory: Memory
    skips: bool = False
    keeps: bool = False
    replanned: Callable[[Plan], None] = lambda _: None
    _kept: Whole | None = field(default=None, init=False)
    _left_out: list[int] = field(default_factory=list, init=False)
    _pause: Pause = field(default=no_pause, init=False)

    def epochs(self, pause: Pause = no_pause, *, most: int | None = None) -> Iterator[EpochRecord]:
        """Train and test epoch by epoch as `Trainer.epochs`, which describes the arguments.

        Raises NotFiniteError and OutOfMemoryError when there is no other way; the state of the run is then the last
        whole one, where there is one to go back to.
        """
        self._pause = pause
        is_new = self.trainer.position.phase < 0
        while True:
            try:
                if self._kept is None and (is_new or self.keeps):
                    self.trainer.begin()
                    self._keep()
                for record in self.trainer.epochs(self._paused, most=most):
                    yield record
                    if self.keeps:
                        self._keep()
                    else:
                        self._kept = None  # the first state, which the first checkpoint takes the place of
                return
            except NotFiniteError as error:
                fault: Exception = error
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                fault = error
            # Not inside `except`: there the traceback still holds the tensors of the failed step.
            fault.__traceback__ = fault.__context__ = None
            if isinstance(fault, NotFiniteError):
                self._answer_not_finite(fault)
            else:
                self._answer_out_of_memory(fault)

    def _paused(self, epoch: int, step: int, *, steps: int, ending: bool = False) -> None:
        self._pause(epoch, step, steps=steps, ending=ending)
        is_due = steps % KEEP_EVERY == 0 and not ending
        if self.keeps and is_due and (self._kept is None or self._kept.place != (epoch, step)):
            self._keep()

    def _keep(self) -> None:
        at = self.trainer.position
        self._kept = Whole(Place(at.epoch, at.step), _copied(self.state.state_dict()))

    def _go_back(self) -> Place | None:
        """Go back to the last state; return where that is, or None when there is none."""
        found = self._kept or self.saved()
        if found is None:
            return None
        self.state.load_state_dict(copy.deepcopy(found.state))
        return found.place

    def _answer_not_finite(self, fault: NotFiniteError) -> None:
        """Find the step that is the cause, and then leave it out. Raises NotFiniteError when that cannot be done."""
        notice = self.trainer.observer.notice
        where = f"epoch {fault.epoch + 1}, step {fault.step + 1}"
        back = self._go_back()
        if fault.is_cause:
            number = fault.epoch * self.trainer.feed.train_loader.steps_per_epoch + fault.step
            in_a_row = self._left_out[-MOST_IN_A_ROW:] == list(range(number - MOST_IN_A_ROW, number))
            if self.skips and back is not None and not in_a_row:
                self._left_out.append(number)
                self.trainer.leave_out(fault.epoch, fault.step)
                notice(f"{where}: {fault}; the step is left out (number {len(self._left_out)} so far)")
                return
        elif back is not None and back.epoch == fault.epoch and fault.step - back.step < MOST_AGAIN:
            self.trainer.examine(fault.epoch, fault.step)
            notice(f"{where}: {fault}; to find the cause, the steps after {_words(back)} are taken again")
            return
        kept = "there is no checkpoint to go back to" if back is None else f"the weights of {_words(back)} are kept"
        advice = "try a lower --lr, or --clip-grad" if self.skips else "try a lower --lr, --clip-grad, or --on-nan skip"
        raise NotFiniteError(
            f"{where}: {fault}; {kept}; {advice}", epoch=fault.epoch, step=fault.step, is_cause=fault.is_cause
        )

    def _answer_out_of_memory(self, fault: Exception) -> None:
        """Plan the phase with less memory, and go back. Raises OutOfMemoryError when there is no way to."""
        trainer = self.trainer
        at, plan = trainer.position, trainer.plan
        phase = max(0, at.phase)
        if trainer.forward.device.type == "cuda":
            torch.cuda.empty_cache()
        where = f"memory ran out in phase {phase + 1} of {len(plan.phases)}, epoch {at.epoch + 1}"
        less = self.memory.less(plan, phase) if self.keeps else None
        if less is None or self._go_back() is None:
            raise OutOfMemoryError(f"{where}: {self.memory.words(plan, phase)}") from fault
        trainer.follow(less)
        saving = less.saving(less.phases[phase])
        trainer.observer.notice(f"{where}; it is tried again from the last whole state, and {saving}")
        self.replanned(less)


def _words(place: Place) -> str:
    return str(place) if any(place) else "the start"


def _copied(state: Any) -> Any:
    """Copy nested plain data with tensors, these into memory of the host."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: _copied(each) for key, each in state.items()}
    if isinstance(state, list | tuple):
        items = [_copied(each) for each in state]
        return tuple(items) if isinstance(state, tuple) else items
    return state
