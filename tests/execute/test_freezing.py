"""What a phase holds of a model: modes and gradients, what is given back, and whose they are."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import update_bn

from fxsplit.capture.tracing import trace
from fxsplit.errors import PartitionError
from fxsplit.execute.executor import Executor
from fxsplit.objects.snapshot import MARK
from fxsplit.plan.partition import partition
from fxsplit.plan.schedule import Phase
from tests.networks import Chain

pytestmark = pytest.mark.usefixtures("one_thread")

MIDDLE = Phase(start=1, stop=2, epochs=1)
LAST = Phase(start=2, stop=3, epochs=1)
EVERYTHING = Phase(start=0, stop=3, epochs=1)


def images(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def chain() -> Chain:
    """Statistics that are neither 0 nor 1."""
    torch.manual_seed(0)
    model = Chain()
    model(images(9) * 2 + 1)
    return model


def executor(model: nn.Module) -> Executor:
    captured = trace(model, (images(),))
    return Executor(captured, partition(captured, at=["conv2", "head"]))


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def wanting(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# Modes


def test_modes_are_given_back_as_the_user_had_them() -> None:
    model = chain()
    model.norm1.eval()
    before = modes(model)
    net = executor(model)
    for phase in (MIDDLE, LAST, MIDDLE):
        net.enter(phase)
        net(images())
        assert not model.norm1.training
        assert model.norm2.training is (phase is MIDDLE)
        assert model.training
        assert model.conv1.training is False
    assert vars(model)[MARK]
    net.release()
    assert modes(model) == before
    assert MARK not in vars(model)


def test_what_somebody_trains_in_between_is_held_again_and_given_back_as_training() -> None:
    model = chain().eval()
    net = executor(model)
    net.enter(LAST)
    model.train()
    before = model.norm1.running_mean.clone()
    net(images())
    model.norm2.train()
    net(images())
    assert torch.equal(model.norm1.running_mean, before)
    assert not model.norm1.training
    assert not model.norm2.training
    net.release()
    assert all(modes(model).values())
    net.enter(LAST)
    model.eval()
    net.release()
    assert not any(modes(model).values())


def test_a_module_on_both_sides_of_the_cut_has_two_modes_in_one_forward() -> None:
    class Twice(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.drop(self.conv1(x))
            return self.head(self.drop(self.conv2(x)).mean((2, 3)))

    model = Twice()
    captured = trace(model, (images(),))
    net = Executor(captured, partition(captured, at=["conv2"]))
    for phase in (Phase(start=1, stop=2, epochs=1), Phase(start=0, stop=1, epochs=1)):
        net.enter(phase)
        torch.manual_seed(3)
        ours = net.train()(images().requires_grad_())
        torch.manual_seed(3)
        first, second = phase.start == 0, phase.stop == 2
        x = F.dropout(model.conv1(images()), 0.5, first)
        expected = model.head(F.dropout(model.conv2(x), 0.5, second).mean((2, 3)))
        assert torch.equal(ours, expected)
        assert model.drop.training


class Adapted(nn.Module):
    """A linear layer with an adapter that is merged into its weight for evaluation, as LoRA does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.down, self.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(6, 2))
        self.merged = False

    def train(self, mode: bool = True) -> Adapted:
        super().train(mode)
        if self.merged is mode:
            self.weight.data += (-1 if mode else 1) * (self.up @ self.down).detach()
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        plain = F.linear(x, self.weight)
        return plain if self.merged else plain + F.linear(F.linear(x, self.down), self.up)


def test_modules_with_a_train_of_their_own_are_told_by_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Adapted(), nn.ReLU(), Adapted(), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(4, 6)
    expected = model(x).detach()
    captured = trace(model, (x,))
    net = Executor(captured, partition(captured, at=["2", "4"]))
    net.enter(Phase(start=1, stop=3, epochs=1))
    assert model[0].merged
    assert not model[2].merged
    assert torch.allclose(net(x), expected, atol=1e-5)
    assert torch.allclose(net.eval()(x), expected, atol=1e-5)
    assert model[2].merged
    net.train()
    net.release()
    assert not model[0].merged
    assert torch.allclose(net(x), expected, atol=1e-5)


# Statistics


def test_update_bn_gives_settled_norms_what_it_gives_the_plain_model_and_folds_follow() -> None:
    model = chain()
    plain = copy.deepcopy(model)
    net = executor(model)
    net.enter(LAST)
    batches = [images(seed) for seed in range(3)]
    for training in (True, False):
        net.train(training)
        plain.train(training)
        net(images())
        update_bn(batches, net)
        update_bn(batches, plain)
        assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
        assert net.training is training
        assert not model.norm1.training
        before = model.norm1.running_var.clone()
        net.train()
        plain.eval()
        with torch.no_grad():
            assert torch.allclose(net(images()), plain(images()), atol=1e-5)
        assert torch.equal(model.norm1.running_var, before)


