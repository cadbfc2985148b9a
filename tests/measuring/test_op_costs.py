"""Allocations as the allocator tells them, and ops measured in training steps of a copy of the model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxsplit.capture.tracing import trace
from fxsplit.errors import GuardError, TraceError
from fxsplit.measuring import allocations, op_costs
from fxsplit.measuring.op_costs import measure
from tests.networks import HAZARDS, BranchOnShape, Chain

CPU = torch.device("cpu")


def test_allocations_of_a_known_case() -> None:
    with allocations.recorded(CPU) as events:
        first = torch.empty(1000, dtype=torch.uint8)
        second = torch.empty(2000, dtype=torch.uint8)
        del first
        allocations.mark("here")
        third = torch.empty(500, dtype=torch.uint8)
    sizes = [event.size for event in events if not event.mark and abs(event.size) >= 500]
    assert sizes == [1000, 2000, -1000, 500]
    large = [event for event in events if event.mark or abs(event.size) >= 500]
    assert [event.mark for event in large] == ["", "", "", "here", ""]
    assert allocations.peak(large) == 3000
    assert allocations.survivors(large) == {1, 4}
    assert allocations.peak(large, without={1, 4}) == 1000
    assert len(second) + len(third) == 2500


def test_memory_that_a_kernel_gives_back_counts() -> None:
    values = torch.rand(4096)
    with allocations.recorded(CPU) as events:
        found = values.median()
    # The kernel sorts a copy.
    assert found.dim() == 0
    assert allocations.peak(events) >= values.nbytes


@pytest.mark.parametrize("name", HAZARDS)
def test_every_op_is_measured_and_the_model_stays_as_it_was(name: str) -> None:
    torch.manual_seed(0)
    model = HAZARDS[name]()
    images = torch.randn(4, 3, 8, 8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    copy_of_images, random_state = images.clone(), torch.get_rng_state()
    plain = trace(model, (images,))
    found = measure(plain, (images,), steps=2)
    for old, new in ((plain.train, found.train), (plain.eval, found.eval)):
        assert [op.macs for op in new.ops] == [op.macs for op in old.ops]
        assert new.digest() == old.digest()
        assert all(op.seconds is None for op in old.ops)
        assert all(op.seconds is not None and op.seconds >= (op.forward_seconds or 1.0) > 0 for op in new.ops)
    assert all(op.seconds == op.forward_seconds and not op.backward_workspace_bytes for op in found.eval.ops)
    assert any(op.seconds != op.forward_seconds for op in found.train.ops)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(images, copy_of_images)
    assert torch.equal(torch.get_rng_state(), random_state)


class _SlowTwin(torch.autograd.Function):
    """Takes 1 s forward and 3 s backward of a clock that stands still otherwise, and borrows memory."""

    seconds = 0.0

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        _SlowTwin.seconds += 1
        torch.empty(BORROWED)
        return x * 1.0

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        _SlowTwin.seconds += 3
        torch.empty(2 * BORROWED)
        return gradient * 1.0


BORROWED = 1 << 18


class Slow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _SlowTwin.apply(x)  # type: ignore[no-any-return, no-untyped-call]


class OneSlowOp(Chain):
    """Chain with a slow op in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = Slow()

    def forward(self, x: Tensor) -> Tensor:
        x = self.slow(self.norm1(self.conv1(x)).relu())
        return self.head(self.norm2(self.conv2(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("traced", [2, 8])
def test_seconds_and_workspace_belong_to_the_op_that_takes_them(traced: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_costs, "time", SimpleNamespace(perf_counter=lambda: _SlowTwin.seconds))
    found = measure(trace(OneSlowOp(), (torch.empty(traced, 3, 8, 8),)), (torch.randn(2, 3, 8, 8),), steps=3)
    share = traced / 2  # figures are those of the traced batch
    for graph, backward in ((found.train, 3), (found.eval, 0)):
        for op in graph.ops:
            slow = share if op.name == "slow" else 0
            assert (op.forward_seconds, op.seconds) == (slow, slow * (1 + backward))
            for borrowed, times in ((op.forward_workspace_bytes, 1), (op.backward_workspace_bytes, 2 * backward / 3)):
                # Not to the byte: the op takes some memory for itself.
                assert borrowed == pytest.approx(slow * times * 4 * BORROWED, abs=share * 50_000)


def test_what_cannot_be_measured_is_refused() -> None:
    with torch.device("meta"):
        model = Chain()
    with pytest.raises(TraceError, match="no weights to measure it with"):
        measure(trace(model, (torch.empty(2, 3, 8, 8, device="meta"),)), (torch.empty(2, 3, 8, 8),))
    with pytest.raises(GuardError, match="another path"):
        measure(trace(BranchOnShape(), (torch.empty(2, 3, 8, 8),)), (torch.empty(2, 3, 6, 6),))
