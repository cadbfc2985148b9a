"""Soft targets: the network learns from its own earlier outputs beside the labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


class SoftTargets(ABC):
    """Keeps logits of the network for each image, and compares later ones with them.

    Of the loss, a share is the divergence from the logits that were kept of the image, both at `temperature` (Hinton et
    al., Distilling the knowledge in a neural network, 2015); the rest is the cross-entropy with the labels. An image of
    which none were kept has the cross-entropy alone.

    Args:
        samples: how many images there are.
        weight: the largest share, 0 to 1.
        temperature: what logits are divided by before they are compared.
    """

    def __init__(self, samples: int, *, weight: float, temperature: float = 1.0) -> None:
        self.weight, self.temperature = weight, temperature
        self._samples = samples
        # float16 (samples, K), not a number where none were kept; None before the first are.
        self._logits: Tensor | None = None

    @abstractmethod
    def share(self, progress: float) -> float:
        """Return the share of the loss when `progress` of the run is done, 0 to 1."""

    @abstractmethod
    def learnt(self, logits: Tensor, ids: Tensor) -> None:
        """Take note of the logits (B, K) that training gave for the images `ids` (B,)."""

    def keep(self, logits: Tensor, ids: Tensor) -> None:
        """Keep logits (B, K) of the images `ids` (B,), in place of those kept before."""
        if self._logits is None:
            self._logits = logits.new_full((self._samples, logits.shape[1]), float("nan"), dtype=torch.float16)
        largest = torch.finfo(torch.float16).max
        self._logits[ids] = logits.detach().clamp(-largest, largest).half()

    def loss(self, logits: Tensor, labels: Tensor, ids: Tensor, *, progress: float, smoothing: float = 0.0) -> Tensor:
        """Return the mean loss () of logits (B, K) with labels (B,) of the images `ids` (B,)."""
        hard = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        earlier = torch.full_like(logits, float("nan")).float() if self._logits is None else self._logits[ids].float()
        # Nothing here asks the device for a number, so that a GPU is never waited for.
        share = torch.where(earlier.isnan().any(dim=1), 0.0, self.share(progress))
        own = F.log_softmax(logits.float() / self.temperature, dim=1)
        wanted = F.log_softmax(earlier.nan_to_num() / self.temperature, dim=1)
        soft = self.temperature**2 * F.kl_div(own, wanted, reduction="none", log_target=True).sum(dim=1)
        return ((1 - share) * hard + share * soft).mean()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the logits that were kept."""
        return {} if self._logits is None else {"logits": self._logits}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with logits that `state_dict` returned."""
        self._logits = state["logits"].clone() if "logits" in state else None


class LastTargets(SoftTargets):
    """Targets are what training gave when it last saw the image; no forward pass is added.

    Their share grows with the run. Source: Kim et al., Self-knowledge distillation with progressive refinement of
    targets, 2021, equations 6 and 7.
    """

    def share(self, progress: float) -> float:
        return self.weight * progress

    def learnt(self, logits: Tensor, ids: Tensor) -> None:
        self.keep(logits, ids)


class MeanTargets(SoftTargets):
    """Targets are what the mean of the weights gives for each image, kept once, at the midpoint of the run.

    Their share is the same from then on. Sources: Furlanello et al., Born-again neural networks, 2018, learning from
    the mean of Izmailov et al., Averaging weights leads to wider optima and better generalization, 2018.
    """

    def share(self, progress: float) -> float:  # noqa: ARG002 - of every moment the same
        return self.weight

    def learnt(self, logits: Tensor, ids: Tensor) -> None:
        """Nothing: what training gives is no target here."""
