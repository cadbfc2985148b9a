"""State of training: saved between two steps, made anew and loaded, it goes on bit for bit as if it had not stopped."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxsplit.caching.cache import CachePolicy
from fxsplit.plan.schedule import Phase
from fxsplit.report import EpochRecord, Observer, StepRecord
from fxsplit.training import phase_optimizer
from fxsplit.training.accuracy import Accuracy, PendingScore
from fxsplit.training.optimizers import SCHEDULES, load_named_state, make_optimizer, make_scheduler, named_state
from fxsplit.training.plasticity import Plasticity
from fxsplit.training.regularisers.endings import Endings, WeightAverage
from fxsplit.training.regularisers.exits import Exits
from fxsplit.training.regularisers.soft_targets import LastTargets, MeanTargets, SoftTargets
from fxsplit.training.trainer import Trainer
from tests.networks import Chain
from tests.training.test_exits import exits_of, layers
from tests.training.test_trainer import same, trainer, weights

pytestmark = pytest.mark.usefixtures("one_thread")

SETTLING = (Phase(start=0, stop=4, epochs=1), Phase(start=1, stop=4, epochs=1), Phase(start=2, stop=4, epochs=2))
TWICE = (Phase(start=0, stop=4, epochs=2), Phase(start=2, stop=4, epochs=2))

pytestmark = pytest.mark.usefixtures("one_thread")


def with_exits(folder: Path, **changes: Any) -> Trainer:
    model = layers()
    return trainer(
        model,
        plan=tuple(replace(phase, micro_batches=2) for phase in SETTLING),
        exits=partial(exits_of, model),
        soft_targets=LastTargets(50, weight=0.8),
        average=0.75,
        recalibrate=True,
        annealing=0.5,
        scheduler={"name": "cosine"},
        clip_grad=1.0,
        cache=CachePolicy(medium="ram", folder=str(folder)),
        **changes,
    )


def with_midpoint(_: Path, **changes: Any) -> Trainer:
    return trainer(Chain(), plan=TWICE, average=0.75, soft_targets=MeanTargets(50, weight=0.5), **changes)


def with_veto(_: Path, **changes: Any) -> Trainer:
    # From the second step on, nothing moves.
    rates = {"name": "step", "decay_rate": 1e-9, "decay_epochs": 0.5}
    return trainer(Chain(), plan=TWICE, veto=True, scheduler=rates, optimizer={"weight_decay": 1e-3}, **changes)


Make = Callable[..., Trainer]


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """The run ends here."""


class Saves(Observer):
    """Saves all that a run goes on from after a step of the run, or after an epoch, and ends it."""

    def __init__(self, *, step: int | None = None, epoch: int | None = None) -> None:
        self.step, self.epoch = step, epoch
        self.trainer: Trainer | None = None
        self.state: Mapping[str, Any] = {}

    def step_done(self, record: StepRecord) -> None:
        if (record.epoch - 1) * record.steps + record.step == self.step:
            self._save()

    def epoch_done(self, record: EpochRecord) -> None:
        if record.epoch == self.epoch:
            self._save()

    def _save(self) -> None:
        assert self.trainer is not None
        self.state = loaded({"trainer": self.trainer.state_dict(), "model": dict(self.trainer.executor.state_dict())})
        raise Stopped


def loaded(state: Any) -> Any:
    """What a file gives back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def finished(net: Trainer) -> list[tuple[Tensor, ...]]:
    """Run to the end; the figures of each epoch, and the weights that are left."""
    records = [torch.tensor([r.start, r.lr, r.train_loss, r.eval_loss, r.eval_top1]) for r in net.epochs()]
    exits = net.objective.exits
    left = [*weights(net.executor), *(weights(exits.modules) if exits else [])]
    return [*((record,) for record in records), tuple(left)]


def made(make: Make, folder: Path, seed: int, **changes: Any) -> Trainer:
    torch.manual_seed(seed)
    return make(folder, log_interval=1, **changes)


