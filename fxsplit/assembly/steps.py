"""What a step of a run computes with: precision, loss, optimizer, learning rate."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from fxsplit.execute.forward import logits_of
from fxsplit.spec import RunSpec
from fxsplit.training.optimizers import make_optimizer, make_scheduler
from fxsplit.training.phase_optimizer import MakeScheduler


def amp_dtype(spec: RunSpec) -> torch.dtype | None:
    """Return the type in which autocast computes; None without autocast."""
    return getattr(torch, spec.amp_dtype) if spec.amp else None


def loss(spec: RunSpec, output: Any, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of what a model returned, with the label smoothing of the run."""
    return cross_entropy(logits_of(output), labels, label_smoothing=spec.smoothing)


def scheduler(spec: RunSpec, epochs: int) -> MakeScheduler:
    """Make what makes the learning-rate schedule of an optimizer, for a run of so many epochs."""
    return partial(
        make_scheduler,
        name=spec.sched,
        epochs=epochs,
        warmup_epochs=spec.warmup_epochs,
        min_lr=spec.min_lr,
        decay_epochs=spec.decay_epochs,
        decay_milestones=spec.decay_milestones,
        decay_rate=spec.decay_rate,
    )


def optimizer(spec: RunSpec) -> partial[Optimizer]:
    """Make what makes the optimizer of a module."""
    return partial(
        make_optimizer,
        name=spec.opt,
        lr=spec.lr,
        momentum=spec.momentum,
        weight_decay=spec.weight_decay,
        layer_decay=spec.layer_decay,
    )


def optimizer_of(spec: RunSpec, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Make an optimizer of these parameters alone."""
    return optimizer(spec)(nn.ParameterList(parameters), layer_decay=None)
