"""A frozen op that calls a method of the model itself finds it in evaluation; the model's mode stays that of all."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor, nn

import fxsplit
from tests.exact import Linears, executor_of, rows


class Resting(Linears):
    """From the first statement of its forward on that draws, the rest is one op."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if random.random() < 2:
            h = nn.functional.dropout(h, 0.5, self.training)
        return self.c(3 * h if self.training else h)


class Method(Linears):
    """Its method is one op."""

    def scaled(self, h: Tensor) -> Tensor:
        if h.abs().sum() > 1e9:
            return h
        return 3 * h if self.training else h

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.scaled(self.a(x))).relu())


class OwnTrain(Method):
    """Its `train` puts all modules into one mode."""

    def train(self, mode: bool = True) -> OwnTrain:
        super().train(mode)
        return self


@pytest.mark.parametrize(("kind", "start", "stop"), [(Resting, 0, 1), (Method, 1, 2), (OwnTrain, 1, 2)])
def test_the_model_stays_in_training_while_what_is_frozen_sees_evaluation(
    kind: type[Linears], start: int, stop: int
) -> None:
    model = kind()
    plain = copy.deepcopy(model).eval()
    net = executor_of(fxsplit.trace(model, (rows(),)))
    net.enter(fxsplit.Phase(start=start, stop=stop, epochs=1))
    for _ in range(2):
        net.train()
        assert torch.equal(net(rows()), plain(rows()))
        assert net.training
        assert model.training
    modes = [module.training for module in (model, model.a, model.b, model.c)]
    assert modes[1 + 2 * start]  # what trains
    net.release()
    assert all(module.training for module in model.modules())
