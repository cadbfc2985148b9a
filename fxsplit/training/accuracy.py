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


class PendingScore:
    """A score whose sums are on their way from the device; nothing waits for them but `read`.

    Args:
        sums: loss, hits, and hits among five, float64 (3,).
        count: samples that they are over.
    """

    def __init__(self, sums: Tensor, count: int) -> None:
        on_cuda = sums.device.type == "cuda"
        self._sums = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=on_cuda)
        self._sums.copy_(sums, non_blocking=True)
        self._count = count
        self._copied = torch.cuda.current_stream(sums.device).record_event() if on_cuda else None

    def is_here(self) -> bool:
        """Tell whether `read` would return at once."""
        return self._copied is None or bool(self._copied.query())

    def read(self) -> Score:
        """Return the score; its means are NaN without samples."""
        if self._copied is not None:
            self._copied.synchronize()
        totals = self._sums.tolist()
        loss, top1, top5 = (total / self._count if self._count else float("nan") for total in totals)
        return Score(loss=loss, top1_pct=100 * top1, top5_pct=100 * top5, count=self._count)


class Accuracy:
    """Sums losses and correct predictions on the device, in tensors that stay where they are, without waiting for it.

    The number of samples is known to the host: each batch is given to `update`, which may be recorded and replayed, and
    its size to `count`.
    """

    def __init__(self, device: torch.device) -> None:
        self._count = 0
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._hits = torch.zeros(2, dtype=torch.int64, device=device)

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add the sums of a batch: of its mean loss (), logits (B, K), labels (B,). With K < 5, top-5 means top-K."""
        samples, classes = logits.shape
        hits = logits.topk(min(5, classes), dim=1).indices == labels[:, None]
        self._hits += torch.stack((hits[:, 0].sum(), hits.sum()))
        self._loss += loss.detach().double() * samples

    def count(self, samples: int) -> None:
        """Count the samples of a batch."""
        self._count += samples

    def sent(self) -> PendingScore:
        """Send the means so far to the host."""
        return PendingScore(torch.cat((self._loss[None], self._hits.double())), self._count)

    def read(self) -> Score:
        """Return the means so far; they are NaN before the first batch."""
        return self.sent().read()

    def is_finite(self) -> bool:
        """Tell whether all losses so far are finite, those included that are not counted yet."""
        return bool(self._loss.isfinite())

    def reset(self) -> None:
        """Begin anew."""
        self._count = 0
        self._loss.zero_()
        self._hits.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far, to go on from them."""
        return {"count": self._count, "loss": self._loss, "hits": self._hits}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the sums that `state_dict` returned."""
        self._count = state["count"]
        self._loss.copy_(state["loss"])
        self._hits.copy_(state["hits"])
