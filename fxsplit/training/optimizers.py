"""Optimizers and learning rates, by timm's names."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from fxsplit.errors import UsageError, nearest

# Those of timm's schedules that are functions of the step alone: plateau looks at the test images.
SCHEDULES = ("constant", "cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt")

# Those of torch that have a fused kernel for CPU and CUDA alike.
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


def make_optimizer(
    *modules: nn.Module,
    name: str,
    lr: float,
    momentum: float,
    weight_decay: float,
    previous: Optimizer | None = None,
) -> Optimizer:
    """Make an optimizer over the parameters of `modules` that want a gradient, each in exactly one group.

    Weight decay leaves out biases, norms and what a module itself lists in `no_weight_decay()`, as timm does.
    Parameters that `previous` holds too keep their state. Raises UsageError for an unknown name and for values
    that the optimizer refuses.
    """
    if name not in list_optimizers():
        raise UsageError(f"timm has no optimizer {name!r}{nearest(name, list_optimizers())}")
    groups = [group for module in modules for group in _groups(module, weight_decay) if group["params"]]
    try:
        optimizer: Optimizer = create_optimizer_v2(
            groups, opt=name, lr=lr, momentum=momentum, weight_decay=weight_decay, **_fused(name, groups)
        )
    except (ImportError, TypeError, ValueError) as error:
        raise UsageError(f"the optimizer {name!r} cannot be made: {error}") from error
    if previous is not None:
        for parameter in parameters_of(optimizer):
            if parameter in previous.state:
                optimizer.state[parameter] = previous.state[parameter]
    return optimizer


def _fused(name: str, groups: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Ask for the one kernel that updates everything, where torch has it: on a CPU more than twice as fast."""
    numbers = all(parameter.is_floating_point() for group in groups for parameter in group["params"])
    return {"fused": True} if numbers and get_optimizer_info(name).opt_class in FUSED else {}


def _groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    if not weight_decay:
        return [{"params": [parameter for parameter in module.parameters() if parameter.requires_grad]}]
    spared: Collection[str] = getattr(module, "no_weight_decay", tuple)()
    groups: list[dict[str, Any]] = param_groups_weight_decay(module, weight_decay, no_weight_decay_list=spared)
    return groups


def slots_of(make_optimizer: Callable[[Sequence[nn.Parameter]], Optimizer]) -> int:
    """Count the values that an optimizer keeps for each parameter, by a step on a small one."""
    weight = nn.Parameter(torch.zeros(16, 16))
    optimizer = make_optimizer([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = [value for value in optimizer.state[weight].values() if isinstance(value, Tensor)]
    return round(sum(value.numel() for value in kept) / weight.numel())


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """List all parameters that an optimizer moves."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def split_by_end(optimizer: Optimizer, ends: Mapping[Tensor, int]) -> None:
    """Divide the optimizer's groups so that all parameters of one stop training at the same step, its "end".

    One that no partition uses has no end of its own, and takes the last.
    """
    groups: list[dict[str, Any]] = []
    last = max(ends.values())
    for group in optimizer.param_groups:
        parts: dict[int, list[Tensor]] = {}
        for parameter in group["params"]:
            parts.setdefault(ends.get(parameter, last), []).append(parameter)
        groups += [{**group, "params": parameters, "end": end} for end, parameters in parts.items()]
    optimizer.param_groups[:] = groups


def anneal(optimizer: Optimizer, step: int, *, steps: float) -> None:
    """Scale the learning rate of each group down to zero over the last `steps` before its end, by half a cosine.

    timm's schedulers multiply theirs by this scale. With `steps` as long as a group trains, and no other schedule, this
    is the annealing of Brock et al., FreezeOut: accelerate training by progressively freezing layers, 2017.
    """
    for group in optimizer.param_groups:
        left = min(1.0, max(0, group["end"] - step) / min(steps, group["end"]))
        group["lr_scale"] = (1 - math.cos(math.pi * left)) / 2


def make_scheduler(
    optimizer: Optimizer,
    *,
    name: str,
    epochs: int,
    steps_per_epoch: int,
    warmup_epochs: int,
    min_lr: float,
    decay_epochs: float | None = None,
    decay_milestones: Sequence[float] = (),
    decay_rate: float = 0.1,
) -> Scheduler:
    """Make the learning rate of the whole run, a function of the steps done: set it with `step_update`.

    The rate decays by `decay_rate` every `decay_epochs` ("step"; a third of the run if None) or at `decay_milestones`
    ("multistep"). Raises UsageError for an unknown name.
    """
    if name not in SCHEDULES:
        raise UsageError(
            f"there is no learning-rate schedule {name!r}{nearest(name, SCHEDULES)} (have: {', '.join(SCHEDULES)})"
        )
    if name == "step" and decay_epochs is None:
        decay_epochs = epochs / 3
    scheduler: Scheduler
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=name,
        num_epochs=epochs,
        decay_epochs=decay_epochs,
        decay_milestones=list(decay_milestones),
        decay_rate=decay_rate,
        warmup_epochs=warmup_epochs,
        min_lr=min_lr,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return scheduler


def named_state(optimizer: Optimizer, names: Mapping[Tensor, str]) -> dict[str, Any]:
    """Return an optimizer's state with the name of each parameter in place of its number.

    It has the form of `get_optimizer_state_dict` in torch.distributed.checkpoint, which covers the parameters of one
    module alone.
    """
    state = optimizer.state_dict()
    order = [names[parameter] for parameter in parameters_of(optimizer)]
    return {
        "state": {order[number]: values for number, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [order[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }


def load_named_state(optimizer: Optimizer, state: Mapping[str, Any], names: Mapping[Tensor, str]) -> None:
    """Load a state that `named_state` returned. Raises ValueError when it is of other parameters."""
    order = [names[parameter] for parameter in parameters_of(optimizer)]
    saved = [name for group in state["param_groups"] for name in group["params"]]
    if saved != order:
        raise ValueError(f"the state is of {len(saved)} parameters, which are not the {len(order)} of this optimizer")
    # To torch, a parameter's number is any key by which its state is found.
    optimizer.load_state_dict(dict(state))
