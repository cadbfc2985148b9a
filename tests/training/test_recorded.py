"""Training whose steps are recorded and replayed: it ends as eager training does, bit for bit.

The recorder is a simulation on the CPU, which burns Python's numbers into a recording as a CUDA graph does.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from fxsplit.caching.cache import CachePolicy
from fxsplit.data.order import EpochOrder
from fxsplit.plan.schedule import Phase
from fxsplit.report import EpochRecord, Observer, StepRecord
from fxsplit.training.accuracy import Accuracy, PendingScore
from fxsplit.training.optimizers import load_named_state, make_optimizer, named_state
from fxsplit.training.phase_optimizer import PhaseOptimizer
from fxsplit.training.regularisers.endings import WeightAverage
from fxsplit.training.regularisers.soft_targets import LastTargets, MeanTargets
from fxsplit.training.trainer import Trainer
from tests.cuda.simulated import SimulatedRecorder
from tests.networks import AssignedBuffer, Chain, FunctionalDropout, InnerBranchOnData
from tests.training.test_exits import exits_of, layers
from tests.training.test_trainer import Listener, trainer

# Of the 4 steps of an epoch, 3 have full batches. The first 3 of a phase come before its recording.
SETTLING = (Phase(start=0, stop=4, epochs=2), Phase(start=1, stop=4, epochs=3), Phase(start=2, stop=4, epochs=2))
# One recording of training steps, and one of test batches.
Recorder = partial(SimulatedRecorder, most=2)
RATES = {"name": "step", "decay_rate": 0.5, "decay_epochs": 0.5}


@pytest.fixture(autouse=True)
def rates_of_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device a learning rate is a float32 number, so the eager runs have these, too."""
    update = Scheduler.update_groups

    def rounded(self: Scheduler, values: Any) -> None:
        update(self, values)
        for group in self.optimizer.param_groups:
            group["lr"] = float(torch.tensor(group["lr"]))

    monkeypatch.setattr(Scheduler, "update_groups", rounded)


Left = tuple[list[Tensor], list[EpochRecord]]


def trained(make: Callable[..., Trainer], **changes: Any) -> Left:
    """The state at the end, random numbers and optimizer included, and the records without what was measured."""
    torch.manual_seed(0)
    net = make(**changes)
    torch.manual_seed(1)
    records = list(net.epochs())
    state = list(net.executor.state_dict().values())
    kept = [value for each in net.optimizer.optimizer.state.values() for value in each.values()]
    state += [value for value in kept if isinstance(value, Tensor)]
    if net.objective.exits is not None:
        state += net.objective.exits.modules.state_dict().values()
    return [*(each.clone() for each in state), torch.get_rng_state()], records


def agree(one: Left, other: Left) -> bool:
    first, second = (
        [(each.train_loss, each.train_top1, each.eval_loss, each.lr) for each in records] for _, records in (one, other)
    )
    return first == second and len(one[0]) == len(other[0]) and all(map(torch.equal, one[0], other[0]))


def standard(**changes: Any) -> Trainer:
    return trainer(FunctionalDropout(), scheduler=RATES, clip_grad=0.5, **changes)


def settling(**changes: Any) -> Trainer:
    return trainer(FunctionalDropout(), plan=SETTLING, scheduler=RATES, optimizer={"name": "sgd"}, **changes)


def settling_from_rows(**changes: Any) -> Trainer:
    """The first batch at a cut is computed eagerly; one recording writes rows, and another one reads them."""
    return settling(cache=CachePolicy(medium="device"), loader={"batch_size": 4}, **changes)


def settling_from_views(**changes: Any) -> Trainer:
    """In two of three epochs rows are written."""
    loader = {"batch_size": 4, "augment": "crop-flip", "views": 2}
    return settling(cache=CachePolicy(medium="device"), loader=loader, **changes)


def augmented(**changes: Any) -> Trainer:
    return standard(loader={"augment": "crop-flip", "mean": (0.4,), "std": (0.2,)}, **changes)


def with_everything(**changes: Any) -> Trainer:
    model = layers()
    return trainer(
        model,
        plan=tuple(replace(phase, micro_batches=2) for phase in SETTLING),
        exits=partial(exits_of, model),
        soft_targets=LastTargets(50, weight=0.5),
        average=0.75,
        recalibrate=True,
        annealing=0.5,
        scheduler={"name": "cosine"},
        optimizer={"name": "adamw", "weight_decay": 0.1},
        clip_grad=1.0,
        **changes,
    )


def with_everything_from_rows(**changes: Any) -> Trainer:
    return with_everything(cache=CachePolicy(medium="device"), loader={"batch_size": 4}, **changes)


def with_midpoint(**changes: Any) -> Trainer:
    soft = MeanTargets(50, weight=0.5)
    return trainer(Chain(), plan=SETTLING[:1] + SETTLING[2:], average=0.75, soft_targets=soft, **changes)