def test_statistics_that_were_means_before_are_taken_anew_too() -> None:
    model = chain()
    model.norm1.momentum = model.norm2.momentum = None
    plain = copy.deepcopy(model)
    net = executor(model)
    net.enter(LAST)
    net(images())
    update_bn([images(1)], net)
    update_bn([images(1)], plain)
    assert torch.equal(model.norm1.running_mean, plain.norm1.running_mean)
    net(images())
    assert torch.equal(model.norm1.running_mean, plain.norm1.running_mean)


def test_a_momentum_of_none_alone_unsettles_nothing() -> None:
    model = chain()
    net = executor(model)
    net.enter(LAST)
    model.norm1.momentum = None
    before = model.norm1.running_mean.clone()
    net(images())
    net.train()(images())
    assert torch.equal(model.norm1.running_mean, before)


# Gradients


@pytest.mark.parametrize("segmented", [False, True])
def test_a_model_put_into_evaluation_before_backward_is_recomputed_in_training(segmented: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.Flatten(), nn.Linear(216, 3))
    plain = copy.deepcopy(model)
    captured = trace(model, (images(),))
    net = Executor(captured, partition(captured, at=["3"]))
    net.enter(Phase(start=0, stop=2, epochs=1, recompute=1, segmented=segmented))
    for each in (net, plain):
        torch.manual_seed(0)
        loss = each.train()(images()).square().sum()
        each.eval()
        loss.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert not any(modes(model).values())


@pytest.mark.parametrize("training", [True, False])
def test_an_input_that_wants_a_gradient_gets_the_plain_models_through_settled_partitions(training: bool) -> None:
    model = chain()
    plain = copy.deepcopy(model).train(training)
    plain.norm1.eval()
    plain.norm2.eval()
    net = executor(model)
    net.enter(LAST)
    net.train(training)
    # A generator before a discriminator: the input is worked out from something that trains.
    ours, theirs = (torch.ones((), requires_grad=True) for _ in range(2))
    result, expected = net(images() * ours), plain(images() * theirs)
    assert torch.equal(result, expected)
    result.square().sum().backward()
    expected.square().sum().backward()
    assert theirs.grad
    assert torch.equal(ours.grad, theirs.grad)
    assert model.conv1.weight.grad is None
    assert torch.equal(model.head.weight.grad, plain.head.weight.grad)
    assert not net.settle(images())[0].requires_grad
    with torch.no_grad():
        assert not net.settle(images().requires_grad_())[0].requires_grad


def test_evaluation_runs_the_true_modules() -> None:
    model = chain()
    net = executor(model)
    net.enter(LAST)
    net.train()(images())
    assert torch.equal(net.eval()(images()), copy.deepcopy(model).eval()(images()))
    # Written in a way that no tensor tells of.
    model.conv1.weight.data.mul_(3)
    model.norm1.running_mean.data.mul_(3)
    assert torch.equal(net(images()), copy.deepcopy(model).eval()(images()))
    for again in (net.train, lambda: net.enter(LAST)):
        model.conv1.weight.data.mul_(0.5)
        again()
        with torch.no_grad():
            plain = copy.deepcopy(model).eval()
            assert torch.allclose(net(images()), plain(images()), atol=1e-5)


def test_folds_read_eps_and_modules_anew_and_leave_other_kinds_alone() -> None:
    model = chain()
    net = executor(model)
    net.enter(LAST)

    def right() -> bool:
        with torch.no_grad():
            ours = net.train()(images())
            return torch.allclose(ours, copy.deepcopy(model).eval()(images()), atol=1e-5)

    assert right()
    model.norm1.eps = 0.5
    assert right()
    model.norm1 = nn.BatchNorm2d(6, eps=0.1)
    model.norm1.running_mean.fill_(0.3)
    assert right()
    model.norm1 = nn.GroupNorm(2, 6)
    assert right()
    model.norm1 = nn.BatchNorm2d(6)
    model.conv1 = nn.Conv2d(3, 6, 5, padding=2)
    assert right()
    model.conv1 = nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular")
    assert right()


