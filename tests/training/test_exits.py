"""Auxiliary exits: what they add to the loss, whom they reach, how long they last, and what they leave alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxsplit.caching.cache import CachePolicy
from fxsplit.capture.tracing import trace
from fxsplit.data.loader import Loader
from fxsplit.execute.executor import Executor
from fxsplit.plan.partition import partition
from fxsplit.plan.schedule import SCHEDULES, Phase
from fxsplit.training.optimizers import parameters_of
from fxsplit.training.regularisers.exits import Exits, channel_dim, features_of
from fxsplit.training.regularisers.soft_targets import LastTargets
from fxsplit.training.trainer import Trainer
from tests.execute.test_executor import _executor, _images
from tests.networks import HAZARDS, Chain, LongSkip
from tests.training.test_trainer import TRAIN, Listener, same, trainer, weights

CPU = torch.device("cpu")
SETTLING = (Phase(start=0, stop=4, epochs=1), Phase(start=1, stop=4, epochs=1), Phase(start=2, stop=4, epochs=2))

pytestmark = pytest.mark.usefixtures("one_thread")


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.Flatten(),
        nn.Linear(96, 5),
    )


def exits_of(model: nn.Module, net: Executor, *, count: int = 2, weight: float = 0.3, seed: int = 3) -> Exits:
    graph = trace(model, (torch.empty(2, 3, 8, 8),)).train
    return Exits(graph, net.partitions, count=count, num_classes=5, weight=weight, seed=seed, device=CPU)


def with_exits(model: nn.Module, *, count: int = 2, weight: float = 0.3, **changes: Any) -> Trainer:
    made = partial(exits_of, model, count=count, weight=weight) if count else None
    return trainer(model, exits=made, **changes)


def run(kind: Callable[[], nn.Module], **changes: Any) -> tuple[list[Tensor], list[Tensor]]:
    """What a whole training leaves: the state of the model and of the exits of the last phase."""
    torch.manual_seed(0)
    model = kind()
    torch.manual_seed(1)
    net = with_exits(model, **changes)
    losses = [torch.tensor([record.train_loss, record.eval_loss]) for record in net.epochs()]
    return [*losses, *weights(model)], weights(net.objective.exits.modules) if net.objective.exits else []


def test_training_equals_a_hand_written_loop_bit_for_bit() -> None:
    model = layers()
    plain = copy.deepcopy(model)
    net = with_exits(model, smoothing=0.1)
    ends = [int(part.name) for part in net.plan.partitions[1:3]]
    twin = exits_of(plain, net.executor)
    twin.enter(net.plan.phases[0], pytest.fail)
    heads = [copy.deepcopy(each.linear) for each in twin.modules.values() if isinstance(each.linear, nn.Linear)]
    records = list(net.epochs())

    optimizer = torch.optim.Adam(
        [*plain.parameters(), *(p for head in heads for p in head.parameters())], lr=1e-2, fused=True
    )
    own = 0.0
    for epoch in range(4):
        plain.train()
        own = 0.0
        for batch in Loader(TRAIN, batch_size=16, training=True, seed=3).batches(epoch):
            optimizer.zero_grad()
            values = [batch.images]
            for layer in plain:
                values.append(layer(values[-1]))
            scores = [head(values[end].mean((2, 3))) for head, end in zip(heads, ends, strict=True)]
            main, *early = (F.cross_entropy(each, batch.labels, label_smoothing=0.1) for each in (values[-1], *scores))
            (main + 0.3 * early[0] + 0.3 * early[1]).backward()
            optimizer.step()
            own += main.item() * len(batch.labels)
    assert same(weights(model), weights(plain))
    assert net.objective.exits is not None
    assert same(weights(net.objective.exits.modules), [p for head in heads for p in head.parameters()])
    assert records[-1].train_loss == pytest.approx(own / 50, rel=1e-6)
    assert records[-1].trainable_parameters == sum(p.numel() for p in parameters_of(optimizer))


@pytest.mark.parametrize("recompute", [0, 3])
def test_a_gradient_reaches_what_trains_before_the_exit_and_nothing_else(recompute: int) -> None:
    model = layers()
    net = _executor(model, 8, 4)
    phase = Phase(start=1, stop=4, epochs=1, recompute=recompute)
    exits = exits_of(model, net)
    images, labels = _images(0, 8)
    net.enter(phase)
    exits.enter(phase, pytest.fail)
    net.train()
    with exits.tapped(net) as scores:
        net(images)
    assert len(scores) == 2
    zero = torch.zeros(())
    exits.add_to(zero, scores, labels, smoothing=0.0).backward()  # type: ignore[no-untyped-call]
    reached = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    wanted = {name for part in net.partitions[1:3] for name in part.state}
    # A bias before BatchNorm has a gradient of rounding errors, or of nothing.
    assert wanted & reached == reached
    assert {name for name in wanted if name.endswith("weight") and name in dict(net.named_parameters())} <= reached
    assert all(p.grad is not None and p.grad.any() for p in exits.modules.parameters())
    assert exits.add_to(zero, [], labels, smoothing=0.0) is zero


@pytest.mark.parametrize("plan", [*SCHEDULES, SETTLING])
def test_exits_of_no_weight_change_nothing(plan: Any) -> None:
    without, _ = run(layers, count=0, plan=plan)
    weightless, _ = run(layers, count=2, weight=0.0, plan=plan)
    weighted, _ = run(layers, count=2, plan=plan)
    assert same(without, weightless)
    assert not same(without, weighted)


def test_an_exit_lasts_until_its_partition_settles_and_its_optimizer_state_with_it() -> None:
    model = layers()
    net = with_exits(model, plan=SETTLING)
    assert net.objective.exits is not None
    seen: list[dict[str, nn.Module]] = []
    steps: list[list[int]] = []
    for _ in net.epochs():
        seen.append(dict(net.objective.exits.modules))
        optimizer = net.optimizer.optimizer
        trained = [p for p in model.parameters() if p.requires_grad]
        exits = net.objective.exits.modules
        assert set(optimizer.state) == {*trained, *exits.parameters()} == {*parameters_of(optimizer)}
        firsts = [next(each.parameters()) for each in exits.values()]
        steps.append([int(optimizer.state[first]["step"]) for first in firsts])
    assert [list(names) for names in seen] == [["0", "1"], ["1", "2"], ["2"], ["2"]]
    assert seen[0]["1"] is seen[1]["1"]
    assert seen[1]["2"] is seen[2]["2"]
    assert steps == [[4, 4], [8, 4], [8], [12]]


@pytest.mark.parametrize(
    ("phase", "count", "wanted"),
    [((0, 4), 9, "012"), ((0, 4), 1, "0"), ((0, 2), 9, "01"), ((0, 1), 2, "0"), ((1, 3), 2, "12"), ((3, 4), 2, "")],
)
def test_exits_are_at_the_ends_of_the_first_partitions_that_train(
    phase: tuple[int, int], count: int, wanted: str
) -> None:
    model = layers()
    exits = exits_of(model, _executor(model, 8, 4), count=count)
    exits.enter(Phase(start=phase[0], stop=phase[1], epochs=1), pytest.fail)
    assert list(exits.modules) == list(wanted)


@pytest.mark.parametrize("kind", [layers, Chain, LongSkip, HAZARDS["InPlace"]])
def test_training_from_a_cache_is_the_same_bit_for_bit(kind: Callable[[], nn.Module], tmp_path: Path) -> None:
    cache = CachePolicy(medium="ram", folder=str(tmp_path))
    phases = (Phase(start=0, stop=4, epochs=1), Phase(start=1, stop=4, epochs=3))
    plain, cached = (run(kind, plan=phases, cache=each) for each in (None, cache))
    assert len(plain[1]) == 4
    assert same(plain[0], cached[0])
    assert same(plain[1], cached[1])


@pytest.mark.parametrize("kind", [layers, Chain, HAZARDS["InPlace"], HAZARDS["FunctionalDropout"]])
def test_recomputing_is_the_same_bit_for_bit(kind: Callable[[], nn.Module]) -> None:
    kept, again = (run(kind, plan=(Phase(start=0, stop=4, epochs=4, recompute=cut),)) for cut in (0, 3))
    assert same(kept[0], again[0])
    assert same(kept[1], again[1])


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    def left(micro_batches: int) -> list[Tensor]:
        optimizer = {"name": "momentum", "momentum": 0.0, "lr": 0.1}
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5))
        plan = (Phase(start=0, stop=4, epochs=4, micro_batches=micro_batches),)
        net = with_exits(model, optimizer=optimizer, plan=plan)
        next(net.epochs())
        assert net.objective.exits is not None
        return [*weights(model), *weights(net.objective.exits.modules)]

    for whole, parts, smaller in zip(left(1), left(3), left(2), strict=True):
        torch.testing.assert_close(whole, parts)
        torch.testing.assert_close(whole, smaller)


def test_autocast_and_loss_scaling_train_exits() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        net = with_exits(layers(), amp_dtype=dtype)
        assert net.objective.exits is not None
        twin = exits_of(layers(), net.executor)
        twin.enter(net.plan.phases[0], pytest.fail)
        next(net.epochs())
        pairs = list(zip(weights(net.objective.exits.modules), weights(twin.modules), strict=True))
        assert all(after.isfinite().all() and not torch.equal(after, before) for after, before in pairs)


def test_weights_depend_on_seed_and_partition_alone() -> None:
    model = Chain()
    net = _executor(model, 8, 4)

    def made(seed: int, start: int = 0) -> list[Tensor]:
        exits = exits_of(model, net, seed=seed)
        exits.enter(Phase(start=start, stop=4, epochs=1), pytest.fail)
        return weights(exits.modules)

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = made(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert same(first, made(1))
    assert not same(first, made(2))
    assert first[0].shape == first[2].shape
    assert not torch.equal(first[0], first[2])
    assert same(first[2:], made(1, start=1)[:2])


def test_an_exit_anneals_with_its_partition() -> None:
    net = with_exits(layers(), plan=SETTLING, annealing=1.0)
    assert net.objective.exits is not None
    ends = []
    for _ in net.epochs():
        by_parameter = {p: group["end"] for group in net.optimizer.optimizer.param_groups for p in group["params"]}
        ends.append([by_parameter[p] for each in net.objective.exits.modules.values() for p in each.parameters()])
    # Four steps an epoch; partition 0 settles after one epoch, partition 1 after two, partition 2 never.
    assert ends == [[4, 4, 8, 8], [8, 8, 16, 16], [16, 16], [16, 16]]


def test_exits_learn_beside_everything_else() -> None:
    more: dict[str, Any] = {"plan": SETTLING, "recalibrate": True, "average": 0.5, "smoothing": 0.1}
    without, _ = run(layers, count=0, soft_targets=LastTargets(50, weight=0.8), **more)
    weightless, _ = run(layers, weight=0.0, soft_targets=LastTargets(50, weight=0.8), **more)
    weighted, exits = run(layers, soft_targets=LastTargets(50, weight=0.8), **more)
    assert same(without, weightless)
    assert not same(without, weighted)
    assert all(value.isfinite().all() for value in exits)


def test_the_model_knows_nothing_of_its_exits() -> None:
    model = layers()
    names, modules = list(model.state_dict()), list(model.named_modules())
    net = with_exits(model)
    for _ in net.epochs():
        assert list(net.executor.state_dict()) == list(model.state_dict()) == names
        assert list(model.named_modules()) == modules


def test_weight_decay_spares_the_biases_of_exits() -> None:
    net = with_exits(layers(), optimizer={"name": "adamw", "weight_decay": 0.1}, loader={"limit": 1})
    next(net.epochs())
    assert net.objective.exits is not None
    decays = {p: group["weight_decay"] for group in net.optimizer.optimizer.param_groups for p in group["params"]}
    assert [decays[p] for p in net.objective.exits.modules.parameters()] == [0.1, 0.0] * 2


class Flattening(nn.Module):
    """Between the two convolutions there is no row for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(256, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).reshape(-1).tanh()
        return self.head(self.second(x.reshape(-1, 4, 8, 8)).flatten(1))


