"""Soft targets: the network learns from its own earlier outputs beside the labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


class SoftTargets:
    """The last logits that training gave for each of `samples` images, as float16, and the loss against them.

    Of the loss, a share that grows with the run up to `weight` is the divergence from what the network said when it
    last saw the image, both at `temperature`; the rest is the cross-entropy. No forward pass is added. An image that
    is seen for the first time has the cross-entropy alone.

    Source: Kim et al., Self-knowledge distillation with progressive refinement of targets, 2021, equations 6 and 7;
    temperature as in Hinton et al., Distilling the knowledge in a neural network, 2015.
    """

    def __init__(self, samples: int, *, weight: float, temperature: float = 1.0) -> None:
        self.samples, self.weight, self.temperature = samples, weight, temperature
        self._logits: Tensor | None = None

    def loss(self, logits: Tensor, labels: Tensor, ids: Tensor, *, progress: float, smoothing: float = 0.0) -> Tensor:
        """The mean loss () of logits (B, K) with labels (B,) of the images `ids` (B,); keeps the logits for later.

        `progress` is the share of the run that is done, 0 to 1.
        """
        if self._logits is None:
            self._logits = logits.new_full((self.samples, logits.shape[1]), float("nan"), dtype=torch.float16)
        earlier = self._logits[ids].float()
        # Nothing here asks the device for a number, so that a GPU is never waited for.
        share = torch.where(earlier.isnan().any(dim=1), 0.0, self.weight * progress)
        hard = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        own = F.log_softmax(logits.float() / self.temperature, dim=1)
        wanted = F.log_softmax(earlier.nan_to_num() / self.temperature, dim=1)
        soft = self.temperature**2 * F.kl_div(own, wanted, reduction="none", log_target=True).sum(dim=1)
        largest = torch.finfo(torch.float16).max
        self._logits[ids] = logits.detach().clamp(-largest, largest).half()
        return ((1 - share) * hard + share * soft).mean()
