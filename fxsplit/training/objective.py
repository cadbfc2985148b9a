"""What a step learns from: labels, the network's own earlier outputs, auxiliary exits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxsplit.data.batch import Batch
from fxsplit.execute.forward import Forward
from fxsplit.training.regularisers.exits import Exits
from fxsplit.training.regularisers.soft_targets import MeanTargets, SoftTargets


class Losses(NamedTuple):
    """Holds the losses of a forward pass in training, and its class scores.

    `total` () is the loss that gradients are taken of. `loss` () leaves out the exits, so that runs with and without
    exits can be compared; it is what records show.
    """

    total: Tensor
    loss: Tensor
    logits: Tensor


class Objective:
    """Computes the loss of a micro-batch.

    Args:
        smoothing: label smoothing, 0 to 1.
        soft_targets: earlier outputs of the network, to learn from beside the labels.
        exits: auxiliary classifiers that train beside the model.
    """

    def __init__(
        self, *, smoothing: float = 0.0, soft_targets: SoftTargets | None = None, exits: Exits | None = None
    ) -> None:
        self.smoothing, self.soft_targets, self.exits = smoothing, soft_targets, exits

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """What trains beside the model."""
        return () if self.exits is None else (self.exits.modules,)

    @property
    def has_midpoint(self) -> bool:
        """Whether `keep_targets` must be called at the midpoint of the run."""
        return isinstance(self.soft_targets, MeanTargets)

    def __call__(self, forward: Forward, batch: Batch, *, progress: float | Tensor) -> Losses:
        """Run a micro-batch forward and return its losses; `progress` is the share of the run that is done, 0 to 1."""
        if self.exits is None:
            logits = forward.logits(batch)
            loss = self._loss(logits, batch, progress)
            return Losses(loss, loss, logits)
        with self.exits.tapped(forward.executor) as scores:
            logits = forward.logits(batch)
        loss = self._loss(logits, batch, progress)
        total = self.exits.add_to(loss, scores, batch.targets, smoothing=self.smoothing)
        return Losses(total, loss, logits)

    def _loss(self, logits: Tensor, batch: Batch, progress: float | Tensor) -> Tensor:
        if self.soft_targets is None:
            return F.cross_entropy(logits, batch.targets, label_smoothing=self.smoothing)
        loss = self.soft_targets.loss(logits, batch.labels, batch.ids, progress=progress, smoothing=self.smoothing)
        if batch.counted:
            self.soft_targets.after_forward(logits, batch.ids)
        return loss

    def keep_targets(self, forward: Forward, batches: Iterable[Batch]) -> None:
        """Keep the network's present output in evaluation as the soft target of each image of `batches`."""
        if self.soft_targets is not None:
            forward.executor.eval()
            with torch.no_grad(), forward.autocast():
                for batch in batches:
                    logits = forward.logits(batch)
                    if batch.counted:
                        self.soft_targets.keep(logits, batch.ids)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of soft targets and exits."""
        parts = {"soft_targets": self.soft_targets, "exits": self.exits}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; the same phase must have been entered."""
        if self.soft_targets is not None:
            self.soft_targets.load_state_dict(state["soft_targets"])
        if self.exits is not None:
            self.exits.load_state_dict(state["exits"])