def with_midpoint_in_a_phase(**changes: Any) -> Trainer:
    return trainer(Chain(), average=0.75, soft_targets=MeanTargets(50, weight=0.5), **changes)


def with_veto(**changes: Any) -> Trainer:
    return trainer(Chain(), plan=SETTLING, veto=True, scheduler=RATES, **changes)


def in_bfloat16(**changes: Any) -> Trainer:
    return trainer(FunctionalDropout(), plan=SETTLING, scheduler=RATES, amp_dtype=torch.bfloat16, **changes)


def refusals(listener: Listener) -> list[str]:
    return [each for each in listener.heard if isinstance(each, str) and "eagerly" in each]


# How many steps are replayed, and test batches; and how many if the update is eager, since it does not matter then what
# is averaged.
@pytest.mark.parametrize(
    ("make", "whole", "without_update"),
    [
        (standard, 9 + 1, 10),
        (settling, 3 + 6 + 3, 12),
        # Of 13 steps in an epoch 12 have full batches.
        (settling_from_rows, 21 + (8 + 21) + (8 + 9) + 18, 85),
        (settling_from_views, 21 + (8 + 12 + 9) + 39, 89),
        (augmented, 9 + 1, 10),
        (with_everything, 9, 12),
        (with_everything_from_rows, 58 + 15, 67 + 18),
        (with_midpoint, 3, 6),
        (with_midpoint_in_a_phase, 3, 6),
        (with_veto, 3 + 6 + 3, 12),
        (in_bfloat16, 3 + 6 + 3, 12),
    ],
)
@pytest.mark.parametrize("update_is_recorded", [True, False], ids=["whole", "update eager"])
@pytest.mark.usefixtures("one_thread")
def test_recorded_training_ends_as_eager_training(
    make: Callable[..., Trainer], whole: int, without_update: int, update_is_recorded: bool
) -> None:
    listener, recorder = Listener(), Recorder()
    found = trained(make, recorder=recorder, update_is_recorded=update_is_recorded, observer=listener)
    assert agree(found, trained(make))
    assert refusals(listener) == []
    assert recorder.replays == (whole if update_is_recorded else without_update)


def test_the_scale_of_the_loss_is_read_by_replays() -> None:
    """It grows in every other step, and gradients are divided by it outside of the recording."""
    runs = []
    for recorder in (None, Recorder()):
        torch.manual_seed(0)
        net = trainer(Chain(), recorder=recorder, update_is_recorded=False)
        net.step._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        list(net.epochs())
        assert net.step.state_dict()["scaler"]["scale"] == 2.0**18
        runs.append(list(net.executor.state_dict().values()))
    assert all(map(torch.equal, *runs))


def burn_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    set_rate = PhaseOptimizer.set_rate

    def on_the_host(self: PhaseOptimizer, step: int) -> None:
        set_rate(self, step)
        for group in self.optimizer.param_groups:
            group["lr"] = float(group["lr"])

    monkeypatch.setattr(PhaseOptimizer, "set_rate", on_the_host)


def burn_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    made = WeightAverage.__init__
    monkeypatch.setattr(WeightAverage, "__init__", lambda self, _=None: made(self))


def burn_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LastTargets, "share", lambda self, progress: self.weight * float(progress.detach().numpy()))


def burn_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    def ids(self: EpochOrder) -> Tensor:
        return self._order[16 * int(self._step.numpy()[0]) :][: self._size].clone()

    monkeypatch.setattr(EpochOrder, "ids", ids)


def burn_score(monkeypatch: pytest.MonkeyPatch) -> None:
    def reset(self: Accuracy) -> None:
        self.__init__(torch.device("cpu"))  # type: ignore[misc]

    monkeypatch.setattr(Accuracy, "reset", reset)


