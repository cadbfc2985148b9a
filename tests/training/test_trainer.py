"""Training through the executor: equal to a plain loop, and true to the plan."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxsplit.caching.cache import CachePolicy
from fxsplit.caching.feed import Feed
from fxsplit.capture.tracing import trace
from fxsplit.cuda.replay import Recordings
from fxsplit.data.batch import Batch
from fxsplit.data.images import MemoryImages
from fxsplit.data.loader import Loader
from fxsplit.errors import FxsplitError, NotFiniteError, UsageError
from fxsplit.execute.executor import Executor
from fxsplit.execute.forward import Forward, logits_of
from fxsplit.measuring import allocations
from fxsplit.measuring.op_costs import measure
from fxsplit.models.libraries.paper import NETWORKS
from fxsplit.plan.forecast import forecast
from fxsplit.plan.partition import partition
from fxsplit.plan.schedule import Phase, Plan, schedule
from fxsplit.report import EpochRecord, Observer, StepRecord
from fxsplit.training.accuracy import Accuracy
from fxsplit.training.objective import Objective
from fxsplit.training.optimizers import make_optimizer, make_scheduler
from fxsplit.training.phase_optimizer import PhaseOptimizer
from fxsplit.training.plasticity import Plasticity
from fxsplit.training.regularisers.endings import Endings, WeightEma, named_parameters
from fxsplit.training.regularisers.exits import Exits
from fxsplit.training.regularisers.soft_targets import SoftTargets
from fxsplit.training.step import Step
from fxsplit.training.trainer import Trainer
from tests.cuda.simulated import SimulatedRecorder
from tests.networks import Chain, FunctionalDropout


def images(count: int, seed: int, side: int = 8) -> MemoryImages:
    random = torch.Generator().manual_seed(seed)
    return MemoryImages(
        pixels=torch.randint(256, (count, 3, side, side), generator=random, dtype=torch.uint8),
        labels=torch.randint(5, (count,), generator=random),
        img_size=side,
    )


TRAIN, TEST = images(50, 0), images(20, 1)


def trainer(
    model: nn.Module,
    *,
    plan: str | tuple[Phase, ...] = "standard",
    smoothing: float = 0.0,
    soft_targets: SoftTargets | None = None,
    exits: Callable[[Executor], Exits] | None = None,
    annealing: float = 0.0,
    average: float = 0.0,
    ema: float | None = None,
    recalibrate: bool = False,
    veto: bool = False,
    clip_grad: float | None = None,
    amp_dtype: torch.dtype | None = None,
    cache: CachePolicy | None = None,
    log_interval: int = 10,
    observer: Observer | None = None,
    recorder: SimulatedRecorder | None = None,
    update_is_recorded: bool = True,
    **changes: Any,
) -> Trainer:
    """4 epochs in 4 partitions, with Adam; 50 images in batches of 16 leave a last batch of 2."""
    given = {"train": TRAIN, "test": TEST, "batch_size": 16, "channels_last": False, **changes.pop("loader", {})}
    both = {name: given.pop(name) for name in ("batch_size", "channels_last")}
    test_loader = Loader(given.pop("test"), **both)
    train_loader = Loader(given.pop("train"), training=True, seed=3, **both, **given)
    side = train_loader.images.img_size
    captured = trace(model, (torch.empty(2, 3, side, side),))
    parts = partition(captured, count=4)
    observer = observer or Observer()
    recordings = None
    if recorder is not None:
        recordings = Recordings(recorder, train_loader.device, held=(model,), notice=observer.notice)
    is_recorded = recorder is not None and update_is_recorded
    made = (
        schedule(plan, partitions=parts, epochs=4)
        if isinstance(plan, str)
        else Plan(schedule="mine", partitions=parts, phases=plan)
    )
    options = {"name": "adam", "lr": 1e-2, "momentum": 0.9, "weight_decay": 0.0, **changes.pop("optimizer", {})}
    rates = {"name": "constant", "warmup_epochs": 0, "min_lr": 0.0, **changes.pop("scheduler", {})}
    assert not changes
    executor = Executor(captured, parts)
    forward = Forward(executor, train_loader.device, amp_dtype=amp_dtype)
    objective = Objective(
        smoothing=smoothing, soft_targets=soft_targets, exits=None if exits is None else exits(executor)
    )
    steps = train_loader.steps_per_epoch
    return Trainer(
        plan=made,
        forward=forward,
        feed=Feed(forward, train_loader, test_loader, policy=cache),
        objective=objective,
        step=Step(
            forward,
            objective,
            batch_size=train_loader.batch_size,
            clip_grad=clip_grad,
        ),
        optimizer=PhaseOptimizer(
            executor,
            made,
            make_optimizer=partial(make_optimizer, model, **options),
            make_scheduler=partial(make_scheduler, epochs=made.epochs, **rates),
            steps_per_epoch=steps,
            exits=objective.exits,
            annealing=annealing,
            device=train_loader.device if is_recorded else None,
        ),
        endings=Endings(
            forward,
            made,
            steps_per_epoch=steps,
            average=average,
            recalibrate=recalibrate,
            midpoint=objective.has_midpoint,
            recorded=is_recorded,
        ),
        ema=None
        if ema is None
        else WeightEma(executor, decay=ema, device=train_loader.device if is_recorded else None),
        plasticity=Plasticity(named_parameters(executor), interval=max(1, steps // 3)) if veto else None,
        recordings=recordings,
        update_is_recorded=is_recorded,
        log_interval=log_interval,
        observer=observer,
    )


def weights(model: nn.Module) -> list[Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def same(left: Iterable[Tensor], right: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_standard_training_equals_a_hand_written_loop_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = FunctionalDropout()
    plain = copy.deepcopy(model)
    torch.manual_seed(1)
    records = list(trainer(model).epochs())

    torch.manual_seed(1)
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-2, fused=True)
    losses, hits = 0.0, 0
    for epoch in range(4):
        plain.train()
        losses = 0.0
        for batch in Loader(TRAIN, batch_size=16, training=True, seed=3).batches(epoch):
            optimizer.zero_grad()
            loss = F.cross_entropy(plain(batch.images), batch.labels)
            loss.backward()
            optimizer.step()
            losses += loss.item() * len(batch.labels)
        plain.eval()
        with torch.no_grad():
            hits = sum(
                int((plain(batch.images).argmax(1) == batch.labels).sum())
                for batch in Loader(TEST, batch_size=16).batches(0)
            )
    assert same(weights(model), weights(plain))
    assert math.isclose(records[-1].train_loss, losses / 50, rel_tol=1e-6)
    assert records[-1].eval_top1 == 100 * hits / 20
    assert [record.epoch for record in records] == [1, 2, 3, 4]
    assert records[0].trainable_parameters == sum(p.numel() for p in plain.parameters())


def test_settled_state_is_the_same_to_the_bit_from_settling_to_the_end() -> None:
    model = Chain()
    net = trainer(model, plan=(Phase(start=0, stop=4, epochs=1), Phase(start=2, stop=4, epochs=3)))
    settled = {name for part in net.plan.partitions[:2] for name in part.state}

    def digest(names: set[str]) -> str:
        state = model.state_dict()
        return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(names))).hexdigest()

    found = []
    for record in net.epochs():
        assert record.eval_top5 == 100
        found.append((digest(settled), digest(set(model.state_dict()) - settled)))
    assert len({one for one, _ in found}) == 1
    assert len({rest for _, rest in found}) == 4
    assert all(parameter.requires_grad for parameter in model.parameters())


def states(net: Trainer) -> tuple[list[int], list[int]]:
    """How many parameters the optimizer holds, and the steps that its state remembers, at the end of each epoch."""
    sizes, steps = [], []
    for _ in net.epochs():
        optimizer = net.optimizer.optimizer
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        assert len({id(parameter) for parameter in held}) == len(held)
        assert set(optimizer.state) <= set(held)
        sizes.append(len(held))
        steps.append(int(max(state["step"] for state in optimizer.state.values())))
    return sizes, steps


def test_surviving_parameters_keep_their_optimizer_state_and_settled_ones_lose_it() -> None:
    phases = (Phase(start=0, stop=4, epochs=2), Phase(start=2, stop=4, epochs=2))
    sizes, steps = states(trainer(Chain(), plan=phases))
    assert sizes[0] == 10
    assert sizes[0] == sizes[1] > sizes[2] == sizes[3]
    assert steps == [4, 8, 12, 16]


def test_a_fresh_optimizer_starts_anew() -> None:
    phases = tuple(Phase(start=0, stop=stop, epochs=1, fresh_optimizer=True) for stop in (4, 3))
    _, steps = states(trainer(Chain(), plan=phases))
    assert steps == [4, 4]


def test_the_learning_rate_is_one_schedule_over_the_whole_run() -> None:
    phases = (Phase(start=0, stop=4, epochs=2), Phase(start=2, stop=4, epochs=2))
    rates = {"name": "cosine", "min_lr": 1e-3}
    split = [record.lr for record in trainer(Chain(), plan=phases, scheduler=rates).epochs()]
    whole = [record.lr for record in trainer(Chain(), scheduler=rates).epochs()]
    assert split == whole
    # The last step of each epoch: step 4 e + 3 of 16.
    wanted = [1e-3 + (1e-2 - 1e-3) * (1 + math.cos(math.pi * (4 * epoch + 3) / 16)) / 2 for epoch in range(4)]
    assert whole == pytest.approx(wanted)


def test_a_constant_rate_is_constant_and_can_warm_up() -> None:
    assert [record.lr for record in trainer(Chain()).epochs()] == [1e-2] * 4
    warm = [record.lr for record in trainer(Chain(), scheduler={"warmup_epochs": 2}).epochs()]
    assert warm[0] < warm[1] < warm[2] == warm[3] == 1e-2


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    def gradients(steps: int) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5))
        plan = (Phase(start=0, stop=4, epochs=4, micro_batches=steps),)
        net = trainer(model, plan=plan, optimizer={"name": "momentum", "momentum": 0.0, "lr": 1.0})
        next(net.epochs())
        return weights(model)

    for whole, parts in zip(gradients(1), gradients(3), strict=True):
        torch.testing.assert_close(whole, parts)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("counts", [(2, 4), (3, 5)])
def test_micro_batches_train_as_whole_batches_do(counts: tuple[int, int], cached: bool, tmp_path: Path) -> None:
    """Also where parts are not equal, and where the last batch, of 2, has fewer of them."""

    def trained(counts: tuple[int, int]) -> tuple[list[Tensor], list[float]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5))
        first, later = counts
        phases = (
            Phase(start=0, stop=4, epochs=1, micro_batches=first),
            Phase(start=1, stop=4, epochs=3, micro_batches=later, recompute=2),
        )
        cache = CachePolicy(medium="ram", folder=str(tmp_path)) if cached else None
        net = trainer(model, plan=phases, cache=cache, optimizer={"name": "momentum", "lr": 0.1})
        losses = [record.train_loss for record in net.epochs()]
        return weights(model), losses

    whole, parts = trained((1, 1)), trained(counts)
    assert max(float((a - b).abs().max()) for a, b in zip(whole[0], parts[0], strict=True)) < 1e-5
    assert parts[1] == pytest.approx(whole[1], rel=1e-5)


def test_each_micro_batch_runs_alone() -> None:
    seen: list[int] = []
    model = Chain()
    model.head.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    net = trainer(model, plan=(Phase(start=0, stop=4, epochs=1, micro_batches=6),))
    seen.clear()
    list(net.epochs())
    assert seen == [
        *3 * [3, 3, 3, 3, 2, 2],
        2,
        *(len(batch) for batch in net.feed.test_loader.batches(0)),
    ]


def test_a_value_that_is_none_is_none_in_each_micro_batch() -> None:
    rows = torch.arange(6)
    batch = Batch(values=(None, rows), cut=2, labels=rows + 10, ids=rows + 20)
    parts = list(batch.divided(4, batch_size=16))
    assert [(none, own.tolist()) for none, own in (part.values for part in parts)] == [
        (None, [0, 1]), (None, [2, 3]), (None, [4, 5]),
    ]  # fmt: skip
    assert [(part.cut, part.labels.tolist(), part.ids.tolist()) for part in parts] == [
        (2, [10, 11], [20, 21]), (2, [12, 13], [22, 23]), (2, [14, 15], [24, 25]),
    ]  # fmt: skip


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize("recompute", [0, 2])
@pytest.mark.usefixtures("one_thread")
def test_a_step_allocates_what_is_forecast(recompute: int, micro_batches: int) -> None:
    """The gradient of the large linear layer is what a micro-batch of 4 needs most of."""
    torch.manual_seed(0)
    phase = Phase(start=0, stop=4, epochs=1, recompute=recompute, micro_batches=micro_batches)
    shown = images(16, 0, side=32)
    net = trainer(
        NETWORKS["cnn"](5, 32, 3),
        plan=(phase,),
        loader={"train": shown, "test": shown},
        optimizer={"name": "momentum", "momentum": 0.0},
    )
    (batch,) = net.feed.train_loader.batches(0)
    found = trace(net.executor, (batch.images,))
    known = measure(found, (batch.images,), steps=1)
    (ahead,) = forecast(net.plan, known, batch_size=16, optimizer_slots=0).phases
    net.executor.enter(phase)
    optimizer, accuracy = net.optimizer.optimizer, Accuracy(batch.images.device)
    net.step.backward(batch, optimizer, micro_batches=micro_batches, progress=0.0, accuracy=accuracy)
    net.step.update(optimizer)
    optimizer.zero_grad()
    with allocations.recorded(batch.images.device) as events:
        net.step.backward(batch, optimizer, micro_batches=micro_batches, progress=0.5, accuracy=accuracy)
        net.step.update(optimizer)
    activations = allocations.peak(events, without=allocations.survivors(events))
    assert ahead.activation_bytes == pytest.approx(activations, rel=0.05)
    assert ahead.peak_bytes - ahead.parameter_bytes == pytest.approx(allocations.peak(events), rel=0.05)


def test_clipping_bounds_the_step() -> None:
    torch.manual_seed(0)
    model = Chain()
    before = weights(model)
    net = trainer(
        model, clip_grad=1e-3, optimizer={"name": "momentum", "momentum": 0.0, "lr": 1.0}, loader={"limit": 1}
    )
    next(net.epochs())
    moved = [
        after - old
        for (name, after), old in zip(model.state_dict().items(), before, strict=True)
        if name in dict(model.named_parameters())
    ]
    assert torch.stack([part.square().sum() for part in moved]).sum().sqrt().item() == pytest.approx(1e-3, rel=1e-2)


def test_smoothing_reaches_the_loss_and_never_the_test() -> None:
    frozen = {"name": "momentum", "lr": 1e-12, "momentum": 0.0}
    plain, smooth = (
        next(trainer(_seeded(), smoothing=value, optimizer=frozen, loader={"limit": 1}).epochs())
        for value in (0.0, 0.9)
    )
    assert plain.train_loss != smooth.train_loss
    assert plain.eval_loss == pytest.approx(smooth.eval_loss, rel=1e-5)


def _seeded() -> nn.Module:
    torch.manual_seed(0)
    return Chain()


def test_autocast_and_channels_last_train() -> None:
    seen: list[tuple[torch.dtype, bool]] = []
    model = Chain()
    net = trainer(
        model.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        amp_dtype=torch.bfloat16,
        loader={"channels_last": True, "limit": 1},
    )
    model.norm2.register_forward_pre_hook(
        lambda _, args: seen.append((args[0].dtype, args[0].is_contiguous(memory_format=torch.channels_last)))
    )
    record = next(net.epochs())
    assert math.isfinite(record.train_loss)
    assert set(seen) == {(torch.bfloat16, True)}


@pytest.mark.parametrize(
    ("rates", "wanted"),
    [
        ({"name": "step", "decay_epochs": 2.0, "decay_rate": 0.5}, [1e-2, 1e-2, 5e-3, 5e-3]),
        ({"name": "multistep", "decay_milestones": (1.5, 3.5)}, [1e-2, 1e-3, 1e-3, 1e-4]),
    ],
)
def test_rates_that_decay_in_steps(rates: dict[str, Any], wanted: list[float]) -> None:
    assert [record.lr for record in trainer(Chain(), scheduler=rates).epochs()] == pytest.approx(wanted)


class Listener(Observer):
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def notice(self, sentence: str) -> None:
        self.heard.append(sentence)

    def phase_started(self, index: int, phase: Phase) -> None:
        self.heard.append(("phase", index, phase.start))

    def step_done(self, record: StepRecord) -> None:
        self.heard.append(("step", record.epoch, record.step, record.steps))

    def epoch_done(self, record: EpochRecord) -> None:
        self.heard.append(("epoch", record.epoch, record.phase, record.cut))


def test_an_observer_hears_everything_in_order() -> None:
    listener = Listener()
    phases = (Phase(start=0, stop=4, epochs=1), Phase(start=1, stop=4, epochs=1))
    net = trainer(Chain(), plan=phases, observer=listener, log_interval=3)
    list(net.epochs())
    cut = net.plan.partitions[1].name
    assert listener.heard == [
        ("phase", 0, 0), ("step", 1, 3, 4), ("step", 1, 4, 4), ("epoch", 1, 0, ""),
        ("phase", 1, 1), ("step", 2, 3, 4), ("step", 2, 4, 4), ("epoch", 2, 1, cut),
    ]  # fmt: skip


def test_the_training_accuracy_is_that_of_the_images_as_they_were_trained_on() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    with torch.no_grad():
        right = (model(TRAIN.pixels / 255).argmax(1) == TRAIN.labels).sum().item()
    still = {"name": "momentum", "momentum": 0.0, "lr": 1e-30}
    record = next(trainer(model, optimizer=still).epochs())
    assert record.train_top1 == 100 * right / 50
    assert record.train_top1 != record.eval_top1


def test_a_diverging_loss_ends_the_training() -> None:
    net = trainer(Chain(), optimizer={"name": "momentum", "lr": 1e30, "momentum": 0.0})
    with pytest.raises(NotFiniteError, match="the loss is not finite") as raised:
        next(net.epochs())
    assert (raised.value.epoch, raised.value.step, raised.value.is_cause) == (0, 3, False)


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(FxsplitError, match="at least 2 training images"):
        trainer(Chain(), loader={"train": TRAIN.subset(torch.tensor([0]))})


class Ungraded(Chain):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_a_loss_that_nothing_can_learn_from_is_an_error() -> None:
    with pytest.raises(FxsplitError, match="depends on no parameter that trains"):
        next(trainer(Ungraded()).epochs())


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="no optimizer 'addam'; did you mean 'adam'"):
        trainer(Chain(), optimizer={"name": "addam"})
    with pytest.raises(UsageError, match=r"no learning-rate schedule 'cosin'; did you mean 'cosine'\?"):
        trainer(Chain(), scheduler={"name": "cosin"})
    with pytest.raises(UsageError, match="the optimizer 'sgd' cannot be made: Nesterov momentum requires"):
        trainer(Chain(), optimizer={"name": "sgd", "momentum": 0.0})


def test_weight_decay_spares_biases_and_norms() -> None:
    model = Chain()
    optimizer = make_optimizer(model, name="adamw", lr=1e-3, momentum=0.9, weight_decay=0.1)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name for name, p in model.named_parameters() if decays[id(p)]} == {
        "conv1.weight", "conv2.weight", "head.weight",
    }  # fmt: skip


def test_scores_are_found_in_what_classifiers_return() -> None:
    scores = torch.zeros(2, 5)
    for output in (scores, (scores, None), {"logits": scores, "loss": None}, [(scores,)]):
        assert logits_of(output) is scores
    with pytest.raises(FxsplitError, match="the model returns NoneType"):
        logits_of(None)
