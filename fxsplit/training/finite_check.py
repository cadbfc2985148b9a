"""Finds out that training has left the finite numbers, and where."""

from __future__ import annotations

import math

from fxsplit.data.batch import Batch
from fxsplit.execute.forward import Forward
from fxsplit.measuring.finite import are_finite, first_not_finite, named
from fxsplit.training.accuracy import Accuracy, Score
from fxsplit.training.optimizers import gradients_of, parameters_of
from fxsplit.training.phase_optimizer import PhaseOptimizer
from fxsplit.training.step import Step


class FiniteCheck:
    """Looks at losses, gradients and weights. Each look waits for the device.

    Args:
        forward: runs a batch again, to find where its numbers cease to be finite.
        step: took the steps.
        optimizer: has what trains.
        accuracy: has the sum of all losses.
    """

    def __init__(self, forward: Forward, step: Step, optimizer: PhaseOptimizer, accuracy: Accuracy) -> None:
        self._forward, self._step, self._optimizer, self._accuracy = forward, step, optimizer, accuracy

    def fault(self, score: Score) -> str:
        """Say what is not finite, the mean loss or the weights that train; "" if all is."""
        if score.count and not math.isfinite(score.loss):
            return "the loss is not finite"
        return "" if are_finite(parameters_of(self._optimizer.optimizer)) else "weights are not finite"

    def cause(self, batch: Batch) -> str:
        """Say where a loss or gradients come from that are not finite, after backward on this batch; "" if all are.

        Infinite gradients of a loss that is scaled are no fault: the step is left out, and the scale falls.
        """
        if not self._accuracy.is_finite():
            where = first_not_finite(self._forward, batch) or "every output is finite, so it comes from the loss itself"
            return f"the loss is not finite: {where}"
        if self._step.is_scaled or (index := self._last_without_gradient()) is None:
            return ""
        place = "an exit" if index < 0 else named(self._forward.executor.partitions, index)
        return f"the loss is finite, but the gradients are not, first in {place}"

    def _last_without_gradient(self) -> int | None:
        """Find the last partition whose gradients are not finite, which backward reaches first; -1 for an exit."""
        executor = self._forward.executor
        for index in reversed(range(*executor.window)):
            if not are_finite(parameter.grad for parameter in executor.owned[index]):
                return index
        return None if are_finite(gradients_of(self._optimizer.optimizer)) else -1