def test_a_partition_without_rows_has_no_exit_and_it_is_told_once() -> None:
    model = Flattening()
    captured = trace(model, (torch.empty(2, 3, 8, 8),))
    parts = partition(captured, at=["tanh", "second", "head"])
    exits = Exits(captured.train, parts, count=2, num_classes=5, weight=1.0, seed=0, device=CPU)
    listener = Listener()
    for _ in range(2):
        exits.enter(Phase(start=0, stop=4, epochs=1), listener.notice)
        assert list(exits.modules) == ["1"]
    assert listener.heard == [
        f"there is no exit after partition {parts[0].name!r}, because it delivers no floating-point row for each image"
    ]


class LargeSkip(Chain):
    """The value made first is the largest at every cut."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.norm1(self.conv1(x))
        x = self.norm2(self.conv2(F.avg_pool2d(first, 2)))
        return self.head(x.mean((2, 3)) + first.mean((2, 3)))


def test_an_exit_takes_what_its_own_partition_made() -> None:
    captured = trace(LargeSkip(), (torch.empty(2, 3, 8, 8),))
    parts = partition(captured, at=["conv2", "norm2"])
    values = [features_of(captured.train, part) for part in parts[:2]]
    assert [len(part.writes) for part in parts[:2]] == [2, 2]
    # Of the two that the first one made, the larger.
    assert [value and value.shape for value in values] == [(2, 6, 8, 8), (2, 6, 4, 4)]


@pytest.mark.parametrize(
    ("shape", "channels"),
    [((2, 7), 1), ((2, 16, 7), 2), ((2, 7, 4, 4), 1), ((2, 4, 4, 7), 3), ((2, 4, 4, 4), 1), ((2, 7, 3, 4, 4), 1)],
)
def test_where_the_channels_are(shape: tuple[int, ...], channels: int) -> None:
    assert channel_dim(shape) == channels


@pytest.mark.parametrize(
    ("name", "options", "at", "channels"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32}, ["blocks.1", "blocks.6"], [192, 192]),
        ("swin_tiny_patch4_window7_224", {"img_size": 64}, ["layers.1", "layers.2"], [96, 192]),
        ("resnet18", {}, ["layer2", "layer3", "fc"], [64, 128, 512]),
    ],
)
def test_exits_of_known_networks(name: str, options: dict[str, int], at: list[str], channels: list[int]) -> None:
    model = timm.create_model(name, num_classes=5, **options)
    size = options.get("img_size", 32)
    captured = trace(model, (torch.empty(2, 3, size, size),))
    parts = partition(captured, at=at)
    exits = Exits(captured.train, parts, count=3, num_classes=5, weight=1.0, seed=0, device=CPU)
    net = Executor(captured, parts).train()
    exits.enter(Phase(start=0, stop=len(parts), epochs=1), pytest.fail)
    assert [each.linear.weight.shape[1] for each in exits.modules.values()] == channels  # type: ignore[union-attr]
    images, labels = _images(0, size)
    with exits.tapped(net) as scores:
        net(images)
    exits.add_to(torch.zeros(()), scores, labels, smoothing=0.0).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.any() for p in exits.modules.parameters())
