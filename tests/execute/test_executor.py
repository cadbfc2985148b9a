"""The executor computes what the model computes, bit for bit, and moves what the phase says and nothing else."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxsplit.capture.tracing import trace
from fxsplit.errors import GuardError, PartitionError
from fxsplit.execute.executor import Executor
from fxsplit.models.libraries.paper import NETWORKS
from fxsplit.models.registry import build
from fxsplit.objects.structure import tensors_in
from fxsplit.plan.cuts import cuts
from fxsplit.plan.partition import partition
from fxsplit.plan.schedule import SCHEDULES, Phase, schedule
from tests.networks import (
    HAZARDS,
    SHORTER,
    AuxiliaryHead,
    BranchOnShape,
    Chain,
    FunctionalDropout,
    FunctionalNorm,
    OtherTensors,
    RootParameter,
    TiedWeight,
)


def _resnext() -> nn.Module:
    model: nn.Module = timm.create_model("resnext50_32x4d", num_classes=5, **SHORTER["resnext50_32x4d"])
    return model


def _paper(name: str) -> Callable[[], nn.Module]:
    return lambda: NETWORKS[name](num_classes=5, img_size=16)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{name: (make, 8) for name, make in HAZARDS.items()},
    **{f"paper:{name}": (_paper(name), 16) for name in NETWORKS},
    "timm:resnext50_32x4d": (_resnext, 32),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def _executor(model: nn.Module, size: int, count: int | None = None) -> Executor:
    captured = trace(model, (torch.empty(2, 3, size, size),))
    most = 1 + sum(cut.refusal is None for cut in cuts(captured))
    parts = partition(captured, count=min(most, 4) if count is None else count)
    return Executor(captured, parts)


def _images(seed: int, size: int, batch: int = 4) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, size, size, generator=random), torch.randint(5, (batch,), generator=random)


def _train(net: nn.Module, size: int, steps: int = 3) -> list[Tensor]:
    """Train from a fixed random state; return all that a run leaves behind: losses, gradients, random state."""
    torch.manual_seed(7)
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(steps):
        images, labels = _images(step, size)
        optimizer.zero_grad()
        loss = _loss(net(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    gradients = [torch.zeros(()) if p.grad is None else p.grad for p in net.parameters()]
    return [*losses, *gradients, torch.get_rng_state()]


def _loss(output: object, labels: Tensor) -> Tensor:
    """Of the class scores, and of an auxiliary head's."""
    scores = [leaf for leaf in tensors_in(output) if leaf.shape == (len(labels), 5)]
    return torch.stack([F.cross_entropy(each, labels) for each in scores]).sum()


