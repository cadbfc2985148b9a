"""Soft targets: the network learns from its own earlier outputs beside the labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from fxsplit.distribute.processes import Processes

# Images whose logits are exchanged at a time.
EXCHANGED = 65536


class SoftTargets(ABC):
    """Keeps logits of the network for each image, and computes a loss that compares later logits with them.

        loss = (1 - share) * cross-entropy with the label + share * T^2 * divergence from the kept logits

    The divergence is that of Kullback and Leibler at temperature T (Hinton et al., Distilling the knowledge in a neural
    network, 2015). For an image without kept logits the share is 0.

    Args:
        samples: how many images there are.
        weight: the largest share, 0 to 1.
        temperature: T, which logits are divided by before they are compared, above 0.
        fade: the last part of the run, 0 to 1, over which the share falls to nothing, linearly.
        device: of logits that other processes have kept, where none are kept here.
    """

    def __init__(
        self,
        samples: int,
        *,
        weight: float,
        temperature: float = 1.0,
        fade: float = 0.0,
        device: torch.device | None = None,
    ) -> None:
        self.weight, self.temperature, self._fade = weight, temperature, fade
        self._samples, self._device = samples, device
        # float16 (samples, K), NaN for an image without kept logits; None before any are kept.
        self._logits: Tensor | None = None
        # Which images' logits were kept here since the last `exchange`, bool (samples,).
        self._kept: Tensor | None = None

    @abstractmethod
    def share(self, progress: float | Tensor) -> float | Tensor:
        """Return the share of the divergence in the loss, 0 to 1, when `progress` of the run is done, 0 to 1.

        The share is that before it fades. Both are tensors () where steps are recorded.
        """

    def _left(self, progress: float | Tensor) -> float | Tensor:
        """Return what fading has left of the share, 0 to 1."""
        if not self._fade:
            return 1.0
        left = (1 - progress) / self._fade
        return left.clamp(max=1) if isinstance(left, Tensor) else min(1.0, left)

    @abstractmethod
    def after_forward(self, logits: Tensor, ids: Tensor) -> None:
        """Use the logits (B, K) of a training step for the images `ids` (B,), after its loss was computed."""

    def keep(self, logits: Tensor, ids: Tensor) -> None:
        """Keep logits (B, K) as the targets of the images `ids` (B,), in place of earlier ones."""
        kept_logits, kept = self._state(logits.shape[1], logits.device)
        kept.index_fill_(0, ids, True)
        largest = torch.finfo(torch.float16).max
        kept_logits[ids] = logits.detach().clamp(-largest, largest).half()

    def _state(self, classes: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
        """Return the logits of all images and which were kept here, made if there are none yet."""
        if self._logits is None or self._kept is None:
            shape = self._samples, classes
            self._logits = torch.full(shape, float("nan"), dtype=torch.float16, device=device)
            self._kept = torch.zeros(self._samples, dtype=torch.bool, device=device)
        return self._logits, self._kept

    def exchange(self, processes: Processes) -> None:
        """Give all processes what each has kept since the last call, of other images than the others."""
        # In a pipeline some have kept nothing.
        classes = processes.most(0 if self._logits is None else self._logits.shape[1])
        if processes.count == 1 or not classes:
            return
        parts = (torch.split(each, EXCHANGED) for each in self._state(classes, self._device))
        for rows, kept in zip(*parts, strict=True):
            given = processes.sum(torch.where(kept[:, None], rows, 0))
            rows.copy_(torch.where(processes.sum(kept.int())[:, None] > 0, given, rows))
            kept.zero_()

    def loss(
        self, logits: Tensor, labels: Tensor, ids: Tensor, *, progress: float | Tensor, smoothing: float = 0.0
    ) -> Tensor:
        """Return the mean loss () of logits (B, K) with labels (B,) of the images `ids` (B,)."""
        hard = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        earlier = torch.full_like(logits, float("nan")).float() if self._logits is None else self._logits[ids].float()
        # Nothing here reads a number from the device: the host would wait for the GPU.
        share = torch.where(earlier.isnan().any(dim=1), 0.0, self.share(progress) * self._left(progress))
        predicted = F.log_softmax(logits.float() / self.temperature, dim=1)
        targets = F.log_softmax(earlier.nan_to_num() / self.temperature, dim=1)
        soft = self.temperature**2 * F.kl_div(predicted, targets, reduction="none", log_target=True).sum(dim=1)
        return ((1 - share) * hard + share * soft).mean()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the kept logits."""
        return {} if self._logits is None else {"logits": self._logits}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load kept logits that `state_dict` returned."""
        self._logits = state["logits"].clone() if "logits" in state else None
        self._kept = None if self._logits is None else self._logits.new_zeros(self._samples, dtype=torch.bool)


class LastTargets(SoftTargets):
    """Takes as an image's target the logits of the training step that last saw it; no forward pass is added.

    The share grows linearly over the run. Source: Kim et al., Self-knowledge distillation with progressive refinement
    of targets, 2021, equations 6 and 7.
    """

    def share(self, progress: float | Tensor) -> float | Tensor:
        return self.weight * progress

    def after_forward(self, logits: Tensor, ids: Tensor) -> None:
        self.keep(logits, ids)


class MeanTargets(SoftTargets):
    """Takes as an image's target the output of the averaged weights at the midpoint of the run, kept once.

    The share is the same from then on. Sources: Furlanello et al., Born-again neural networks, 2018, for learning from
    an earlier self; Izmailov et al., Averaging weights leads to wider optima and better generalization, 2018, for the
    averaged weights.
    """

    def share(self, progress: float | Tensor) -> float:  # noqa: ARG002 - the same throughout the run
        return self.weight

    def after_forward(self, logits: Tensor, ids: Tensor) -> None:
        """Do nothing: targets are set by `keep`, at the midpoint."""
