"""Kernels of the meta device whose results are known do not run again, and nothing shows it but the time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fxsplit.capture.tracing import trace
from fxsplit.meta import kernels
from fxsplit.meta.evaluate import META
from fxsplit.meta.kernels import Kernels
from fxsplit.models.registry import sketch


def twice(net: nn.Module, x: Tensor) -> list[Tensor]:
    return [net(x.clone()).sum() for _ in range(2)]


@pytest.mark.parametrize("spec", ["timm:test_efficientnet", "timm:test_vit", "torchvision:shufflenet_v2_x0_5"])
def test_a_trace_is_the_same_as_when_every_kernel_runs(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = sketch(spec, num_classes=5, img_size=160), torch.empty(2, 3, 160, 160, device=META)
    known = trace(model, (images,))
    monkeypatch.setattr(kernels, "_makes_tensors", lambda _func: False)
    run = trace(model, (images,))
    assert (known.train, known.eval) == (run.train, run.eval)


@pytest.mark.parametrize("inference", [False, True])
def test_operations_are_counted_as_torch_counts_them(inference: bool) -> None:
    with META:
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
        x = torch.empty(2, 3, 8, 8)
    ours, theirs = Kernels(), FlopCounterMode(display=False)
    with torch.inference_mode(inference):
        with ours.counting() as found:
            twice(net, x)
        with theirs:
            twice(net, x)
    assert found == theirs.get_flop_counts()["Global"]


def calls(a: Tensor) -> list[Tensor]:
    whole = a.long()
    return [a.relu(), a.relu(), a.t().relu(), a.double().relu(), a.sum(0), a.sum(1), whole.clamp(1), whole.clamp(1.0)]


def test_what_is_known_is_made_anew() -> None:
    """Neither the same tensor nor a view; and what differs in stride, type or a number is another call."""
    a = torch.empty(4, 4, device=META)
    with Kernels():
        found = calls(a)
        first, second = a.view(16), a.view(16)
    expected = calls(a)
    for mine, other in zip(found, expected, strict=True):
        assert (mine.shape, mine.stride(), mine.dtype) == (other.shape, other.stride(), other.dtype)
    assert len({each.untyped_storage()._cdata for each in found}) == len(found)
    assert first.untyped_storage()._cdata == second.untyped_storage()._cdata == a.untyped_storage()._cdata


def test_tensors_with_numbers_are_computed() -> None:
    with Kernels():
        assert (torch.ones(3) + 1).tolist() == [2, 2, 2]
        assert (torch.zeros(3) + 1).tolist() == [1, 1, 1]
