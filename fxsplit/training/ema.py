"""An exponential moving average of the weights: what is tested, and what partitions settle with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fxsplit.cuda.number import Number
from fxsplit.execute.executor import Executor

# With warm-up the share that is left after n steps is 1 - n ** -WARMUP_POWER at most, as in timm.
WARMUP_POWER = 2 / 3


class WeightEma:
    """Keeps the exponential moving average of what trains: parameters, and the buffers of their partitions.

        average = decay * average + (1 - decay) * value, after each step

    It is that of timm's ModelEmaV3, and begins with the first step. A partition that stops training takes its average,
    so what is settled is the same for the network that trains and for the averaged one.

    Args:
        executor: whose partitions train.
        decay: what of the average is left after a step, 0 to 1.
        warmup: let the decay grow from 0 at the beginning.
        device: where steps are recorded, or None.
    """

    def __init__(
        self, executor: Executor, *, decay: float, warmup: bool = False, device: torch.device | None = None
    ) -> None:
        self._executor, self._decay, self._has_warmup = executor, decay, warmup
        self._weight = Number(device)
        self._means: dict[str, Tensor] = {}

    @torch.no_grad()
    def enter(self) -> None:
        """Begin an average of what trains in the phase that was entered, where there is none yet."""
        for name, value in self._training(range(*self._executor.window)).items():
            if name not in self._means:
                self._means[name] = value.detach().clone()

    def _training(self, partitions: Iterable[int]) -> dict[str, Tensor]:
        """Return the parameters of partitions that the user did not freeze, and their buffers, by name."""
        executor = self._executor
        owned = {id(parameter) for index in partitions for parameter in executor.owned[index]}
        names = {name for index in partitions for name in executor.partitions[index].state}
        buffers = {name: buffer for name, buffer in executor.named_buffers() if name in names}
        return {name: each for name, each in executor.named_parameters() if id(each) in owned} | buffers

    def decay_at(self, step: int) -> float:
        """Return what of the average is left after the step with this number, from 1 on."""
        if step <= 1:
            return 0.0
        return min(self._decay, 1 - step**-WARMUP_POWER) if self._has_warmup else self._decay

    def count_step(self, step: int) -> None:
        """Set what `add` adds after the step with this number, from 1 on."""
        if not self._means:
            # All partitions had stopped training, and now a longer plan goes on.
            self.enter()
        self._weight.set(1 - self.decay_at(step))

    @torch.no_grad()
    def add(self) -> None:
        """Add the present values to the averages. It can be recorded."""
        now = self._present()
        floats = [name for name, value in now.items() if value.is_floating_point()]
        means, values = [self._means[name] for name in floats], [now[name] for name in floats]
        weight = self._weight.value
        if means:
            torch._foreach_lerp_(
                means, values, [weight.to(mean.dtype) for mean in means] if isinstance(weight, Tensor) else weight
            )
        for name in now.keys() - set(floats):
            self._means[name].copy_(now[name])

    def _present(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {**dict(self._executor.named_parameters()), **dict(self._executor.named_buffers())}
        return {name: state[name].detach() for name in self._means if name in state}

    @torch.no_grad()
    def settle(self, partitions: Iterable[int]) -> None:
        """Set partitions that stop training to their averages, which end here."""
        for name, value in self._training(partitions).items():
            if name in self._means:
                value.copy_(self._means.pop(name))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averages; then it has its own values again, bit for bit."""
        now = self._present()
        own = {name: value.clone() for name, value in now.items()}
        _write(now, self._means)
        try:
            yield
        finally:
            _write(now, own)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages."""
        return {"means": dict(self._means)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load averages that `state_dict` returned; the same phase must have been entered."""
        self._means = {name: self._means[name] for name in state["means"]}
        _write(self._means, state["means"])


@torch.no_grad()
def _write(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        into[name].copy_(value)
