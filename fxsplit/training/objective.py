"""What a step learns from: labels, the network's own earlier outputs, auxiliary exits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fxsplit.data.batch import Batch
from fxsplit.execute.forward import Forward
from fxsplit.training.exits import Exits
from fxsplit.training.soft_targets import MeanTargets, SoftTargets


class Learnt(NamedTuple):
    """What a forward pass in training gives.

    `total` () is what is learnt from. `loss` () is the model's own share of it, without the exits, so that runs with
    and without exits can be compared.
    """

    total: Tensor
    loss: Tensor
    logits: Tensor


class Objective:
    """Computes the loss of a part of a batch.

    Args:
        smoothing: label smoothing, 0 to 1.
        soft_targets: earlier outputs of the network, to learn from beside the labels.
        exits: classifiers that train beside the model.
    """

    def __init__(
        self, *, smoothing: float = 0.0, soft_targets: SoftTargets | None = None, exits: Exits | None = None
    ) -> None:
        self.smoothing, self.soft_targets, self.exits = smoothing, soft_targets, exits

    @property
    def has_midpoint(self) -> bool:
        """Whether targets are to be kept at the midpoint of the run, by `keep_targets`."""
        return isinstance(self.soft_targets, MeanTargets)

    def __call__(self, forward: Forward, part: Batch, *, progress: float) -> Learnt:
        """Run a part of a batch forward when `progress` of the run is done, 0 to 1, and return its losses."""
        if self.exits is None:
            logits = forward.logits(part)
            loss = self._loss(logits, part, progress)
            return Learnt(loss, loss, logits)
        with self.exits.tapped(forward.executor) as scores:
            logits = forward.logits(part)
        loss = self._loss(logits, part, progress)
        total = self.exits.add_to(loss, scores, part.labels, smoothing=self.smoothing)
        return Learnt(total, loss, logits)

    def _loss(self, logits: Tensor, part: Batch, progress: float) -> Tensor:
        if self.soft_targets is None:
            return F.cross_entropy(logits, part.labels, label_smoothing=self.smoothing)
        loss = self.soft_targets.loss(logits, part.labels, part.ids, progress=progress, smoothing=self.smoothing)
        self.soft_targets.learnt(logits, part.ids)
        return loss

    def keep_targets(self, forward: Forward, batches: Iterable[Batch]) -> None:
        """Keep what the network, as it is now and in evaluation, says of each image as its soft target."""
        if self.soft_targets is not None:
            forward.executor.eval()
            with torch.no_grad(), forward.autocast():
                for batch in batches:
                    self.soft_targets.keep(forward.logits(batch), batch.ids)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of soft targets and exits."""
        parts = {"soft_targets": self.soft_targets, "exits": self.exits}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned in the same phase."""
        if self.soft_targets is not None:
            self.soft_targets.load_state_dict(state["soft_targets"])
        if self.exits is not None:
            self.exits.load_state_dict(state["exits"])
