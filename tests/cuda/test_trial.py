"""Which optimizers can be recorded: found by trying, for all that timm lists."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from timm.optim import list_optimizers
from torch import nn
from torch.optim import Optimizer

from fxsplit.cuda import trial
from fxsplit.cuda.trial import why_not_replayed
from fxsplit.training.optimizers import make_optimizer
from tests.cuda.simulated import SimulatedRecorder

CPU = torch.device("cpu")
WAITS = "the host waits for the result of item"


@pytest.fixture(autouse=True)
def capturable_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let optimizers keep what they count on the device, which they do on GPUs alone."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("torch.optim", "timm.optim")) and hasattr(module, "_get_capturable_supported_devices"):
            monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda **_: ["cpu"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def reason(name: str) -> str | None:
    def make(parameters: Sequence[nn.Parameter], capturable: bool) -> Optimizer:
        given = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
        return make_optimizer(nn.ParameterList(parameters), name=name, capturable=capturable, **given)

    return why_not_replayed(make, SimulatedRecorder(), CPU)


def test_what_is_recorded_of_all_optimizers() -> None:
    """What the CPU's kernels allow; a GPU's may allow more."""
    found = {name: reason(name) for name in list_optimizers()}
    assert len(found) > 90
    recorded = {name for name, why in found.items() if why is None}
    assert {"adam", "adamw", "sgd", "momentum", "nadam", "radam", "adamax", "lion", "muon", "adopt"} <= recorded
    waiting = {name for name, why in found.items() if why == WAITS}
    assert {"lamb", "lars", "adan", "adagrad", "adafactor", "madgrad"} <= waiting
    assert found["laprop"] == "the optimizer LaProp changes on the host"


class Plain(Optimizer):
    """p -= lr * factor * gradient, in one of many ways."""

    def __init__(self, parameters: Sequence[nn.Parameter], step: Callable[[Plain, nn.Parameter, Any], None]) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.how, self.steps = step, torch.zeros(())

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        self.steps.add_(1)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.how(self, parameter, group)


def on_the_device(net: Plain, parameter: nn.Parameter, group: Any) -> None:
    parameter.sub_(parameter.grad * group["lr"] / net.steps)  # type: ignore[operator]


def with_its_own_count(_: Plain, parameter: nn.Parameter, group: Any) -> None:
    group["steps"] = group.get("steps", 0) + 1
    parameter.sub_(parameter.grad * group["lr"] / group["steps"])  # type: ignore[operator]


COUNT = [0]


def with_a_hidden_count(_: Plain, parameter: nn.Parameter, group: Any) -> None:
    COUNT[0] += 1
    parameter.sub_(parameter.grad * group["lr"] / COUNT[0])  # type: ignore[operator]


def with_a_hidden_rate(_: Plain, parameter: nn.Parameter, group: Any) -> None:
    rate = group["lr"]
    parameter.sub_(parameter.grad * float(rate if isinstance(rate, float) else rate.numpy()))  # type: ignore[operator]


def with_fresh_state(net: Plain, parameter: nn.Parameter, group: Any) -> None:
    net.state[parameter]["mean"] = parameter.grad * group["lr"]
    parameter.sub_(net.state[parameter]["mean"])


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (on_the_device, None),
        (with_its_own_count, "the optimizer Plain changes on the host"),
        (with_a_hidden_count, "its replayed steps differ from eager ones"),
        (with_a_hidden_rate, "its replayed steps differ from eager ones"),
        (with_fresh_state, "the optimizer Plain changes on the host"),
    ],
)
def test_numbers_on_the_host_are_noticed(step: Any, expected: str | None) -> None:
    def made(parameters: Sequence[nn.Parameter], _: bool) -> Optimizer:
        COUNT[0] = 0
        return Plain(parameters, step)

    assert why_not_replayed(made, SimulatedRecorder(), CPU) == expected


def test_a_trial_draws_nothing_and_changes_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_rng_state()
    assert reason("adamw") is None
    assert torch.equal(torch.get_rng_state(), before)
    # With one rate throughout, a rate that is burnt in would not be noticed.
    monkeypatch.setattr(trial, "RATES", trial.RATES[:1] * len(trial.RATES))
    assert why_not_replayed(lambda given, _: Plain(given, with_a_hidden_rate), SimulatedRecorder(), CPU) is None