@pytest.mark.parametrize("make", [with_everything])
@pytest.mark.parametrize("burn", [burn_rates, burn_weights, burn_progress, burn_batches, burn_score])
@pytest.mark.usefixtures("one_thread")
def test_what_is_burnt_into_a_recording_is_noticed(
    make: Callable[..., Trainer], burn: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trained(make)
    with monkeypatch.context() as patched:
        burn(patched)
        recorder = Recorder()
        assert not agree(trained(make, recorder=recorder), expected)
        assert recorder.replays


class Draws(nn.Module):
    """Draws a number in Python, and counts its calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (1 + random.random()) if self.training else x


class Drawing(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.draws = Draws()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.draws(x))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (AssignedBuffer, "module 'average' changes on the host"),
        (InnerBranchOnData, "the host waits for the result of item"),
        (Drawing, "'draws' changes on the host"),
    ],
)
def test_what_cannot_be_recorded_runs_eagerly_and_is_told_once(model: type[nn.Module], reason: str) -> None:
    def make(**changes: Any) -> Trainer:
        random.seed(0)
        return trainer(model(), plan=SETTLING, **changes)

    listener, recorder = Listener(), Recorder()
    assert agree(trained(make, recorder=recorder, observer=listener), trained(make))
    (said,) = refusals(listener)
    assert reason in said
    assert recorder.recordings < 3


@pytest.mark.usefixtures("one_thread")
def test_where_memory_is_short_the_recording_goes_before_other_work() -> None:
    recorder = Recorder(roomy=False)
    assert agree(trained(settling, recorder=recorder), trained(settling))
    # In each epoch the smaller last batch comes before a fourth full one, and there is one full batch to test on.
    assert (recorder.warm_ups, recorder.replays) == (3 * 7 + 7, 0)


def test_recomputing_phases_run_eagerly() -> None:
    def make(**changes: Any) -> Trainer:
        phases = (replace(SETTLING[0], recompute=3), SETTLING[1])
        return trainer(FunctionalDropout(), plan=phases, **changes)

    listener, recorder = Listener(), Recorder()
    assert agree(trained(make, recorder=recorder, observer=listener), trained(make))
    (said,) = refusals(listener)
    assert "recomputing" in said
    # Those of the second phase, and in both phases the test batches.
    assert (recorder.warm_ups, recorder.recordings, recorder.replays) == (3 + 2 + 3, 1, 6)


@pytest.mark.parametrize("fails_at", [0, 10, 60, 90, 150])
@pytest.mark.usefixtures("one_thread")
def test_a_recording_that_fails_leaves_everything_as_it_was(fails_at: int) -> None:
    listener, recorder = Listener(), Recorder(fails_at=fails_at)
    assert agree(trained(with_everything, recorder=recorder, observer=listener), trained(with_everything))
    (said,) = refusals(listener)
    assert said.endswith("RuntimeError: operation not permitted when stream is capturing")
    assert (recorder.recordings, recorder.replays) == (0, 0)


@pytest.mark.parametrize("before", [None, Recorder], ids=["eager", "recorded"])
@pytest.mark.parametrize("after", [None, Recorder], ids=["eager", "recorded"])
@pytest.mark.usefixtures("one_thread")
def test_training_goes_on_with_or_without_recordings(before: Any, after: Any) -> None:
    """A state that was saved in the midst of an epoch, between two replays, is loaded into another run."""

    def made(kind: Any) -> Trainer:
        torch.manual_seed(0)
        return with_everything(recorder=kind and kind())

    class Save(Observer):
        state: Any = None

        def step_done(self, record: StepRecord) -> None:
            if (record.epoch, record.step) == (5, 2):
                state = first.state_dict(), first.executor.state_dict(), torch.get_rng_state()
                self.state = copy.deepcopy(state)

    first, expected = made(before), made(None)
    first.observer, first.log_interval = Save(), 1
    torch.manual_seed(1)
    list(first.epochs())
    torch.manual_seed(1)
    records = list(expected.epochs())
    second = made(after)
    state, weights, drawn = first.observer.state
    second.executor.load_state_dict(weights)
    second.load_state_dict(state)
    torch.set_rng_state(drawn)
    rest = list(second.epochs())
    assert [each.train_loss for each in rest] == [each.train_loss for each in records[4:]]
    assert all(map(torch.equal, second.executor.state_dict().values(), expected.executor.state_dict().values()))


def test_scores_come_when_they_have_arrived_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for them until the epoch ends."""
    listener = Listener()
    net = trainer(Chain(), plan=SETTLING[:1], observer=listener, log_interval=1)
    arrived: list[bool] = [False, False, True] + [False] * 20
    monkeypatch.setattr(PendingScore, "is_here", lambda _: arrived.pop(0))
    list(net.epochs())
    steps = [each[1:3] for each in listener.heard if each[0] == "step"]
    assert steps == [(epoch, step) for epoch in (1, 2) for step in (1, 2, 3, 4)]


@pytest.mark.parametrize("capturable", [True, False])
def test_a_state_is_loaded_and_steps_are_computed_as_before(capturable: bool) -> None:
    """How is the optimizer's own matter: the state may come from a run with recordings, or from another device."""
    weight = nn.Parameter(torch.ones(3))

    def made(lr: float, *, capturable: bool) -> torch.optim.Optimizer:
        given = {"name": "nadam", "momentum": 0.9, "weight_decay": 0.0}
        return make_optimizer(nn.ParameterList([weight]), lr=lr, capturable=capturable, **given)

    state = named_state(made(0.5, capturable=not capturable), {weight: "weight"})
    optimizer = made(0.1, capturable=capturable)
    load_named_state(optimizer, state, {weight: "weight"})
    (group,) = optimizer.param_groups
    assert (group["lr"], group["capturable"]) == (0.5, capturable)
