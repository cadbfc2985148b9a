"""The exponential moving average of weights: timm's, over what trains."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.utils import ModelEmaV3

from fxsplit.plan.schedule import Phase
from fxsplit.training.regularisers.endings import WeightEma
from fxsplit.training.trainer import Trainer
from tests.networks import Chain
from tests.training.test_trainer import same, trainer, weights

PHASES = (Phase(start=0, stop=4, epochs=2), Phase(start=2, stop=4, epochs=2))


@pytest.mark.parametrize("warmup", [False, True])
def test_averages_are_those_of_timm(warmup: bool) -> None:
    torch.manual_seed(0)
    net = trainer(Chain())
    executor, plain = net.executor, Chain()
    plain.load_state_dict(executor.state_dict())
    ema, theirs = WeightEma(executor, decay=0.9, warmup=warmup), ModelEmaV3(plain, decay=0.9, use_warmup=warmup)
    ema.enter()
    for step in range(1, 20):
        with torch.no_grad():
            for name, value in executor.state_dict().items():
                value.add_(1 if value.dtype is torch.int64 else torch.randn_like(value))
                plain.state_dict()[name].copy_(value)
        ema.count_step(step)
        ema.add()
        theirs.update(plain, step=step)
        before = copy.deepcopy(executor.state_dict())
        with ema.applied():
            inside = copy.deepcopy(executor.state_dict())
        assert same(executor.state_dict().values(), before.values())
        for name, value in theirs.module.state_dict().items():
            torch.testing.assert_close(inside[name], value)
    ema.settle(range(4))
    for name, value in theirs.module.state_dict().items():
        torch.testing.assert_close(executor.state_dict()[name], value)


def test_tests_are_of_averages_and_partitions_end_with_them() -> None:
    torch.manual_seed(0)
    net = trainer(Chain(), plan=PHASES, ema=0.9)
    assert net.ema is not None
    settled: dict[str, torch.Tensor] = {}
    for epoch, record in enumerate(net.epochs()):
        if epoch == 1:
            # What the front is averaged to now, it is set to before the next epoch.
            with net.ema.applied():
                settled = {name: value.clone() for name, value in net.executor.state_dict().items()}
                inside = net.evaluate()
            assert record.eval_loss == inside.loss
        if epoch >= 2:
            front = [name for part in net.plan.partitions[:2] for name in part.state]
            assert all(torch.equal(net.executor.state_dict()[name], settled[name]) for name in front)
    # At the end the model has the averages, and there are none beside it.
    assert net.ema.state_dict() == {"means": {}}
    assert record.eval_loss == net.evaluate().loss


def test_no_decay_is_no_average() -> None:
    def trained(ema: float | None) -> tuple[Trainer, list[float]]:
        torch.manual_seed(0)
        net = trainer(Chain(), plan=PHASES, ema=ema)
        return net, [record.eval_loss for record in net.epochs()]

    (plain, losses), (averaged, others) = trained(None), trained(0.0)
    assert losses == others
    assert same(weights(plain.executor), weights(averaged.executor))
