"""The loop of training: the phases of a plan, their epochs, their batches. It is the same for every schedule."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch

from fxsplit.caching.feed import Feed
from fxsplit.cuda.number import Number
from fxsplit.cuda.replay import Recordings
from fxsplit.data.batch import Batch
from fxsplit.distribute.concord import Concord
from fxsplit.distribute.processes import ALONE, Processes
from fxsplit.errors import NotFiniteError
from fxsplit.execute.forward import Forward
from fxsplit.measuring.heap import trim_heap
from fxsplit.plan.schedule import Phase, Plan
from fxsplit.report import EpochRecord, Observer
from fxsplit.saving.run_state import Stateful
from fxsplit.training.accuracy import Accuracy, PendingScore, Score, Snapshots
from fxsplit.training.evaluator import Evaluator
from fxsplit.training.finite_check import FiniteCheck
from fxsplit.training.guard import Guard
from fxsplit.training.objective import Objective
from fxsplit.training.phase_optimizer import PhaseOptimizer
from fxsplit.training.plasticity import Plasticity
from fxsplit.training.recorded_step import RecordedStep
from fxsplit.training.regularisers.endings import Endings, WeightEma, named_parameters
from fxsplit.training.step import Step
from fxsplit.training.telemetry import Telemetry, Work


class Pause(Protocol):
    """Is called where the state of training is whole: it may save it, or end the run by an exception."""

    def __call__(self, epoch: int, step: int, *, steps: int, ending: bool = False) -> None:
        """Save or end a run of which `epoch` epochs and `step` steps of the next are done, in all `steps`.

        `ending` says that an exception ends it here anyway.
        """
        ...


# Before all steps.
NOWHERE = (-1, -1)
# Of a record, the memory of a process.
PEAKS = ("peak_resident_bytes", "peak_allocated_bytes", "peak_reserved_bytes")


def no_pause(epoch: int, step: int, *, steps: int, ending: bool = False) -> None:
    """Go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a run is: the index of its phase (-1 before the first), the epochs done, and the steps done of the next.

    `ended` says that all its steps are taken and what trained to the end has ended; only the test is left.
    """

    phase: int = -1
    epoch: int = 0
    step: int = 0
    ended: bool = False


@dataclass(kw_only=True)
class Trainer:
    """Trains an executor by a plan: phases of epochs of batches, one optimizer step a batch.

    Its parts do the work, and each keeps its own state. They must be made for the same executor and the same plan.

    Args:
        plan: says which partitions train when.
        forward: runs batches through the executor.
        feed: gives the batches to train and to test on.
        objective: computes the loss.
        step: takes an optimizer step.
        optimizer: has the optimizer and the learning rate of each phase.
        endings: averages and recalibrates partitions that stop training.
        ema: averages weights, for tests and for partitions that stop training; None for neither.
        plasticity: lets partitions whose weights still move settle later than planned; None keeps to the plan.
        guard: undoes moves of the cut that cost accuracy on the held-out images of `feed`; None keeps to the plan.
        snapshots: tests the mean of what the network says at the end of each phase; None for no such ensemble.
        work: counts the multiply-adds of training, those of a pipeline in its first process; None counts none.
        recordings: records steps and replays them; None takes every step eagerly. The other parts must be made for it.
        update_is_recorded: whether the optimizer's part of a step can be replayed, too; else it follows eagerly.
        processes: those that train the model together; each has such a trainer.
        log_interval: steps between two calls of the observer's `step_done`.
        observer: is called while the run happens.
    """

    plan: Plan
    forward: Forward
    feed: Feed
    objective: Objective
    step: Step
    optimizer: PhaseOptimizer
    endings: Endings
    ema: WeightEma | None = None
    plasticity: Plasticity | None = None
    guard: Guard | None = None
    snapshots: Snapshots | None = None
    work: Work | None = None
    recordings: Recordings | None = None
    update_is_recorded: bool = False
    processes: Processes = ALONE
    log_interval: int = 10
    observer: Observer = field(default_factory=Observer)

    def __post_init__(self) -> None:
        self.executor = self.forward.executor
        self._position = Position()
        self._steps_per_epoch = self.feed.train_loader.steps_per_epoch
        self._accuracy = Accuracy(self.forward.device, self.processes)
        self._concord = Concord(
            self.processes,
            self.forward.engine,
            [self.objective.soft_targets, self.ema, self.plasticity],
            copies=[self.endings, self.ema, self.plasticity],
        )
        self._progress = Number(None if self.recordings is None else self.forward.device)
        # Scores of steps that are on their way from the device.
        self._pending: deque[tuple[int, PendingScore]] = deque()
        self._telemetry = Telemetry(self.forward.device)
        self._recorded_step = RecordedStep(
            step=self.step,
            feed=self.feed,
            optimizer=self.optimizer,
            endings=self.endings,
            ema=self.ema,
            accuracy=self._accuracy,
            recordings=self.recordings,
            update_is_recorded=self.update_is_recorded,
        )
        self._evaluator = Evaluator(
            self.forward,
            self.feed,
            ema=self.ema,
            snapshots=self.snapshots,
            work=self.work,
            recordings=self.recordings,
            processes=self.processes,
        )
        self._finite = FiniteCheck(self.forward, self.step, self.optimizer, self._accuracy)
        self._pause: Pause = no_pause
        # Whether `state_dict` would be the state of a position, and not of something between two.
        self._is_whole = False
        # By epoch and step: the steps that are not taken, and the last one whose numbers are looked at.
        self._left_out: set[tuple[int, int]] = set()
        self._examined = NOWHERE

    @property
    def position(self) -> Position:
        """Where the run is."""
        return self._position

    def confusion(self) -> dict[tuple[int, int], int]:
        """Return how many images there were of each label and class that they were taken for, in the last test.

        All processes call it together.
        """
        return self._evaluator.confusion.read()

    def begin(self) -> None:
        """Enter the first phase; does nothing in a run that has begun."""
        if self._position.phase < 0:
            self._begin(0)

    def follow(self, plan: Plan) -> None:
        """Go on by another plan, whose phases differ in nothing but how they save memory."""
        self.plan = plan
        if self.work is not None:
            self.work.follow(plan)

    def leave_out(self, epoch: int, step: int) -> None:
        """Do not take a step of the run, both numbers from 0: its batch is passed over."""
        self._left_out.add((epoch, step))

    def examine(self, epoch: int, step: int) -> None:
        """Look at the numbers of all steps until this one, both numbers from 0.

        Each waits for the device then. The first whose loss or gradients are not finite is not completed: `epochs`
        raises a NotFiniteError that says where they come from.
        """
        self._examined = (epoch, step)

    def epochs(self, pause: Pause = no_pause, *, most: int | None = None) -> Iterator[EpochRecord]:
        """Train and test epoch by epoch, and give the record of each; the observer is told of it after that.

        At the end, or when the iterator is closed, caches are freed and the model is as free to train as it was before.
        Raises NotFiniteError when loss or weights are no numbers any more: it is noticed with the scores that come from
        the device every `log_interval` steps, before a state is given out, and at the end of an epoch.

        Args:
            pause: is called after each step and each batch of the test, and where an exception leaves the state whole.
            most: the most epochs that are trained now; None for all that are left.
        """
        self._pause, failed_alone = pause, False
        epochs = range(self._position.epoch, self.plan.epochs)
        try:
            for epoch in epochs[:most]:
                self._telemetry.epoch_begins()
                if not self._position.step:
                    self._begin(epoch)
                record = self._epoch(epoch)
                yield record
                self._is_whole = True
                self.observer.epoch_done(record)
                self._is_whole = False
        except GeneratorExit:
            raise
        except BaseException as error:
            # Interrupts, and numbers that are not finite, come to all processes after the same step.
            failed_alone = isinstance(error, Exception) and not isinstance(error, NotFiniteError)
            if self._is_whole:
                self._paused(ending=True)
            raise
        finally:
            self._pause = no_pause
            self._forget()
            self.feed.close()
            self.forward.engine.leave(alone=failed_alone)
            self.executor.release()

    def _paused(self, *, ending: bool = False) -> None:
        at = self._position
        self._pause(at.epoch, at.step, steps=at.epoch * self._steps_per_epoch + at.step, ending=ending)

    def _begin(self, epoch: int) -> None:
        """Change to the phase of an epoch; at the midpoint of the run, also average weights and keep soft targets."""
        before, index = self._position.phase, self._phase_of(epoch)
        at_midpoint = epoch == self.endings.midpoint_epoch
        if index == before:
            if self.forward.engine.is_outdated(self.feed.cut):
                self._divide()
            if at_midpoint:
                self._forget()
                self._end([], epoch, at_midpoint=True)
            return
        if before >= 0:
            self._leave(epoch, self.plan.phases[index], at_midpoint=at_midpoint)
        stays = self.guard is not None and index == self.guard.last_phase
        end = self._end_of(index, stays=stays)
        self._enter(index, epochs_left=end - epoch)
        self._concord.check({name: part.state_dict for name, part in self._parts().items()})

    def _end_of(self, index: int, *, stays: bool) -> int:
        """Return the epoch before which a phase ends: one that `stays` does so where everything trains again."""
        if not stays:
            return self.plan.first_epoch(index) + self.plan.phases[index].epochs
        later = (number for number in range(index + 1, len(self.plan.phases)) if self.plan.phases[number].thaws)
        return next(map(self.plan.first_epoch, later), self.plan.epochs)

    def _phase_of(self, epoch: int) -> int:
        """Return the index of an epoch's phase: as planned, or an earlier one.

        An earlier one settles only quiet partitions, or no more than the guard allows.
        """
        planned, now = self.plan.phase_index_at(epoch), self._position.phase
        if self.guard is not None and not self.plan.phases[planned].thaws:
            planned = min(planned, self.guard.last_phase)
        if planned < now or now < 0 or self.plasticity is None:
            return planned
        start = self.plan.phases[now].start
        for index in range(planned, now, -1):
            if all(map(self.plasticity.is_quiet, range(start, self.plan.phases[index].start))):
                return index
        if planned > now and epoch == self.plan.first_epoch(planned):
            name = self.plan.partitions[self.plan.phases[planned].start].name
            self.observer.notice(f"what lies before {name} still learns and settles later than in epoch {epoch + 1}")
        return now

    def _leave(self, epoch: int, following: Phase | None, *, at_midpoint: bool = False) -> None:
        """End the training of the partitions that do not train in the following phase; without one, of all."""
        self._forget()
        go_on = range(following.start, following.stop) if following else ()
        self._end([i for i in range(*self.executor.window) if i not in go_on], epoch, at_midpoint=at_midpoint)

    def _end(self, partitions: Sequence[int], epoch: int, *, at_midpoint: bool) -> None:
        if self.ema is not None:
            self.ema.settle(partitions)
        stop = self.executor.window[1] if at_midpoint else max(partitions, default=-1) + 1
        self.endings.end(partitions, self._forwarded(epoch, stop), at_midpoint=at_midpoint)
        self._concord.restore(of_first=True)
        if at_midpoint:
            every = len(self.plan.partitions)
            self.objective.keep_targets(self.forward, self._forwarded(epoch, every))
            self._concord.restore(of_first=True)

    def _forwarded(self, epoch: int, stop: int) -> Iterator[Batch]:
        """Give the batches of an epoch to be run forward up to the cut `stop`, and count that work.

        In a pipeline the first process does so alone.
        """
        if not self.processes.pipeline.is_first:
            return
        for batch in self.feed.training(epoch):
            if self.work is not None:
                self.work.forward(len(batch), start=self.feed.settled_from, stop=stop)
            yield batch

    def _enter(self, index: int, *, epochs_left: int) -> None:
        # Each of these steps depends on what those before it have done to the model:
        #
        #   0 ............. start ................... stop ............. n
        #   |    settled      |        trains           |     frozen     |    (1) modes, requires_grad, folded weights
        #                     |------ exit ---- exit                          (2) exits of the first that train
        #   |<---- cached --->|                                               (3) another cache, if the cut has moved
        #                     |<------ engine --------->|                     (4) whose gradients it reduces; it may
        #                     |                         |                         divide weights, and undo that before
        #                     |<- optimizer, averages ->|                     (5) over what trains after (1), (2), (3)
        self._forget()
        phase = self.plan.phases[index]
        self._position = replace(self._position, phase=index)
        self.executor.enter(phase)  # (1)
        if self.objective.exits is not None:
            self.objective.exits.enter(phase, self.observer.notice)  # (2)
        later = self.plan.phases[index + 1 :]
        self.feed.enter(phase.start, epochs=epochs_left, notice=self.observer.notice, later=later)  # (3)
        self.forward.engine.enter(*self.objective.modules, cut=self.feed.cut)  # (4)
        self.optimizer.enter(index)  # (5)
        self.endings.enter(index)
        if self.plasticity is not None:
            self.plasticity.enter(named_parameters(self.executor))
        if self.ema is not None:
            self.ema.enter()
        trim_heap()
        self._telemetry.phase_begins()
        self.observer.phase_started(index, phase)
        if self.executor.is_compiled:
            self.observer.working("compiling")

    def _divide(self) -> None:
        """Divide partitions anew among processes, since batches now come at another cut than they did."""
        self.forward.engine.enter(*self.objective.modules, cut=self.feed.cut)
        self.optimizer.move()

    def _epoch(self, epoch: int) -> EpochRecord:
        trained = self._train(epoch)
        if (self.endings.average or self.ema) and epoch + 1 == self.plan.epochs and not self._position.ended:
            self._is_whole = False
            self._leave(epoch, None)
            self._position = replace(self._position, ended=True)
        self._is_whole = True
        self._telemetry.training_ends()
        tested, ensemble = self._test(epoch)
        self._is_whole = False
        held_out = None if self.guard is None else self._watch(self.guard)
        phase = self._position.phase
        self._position = Position(phase=phase, epoch=epoch + 1)
        self._accuracy.reset()
        record = self._telemetry.epoch(
            self.plan,
            phase=phase,
            epoch=epoch,
            optimizer=self.optimizer,
            feed=self.feed,
            reduced_bytes=self.forward.engine.bytes_per_step,
            gathered_bytes=self.forward.engine.gathered_per_step,
            sent_bytes=self.forward.engine.sent_per_step,
            trained=trained,
            tested=tested,
            held_out_pct=held_out,
            multiply_adds=None if self.work is None else self.work.take(),
            ensemble_top1=ensemble,
        )
        return record if self.processes.count == 1 else self._of_all(record)

    def _of_all(self, record: EpochRecord) -> EpochRecord:
        """Add up what all processes have worked, and find the largest peaks of their memory."""
        seconds, work = self._total(record.processor_seconds or 0.0, record.multiply_adds or 0)
        own_peaks = {name: getattr(record, name) for name in PEAKS if getattr(record, name) is not None}
        peaks: dict[str, Any] = {name: self.processes.most(peak) for name, peak in own_peaks.items()}
        return replace(record, processor_seconds=seconds, multiply_adds=work, **peaks)

    def _total(self, seconds: float, work: int) -> tuple[float, int]:
        """Add up processor seconds and multiply-adds over all processes."""
        total = self.processes.sum(torch.tensor(seconds, dtype=torch.float64))
        return float(total), int(self.processes.sum(torch.tensor(work)))

    def _watch(self, guard: Guard) -> float:
        """Let the guard see which held-out images are right now; return their accuracy in per cent."""
        right = self.processes.pipeline.first(self._evaluator.held_out)
        if sentence := guard.epoch_done(self._position.phase, right):
            self.observer.notice(sentence)
        return 100 * float(right.double().mean())

    def _train(self, epoch: int) -> Score:
        """Take the steps of an epoch that are not done yet, and return the score on the training images."""
        self.executor.train()
        steps = self._steps_per_epoch
        for key in self.feed.put(epoch, self._position.step):
            self._is_whole = False
            if (epoch, self._position.step) in self._left_out:
                self.feed.fetch()
            else:
                self._take_step(key, done=epoch * steps + self._position.step)
                if self.plasticity is not None:
                    self.plasticity.step_done()
            step = self._position.step + 1
            self._position = replace(self._position, step=step)
            if step % self.log_interval == 0 or step == steps:
                self._pending.append((step, self._accuracy.sent()))
            self._is_whole = True
            self._report(epoch, wait=step == steps)
            self._paused()
        self._concord.restore()
        trained = self._accuracy.read()
        self._refuse_not_finite(trained)
        return trained

    def _take_step(self, key: Hashable, *, done: int) -> None:
        """Take an optimizer step after `done` steps of the run, on the batch with this key."""
        self.optimizer.set_rate(done)
        self._progress.set(done / (self.plan.epochs * self._steps_per_epoch))
        means = self.endings.count_step(done + 1)
        if self.ema is not None:
            self.ema.count_step(done + 1)
        is_examined = (self._position.epoch, self._position.step) <= self._examined
        samples = self._recorded_step.take(
            key,
            self.plan.phases[self._position.phase],
            progress=self._progress.value,
            means=means,
            examine=self._examine if is_examined else None,
        )
        if self.forward.engine.has_loss:
            self._accuracy.count(samples)
        if self.work is not None:
            exits = () if self.objective.exits is None else self.objective.exits.linears()
            self.work.step(self._position.phase, samples, start=self.feed.settled_from, exits=exits)

    def _examine(self, batch: Batch) -> None:
        """Raise NotFiniteError, which names the cause, when the loss or the gradients of this step are not finite."""
        if cause := self._finite.cause(batch):
            raise NotFiniteError(cause, epoch=self._position.epoch, step=self._position.step, is_cause=True)

    def _refuse_not_finite(self, score: Score) -> None:
        """Raise NotFiniteError when the mean loss or what trains is not finite. It waits for the device."""
        if fault := self._finite.fault(score):
            self._is_whole = False
            at = self._position
            raise NotFiniteError(fault, epoch=at.epoch, step=max(0, at.step - 1))

    def _forget(self) -> None:
        """Drop the recordings of steps, with the memory that they hold."""
        if self.recordings is not None:
            self.recordings.forget()

    def _report(self, epoch: int, *, wait: bool) -> None:
        """Tell the observer of steps whose scores have come from the device; of all, if it is to `wait`."""
        while self._pending and (wait or self._pending[0][1].is_here()):
            step, pending = self._pending.popleft()
            score = pending.read()
            if score.count and not math.isfinite(score.loss):
                self._refuse_not_finite(score)
            record = self._telemetry.step(
                phase=self._position.phase,
                epoch=epoch,
                step=step,
                steps=self._steps_per_epoch,
                score=score,
            )
            self.observer.step_done(record)

    def _test(self, epoch: int) -> tuple[Score, float | None]:
        """Return the score on the test images and, where a phase ends, that of the snapshot ensemble."""
        phase = self._position.phase
        if epoch + 1 < self.plan.epochs and self.plan.phase_index_at(epoch + 1) == phase:
            return self._evaluator.score(pause=self._paused), None
        return self._evaluator.score_of_snapshot(phase, pause=self._paused)

    def evaluate(self) -> Score:
        """Return the score on the test images, of averaged weights where there are any."""
        return self._evaluator.score()

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on training, besides the model's own state and the random states.

        It holds plain data and tensors, with parameters by name. The tensors are not copies: save or copy them before
        the next step. Raises NotFiniteError when it is no state to go on from.
        """
        self._concord.restore()
        self._refuse_not_finite(self._accuracy.read())
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        # As many processes as may be go on from it, so it has what all of these have spent on the present epoch.
        spent, worked = parts["telemetry"], parts.get("work", {"count": 0})
        spent["processor"], worked["count"] = self._total(spent["processor"], worked["count"])
        return {"position": asdict(self._position), "feed": self.feed.state_dict(), **parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned. The model must have loaded its own state before, on the run's device.

        `epochs` then goes on where the run was, also in the midst of an epoch. Rows that caches had are computed again,
        so random states are to be restored after this. The plan may last longer now than it did.
        """
        self._position = Position(**state["position"])
        self._pending.clear()
        if self._position.phase >= 0:
            self._enter(self._position.phase, epochs_left=state["feed"]["epochs"])
        if self._position.epoch < self.plan.epochs:
            self.feed.load_state_dict(state["feed"], self.observer.notice)
        if not self.processes.is_first:
            # What had been spent on the present epoch is that of all processes, and counts once.
            state = {**state, "telemetry": {**state["telemetry"], "processor": 0.0}, "work": {"count": 0}}
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Stateful]:
        parts: dict[str, Stateful | None] = {
            "objective": self.objective,
            "optimizer": self.optimizer,
            "step": self.step,
            "endings": self.endings,
            "ema": self.ema,
            "accuracy": self._accuracy,
            "plasticity": self.plasticity,
            "guard": self.guard,
            "snapshots": self.snapshots,
            "work": self.work,
            "telemetry": self._telemetry,
        }
        return {name: part for name, part in parts.items() if part is not None}
