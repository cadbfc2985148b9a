"""The proof of one batch: what it finds, where it says that it begins, and that it leaves everything as it was."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsplit
from fxsplit.errors import ProofError, UsageError
from fxsplit.proving.equality import differences, leaves
from fxsplit.proving.first_batch import prove_batch

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3])


class Net(nn.Module):
    """A bit of everything that a step can change."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.3)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 5).requires_grad_(False)
        self.frozen.bias.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.relu(self.norm(self.conv(x)))).mean((2, 3))
        scores: Tensor = self.frozen(self.head(x))
        return scores


class Counting(nn.Module):
    """Kept whole: changes what is neither parameter nor buffer, and draws from everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seen, self.last = 0, [1.0], torch.zeros(2)
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(float(x.detach().sum()))
        self.last += 1
        self.late = self.calls
        noise = torch.rand((), generator=self.generator) + random.random() + np.random.rand() + self.calls
        return x * noise if x.sum() > -1e9 else x


class Whole(Net):
    def __init__(self) -> None:
        super().__init__()
        self.counting = Counting()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.counting(x) * 1)


def net_of(model: nn.Module) -> fxsplit.Executor:
    trace = fxsplit.trace(model, (IMAGES,), leaves=[Counting])
    return fxsplit.Executor(trace, fxsplit.partition(trace, count=3))


def state_of(model: nn.Module) -> Any:
    """All that a proof might leave changed."""
    return {
        path: {
            **{key: copy.deepcopy(value) for key, value in vars(module).items() if key not in ("_modules", "_stages")},
            "gradients": {name: each.grad for name, each in module.named_parameters()},
            "wanted": {name: each.requires_grad for name, each in module.named_parameters()},
        }
        for path, module in model.named_modules()
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [Net, Whole])
def test_everything_is_put_back(kind: type[Net], training: bool) -> None:
    model = kind().train(training)
    net = net_of(model)
    model.norm.eval()
    model(IMAGES).sum().backward()
    gradient = model.head.weight.grad
    handle = model.head.register_forward_hook(lambda *_: None)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[union-attr, index]
    before, versions = leaves(state_of(model), ""), [each._version for each in model.parameters()]
    proof = fxsplit.prove(model, net, (IMAGES,))
    assert proof.compared > 20
    assert not proof.varying
    assert not differences(before, leaves(state_of(model), ""))
    assert model.head.weight.grad is gradient
    assert [each._version for each in model.parameters()] == versions
    assert handle.id in model.head._forward_hooks
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[union-attr, index]


def _break(net: fxsplit.Executor, index: int, change: Callable[[Tensor], Tensor]) -> None:
    """Let what a partition delivers be changed."""

    def wrong(_stage: nn.Module, _values: Any, made: Any) -> Any:
        return [change(value) for value in made] if isinstance(made, list) else change(made)

    net.stage_at(index).register_forward_hook(wrong)


class _TripledGradient(torch.autograd.Function):
    @staticmethod
    def forward(_context: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_context: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 3


def _drawn(x: Tensor) -> Tensor:
    np.random.rand()
    return x


def test_a_wrong_value_is_named_with_the_module_behind_it() -> None:
    model = Net()
    net = net_of(model)
    before = leaves(state_of(model), "")
    _break(net, 0, lambda value: value * 1.001)
    with pytest.raises(
        ProofError, match=r"output \(by .* at most\), loss .* and \d+ more differ, which begins"
    ) as caught:
        fxsplit.prove(model, net, (IMAGES,))
    assert caught.value.exit_code == 4
    assert "before module 'head', after 'drop'" in str(caught.value)
    assert "--no-prove" in str(caught.value)
    assert not differences(before, leaves(state_of(model), ""))


def test_a_wrong_gradient_is_named_with_the_place_from_which_it_comes() -> None:
    model = Net()
    net = net_of(model)
    _break(net, 1, _TripledGradient.apply)  # type: ignore[arg-type]
    with pytest.raises(ProofError, match=r"gradient of conv\.weight .* in the backward of 'head'"):
        fxsplit.prove(model, net, (IMAGES,))


def test_a_module_that_gives_something_else_is_named() -> None:
    model = Net()
    net = net_of(model)
    twin = copy.deepcopy(model.frozen)
    with torch.no_grad():
        twin.weight[0, 0] += 1e-3
    last, own = net.stage_at(len(net.partitions) - 1), model.frozen.weight.data

    def swap(weight: Tensor) -> None:
        model.frozen.weight.data = weight

    last.register_forward_pre_hook(lambda *_: swap(twin.weight.data))
    last.register_forward_hook(lambda *_: swap(own))
    with pytest.raises(ProofError, match="begins in module 'frozen'"):
        fxsplit.prove(model, net, (IMAGES,))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_drawn, "random state of numpy .another value. differ"),
        (lambda value: (value,), "type of output .tuple instead of Tensor."),
        (lambda value: value.detach(), "output .requires a gradient in only one of the two."),
        (lambda value: value.double(), "output .dtype torch.float64 instead of torch.float32."),
    ],
)
def test_every_kind_of_difference_is_found(change: Any, expected: str) -> None:
    model = Net()
    net = net_of(model)
    _break(net, 2, change)
    with pytest.raises(ProofError, match=expected):
        fxsplit.prove(model, net, (IMAGES,))


def test_a_gradient_that_only_one_of_the_two_has() -> None:
    model = Net()
    net = net_of(model)
    bias = model.frozen.bias
    _break(net, 2, lambda value: value + (bias.detach() - bias))
    with pytest.raises(ProofError, match=r"gradient of frozen\.bias"):
        fxsplit.prove(model, net, (IMAGES,))


class Noisy(nn.Module):
    """As kernels do that add up in any order: another result each time, whatever the seed."""

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.tensor(list(os.urandom(x.numel()))).view_as(x) / 255 - 0.5
        return x + noise.to(x) * 1e-6 * (x.sum() < 1e9)


class Unsteady(Net):
    def __init__(self) -> None:
        super().__init__()
        self.drop = Noisy()  # type: ignore[assignment]


def test_what_the_model_varies_by_itself_is_measured_and_allowed() -> None:
    model = Unsteady()
    trace = fxsplit.trace(model, (IMAGES,), leaves=[Noisy])
    net = fxsplit.Executor(trace, fxsplit.partition(trace, count=3))
    proof = fxsplit.prove(model, net, (IMAGES,))
    assert 0 < proof.varying["output"] < 1e-5
    assert "buffer norm.running_mean" not in proof.varying
    _break(net, 2, lambda value: value * 1.001)
    with pytest.raises(ProofError, match="output"):
        fxsplit.prove(model, net, (IMAGES,))


def test_inputs_that_want_gradients_and_are_written_into() -> None:
    class Writes(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul(1).sub_(0.5))

    model, images = Writes(), IMAGES.clone().requires_grad_()
    assert fxsplit.prove(model, net_of(model), (images,)).compared
    assert images.grad is None

    class WritesInputs(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sub_(0.5))

    model, images = WritesInputs(), IMAGES.clone()
    fxsplit.prove(model, net_of(model), (images,))
    assert torch.equal(images, IMAGES)


def test_what_cannot_be_proved_is_refused() -> None:
    model = Net()
    net = net_of(model)
    net.enter(fxsplit.Phase(start=1, stop=3, epochs=1))
    with pytest.raises(UsageError, match=r"in a phase.*release"):
        fxsplit.prove(model, net, (IMAGES,))
    net.release()
    fxsplit.prove(model, net, (IMAGES,))
    with pytest.raises(UsageError, match="meta"):
        fxsplit.prove(model, net, (IMAGES.to("meta"),))


def batch_proof(model: nn.Module, net: fxsplit.Executor, **options: Any) -> tuple[Any, list[str]]:
    notices: list[str] = []
    given: dict[str, Any] = {
        "images": IMAGES, "labels": LABELS, "micro_batches": 1, "batch_size": len(IMAGES), "loss": F.cross_entropy,
        "autocast": nullcontext, **options,
    }  # fmt: skip
    return prove_batch(model, net, notice=notices.append, **given), notices


def test_micro_batches_and_autocast_are_those_of_the_run() -> None:
    model = Net()
    net = net_of(model)
    sizes, types = [], []

    def hear(_module: nn.Module, args: Any, made: Tensor) -> None:
        sizes.append(len(args[0]))
        types.append(made.dtype)

    model.conv.register_forward_hook(hear)
    proof, _ = batch_proof(model, net, micro_batches=2, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert sizes == [2, 2] * 2
    assert set(types) == {torch.bfloat16}
    assert proof.compared == batch_proof(model, net)[0].compared + 4


def test_a_batch_that_is_not_full_is_divided_as_training_divides_it() -> None:
    """Three images into two micro-batches would leave one alone."""
    model, sizes = Net(), []
    net = net_of(model)
    model.conv.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    batch_proof(model, net, images=IMAGES[:3], labels=LABELS[:3], micro_batches=2)
    assert sizes == [3] * 2


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: 1")]
)
@pytest.mark.parametrize("most", [4, 2, 1])
def test_where_memory_does_not_hold_it_a_smaller_batch_is_taken(error: Exception, most: int) -> None:
    model = Net()
    net = net_of(model)

    def full(_module: nn.Module, args: Any) -> None:
        if len(args[0]) > most:
            raise error

    model.conv.register_forward_pre_hook(full)
    before = leaves(state_of(model), "")
    proof, notices = batch_proof(model, net)
    assert not differences(before, leaves(state_of(model), ""))
    assert (proof is None) is (most == 1)
    assert len(notices) == {4: 0, 2: 1, 1: 2}[most]
    assert all("memory does not hold" in notice for notice in notices)


def test_half_of_an_odd_batch_is_the_larger_one() -> None:
    model, sizes = Net(), []

    def full(_module: nn.Module, args: Any) -> None:
        sizes.append(len(args[0]))
        if sizes[-1] > 2:
            raise MemoryError

    net = net_of(model)
    model.conv.register_forward_pre_hook(full)
    _, notices = batch_proof(model, net, images=IMAGES[:3], labels=LABELS[:3])
    assert sizes == [3, 2, 2]
    assert notices == ["memory does not hold the proof of the first batch: 2 of its 3 images are taken"]


def test_other_errors_go_on() -> None:
    model = Net()
    net = net_of(model)
    with pytest.raises(IndexError):
        batch_proof(model, net, labels=LABELS + 9)


def test_a_trace_is_verified_where_it_is_asked_for() -> None:
    torch.manual_seed(0)
    model = Net()
    trace = fxsplit.trace(model, (IMAGES,), verify=True)
    assert len(trace.train) > 5
    with pytest.raises(UsageError, match="meta"):
        fxsplit.trace(copy.deepcopy(model).to("meta"), (IMAGES.to("meta"),), verify=True)
