"""Soft targets: the network learns from its own earlier outputs beside the labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


class SoftTargets:
    """Logits of the network for each of `samples` images, kept as float16, and the loss against them.

    Of the loss, a share is the divergence from the logits that were kept of the image, both at `temperature`; the rest
    is the cross-entropy. An image of which none were kept has the cross-entropy alone.

    What is kept is what training gave when it last saw the image, and the share grows with the run up to `weight`; no
    forward pass is added. With `of_mean` the trainer keeps, at one moment of the run, what the mean of the weights
    gives for each image, and from then on the share is `weight`.

    Sources: Kim et al., Self-knowledge distillation with progressive refinement of targets, 2021, equations 6 and 7;
    for `of_mean`, Furlanello et al., Born-again neural networks, 2018, learning from the mean of Izmailov et al.,
    Averaging weights leads to wider optima and better generalization, 2018; temperature as in Hinton et al., Distilling
    the knowledge in a neural network, 2015.
    """

    def __init__(self, samples: int, *, weight: float, temperature: float = 1.0, of_mean: bool = False) -> None:
        self.samples, self.weight, self.temperature, self.of_mean = samples, weight, temperature, of_mean
        self._logits: Tensor | None = None

    def keep(self, logits: Tensor, ids: Tensor) -> None:
        """Keep logits (B, K) of the images `ids` (B,), in place of those kept before."""
        largest = torch.finfo(torch.float16).max
        self._kept(logits)[ids] = logits.detach().clamp(-largest, largest).half()

    def _kept(self, logits: Tensor) -> Tensor:
        if self._logits is None:
            self._logits = logits.new_full((self.samples, logits.shape[1]), float("nan"), dtype=torch.float16)
        return self._logits

    def loss(self, logits: Tensor, labels: Tensor, ids: Tensor, *, progress: float, smoothing: float = 0.0) -> Tensor:
        """The mean loss () of logits (B, K) with labels (B,) of the images `ids` (B,).

        `progress` is the share of the run that is done, 0 to 1.
        """
        earlier = self._kept(logits)[ids].float()
        # Nothing here asks the device for a number, so that a GPU is never waited for.
        share = torch.where(earlier.isnan().any(dim=1), 0.0, self.weight if self.of_mean else self.weight * progress)
        hard = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        own = F.log_softmax(logits.float() / self.temperature, dim=1)
        wanted = F.log_softmax(earlier.nan_to_num() / self.temperature, dim=1)
        soft = self.temperature**2 * F.kl_div(own, wanted, reduction="none", log_target=True).sum(dim=1)
        if not self.of_mean:
            self.keep(logits, ids)
        return ((1 - share) * hard + share * soft).mean()
