"""Optimizers and learning rates, by timm's names.

timm is imported where it is needed: that takes most of a second, and most inspections do without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxsplit.distribute.layout import divided_as
from fxsplit.errors import UsageError, nearest, reason, shown
from fxsplit.objects.structure import is_divided

if TYPE_CHECKING:
    from timm.scheduler.scheduler import Scheduler

# timm's schedules that are functions of the step alone. Its "plateau" looks at the test images and is left out.
SCHEDULES = ("constant", "cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt")

# torch's optimizers that have a fused kernel, which updates all parameters in one call, on CPU and CUDA alike.
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
# Those whose kernel takes parameters that are divided among processes, too.
FUSED_DIVIDED = (torch.optim.Adam, torch.optim.AdamW)

# Optimizers that an error names.
USUAL = ("adamw", "adam", "sgd", "lamb", "lion", "adafactor")

# Values that those of default settings keep for each parameter.
SLOTS = {"adam": 2, "adamw": 2}

# What a group says about how its step is computed.
KERNELS = ("fused", "foreach", "capturable")


def make_optimizer(
    *modules: nn.Module,
    name: str,
    lr: float,
    momentum: float,
    weight_decay: float,
    layer_decay: float | None = None,
    capturable: bool = False,
) -> Optimizer:
    """Make an optimizer over the parameters of `modules` that require a gradient, each in exactly one group.

    Args:
        modules: whose parameters are optimized.
        name: of the optimizer, in timm.
        lr: learning rate, above 0.
        momentum: for optimizers that have one, 0 to 1.
        weight_decay: leaves out biases, norms and what a module itself lists in `no_weight_decay()`, as timm does.
        layer_decay: learning rate of a layer of the first module, as a share of that of the layer after it; layers are
            those of timm (ELECTRA, Clark et al. 2020; BEiT, Bao et al. 2022). Other modules have the full rate.
        capturable: keep what steps count on the device, where the optimizer can, so that a step can be recorded.

    Raises UsageError for an unknown name, for values that the optimizer refuses, and for `layer_decay` where the layers
    are not known.
    """
    from timm.optim import create_optimizer_v2, list_optimizers

    if name not in (known := list_optimizers()):
        raise UsageError(
            f"timm has no optimizer {shown(name)}{nearest(name, known)} (it has {len(known)}, such as "
            f"{', '.join(USUAL)}; timm.optim.list_optimizers() names them all)"
        )
    decays = [layer_decay, *[None] * (len(modules) - 1)]
    groups = [
        group
        for module, decay in zip(modules, decays, strict=True)
        for group in _groups(module, weight_decay, decay)
        if group["params"]
    ]
    try:
        optimizer: Optimizer = create_optimizer_v2(
            groups, opt=name, lr=lr, momentum=momentum, weight_decay=weight_decay, **_fused(name, groups)
        )
    except (ImportError, TypeError, ValueError) as error:
        raise UsageError(f"the optimizer {name!r} cannot be made: {reason(error)}") from error
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = capturable
    # torch would warn that such an optimizer steps eagerly, as it does before each recording.
    vars(optimizer)["_warned_capturable_if_run_uncaptured"] = True
    return optimizer


def _fused(name: str, groups: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Return the option for torch's fused kernel, where it has one: on a CPU it is more than twice as fast."""
    from timm.optim import get_optimizer_info

    parameters = [parameter for group in groups for parameter in group["params"]]
    chosen = FUSED_DIVIDED if any(map(is_divided, parameters)) else FUSED
    numbers = all(parameter.is_floating_point() for parameter in parameters)
    return {"fused": True} if numbers and get_optimizer_info(name).opt_class in chosen else {}


def _groups(module: nn.Module, weight_decay: float, layer_decay: float | None) -> list[dict[str, Any]]:
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    spared: Collection[str] = getattr(module, "no_weight_decay", tuple)()
    if layer_decay is not None:
        if not (hasattr(module, "group_matcher") or getattr(module, "pretrained_cfg", {}).get("classifier")):
            raise UsageError(
                f"layer-decay is {layer_decay:g}, but only timm's models say what their layers are, and "
                f"{type(module).__name__} is none; leave it out"
            )
        by_layer: list[dict[str, Any]] = param_groups_layer_decay(
            module, weight_decay, no_weight_decay_list=spared, layer_decay=layer_decay
        )
        return [{**group, "layer_scale": group["lr_scale"]} for group in by_layer]
    if not weight_decay:
        return [{"params": [parameter for parameter in module.parameters() if parameter.requires_grad]}]
    groups: list[dict[str, Any]] = param_groups_weight_decay(module, weight_decay, no_weight_decay_list=spared)
    return groups