def test_the_weight_of_a_pointwise_convolution_may_become_one_of_a_larger_kernel() -> None:
    """Settled it is a product, which another kernel is not."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    model, x = model.to(memory_format=torch.channels_last), images().contiguous(memory_format=torch.channels_last)
    captured = trace(model, (x,))
    net = Executor(captured, partition(captured, at=["4"]))
    net.enter(Phase(start=1, stop=2, epochs=1))
    for kernel in (1, 3):
        model[0].weight = nn.Parameter(torch.randn(6, 3, kernel, kernel), requires_grad=False)
        with torch.no_grad():
            assert torch.allclose(net.train()(x), copy.deepcopy(model).eval()(x), atol=1e-5)


# Whose


def test_parameters_are_asked_for_at_each_enter() -> None:
    with torch.device("meta"):
        model = Chain()
    captured = trace(model, (torch.empty(2, 3, 8, 8, device="meta"),))
    net = Executor(captured, partition(captured, at=["conv2", "head"]))
    model.to_empty(device="cpu")
    net.enter(MIDDLE)
    assert wanting(model) == {"conv2.weight", "conv2.bias", "norm2.weight", "norm2.bias"}
    model.conv1.weight = nn.Parameter(torch.ones(6, 3, 3, 3))
    assert [len(each) for each in net.owned] == [4, 4, 2]
    assert any(each is model.conv1.weight for each in net.owned[0])
    net.enter(LAST)
    assert wanting(model) == {"head.weight", "head.bias"}
    net.release()
    assert len(wanting(model)) == 10


def test_what_the_user_freezes_between_phases_stays_frozen() -> None:
    model = chain()
    net = executor(model)
    model.conv1.weight.requires_grad_(False)
    net.enter(MIDDLE)
    model.conv2.weight.requires_grad_(False)
    net.enter(LAST)
    net.release()
    assert len(wanting(model)) == 8
    assert wanting(model).isdisjoint({"conv1.weight", "conv2.weight"})


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@pytest.mark.parametrize("is_gone", [False, True])
def test_what_is_parametrized_or_pruned_while_it_is_frozen_thaws_under_its_new_name(is_gone: bool) -> None:
    model = chain()
    model.head.bias.requires_grad_(False)
    net = executor(model)
    net.enter(Phase(start=0, stop=1, epochs=1))
    parametrize.register_parametrization(model.conv2, "weight", Half())
    prune.l1_unstructured(model.head, "weight", 0.5)
    if is_gone:
        del net
        gc.collect()
        executor(model)
    else:
        net.enter(MIDDLE)
        assert wanting(model) == {
            "conv2.parametrizations.weight.original", "conv2.bias", "norm2.weight", "norm2.bias",
        }  # fmt: skip
        net.release()
    assert len(wanting(model)) == 9
    assert wanting(model) > {"conv2.parametrizations.weight.original", "head.weight_orig"}


def test_a_second_executor_is_refused_until_the_first_lets_go() -> None:
    model = chain()
    first, second = executor(model), executor(model)
    first.enter(LAST)
    with pytest.raises(PartitionError, match=r"another executor over this model has entered a phase .* 8 parameters"):
        second.enter(EVERYTHING)
    with pytest.raises(PartitionError, match=r"release\(\)"):
        second.train()(images())
    with pytest.raises(PartitionError, match=r"release\(\)"):
        executor(model)(images())
    # To look does no harm.
    assert torch.equal(second.eval()(images()), first(images()))
    first.release()
    second.enter(LAST)
    assert wanting(model) == {"head.weight", "head.bias"}
    with pytest.raises(PartitionError, match=r"release\(\)"):
        first.train()(images())


@pytest.mark.parametrize("how", ["gone", "copied", "pickled", "copied with its executor"])
def test_what_an_executor_froze_is_not_taken_for_frozen_by_the_user(how: str) -> None:
    model = chain()
    model.conv2.bias.requires_grad_(False)
    model.norm2.eval()
    before, wanted = modes(model), wanting(model)
    first = executor(model)
    first.enter(LAST)
    if how == "gone":
        del first
        gc.collect()
        other: nn.Module = model
    elif how == "copied with its executor":
        other = copy.deepcopy(first)._model
        gc.collect()
    else:
        other = copy.deepcopy(model) if how == "copied" else pickle.loads(pickle.dumps(model))
    second = executor(other)
    assert wanting(other) == wanted
    assert modes(other) == before
    second.enter(MIDDLE)
    assert wanting(other) == {"conv2.weight", "norm2.weight", "norm2.bias"}
    second.release()
    assert wanting(other) == wanted
    assert modes(other) == before
    assert not any(name.startswith("_fxsplit") for name in vars(other))


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copied_executor_holds_its_own_model(copy_of: Callable[[Executor], Executor]) -> None:
    model = chain()
    net = executor(model)
    net.enter(LAST)
    other = copy_of(net)
    other.train()(images())
    with pytest.raises(PartitionError, match=r"release\(\)"):
        executor(other._model).enter(MIDDLE)
    other.release()
    assert len(wanting(other)) == 10
    assert all(modes(other._model).values())
    assert wanting(model) == {"head.weight", "head.bias"}
    assert not model.norm1.training


def test_an_equal_phase_is_the_same_phase() -> None:
    net = executor(chain())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    def phase(stop: int = 3) -> Phase:
        return Phase(start=1, stop=stop, epochs=1, fresh_optimizer=True)

    net.enter(phase(), optimizer)
    net(images()).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 6
    net.enter(phase(), optimizer)
    assert len(optimizer.state) == 6
    net.enter(phase(2), optimizer)
    assert not optimizer.state
