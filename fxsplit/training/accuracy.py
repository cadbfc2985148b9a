"""Mean loss and accuracy over batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Holds mean loss and accuracies, in per cent, over `count` samples."""

    loss: float
    top1_pct: float
    top5_pct: float
    count: int


class Accuracy:
    """Sums losses and correct predictions on the device, without waiting for it; only `read` does."""

    def __init__(self, device: torch.device) -> None:
        self._count = 0
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._hits = torch.zeros(2, dtype=torch.int64, device=device)

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: its mean loss (), logits (B, K) and labels (B,). With K < 5, top-5 means top-K."""
        samples, classes = logits.shape
        hits = logits.topk(min(5, classes), dim=1).indices == labels[:, None]
        self._hits += torch.stack((hits[:, 0].sum(), hits.sum()))
        self._loss += loss.detach().double() * samples
        self._count += samples

    def read(self) -> Score:
        """Return the means so far; they are NaN before the first batch."""
        sums = torch.cat((self._loss[None], self._hits.double())).tolist()
        loss, top1, top5 = (total / self._count if self._count else float("nan") for total in sums)
        return Score(loss=loss, top1_pct=100 * top1, top5_pct=100 * top5, count=self._count)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far, to go on from them."""
        return {"count": self._count, "loss": self._loss, "hits": self._hits}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the sums that `state_dict` returned."""
        self._count = state["count"]
        self._loss.copy_(state["loss"])
        self._hits.copy_(state["hits"])
