"""Mean loss and accuracy over batches, what classes are taken for, and how a snapshot ensemble over phases does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxsplit.distribute.processes import ALONE, Processes


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
    its size to `count`. Means are over the batches of all processes, which ask for them together.
    """

    def __init__(self, device: torch.device, processes: Processes = ALONE) -> None:
        self._processes = processes
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
        sums, count = self._sums()
        return PendingScore(sums, count)

    def _sums(self) -> tuple[Tensor, int]:
        """Add up loss and hits, float64 (3,), and samples over all processes."""
        sums = torch.cat((self._loss[None], self._hits.double()))
        return self._processes.sum(sums), int(self._processes.sum(torch.tensor(self._count)))

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
        """Return the sums so far, over all processes, to go on from them."""
        sums, count = self._sums()
        return {"count": count, "loss": sums[0], "hits": sums[1:].long()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the sums that `state_dict` returned; one process has them, so that they count once."""
        self.reset()
        if self._processes.is_first:
            self._count = state["count"]
            self._loss.copy_(state["loss"])
            self._hits.copy_(state["hits"])


def first_choices(scores: Tensor) -> Tensor:
    """Return the class that each sample is taken for, int64 (B,), by class scores (B, K).

    Of equal scores it is the one that `Accuracy` takes.
    """
    return scores.topk(min(5, scores.shape[1]), dim=1).indices[:, 0]


class Confusion:
    """Counts which class the samples of each class are taken for.

    Batches are kept on the device, and nothing waits for it but `read`, which all processes call together.
    """

    def __init__(self, processes: Processes = ALONE) -> None:
        self._processes = processes
        self._batches: list[Tensor] = []

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Add a batch: class scores (B, K) and labels (B,)."""
        self._batches.append(torch.stack((labels, first_choices(scores))))

    def read(self) -> dict[tuple[int, int], int]:
        """Return how many samples there were of each label and class that they were taken for, over all processes."""
        pairs = torch.cat(self._batches, dim=1).tolist() if self._batches else ((), ())
        found: Counter[tuple[int, int]] = Counter()
        for each in self._processes.all(Counter(zip(*pairs, strict=True))):
            found.update(each)
        return dict(sorted(found.items()))

    def reset(self) -> None:
        """Begin anew."""
        self._batches.clear()


class Snapshots:
    """Keeps the class probabilities of the test images at the end of each phase, and tests their mean.

    Source: Huang et al., Snapshot ensembles: train 1, get M for free, 2017, with a phase in place of a cycle of the
    learning rate. Predictions are kept in place of weights: the test images are always the same, in the same order.
    """

    def __init__(self) -> None:
        self._by_phase: dict[str, Tensor] = {}

    def keep(self, phase: int, probabilities: Tensor) -> None:
        """Keep the probabilities (N, classes) at the end of a phase, in place of earlier ones of that phase."""
        self._by_phase[str(phase)] = probabilities

    def top1_pct(self, labels: Tensor) -> float | None:
        """Return the accuracy of the mean over phases, in per cent, for labels (N,); None before the second phase."""
        if len(self._by_phase) < 2:
            return None
        mean = torch.stack(list(self._by_phase.values())).mean(dim=0)
        return 100 * (first_choices(mean) == labels).double().mean().item()

    def state_dict(self) -> dict[str, Any]:
        """Return the probabilities by phase."""
        return {"by_phase": dict(self._by_phase)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self._by_phase = dict(state["by_phase"])