def gone_on(make: Make, folder: Path, saves: Saves, **changes: Any) -> list[tuple[Tensor, ...]]:
    """Interrupt a run where `saves` says, and go on in one that is made anew, of other weights and with `changes`."""
    first = made(make, folder, 0, observer=saves)
    saves.trainer = first
    with pytest.raises(Stopped):
        finished(first)
    second = made(make, folder, 1, **changes)
    second.executor.load_state_dict(saves.state["model"])
    second.load_state_dict(saves.state["trainer"])
    return finished(second)


def agrees(whole: list[tuple[Tensor, ...]], rest: list[tuple[Tensor, ...]]) -> bool:
    """Whether the epochs that were gone on with, and what is left, are the same."""
    return all(len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in zip(whole[-len(rest) :], rest, strict=True))


@pytest.mark.parametrize("make", [with_exits, with_midpoint, with_veto])
@pytest.mark.parametrize(
    "where", [{"step": 3}, {"step": 8}, {"step": 10}, {"step": 16}, {"epoch": 1}, {"epoch": 2}, {"epoch": 3}]
)
def test_training_goes_on_bit_for_bit(make: Make, where: dict[str, int], tmp_path: Path) -> None:
    whole = finished(made(make, tmp_path, 0))
    rest = gone_on(make, tmp_path, Saves(**where))
    done = where["epoch"] if "epoch" in where else (where["step"] - 1) // 4
    assert len(rest) == 4 - done + 1
    assert agrees(whole, rest)


