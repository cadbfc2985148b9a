"""What makes training more accurate: each piece against what its definition says, and off it changes nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from fxsplit.data.loader import Loader
from fxsplit.plan.schedule import Phase, Plan
from fxsplit.report import Observer
from fxsplit.training.optimizers import anneal, split_by_end
from fxsplit.training.plasticity import Plasticity
from fxsplit.training.regularisers.batchnorm import norms_of, recalibrated
from fxsplit.training.regularisers.endings import WeightAverage, end_epochs
from fxsplit.training.regularisers.soft_targets import LastTargets, MeanTargets
from fxsplit.training.trainer import Trainer
from tests.networks import Chain
from tests.plan.test_schedule import partitions
from tests.training.test_trainer import TRAIN, same, trainer, weights

pytestmark = pytest.mark.usefixtures("one_thread")

PHASES = (Phase(start=0, stop=4, epochs=2), Phase(start=2, stop=4, epochs=2))


def trained(**changes: Any) -> tuple[Trainer, nn.Module]:
    torch.manual_seed(0)
    model = Chain()
    made = trainer(model, **changes)
    list(made.epochs())
    return made, model


# Soft targets


def test_the_loss_is_the_one_of_the_paper() -> None:
    """(1 - share) CE + share T^2 KL, each image against what was said of it last."""
    random = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 4, 5, generator=random)
    labels, ids = torch.tensor([0, 1, 2, 3]), torch.tensor([7, 3, 0, 5])
    soft = LastTargets(8, weight=0.8, temperature=2.0)
    assert torch.allclose(soft.loss(first, labels, ids, progress=0.5), F.cross_entropy(first, labels))
    soft.after_forward(first, ids)
    # Image 2 is new, and image 7 comes at another place of the batch.
    again = torch.tensor([3, 2, 5, 7])
    found = soft.loss(second, labels, again, progress=0.5, smoothing=0.1)
    before = {7: first[0].half().float(), 3: first[1].half().float(), 5: first[3].half().float()}
    wanted = 0.0
    for row, label, image in zip(second, labels, again.tolist(), strict=True):
        hard = F.cross_entropy(row, label, label_smoothing=0.1)
        if image in before:
            target = (before[image] / 2).softmax(0)
            divergence = (target * (target.log() - (row / 2).log_softmax(0))).sum()
            hard = 0.6 * hard + 0.4 * 4 * divergence
        wanted += hard / 4
    assert torch.allclose(found, torch.as_tensor(wanted), atol=1e-6)


def test_soft_targets_are_those_of_the_epoch_before() -> None:
    """Training with them is the loop that keeps logits by image, bit for bit."""
    torch.manual_seed(0)
    model = Chain()
    plain = copy.deepcopy(model)
    made = trainer(model, soft_targets=LastTargets(50, weight=0.5))
    list(made.epochs())

    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-2, fused=True)
    soft = LastTargets(50, weight=0.5)
    plain.train()
    for epoch in range(4):
        for step, batch in enumerate(Loader(TRAIN, batch_size=16, training=True, seed=3).batches(epoch)):
            optimizer.zero_grad()
            progress = (4 * epoch + step) / 16
            logits = plain(batch.images)
            soft.loss(logits, batch.labels, batch.ids, progress=progress).backward()
            soft.after_forward(logits, batch.ids)
            optimizer.step()
    assert same(weights(model), weights(plain))


def test_soft_targets_keep_large_logits_finite() -> None:
    soft, logits = LastTargets(1, weight=0.5), torch.tensor([[1e6, -1e6]])
    ids, labels = torch.tensor([0]), torch.tensor([0])
    for _ in range(2):
        assert soft.loss(logits, labels, ids, progress=1.0).isfinite()
        soft.after_forward(logits, ids)


def test_targets_of_the_mean_are_kept_once_and_weigh_the_same_from_then_on() -> None:
    random = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 4, 5, generator=random)
    labels, ids = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 3])
    soft = MeanTargets(4, weight=0.8, temperature=2.0)
    hard = F.cross_entropy(second, labels)
    assert torch.allclose(soft.loss(first, labels, ids, progress=0.1), F.cross_entropy(first, labels))
    soft.after_forward(first, ids)
    assert torch.allclose(soft.loss(second, labels, ids, progress=0.9), hard)
    soft.keep(first, ids)
    target = (first.half().float() / 2).softmax(1)
    divergence = (target * (target.log() - (second / 2).log_softmax(1))).sum(1).mean()
    for progress in (0.6, 0.9):
        found = soft.loss(second, labels, ids, progress=progress)
        assert torch.allclose(found, 0.2 * hard + 0.8 * 4 * divergence, atol=1e-5)


def test_soft_targets_fade_to_nothing() -> None:
    """At 0.9 of a run that fades over its last fifth half of the share is left, also where steps are recorded."""
    random = torch.Generator().manual_seed(0)
    earlier, logits = torch.randn(2, 4, 5, generator=random)
    labels = ids = torch.arange(4)
    for kind in (LastTargets, MeanTargets):
        fades, whole, hard = kind(4, weight=0.6, fade=0.2), kind(4, weight=0.6), F.cross_entropy(logits, labels)
        for each in (fades, whole):
            each.keep(earlier, ids)
        for progress, left in ((0.5, 1.0), (0.8, 1.0), (0.9, 0.5), (1.0, 0.0)):
            soft = whole.loss(logits, labels, ids, progress=progress)
            for given in (progress, torch.tensor(progress)):
                found = fades.loss(logits, labels, ids, progress=given)
                assert torch.allclose(found, left * soft + (1 - left) * hard, atol=1e-6)


@contextmanager
def after_steps(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Inside, copies of the model are added to the list, one after each optimizer step."""
    copies: list[nn.Module] = []
    handle = register_optimizer_step_post_hook(lambda *_: copies.append(copy.deepcopy(model)))
    try:
        yield copies
    finally:
        handle.remove()


