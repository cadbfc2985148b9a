"""An optimizer step that is recorded once, where that can be, and replayed from then on."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch import Tensor

from fxsplit.caching.feed import Feed
from fxsplit.cuda.replay import Recordings
from fxsplit.data.batch import Batch
from fxsplit.plan.schedule import Phase
from fxsplit.training.accuracy import Accuracy
from fxsplit.training.optimizers import gradients_of, set_gradients
from fxsplit.training.phase_optimizer import PhaseOptimizer
from fxsplit.training.regularisers.endings import Endings, WeightEma
from fxsplit.training.step import Step


@dataclass(kw_only=True)
class RecordedStep:
    """Takes an optimizer step on the batch that a feed delivers, with all averages of weights that follow it.

    What changes from step to step, as learning rate and progress, must be set before, so that the rest can be replayed.

    Args:
        step: computes gradients and updates parameters.
        feed: delivers the batch.
        optimizer: has the optimizer of the phase.
        endings, ema: average weights.
        accuracy: sums up losses and correct predictions.
        recordings: records the step and replays it; None takes each eagerly.
        update_is_recorded: whether the optimizer's part can be replayed, too; else it follows eagerly.
    """

    step: Step
    feed: Feed
    optimizer: PhaseOptimizer
    endings: Endings
    ema: WeightEma | None
    accuracy: Accuracy
    recordings: Recordings | None = None
    update_is_recorded: bool = False

    def take(
        self,
        key: Hashable,
        phase: Phase,
        *,
        progress: float | Tensor,
        means: Hashable = None,
        examine: Callable[[Batch], None] | None = None,
    ) -> int:
        """Take a step, and return the number of samples of this process's batch that count.

        Args:
            key: tells batches apart whose steps differ when they are recorded; None takes it eagerly.
            phase: says how the batch is divided.
            progress: the share of the run that is done, 0 to 1.
            means: says which means of weights count the step.
            examine: looks at the batch after backward, eagerly; an error of it leaves the step incomplete.
        """
        optimizer, recordings = self.optimizer.optimizer, self.recordings

        def backward() -> int:
            batch = self.feed.fetch()
            counted = self.step.backward(
                batch, optimizer, micro_batches=phase.micro_batches, progress=progress, accuracy=self.accuracy
            )
            if examine is not None:
                examine(batch)
            return counted

        def update() -> None:
            self.step.update(optimizer)
            self.endings.add_weights()
            if self.ema is not None:
                self.ema.add()

        def whole() -> int:
            samples = backward()
            update()
            return samples

        if recordings is None:
            return whole()
        if phase.recompute:
            recordings.refuse("recomputing activations with the same random numbers reads the random state")
            key = None
        if examine is not None:
            key = None
        if self.update_is_recorded:
            return recordings.run("train", None if key is None else (key, means), whole, held=self._held())
        samples, gradients = recordings.run(
            "train", key, lambda: (backward(), gradients_of(optimizer)), held=self._held()
        )
        set_gradients(optimizer, gradients)
        update()
        return samples

    def _held(self) -> list[object]:
        """List what steps use besides the model and may keep something on the host."""
        objective = self.step.objective
        parts = [objective.soft_targets, None if objective.exits is None else objective.exits.modules]
        return [self.optimizer.optimizer, *(part for part in parts if part is not None)]
