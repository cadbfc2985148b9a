"""What forward's own autocast does to types, on the meta device too, and where it forbids a cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxsplit.capture.tracing import trace
from fxsplit.execute.settled.folding import fold
from fxsplit.execute.stages import stage_graph
from fxsplit.plan.cuts import cuts
from fxsplit.plan.partition import partition
from tests.networks import Chain, Regions


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_types_are_those_of_autocast(device: str) -> None:
    found = trace(Regions(), (torch.empty(2, 3, 8, 8, device=device),))
    for graph in (found.train, found.eval):
        types = {name: graph.values[f"inner.{name}"].dtype for name in range(5)}
        assert types == {0: "bfloat16", 1: "bfloat16", 2: "bfloat16", 3: "float32", 4: "float32"}
        assert [op.output.storage for op in graph.ops if op.name == "inner.0"] == ["inner.0"]


class AsksForItsType(Chain):
    """Forward goes another way where autocast has cast."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.conv1(x)
        return super().forward(x.float()[:, :3]) if x.dtype == torch.bfloat16 else x


def test_forward_is_told_the_type() -> None:
    found = trace(AsksForItsType(), (torch.empty(2, 3, 8, 8),))
    assert found.train.outputs[0] == "head"


def test_no_cut_between_two_uses_of_one_cast() -> None:
    found = trace(Regions(), (torch.empty(2, 3, 8, 8),))
    assert {op.autocast for op in found.train.ops if op.path.startswith("inner") and op.path != "inner.4"} == {0}
    refusals = {cut.path: cut.refusal for cut in cuts(found)}
    assert refusals["conv2_1"] == "ops on both sides use 'conv2.weight' as one autocast region has cast it"
    # Inside of the region there are others.
    assert refusals["inner.3"] is None


class NormOutside(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self[0](x)
        return self[2](self[1](x).mean((2, 3)))


def test_a_norm_outside_of_the_region_of_its_convolution_is_not_folded() -> None:
    model = NormOutside(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))
    found = trace(model, (torch.empty(2, 3, 4, 4),))
    (whole,) = partition(found, count=1)
    graph = stage_graph(found, whole, is_last=True, training=False)
    folds, _ = fold(graph, model)
    # The weight of the convolution is cast by the region, that of the linear op by what is around the model.
    assert [(each.statistics, each.is_ambient) for each in folds] == [((), False), ((), True)]
