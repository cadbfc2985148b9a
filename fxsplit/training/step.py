"""One optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxsplit.data.batch import Batch
from fxsplit.distribute.layout import whole
from fxsplit.errors import FxsplitError
from fxsplit.execute.forward import Forward
from fxsplit.training.accuracy import Accuracy
from fxsplit.training.objective import Objective
from fxsplit.training.optimizers import parameters_of


class Step:
    """Takes one optimizer step on a batch.

        batch ──► micro-batches ──► forward, loss ──► backward ──► gradients ──► clipped ──► optimizer
                                    └─ in autocast ─┘   scaled       add up      unscaled

    The gradient is that of the whole batch, however it is divided, and among however many processes. No micro-batch
    holds a single image, unless all do.

    Args:
        forward: runs micro-batches; its `autocast` sets the precision. float16 gets loss scaling.
        objective: computes their loss.
        batch_size: images that this process takes of a full batch.
        clip_grad: the largest norm of the gradient, or None for no limit.
    """

    def __init__(
        self,
        forward: Forward,
        objective: Objective,
        *,
        batch_size: int,
        clip_grad: float | None = None,
    ) -> None:
        self.forward, self.objective = forward, objective
        self._batch_size, self._clip_grad = batch_size, clip_grad
        self._scaler = torch.amp.GradScaler(forward.device.type, enabled=forward.amp_dtype is torch.float16)

    @property
    def is_scaled(self) -> bool:
        """Whether the loss is scaled, and steps with infinite gradients are left out."""
        return self._scaler.is_enabled()

    def backward(
        self, batch: Batch, optimizer: Optimizer, *, micro_batches: int, progress: float | Tensor, accuracy: Accuracy
    ) -> int:
        """Compute the gradients of a batch, and add its sums to `accuracy`; return how many of its samples count.

        Args:
            batch: what to train on.
            optimizer: of the parameters.
            micro_batches: the number of micro-batches that the batch is divided into.
            progress: the share of the run that is done, 0 to 1.
            accuracy: sums up losses and correct predictions.

        Raises FxsplitError when the loss depends on nothing that trains.
        """
        optimizer.zero_grad()
        parts = list(batch.divided(micro_batches, batch_size=self._batch_size))
        if micro_batches > 1:
            # A process with fewer of them runs its last one again, which counts for nothing.
            more = self.forward.engine.together(len(parts)) - len(parts)
            parts += [replace(parts[-1], weight=0.0)] * more
        self.forward.engine.backward(parts, partial(self._loss, progress=progress, accuracy=accuracy))
        return sum(part.counted for part in parts)

    def _loss(self, micro_batch: Batch, *, progress: float | Tensor, accuracy: Accuracy) -> Tensor:
        with self.forward.autocast():
            total, loss, logits = self.objective(self.forward, micro_batch, progress=progress)
        if not total.requires_grad:
            raise FxsplitError(
                "the loss depends on no parameter that trains now, so nothing would be learnt: the model's forward "
                "runs under torch.no_grad, or what trains is not used"
            )
        if micro_batch.counted:
            accuracy.update(loss, logits, micro_batch.labels)
        weight = micro_batch.weight  # the loss of a micro-batch is a mean over its images alone
        return self._scaler.scale(total * weight if weight != 1 else total)

    def update(self, optimizer: Optimizer) -> None:
        """Update the parameters of `optimizer` by their gradients; its learning rate has been set."""
        if self._clip_grad is not None:
            self._scaler.unscale_(optimizer)
            parameters = parameters_of(optimizer)
            norm = whole(self.forward.engine.gradient_norm(parameters))
            nn.utils.clip_grads_with_norm_(parameters, self._clip_grad, norm)
        self._scaler.step(optimizer)
        self._scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of loss scaling."""
        return {"scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self._scaler.load_state_dict(state["scaler"])
