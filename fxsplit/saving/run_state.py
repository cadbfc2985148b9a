"""All that a run goes on from: model, training, random states. It is saved and restored in one order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fxsplit.distribute.layout import gathered
from fxsplit.distribute.processes import ALONE, Processes
from fxsplit.errors import UsageError
from fxsplit.saving.random_states import random_states, set_random_states


class Stateful(Protocol):
    """Something that can save its state and load it again, as in torch.distributed.checkpoint."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> None: ...


class RunState:
    """Holds together what the next step depends on.

    Args:
        model: the model as the user built it.
        training: position, optimizer, and whatever else is trained or counted.
        processes: those of the run, which save and load together; all but random states is the same in all.
    """

    def __init__(self, model: nn.Module, training: Stateful, processes: Processes = ALONE) -> None:
        self._model, self._training, self._processes = model, training, processes

    def state_dict(self) -> dict[str, Any]:
        """Return plain data and tensors, by the names of parameters. Tensors are not copied.

        Those of which each process has a part are whole in the first one, and empty in the others.
        """
        state = {"model": model_state(self._model), "training": self._training.state_dict()}
        random, *others = self._processes.all(random_states())
        whole = gathered(state, keep=self._processes.is_first)
        return {**whole, "random": random, "random_of_others": others}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned: the model first, which the rest is made from, and random states last.

        Raises UsageError when it is of another model.
        """
        load_model_state(self._model, state["model"])
        self._training.load_state_dict(state["training"])
        states = [state["random"], *state.get("random_of_others", ())]
        if self._processes.rank < len(states):
            set_random_states(states[self._processes.rank])


def model_state(model: nn.Module) -> dict[str, Any]:
    """Return the state of a model by its own names, and beside it the buffers that `state_dict` leaves out."""
    saved = model.state_dict()
    others = {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name not in saved}
    return {"saved": dict(saved), "buffers": others}


@torch.no_grad()
def load_model_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load what `model_state` returned, in place. Raises UsageError when it is of another model, which stays as it is.

    Buffers of other shapes than now are replaced: their module makes them when it runs.
    """
    now = model_state(model)
    if difference := _difference(_shapes(state["saved"]), _shapes(now["saved"])):
        raise UsageError(f"the checkpoint is of another model: {difference}")
    model.load_state_dict(state["saved"])
    for name, buffer in state["buffers"].items():
        path, _, key = name.rpartition(".")
        present = now["buffers"].get(name)
        if isinstance(present, Tensor) and present.shape == buffer.shape:
            present.copy_(buffer)
        else:
            place = present.device if isinstance(present, Tensor) else _device_of(model)
            model.get_submodule(path)._buffers[key] = buffer.to(place)


def _device_of(model: nn.Module) -> torch.device:
    return next((each.device for each in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) if isinstance(value, Tensor) else () for name, value in state.items()}


def _difference(saved: Mapping[str, tuple[int, ...]], now: Mapping[str, tuple[int, ...]]) -> str:
    """Say where two models differ first."""
    for name in (*saved, *now):
        if name not in now:
            return f"this one has no {name!r}"
        if name not in saved:
            return f"{name!r} is not in there"
        if saved[name] != now[name]:
            return f"{name!r} is {_size(saved[name])} there and {_size(now[name])} here"
    return ""


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"