def mean_of(name: str, models: Sequence[nn.Module]) -> Tensor:
    return torch.stack([each.get_parameter(name).detach() for each in models]).mean(0)


class Watched(MeanTargets):
    """Remembers the network as it is when logits are kept of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(50, weight=0.5)
        self.model, self.kept, self.ids = model, [], []  # type: ignore[var-annotated]

    def keep(self, logits: Tensor, ids: Tensor) -> None:
        super().keep(logits, ids)
        self.kept.append((copy.deepcopy(self.model), logits.clone()))
        self.ids += ids.tolist()


LATER = (Phase(start=0, stop=4, epochs=1), Phase(start=1, stop=4, epochs=3))


@pytest.mark.parametrize("plan", ["standard", PHASES, LATER], ids=["standard", "then settling", "while settled"])
def test_targets_of_the_mean_are_what_it_says_of_all_images_in_evaluation(plan: Any) -> None:
    torch.manual_seed(0)
    model = Chain()
    soft = Watched(model)
    made = trainer(model, plan=plan, average=0.75, soft_targets=soft)
    run = made.epochs()
    with after_steps(model) as seen:
        next(run), next(run)
    assert not soft.kept
    settled = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
    next(run)
    assert sorted(soft.ids) == list(range(50))
    taught, _ = soft.kept[0]
    for name, parameter in taught.named_parameters():
        # More than a quarter of 8 steps were done; what is settled already stays.
        counted = seen[-1:] if id(model.get_parameter(name)) in settled else seen[2:]
        assert torch.allclose(parameter, mean_of(name, counted), atol=1e-6), name
    said = torch.cat([logits for _, logits in soft.kept])
    images = torch.cat([batch.images for batch in Loader(TRAIN, batch_size=16, training=True, seed=3).batches(2)])
    assert torch.allclose(said, taught.eval()(images), atol=1e-5)
    next(run)
    assert len(soft.ids) == 50


def test_the_loss_compares_with_the_mean_from_its_moment_on() -> None:
    """Training is as ever until then, and another one afterwards."""
    runs = {}
    for weight in (0.0, 0.5):
        torch.manual_seed(0)
        soft = MeanTargets(50, weight=weight)
        made = trainer(Chain(), plan=PHASES, average=0.5, soft_targets=soft)
        runs[weight] = [record.train_loss for record in made.epochs()]
    assert runs[0.0][:2] == runs[0.5][:2]
    assert all(hard != mixed for hard, mixed in zip(runs[0.0][2:], runs[0.5][2:], strict=True))


# Annealing


def test_each_partition_is_annealed_up_to_its_end() -> None:
    first, second, unused = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    optimizer = torch.optim.SGD([first, second, unused], lr=0.1, momentum=0.5)
    split_by_end(optimizer, {first: 10, second: 40})
    assert [(group["params"], group["end"], group["momentum"]) for group in optimizer.param_groups] == [
        ([first], 10, 0.5),
        ([second, unused], 40, 0.5),
    ]
    scales = []
    for step in (0, 5, 10, 20, 30, 39):
        anneal(optimizer, step, steps=20)
        scales.append([group["lr_scale"] for group in optimizer.param_groups])
    # The first trains for less than the 20 steps, and falls from its beginning.
    early, late = zip(*scales, strict=True)
    assert early == pytest.approx([1, 0.5, 0, 0, 0, 0])
    assert late == pytest.approx([1, 1, 1, 1, 0.5, (1 - math.cos(math.pi / 20)) / 2])


def test_annealing_a_standard_run_is_the_cosine_schedule() -> None:
    rates: list[float] = []

    class Rates(Observer):
        def epoch_done(self, record: Any) -> None:
            rates.append(record.lr)

    _, annealed = trained(annealing=1.0, observer=Rates())
    _, cosine = trained(scheduler={"name": "cosine"}, observer=Rates())
    assert rates[:4] == pytest.approx(rates[4:])
    assert all(map(torch.allclose, weights(annealed), weights(cosine)))


def test_settling_partitions_are_annealed_first() -> None:
    made = trainer(Chain(), plan=PHASES, annealing=1.0)
    run = made.epochs()
    next(run), next(run)
    rates = {group["end"]: group["lr"] for group in made.optimizer.optimizer.param_groups}
    assert set(rates) == {8, 16}
    assert rates[8] == pytest.approx(0.01 * (1 - math.cos(math.pi / 8)) / 2)
    assert rates[16] == pytest.approx(0.01 * (1 - math.cos(math.pi * 9 / 16)) / 2)


# Averaging


def test_the_average_is_the_mean_of_what_was_added() -> None:
    parameter, other = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    average = WeightAverage()
    for number in (1.0, 2.0, 6.0):
        with torch.no_grad():
            parameter.fill_(number)
            other.fill_(number)
        given = {"first": parameter, "other": other} if number < 6 else {"first": parameter}
        average.count(given)
        average.add(given)
    average.apply({"first": parameter})
    assert torch.equal(parameter, torch.full((3,), 3.0))
    assert torch.equal(other, torch.full((3,), 6.0))
    average.apply({"first": parameter, "other": other})
    assert torch.equal(parameter, torch.full((3,), 3.0))
    assert torch.equal(other, torch.full((3,), 1.5))


def test_a_run_ends_with_the_mean_of_its_last_steps() -> None:
    torch.manual_seed(0)
    model = Chain()
    with after_steps(model) as seen:
        list(trainer(model).epochs())
    averaged_run, averaged = trained(average=0.4)
    for name, parameter in averaged.named_parameters():
        # Of 16 steps, those after the 9.6th.
        assert torch.allclose(parameter, mean_of(name, seen[9:]), atol=1e-6), name
    # And what is reported is what it ends with.
    torch.manual_seed(0)
    records = list(trainer(Chain(), average=0.4).epochs())
    assert records[-1].eval_loss == averaged_run.evaluate().loss


def test_partitions_settle_with_the_mean_of_their_own_last_steps() -> None:
    plan = (Phase(start=0, stop=4, epochs=4), Phase(start=2, stop=4, epochs=4))
    torch.manual_seed(0)
    model = Chain()
    with after_steps(model) as seen:
        list(trainer(model, plan=plan[:1]).epochs())
    averaged_run, averaged = trained(plan=plan, average=0.5)
    for name in (name for part in averaged_run.plan.partitions[:2] for name in part.state):
        if name in dict(model.named_parameters()):
            assert torch.allclose(averaged.get_parameter(name), mean_of(name, seen[8:]), atol=1e-6), name


def test_a_mean_begins_anew_at_the_midpoint_from_which_training_goes_on() -> None:
    torch.manual_seed(0)
    model = Chain()
    plan = (Phase(start=0, stop=4, epochs=4),)
    with after_steps(model) as seen:
        list(trainer(model, plan=plan, average=0.75, soft_targets=MeanTargets(50, weight=0.5)).epochs())
    assert len(seen) == 16
    for name, parameter in model.named_parameters():
        # By its share alone it would begin after the fourth step.
        assert torch.allclose(parameter, mean_of(name, seen[8:]), atol=1e-6), name


def test_what_thaws_later_has_settled_with_its_mean_and_its_own_annealing() -> None:
    """Until it thaws the run is that of the plan without; then it ends with the mean of its last steps."""
    plan = (Phase(start=0, stop=4, epochs=2), Phase(start=2, stop=4, epochs=4))
    thawing = (plan[0], replace(plan[1], epochs=2), Phase(start=0, stop=4, epochs=2, thaws=True))
    states = []
    for phases in (plan, thawing):
        torch.manual_seed(0)
        model = Chain()
        made = trainer(model, plan=phases, average=0.2, annealing=0.25)
        run = made.epochs()
        assert [next(run).start for _ in range(4)] == [0, 0, 2, 2]
        states.append(weights(model))
    assert same(*states)
    with after_steps(model) as seen:
        list(run)
    for name, parameter in model.named_parameters():
        assert not torch.equal(seen[0].get_parameter(name), seen[-1].get_parameter(name)), name
        # Of 24 steps, those after the 19.2th; 16 were taken before.
        assert torch.allclose(parameter, mean_of(name, seen[3:]), atol=1e-6), name


def test_what_settles_later_than_planned_and_thaws_ends_with_its_last_weights() -> None:
    """A veto that never lets go: nothing settles, and the mean begins by the end of the run."""
    plan = (
        Phase(start=0, stop=4, epochs=2),
        Phase(start=2, stop=4, epochs=2),
        Phase(start=0, stop=4, epochs=2, thaws=True),
    )
    torch.manual_seed(0)
    model = Chain()
    made = trainer(model, plan=plan, average=0.2, veto=True)
    with after_steps(model) as seen:
        assert [record.start for record in made.epochs()] == [0] * 6
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, mean_of(name, seen[19:]), atol=1e-6), name


def test_when_partitions_stop_is_told_as_seen_from_each_phase() -> None:
    phases = [(2, 4, 1), (0, 4, 2), (1, 3, 3), (1, 4, 4), (0, 4, 5)]
    plan = Plan(
        schedule="mine",
        partitions=partitions(1, 1, 1, 1),
        phases=tuple(Phase(start=start, stop=stop, epochs=n, thaws=not start) for start, stop, n in phases),
    )
    assert [end_epochs(plan, index) for index in range(5)] == [
        [0, 0, 15, 3],
        [3, 15, 15, 3],
        [3, 15, 15, 3],
        [3, 15, 15, 15],
        [15, 15, 15, 15],
    ]


def test_settled_partitions_are_not_averaged_any_more() -> None:
    digests: list[list[Tensor]] = []
    torch.manual_seed(0)
    model = Chain()
    made = trainer(model, plan=PHASES, average=0.75)
    names = [name for part in made.plan.partitions[:2] for name in part.state]
    for record in made.epochs():
        if record.epoch > 2:
            digests.append([model.state_dict()[name].clone() for name in names])
    assert all(same(digest, digests[0]) for digest in digests)


# BatchNorm statistics


def test_recalibrated_statistics_are_the_mean_over_batches() -> None:
    norm = nn.BatchNorm1d(2)
    rows = torch.randn(3, 8, 2)
    norm(100 + torch.randn(8, 2))
    with recalibrated([norm]):
        for batch in rows:
            norm(batch)
    assert norm.running_mean is not None
    assert torch.allclose(norm.running_mean, rows.mean(dim=(0, 1)), atol=1e-6)
    assert norm.momentum == 0.1


def test_partitions_settle_with_statistics_of_their_last_weights() -> None:
    torch.manual_seed(0)
    model = Chain()
    made = trainer(model, plan=PHASES, recalibrate=True)
    run = made.epochs()
    next(run), next(run)
    norms = norms_of(made.executor, 2)
    assert norms
    assert {id(norm) for norm in norms} < {id(norm) for norm in norms_of(made.executor, 4)}
    expected = copy.deepcopy(model).train()
    for module in expected.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for batch in Loader(TRAIN, batch_size=16, training=True, seed=3).batches(2):
            expected(batch.images)
    next(run)
    buffers = dict(expected.named_buffers())
    settled = {name for part in made.plan.partitions[:2] for name in part.state}
    checked = [name for name in buffers if name in settled and "running" in name]
    assert checked
    for name in checked:
        assert torch.allclose(model.get_buffer(name), buffers[name], atol=1e-6), name


# Plasticity


def test_a_partition_is_quiet_after_three_slow_intervals_in_a_row() -> None:
    weight = nn.Parameter(torch.ones(4))
    watch = Plasticity([{"weight": weight}, {}], interval=2)
    found = []
    for speed in (1.0, 0.05, 0.05, 0.5, 0.05, 0.05, 0.05):
        for _ in range(2):
            with torch.no_grad():
                weight.mul_(1 + speed / 2)
            watch.step_done()
        found.append(watch.is_quiet(0))
    assert found == [False] * 6 + [True]
    assert watch.is_quiet(1)


def test_the_veto_delays_settling_and_keeps_the_number_of_epochs() -> None:
    class Notices(Observer):
        def __init__(self) -> None:
            self.heard: list[str] = []

        def notice(self, text: str) -> None:
            self.heard.append(text)

    heard = Notices()
    records = list(trainer(Chain(), plan=PHASES, veto=True, observer=heard).epochs())
    assert [record.start for record in records] == [0, 0, 0, 0]
    assert len(heard.heard) == 1
    assert "still learns and settles later than in epoch 3" in heard.heard[0]
    # Without a learning rate nothing moves.
    still = list(
        trainer(
            Chain(), plan=PHASES, veto=True, scheduler={"name": "step", "decay_rate": 1e-9, "decay_epochs": 0.5}
        ).epochs()
    )
    assert [record.start for record in still] == [0, 0, 2, 2]