def _same(ours: list[Tensor], plain: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def _flat(output: object) -> list[Tensor]:
    return tensors_in(output)


@pytest.mark.parametrize("name", MODELS)
def test_everything_training_equals_the_plain_model_bit_for_bit(name: str) -> None:
    make, size = MODELS[name]
    torch.manual_seed(0)
    plain = make()
    net = _executor(copy.deepcopy(plain), size)

    assert _same(_train(net, size), _train(plain, size))
    assert list(net.state_dict()) == list(plain.state_dict())
    assert _same(list(net.state_dict().values()), list(plain.state_dict().values()))

    plain.eval()
    net.eval()
    for batch in (4, 3):
        images, _ = _images(9, size, batch)
        random_state = torch.get_rng_state()
        ours, expected = _flat(net(images)), _flat(plain(images))
        assert _same(ours, expected)
        assert torch.equal(torch.get_rng_state(), random_state)


def test_what_partitions_deliver_is_heard_before_the_next_one_runs() -> None:
    model = Chain()
    net = _executor(model, 8, 4).train()
    net.enter(Phase(start=1, stop=3, epochs=1))
    images, _ = _images(0, 8)
    told: list[tuple[int, int]] = []
    ran: list[str] = []
    model.head.register_forward_pre_hook(lambda *_: ran.append("head"))

    def hear(index: int, values: list[Tensor]) -> None:
        told.append((index, len(values)))
        assert not ran
        assert all(value.requires_grad for value in values)

    with net.tapped(hear):
        net(images)
    assert told == [(index, len(net.partitions[index].writes)) for index in (1, 2)]
    net(images)
    assert len(told) == 2
    with pytest.raises(ZeroDivisionError), net.tapped(lambda *_: 1 // 0):
        net(images)
    net(images)
    module = nn.Identity()
    module.forward = hear  # type: ignore[method-assign]
    with net.tapped(module):
        assert module not in net.modules()


@pytest.mark.parametrize("spec", ["timm:resnet18", "torchvision:convnext_tiny", "paper:resnext"])
def test_stochastic_depth_drops_the_same_branches_and_none_in_evaluation(spec: str) -> None:
    torch.manual_seed(0)
    plain = build(spec, num_classes=5, img_size=32, drop_path=0.5)
    net = _executor(copy.deepcopy(plain), 32)
    assert _same(_train(net, 32), _train(plain, 32))
    assert _same(list(net.state_dict().values()), list(plain.state_dict().values()))

    undropped = build(spec, num_classes=5, img_size=32)
    undropped.load_state_dict(net.state_dict())
    images, _ = _images(9, 32)
    random_state = torch.get_rng_state()
    assert torch.equal(net.eval()(images), undropped.eval()(images))
    assert torch.equal(torch.get_rng_state(), random_state)
    net.train()
    assert not torch.equal(net(images), net(images))


@pytest.mark.parametrize("name", HAZARDS)
@pytest.mark.parametrize("schedule_name", SCHEDULES)
def test_exactly_the_state_of_the_training_partitions_moves(name: str, schedule_name: str) -> None:
    make, size = MODELS[name]
    torch.manual_seed(0)
    model = make()
    learning = _learning(copy.deepcopy(model), size)
    net = _executor(model, size)
    plan = schedule(schedule_name, partitions=net.partitions, epochs=8)
    trained: set[str] = set()
    for phase in plan.phases:
        net.enter(phase)
        training = {name for part in net.partitions[phase.start : phase.stop] for name in part.state}
        before = {name: value.clone() for name, value in net.state_dict(keep_vars=True).items()}
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
        for step in range(2):
            net.train()
            images, labels = _images(step, size)
            _loss(net(images), labels).backward()
            optimizer.step()
        after = net.state_dict()
        moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
        assert training & learning <= moved, "a parameter that should train did not"
        assert _owners(net, moved) <= training
        trained |= training
    assert trained


def _learning(plain: nn.Module, size: int) -> set[str]:
    """The parameters that get a gradient at all."""
    images, labels = _images(0, size)
    _loss(plain.train()(images), labels).backward()
    return {name for name, parameter in plain.named_parameters() if parameter.grad is not None}


class FusedNorms(nn.Sequential):
    """timm's norm with activation, which is traced through: it counts in one op and moves its statistics in another."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3),
            timm.layers.BatchNormAct2d(6),
            nn.Conv2d(6, 6, 3),
            timm.layers.BatchNormAct2d(6),
            nn.Flatten(),
            nn.Linear(96, 5),
        )


@pytest.mark.parametrize("make", [FusedNorms, FunctionalNorm])
def test_a_counter_moves_with_the_statistics_of_its_norm(make: Callable[[], nn.Module]) -> None:
    """Wherever the model is cut, as in the plain model with the norms before the cut frozen by hand."""
    captured = trace(make(), (torch.empty(2, 3, 8, 8),))
    places = [cut.path for cut in cuts(captured) if cut.refusal is None]
    frozen = set()
    for place in places:
        model = make()
        captured = trace(model, (torch.empty(2, 3, 8, 8),))
        net = Executor(captured, partition(captured, at=[place]))
        net.enter(Phase(start=1, stop=2, epochs=1))
        plain = copy.deepcopy(model).train()
        for path, module in plain.named_modules():
            if f"{path}.running_mean" in net.partitions[0].state:
                module.eval()
                frozen.add(path)
        for step in range(2):
            images, _ = _images(step, 8)
            net.train()(images)
            plain(images)
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(net.state_dict()[name], buffer)
    assert len(frozen) > 1


def _owners(net: Executor, names: set[str]) -> set[str]:
    """Tied parameters under the first of their names."""
    first = {id(value): name for name, value in reversed([*net.named_parameters(), *net.named_buffers()])}
    values = net.state_dict(keep_vars=True)
    return {first[id(values[name])] for name in names}


def test_the_settled_prefix_stays_in_evaluation_without_autograd_whatever_is_called() -> None:
    torch.manual_seed(0)
    model = FunctionalDropout()
    net = _executor(model, 8, count=3)
    net.enter(Phase(start=2, stop=3, epochs=1))
    net.train()
    model.train()
    settled = {name for part in net.partitions[:2] for name in part.state}
    before = {name: model.state_dict()[name].clone() for name in settled}
    images, labels = _images(0, 8)
    (value,) = net.settle(images)
    assert not value.requires_grad
    F.cross_entropy(net(images), labels).backward()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(p.grad is None for name, p in model.named_parameters() if name in settled)


def test_a_frozen_tail_passes_gradients_and_runs_in_evaluation() -> None:
    torch.manual_seed(0)
    model = Chain()
    captured = trace(model, (torch.empty(2, 3, 8, 8),))
    net = Executor(captured, partition(captured, at=["conv2"]))
    reference = copy.deepcopy(model)
    net.enter(Phase(start=0, stop=1, epochs=1))
    net.train()
    images, labels = _images(0, 8)
    F.cross_entropy(net(images), labels).backward()

    # By hand: the first partition in training, the rest in evaluation.
    reference.train()
    reference.norm2.eval()
    F.cross_entropy(reference(images), labels).backward()
    grads = {name: p.grad for name, p in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        if name in net.partitions[0].state:
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, grads[name])
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("at", [["conv2"], ["norm2"], ["norm2", "conv2_1"]])
def test_a_frozen_tail_returns_the_auxiliary_output_of_what_trains(at: list[str]) -> None:
    torch.manual_seed(0)
    model = AuxiliaryHead()
    captured = trace(model, (torch.empty(2, 3, 8, 8),))
    net = Executor(captured, partition(captured, at=at))
    reference = copy.deepcopy(model).train()
    reference.norm2.eval()
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_(name in net.partitions[0].state)
    net.enter(Phase(start=0, stop=1, epochs=1))
    images, labels = _images(0, 8)
    results, kinds = [], []
    for each in (net.train(), reference):
        torch.manual_seed(1)
        output = each(images)
        assert len(_flat(output)) == 2
        kinds.append(type(output))
        _loss(output, labels).backward()
        results.append([*_flat(output), *(p.grad for p in each.parameters() if p.grad is not None)])
    assert kinds[0] is kinds[1]
    assert len(results[0]) == len(results[1]) > 4
    assert _same(*results)
    assert _same(_flat(net.eval()(images)), _flat(reference.eval()(images)))


class DroppedFeatures(Chain):
    """Returns features with dropout in training, and features without in evaluation."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = self.norm1(self.conv1(x)).relu()
        features = F.dropout(x.sigmoid(), training=True) if self.training else x.sigmoid()
        return self.head(self.norm2(self.conv2(x)).relu().mean((2, 3))), features


def test_what_a_settled_part_returns_is_what_it_returns_in_evaluation() -> None:
    torch.manual_seed(0)
    model = DroppedFeatures()
    captured = trace(model, (torch.empty(2, 3, 8, 8),))
    net = Executor(captured, partition(captured, at=["conv2", "norm2"]))
    images, _ = _images(0, 8)
    expected = copy.deepcopy(model).eval()(images)[1]
    for phase in (Phase(start=1, stop=3, epochs=1), Phase(start=2, stop=3, epochs=1), Phase(start=1, stop=2, epochs=1)):
        net.enter(phase)
        torch.testing.assert_close(net.train()(images)[1], expected)
    net.release()
    torch.manual_seed(1)
    plain = copy.deepcopy(model).train()(images)[1]
    torch.manual_seed(1)
    assert torch.equal(net.train()(images)[1], plain)


class OtherFeatures(Chain):
    """Returns what training makes before the cut and evaluation after it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = self.norm1(self.conv1(x)).relu()
        features = F.dropout(x) if self.training else x.tanh()
        return self.head(self.norm2(self.conv2(x)).relu().mean((2, 3))), features


def test_an_output_that_no_partition_makes_in_a_phase_is_refused() -> None:
    captured = trace(OtherFeatures(), (torch.empty(2, 3, 8, 8),))
    net = Executor(captured, partition(captured, at=["conv2"])).train()
    images, _ = _images(0, 8)
    assert len(_flat(net(images))) == 2
    net.enter(Phase(start=1, stop=2, epochs=1))
    with pytest.raises(PartitionError, match="no partition makes it; cut elsewhere"):
        net(images)


def test_entering_drops_gradients_that_momentum_would_follow() -> None:
    net = _executor(Chain(), 8, count=2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    images, labels = _images(0, 8)
    F.cross_entropy(net(images), labels).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    net.enter(Phase(start=1, stop=2, epochs=1))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer.step()
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert moved.isdisjoint(net.partitions[0].state)


def test_release_restores_and_what_the_user_froze_stays_frozen() -> None:
    model = Chain()
    model.conv2.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    net = _executor(model, 8, count=3)
    net.enter(Phase(start=1, stop=3, epochs=1))
    assert not model.conv2.weight.requires_grad
    assert not model.conv1.weight.requires_grad
    net.release()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_a_tied_weight_settles_with_its_first_user() -> None:
    model = TiedWeight()
    captured = trace(model, (torch.empty(2, 3, 8, 8),))
    net = Executor(captured, partition(captured, at=["second"]))
    assert captured.tied == {"first.weight": ("second.weight",)}
    net.enter(Phase(start=1, stop=2, epochs=1))
    before = model.first.weight.clone()
    _train(net, 8)
    assert torch.equal(model.first.weight, before)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
@pytest.mark.parametrize("name", HAZARDS)
def test_copies_are_whole_and_their_own(name: str, copy_of: Callable[[Executor], Executor]) -> None:
    make, size = MODELS[name]
    net = _executor(make(), size)
    last = max(part.index for part in net.partitions if part.parameters)
    net.enter(Phase(start=last, stop=len(net.partitions), epochs=1))
    other = copy_of(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    left = _train(other, size)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    assert _same(left, _train(net, size))
    assert other.window == net.window


def test_weights_travel_by_the_models_own_names() -> None:
    model = Chain()
    net = _executor(Chain(), 8)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file, weights_only=True))
    net.eval()
    model.eval()
    images, _ = _images(0, 8)
    assert torch.equal(net(images), model(images))


def test_moving_the_executor_moves_the_model() -> None:
    model = RootParameter()
    net = _executor(model, 8).to(torch.float64)
    assert model.norm1.running_mean is not None
    assert model.norm1.running_mean.dtype is model.shift.dtype is model.scale.dtype is torch.float64
    images, _ = _images(0, 8)
    assert net(images.double()).dtype is torch.float64


def test_an_input_that_takes_another_path_is_refused_by_name() -> None:
    net = _executor(BranchOnShape(), 8)
    with pytest.raises(GuardError, match=r"bool\(\) of 'gt' was True and is now False .*networks\.py"):
        net(torch.randn(2, 3, 6, 6))
    with pytest.raises(GuardError, match="traced with a tensor for 'x' and is now given 'image'"):
        net("image")


def test_other_sizes_work_where_the_model_does_not_ask() -> None:
    torch.manual_seed(0)
    plain = Chain()
    net = _executor(copy.deepcopy(plain), 8)
    images = torch.randn(3, 3, 12, 10)
    assert torch.equal(net(images), plain(images))


def test_partitions_of_another_model_are_refused() -> None:
    captured, other = (trace(make(), (torch.empty(2, 3, 8, 8),)) for make in (Chain, TiedWeight))
    with pytest.raises(PartitionError, match="from another trace"):
        Executor(captured, partition(other, count=2))
    net = Executor(captured, partition(captured, count=2))
    with pytest.raises(PartitionError, match=r"\[2, 3\) of 2"):
        net.enter(Phase(start=2, stop=3, epochs=1))


def test_an_assertion_about_data_is_made_sure_of() -> None:
    net = _executor(HAZARDS["AssertsOnData"](), 8)
    images, _ = _images(0, 8)
    net(images)
    images[0, 0, 0, 0] = float("nan")
    with pytest.raises(GuardError, match=r"another path .* at .*tests/networks.py:\d+"):
        net(images)


def test_the_models_own_hooks_are_kept() -> None:
    model = Chain()
    model.register_forward_hook(lambda _module, _args, output: 2 * output)
    plain = copy.deepcopy(model)
    net = _executor(model, 8).eval()
    images, _ = _images(0, 8)
    assert torch.equal(net(images), plain.eval()(images))


def test_a_value_that_only_training_returns_is_none_in_evaluation() -> None:
    net = _executor(HAZARDS["AuxiliaryHead"](), 8)
    images, _ = _images(0, 8)
    assert net.train()(images).auxiliary.shape == (4, 5)
    assert net.eval()(images).auxiliary is None


def test_tensors_beside_the_parameters_are_the_models_own() -> None:
    model = OtherTensors().eval()
    net = _executor(model, 8).eval()
    images, _ = _images(0, 8)
    before = net(images)
    model.shifts[1].fill_(3)
    expected = copy.deepcopy(model)(images)
    assert torch.equal(net(images), expected)
    assert not torch.equal(before, expected)