@pytest.mark.parametrize(
    ("make", "step", "broken"),
    [
        (with_exits, 10, Exits),
        (with_exits, 10, SoftTargets),
        (with_exits, 15, WeightAverage),
        (with_exits, 15, Endings),
        (with_exits, 10, Accuracy),
        (with_midpoint, 7, WeightAverage),
        (with_midpoint, 10, SoftTargets),
        (with_veto, 6, Plasticity),
    ],
)
def test_a_part_that_loads_nothing_is_noticed(
    make: Make, step: int, broken: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = finished(made(make, tmp_path, 0))
    assert agrees(whole, gone_on(make, tmp_path, Saves(step=step)))
    monkeypatch.setattr(broken, "load_state_dict", lambda *_: None)
    assert not agrees(whole, gone_on(make, tmp_path, Saves(step=step)))


def test_an_optimizer_that_loads_nothing_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = finished(made(with_exits, tmp_path, 0))
    assert agrees(whole, gone_on(with_exits, tmp_path, Saves(step=10)))
    monkeypatch.setattr(phase_optimizer, "load_named_state", lambda *_: None)
    assert not agrees(whole, gone_on(with_exits, tmp_path, Saves(step=10)))


def test_steps_that_are_taken_again_are_told_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where their scores were still on their way from the device when the run went back."""
    monkeypatch.setattr(PendingScore, "is_here", lambda _: False)
    told: list[int] = []

    class Listens(Observer):
        def step_done(self, record: StepRecord) -> None:
            told.append(record.step)

    net = made(with_midpoint, tmp_path, 0, observer=Listens())
    states: list[Any] = []

    def pause(epoch: int, step: int, *, steps: int, ending: bool = False) -> None:  # noqa: ARG001 - as it is called
        if steps == 1 and not states:
            states.append(loaded({"trainer": net.state_dict(), "model": dict(net.executor.state_dict())}))
        elif steps == 3 and not told and not ending:
            raise Stopped

    with pytest.raises(Stopped):
        next(net.epochs(pause))
    net.executor.load_state_dict(states[0]["model"])
    net.load_state_dict(states[0]["trainer"])
    next(net.epochs())
    assert told == [2, 3, 4]


def keys_of(state: Any) -> set[Any]:
    """All keys inside; what is not plain data is one of them."""
    if isinstance(state, Mapping):
        return set(state).union(*map(keys_of, state.values()))
    if isinstance(state, list | tuple):
        return set().union(*map(keys_of, state))
    return set() if state is None or isinstance(state, str | int | float | Tensor) else {state}


@pytest.mark.parametrize("make", [with_exits, with_midpoint, with_veto])
def test_state_is_plain_data_by_the_names_of_parameters(make: Make, tmp_path: Path) -> None:
    net = made(make, tmp_path, 0)
    names = {name for name, _ in net.executor.named_parameters()}
    for epoch, _ in enumerate(net.epochs(), start=1):
        state = net.state_dict()
        assert all(isinstance(key, str) for key in keys_of(state))
        held = set(state["optimizer"]["optimizer"]["state"])
        of_exits = {name for name in held if name.startswith("exit:")}
        assert held - of_exits == {name for name, p in net.executor.named_parameters() if p.requires_grad}
        assert set(state["endings"]["mean"]["means"]) <= names
        assert bool(of_exits) is (make is with_exits)
        # What the midpoint has used is not kept, and nothing is added to it.
        assert bool(state["endings"]["midpoint_mean"]["means"]) is (make is with_midpoint and epoch <= 2)


@pytest.mark.parametrize("name", ["adamw", "momentum", "lion", "adafactor"])
def test_an_optimizer_goes_on_by_names(name: str) -> None:
    def optimizer(model: nn.Module, lr: float) -> tuple[torch.optim.Optimizer, dict[Tensor, str]]:
        return (
            make_optimizer(model, name=name, lr=lr, momentum=0.9, weight_decay=0.1),
            {parameter: path for path, parameter in model.named_parameters()},
        )

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        for step in range(7):
            optimizer.zero_grad()
            images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed + step))
            model(images).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    model, twin = Chain(), Chain()
    first, names = optimizer(model, 1e-3)
    train(model, first, 0)
    twin.load_state_dict(loaded(model.state_dict()))
    second, own_names = optimizer(twin, 1.0)
    load_named_state(second, loaded(named_state(first, names)), own_names)
    train(model, first, 100)
    train(twin, second, 100)
    assert same(weights(model), weights(twin))


def test_the_state_of_another_optimizer_is_refused() -> None:
    model = Chain()
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    options: dict[str, Any] = {"name": "adamw", "lr": 1e-3, "momentum": 0.9, "weight_decay": 0.0}
    whole = make_optimizer(model, **options)
    model.conv1.requires_grad_(False)
    with pytest.raises(ValueError, match="the state is of 10 parameters, which are not the 8 of this optimizer"):
        load_named_state(make_optimizer(model, **options), named_state(whole, names), names)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_learning_rate_follows_from_the_step_alone(name: str) -> None:
    def rates() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD(Chain().parameters(), lr=0.1)
        milestones = (1.5,) if name == "multistep" else ()
        return optimizer, make_scheduler(
            optimizer, name=name, epochs=4, steps_per_epoch=4, warmup_epochs=1, min_lr=0.0, decay_milestones=milestones
        )

    (optimizer, scheduler), (other_optimizer, other) = rates(), rates()
    for step in range(5):
        scheduler.step_update(step)
    for step in range(5, 16):
        scheduler.step_update(step)
        other.step_update(step)
        assert optimizer.param_groups[0]["lr"] == other_optimizer.param_groups[0]["lr"]


def test_plasticity_goes_on_within_an_interval() -> None:
    def moved(watch: Plasticity, weight: Tensor, speeds: tuple[float, ...]) -> list[bool]:
        found = []
        for speed in speeds:
            with torch.no_grad():
                weight.mul_(1 + speed)
            watch.step_done()
            found.append(watch.is_quiet(0))
        return found

    weight, twin = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    first, second = (Plasticity([{"weight": each}], interval=2) for each in (weight, twin))
    moved(first, weight, (0.5, 0.5, 0.02, 0.02, 0.02))
    with torch.no_grad():
        twin.copy_(weight)
    second.load_state_dict(loaded(first.state_dict()))
    left = (0.02, 0.02, 0.02)
    assert moved(first, weight, left) == moved(second, twin, left) == [False, False, True]
    ours, theirs = (each.state_dict()["partitions"][0] for each in (first, second))
    assert torch.equal(ours.pop("before")["weight"], theirs.pop("before")["weight"])
    assert ours == theirs


def test_the_scale_of_the_loss_goes_on(tmp_path: Path) -> None:
    one, other = (with_veto(tmp_path, amp_dtype=torch.float16).step for _ in range(2))
    fresh = other.state_dict()
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    one._scaler.scale(weight.sum() * torch.inf).backward()  # type: ignore[no-untyped-call]
    one._scaler.step(optimizer)
    one._scaler.update()
    other.load_state_dict(loaded(one.state_dict()))
    assert other.state_dict() == one.state_dict() != fresh
