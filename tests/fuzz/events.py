"""What users do to a model between two steps, after it was traced; alike to the model and to its copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import torch
from torch import nn

Happen = Callable[[nn.Module, Random], None]

LAYERS = (nn.Linear, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)


def _choose(model: nn.Module, dice: Random, *kinds: type[nn.Module]) -> tuple[str, Any] | None:
    """One of the model's modules of these kinds, with its path."""
    found = [(path, module) for path, module in model.named_modules() if path and type(module) in kinds]
    return dice.choice(found) if found else None


def _numbers(dice: Random, like: torch.Tensor) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(dice.randrange(1 << 16))).to(like)


def write_data(model: nn.Module, dice: Random) -> None:
    """Write into weights past autograd."""
    for parameter in model.parameters():
        parameter.data.add_(_numbers(dice, parameter), alpha=0.1)


def write_statistics(model: nn.Module, dice: Random) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_var is not None:
            module.running_var.data.mul_(1 + dice.random())


def load(model: nn.Module, dice: Random) -> None:
    model.load_state_dict(_other_state(model, dice))


def assign(model: nn.Module, dice: Random) -> None:
    """Put other tensors in the place of all parameters and buffers."""
    model.load_state_dict(_other_state(model, dice), assign=True)


def _other_state(model: nn.Module, dice: Random) -> dict[str, torch.Tensor]:
    state: Mapping[str, torch.Tensor] = model.state_dict()
    tied: dict[int, torch.Tensor] = {}
    for value in state.values():
        moved = value + 0.1 * _numbers(dice, value).abs() if value.is_floating_point() else value.clone()
        tied.setdefault(value.data_ptr(), moved)
    return {name: tied[value.data_ptr()] for name, value in state.items()}


def new_parameter(model: nn.Module, dice: Random) -> None:
    if chosen := _choose(model, dice, *LAYERS):
        weight = chosen[1].weight
        if isinstance(weight, nn.Parameter):
            new = nn.Parameter(weight.detach() + _numbers(dice, weight), weight.requires_grad)
            for module in model.modules():
                for name, held in module._parameters.items():
                    if held is weight:
                        setattr(module, name, new)


def replace_module(model: nn.Module, dice: Random) -> None:
    """Another layer or norm of the same kind in the place of one."""
    chosen = _choose(model, dice, *LAYERS, nn.BatchNorm1d, nn.BatchNorm2d)
    if chosen and not chosen[1]._forward_pre_hooks:
        path, module = chosen
        new = copy.deepcopy(module)
        for name, held in new.named_parameters():
            held.data.add_(_numbers(dice, held))
            held.requires_grad_(module.get_parameter(name).requires_grad)
        for parent in model.modules():
            for name, held_module in parent._modules.items():
                if held_module is module:
                    parent._modules[name] = new
        assert model.get_submodule(path) is new


def replace_by_another_kind(model: nn.Module, dice: Random) -> None:
    if chosen := _choose(model, dice, nn.ReLU, nn.GELU, nn.Tanh, nn.LeakyReLU):
        parent, _, name = chosen[0].rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Softplus().train(chosen[1].training))


def norm_option(model: nn.Module, dice: Random) -> None:
    if chosen := _choose(model, dice, *NORMS):
        chosen[1].eps = 0.1


def norm_momentum(model: nn.Module, dice: Random) -> None:
    if chosen := _choose(model, dice, nn.BatchNorm1d, nn.BatchNorm2d):
        chosen[1].momentum = 0.7


def dropout_rate(model: nn.Module, dice: Random) -> None:
    if chosen := _choose(model, dice, nn.Dropout):
        chosen[1].p = 0.6


def hook(model: nn.Module, dice: Random) -> None:
    """A hook on a layer that changes what it delivers."""
    if chosen := _choose(model, dice, *LAYERS, *NORMS, nn.ReLU, nn.Tanh, nn.Dropout):
        chosen[1].register_forward_hook(_double)


def hook_on_block(model: nn.Module, dice: Random) -> None:
    found = [module for module in model.modules() if type(module).__name__.startswith("Block")]
    if found:
        dice.choice(found).register_forward_hook(_double)


def _double(module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG001
    return 2 * output if isinstance(output, torch.Tensor) else output


def parametrize(model: nn.Module, dice: Random) -> None:
    chosen = _choose(model, dice, *LAYERS)
    if chosen and isinstance(chosen[1].weight, nn.Parameter):
        nn.utils.parametrize.register_parametrization(chosen[1], "weight", Half())


class Half(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


def replace_forward(model: nn.Module, dice: Random) -> None:
    """A forward of one instance's own."""
    if chosen := _choose(model, dice, *LAYERS, *NORMS):
        module = chosen[1]
        module.forward = _Scaled(module)


class _Scaled:
    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = 3 * type(self._module).forward(self._module, x)
        return output


EVALUATED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.Dropout, nn.AlphaDropout)


def evaluation_by_hand(model: nn.Module, dice: Random) -> None:
    """A layer that is put into evaluation, until somebody calls `train`."""
    if chosen := _choose(model, dice, *EVALUATED):
        chosen[1].eval()


def block_evaluation_by_hand(model: nn.Module, dice: Random) -> None:
    found = [module for module in model.modules() if type(module).__name__.startswith("Block")]
    if found:
        dice.choice(found).eval()


def counter_moved(model: nn.Module, dice: Random) -> None:
    """Written into a number or a buffer that forward moves."""
    for module in model.modules():
        if "calls" in vars(module):
            module.calls = dice.randrange(10)  # type: ignore[assignment]


EVENTS: dict[str, Happen] = {
    "data written": write_data,
    "statistics written": write_statistics,
    "state loaded": load,
    "state assigned": assign,
    "new parameter": new_parameter,
    "module replaced": replace_module,
    "kind replaced": replace_by_another_kind,
    "norm option": norm_option,
    "norm momentum": norm_momentum,
    "dropout rate": dropout_rate,
    "hook set": hook,
    "block hook set": hook_on_block,
    "parametrization set": parametrize,
    "forward replaced": replace_forward,
    "evaluation by hand": evaluation_by_hand,
    "block evaluation by hand": block_evaluation_by_hand,
    "counter written": counter_moved,
}
