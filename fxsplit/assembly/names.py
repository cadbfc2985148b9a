"""Names that only torch, timm or the disk know: what is wrong with one is said before model and data are loaded."""

from __future__ import annotations

import torch
from torch import nn

from fxsplit.assembly.steps import optimizer_of, scheduler
from fxsplit.errors import UsageError, nearest, reason, shown
from fxsplit.plan.planfile import read_file
from fxsplit.spec import RunSpec
from fxsplit.training.optimizers import SLOTS


def check_names(spec: RunSpec, device: torch.device, *, trains: bool = True) -> None:
    """Hold the names in a spec against those that there are: optimizer, learning rates, backend, plan file.

    Unless it `trains`, optimizers that are known without timm are not tried. Raises UsageError when one of them cannot
    be used.
    """
    if trains or spec.opt not in SLOTS:
        _try_optimizer(spec, device)
    if spec.torchcompile:
        known = torch.compiler.list_backends(exclude_tags=())
        if spec.torchcompile not in known:
            raise UsageError(
                f"torch has no backend {shown(spec.torchcompile)} to compile with{nearest(spec.torchcompile, known)} "
                f"(have: {', '.join(torch.compiler.list_backends())})"
            )
    if spec.plan is not None:
        read_file(spec.plan)


def _try_optimizer(spec: RunSpec, device: torch.device) -> None:
    """Make the optimizer and the learning rates of a run for a small parameter, and step once."""
    weight = nn.Parameter(torch.zeros(4, 4, device=device))
    try:
        optimizer = optimizer_of(spec, [weight])
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    except UsageError:
        raise
    except Exception as error:  # such as of an optimizer that needs a closure, or another library
        raise UsageError(f"the optimizer {shown(spec.opt)} cannot be used here: {reason(error)}") from error
    if spec.schedule != "window":  # whose length follows from the model
        scheduler(spec, spec.epochs_total or spec.epochs)(optimizer, steps_per_epoch=1)
