"""What an op costs: multiply-adds in both directions and what it saves, against torch's own counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import DeformConv2d

from fxsplit.capture.tracing import trace
from fxsplit.models.libraries.paper import NETWORKS
from fxsplit.objects.structure import tensors_in
from tests.networks import HAZARDS, Chain

MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    # What is kept whole because it looks at data has no backward on the meta device.
    **{name: (make, 8) for name, make in HAZARDS.items() if name not in ("InnerBranchOnData", "FunctionOnData")},
    **{f"paper:{name}": (make, 32) for name, make in NETWORKS.items()},
    "timm:resnext50_32x4d": (lambda: timm.create_model("resnext50_32x4d"), 32),
    "timm:vit_tiny_patch16_224": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32), 32),
    "timm:convnext_atto": (lambda: timm.create_model("convnext_atto"), 32),
}


def test_backward_multiply_adds_equal_those_worked_out_by_hand() -> None:
    ops = trace(Chain(), (torch.empty(2, 3, 8, 8, device="meta"),)).train.ops
    # One product for each operand whose gradient is wanted: that of the image is not.
    assert {op.name: op.backward_macs for op in ops if op.backward_macs} == {
        "conv1": 8 * 8 * 6 * 3 * 9,
        "conv2": 2 * 8 * 8 * 6 * 6 * 9,
        "head": 2 * 6 * 5,
    }


@pytest.mark.parametrize("name", MODELS)
def test_multiply_adds_equal_torchs_count_of_a_whole_step(name: str) -> None:
    make, size = MODELS[name]
    # The count of attention depends on the device.
    place = torch.device("meta" if name.startswith("timm:") else "cpu")
    with place:
        model, images = make(), torch.rand(2, 3, size, size)
    ops = trace(model, (images,)).train.ops
    counter = FlopCounterMode(display=False)
    with counter:
        made = [tensor for tensor in tensors_in(model(images)) if tensor.requires_grad]
    forward = counter.get_total_flops()
    with counter:
        torch.autograd.backward(made, [torch.empty_like(tensor) for tensor in made])
    assert 2 * 2 * sum(op.macs for op in ops) == forward
    assert 2 * 2 * sum(op.backward_macs for op in ops) == counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_is_named_or_hidden_and_charged_once(name: str) -> None:
    make, size = MODELS[name]
    graph = trace(make(), (torch.rand(2, 3, size, size),)).train
    named = {storage for op in graph.ops for storage in op.saves}
    assert named <= {op.output.storage for op in graph.ops}
    expected = sum(graph.values[storage].bytes_per_sample for storage in named) + sum(
        op.hidden_bytes for op in graph.ops
    )
    # Ops round what they are charged up to a whole byte a sample, one by one.
    assert expected == pytest.approx(sum(op.activation_bytes for op in graph.ops), abs=len(graph))


def test_a_storage_that_two_ops_save_is_saved_by_both() -> None:
    ops = {op.name: op for op in trace(Chain(), (torch.empty(2, 3, 8, 8, device="meta"),)).train.ops}
    assert ops["relu"].saves == ops["conv2"].saves == ("relu",)
    assert ops["conv2"].activation_bytes == 0
    assert ops["conv1"].saves == ()
    assert ops["norm1"].saves == ("conv1",)
    assert ops["norm1"].hidden_bytes == 2 * 6 * 4 // 2  # mean and deviation of the batch


class Deformed(nn.Module):
    """A kernel of torchvision, and a module that looks at data."""

    def __init__(self) -> None:
        super().__init__()
        self.offset, self.deform = nn.Conv2d(3, 18, 3, padding=1), DeformConv2d(3, 4, 3, padding=1)
        self.inner = HAZARDS["InnerBranchOnData"]()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y + self.deform(x, self.offset(x)).mean((1, 2, 3))[:, None]


def test_what_cannot_be_counted_is_said() -> None:
    ops = {op.name: op for op in trace(Deformed(), (torch.rand(2, 3, 8, 8),)).train.ops}
    uncounted = {name: op.target for name, op in ops.items() if op.uncounted}
    assert len(uncounted) == 2
    assert "torchvision.deform_conv2d" in uncounted.values()
    assert ops["offset"].macs == 64 * 27 * 18
    assert not any(op.uncounted for op in trace(Chain(), (torch.rand(2, 3, 8, 8),)).train.ops)