def slots_of(make_optimizer: Callable[[Sequence[nn.Parameter]], Optimizer]) -> int:
    """Count the numbers that an optimizer keeps for each number of a parameter, by a step on a small one.

    `make_optimizer` is given the parameters. SGD without momentum has 0, AdamW 2.
    """
    weight = nn.Parameter(torch.zeros(16, 16))
    optimizer = make_optimizer([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = [value for value in optimizer.state[weight].values() if isinstance(value, Tensor)]
    return round(sum(value.numel() for value in kept) / weight.numel())


def complete_momenta(optimizer: Optimizer) -> None:
    """Give parameters of SGD that are new a momentum of zero, where others have one: its kernel takes all or none."""
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else ():
        states = [optimizer.state[parameter] for parameter in group["params"] if parameter in optimizer.state]
        if any("momentum_buffer" in state for state in states):
            for parameter in group["params"]:
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """List all parameters of an optimizer."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def gradients_of(optimizer: Optimizer) -> list[Tensor | None]:
    """List the gradients of all parameters of an optimizer."""
    return [parameter.grad for parameter in parameters_of(optimizer)]


def set_gradients(optimizer: Optimizer, gradients: Sequence[Tensor | None]) -> None:
    """Give the parameters of an optimizer the gradients that `gradients_of` listed."""
    for parameter, gradient in zip(parameters_of(optimizer), gradients, strict=True):
        parameter.grad = gradient


def split_by_end(optimizer: Optimizer, ends: Mapping[Tensor, int]) -> None:
    """Divide the optimizer's groups, in place, so that each holds parameters that stop training at the same step.

    That step is the group's "end". `ends` has it by parameter; a parameter that is not in there, because no partition
    uses it, takes the last end.
    """
    groups: list[dict[str, Any]] = []
    last = max(ends.values())
    for group in optimizer.param_groups:
        by_end: dict[int, list[Tensor]] = {}
        for parameter in group["params"]:
            by_end.setdefault(ends.get(parameter, last), []).append(parameter)
        groups += [{**group, "params": parameters, "end": end} for end, parameters in by_end.items()]
    optimizer.param_groups[:] = groups


def anneal(optimizer: Optimizer, step: int, *, steps: float) -> None:
    """Set each group's "lr_scale" at `step`: it falls to 0 over the last `steps` before the group's end, as a cosine.

    It falls from the group's "layer_scale", or from 1.

    timm's schedulers multiply their learning rate by this scale. With `steps` as long as a group trains, and a constant
    schedule, this is the annealing of Brock et al., FreezeOut: accelerate training by progressively freezing layers,
    2017.
    """
    for group in optimizer.param_groups:
        left = min(1.0, max(0, group["end"] - step) / min(steps, group["end"]))
        group["lr_scale"] = group.get("layer_scale", 1.0) * (1 - math.cos(math.pi * left)) / 2


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
    """Make a timm scheduler for the learning rate of the whole run; `step_update(steps done)` sets it.

    Args:
        optimizer: whose learning rate is set.
        name: one of `SCHEDULES`.
        epochs: of the run.
        steps_per_epoch: optimizer steps in an epoch.
        warmup_epochs: epochs of linear warm-up.
        min_lr: the lowest learning rate.
        decay_epochs: epochs between decays, for "step"; None for a third of the run.
        decay_milestones: epochs of the decays, for "multistep".
        decay_rate: factor of a decay; the power of "poly".

    Raises UsageError for an unknown name, and for values that the schedule refuses.
    """
    if name not in SCHEDULES:
        raise UsageError(
            f"there is no learning-rate schedule {shown(name)}{nearest(name, SCHEDULES)} (have: {', '.join(SCHEDULES)})"
        )
    if name == "step" and decay_epochs is None:
        decay_epochs = epochs / 3
    from timm.scheduler import create_scheduler_v2

    scheduler: Scheduler
    try:
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
    except (ArithmeticError, AssertionError, TypeError, ValueError) as error:
        raise UsageError(f"the learning-rate schedule {name!r} cannot be made so: {reason(error)}") from error
    return scheduler


def named_state(optimizer: Optimizer, names: Mapping[Tensor, str]) -> dict[str, Any]:
    """Return an optimizer's state with the name of each parameter in place of its number.

    `names` has the name of each parameter. The form is that of torch.distributed.checkpoint's
    `get_optimizer_state_dict`, which can only take parameters of a single module.
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
    """Load a state that `named_state` returned, also one of a run on another device or with other kernels.

    Raises ValueError when it belongs to other parameters.
    """
    order = [names[parameter] for parameter in parameters_of(optimizer)]
    saved = [name for group in state["param_groups"] for name in group["params"]]
    if saved != order:
        raise ValueError(f"the state is of {len(saved)} parameters, which are not the {len(order)} of this optimizer")
    groups = [
        {**group, **{name: own[name] for name in KERNELS if name in own}}
        for group, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    parameters = {names[parameter]: parameter for parameter in parameters_of(optimizer)}
    values = {
        name: {key: _laid_out(value, parameters[name]) for key, value in of_parameter.items()}
        for name, of_parameter in state["state"].items()
    }
    # torch finds a parameter's state by whatever keys "params" lists, so names do as well as numbers.
    optimizer.load_state_dict({**state, "state": values, "param_groups": groups})


def _laid_out(value: Any, parameter: Tensor) -> Any:
    """Divide what an optimizer keeps for each number of a parameter as that is divided."""
    return divided_as(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value
