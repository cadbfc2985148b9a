"""The check finds every difference between two modules, and survives whatever a model does."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxsplit
from fxsplit.capture.examples import Example
from fxsplit.errors import UsageError
from fxsplit.report import CheckRecord, Observer
from fxsplit.run.checking import check_model, differing
from tests.models import Chain

INPUTS = [Example(args=(torch.randn(count, 3, 8, 8),)) for count in (2, 3)]


class Sabotaged(Chain):
    """Chain, with one thing wrong."""

    wrong: Callable[[Sabotaged, Tensor], Tensor] = staticmethod(lambda _self, x: x)

    def forward(self, x: Tensor) -> Tensor:
        return self.wrong(self, super().forward(x))


def _move_statistics(self: Sabotaged, x: Tensor) -> Tensor:
    assert self.norm1.num_batches_tracked is not None
    if self.training:
        self.norm1.num_batches_tracked.add_(1)
    return x


def _draw(_self: Sabotaged, x: Tensor) -> Tensor:
    torch.rand(1)
    return x


def _draw_in_python(_self: Sabotaged, x: Tensor) -> Tensor:
    random.random()
    return x


class OtherGradient(torch.autograd.Function):
    @staticmethod
    def forward(_context: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_context: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 1.0001


def _change_gradient(_self: Sabotaged, x: Tensor) -> Tensor:
    return OtherGradient.apply(x)  # type: ignore[no-any-return]


def _only_at_three(_self: Sabotaged, x: Tensor) -> Tensor:
    return x + 1e-7 * (len(x) == 3)


def _only_in_evaluation(self: Sabotaged, x: Tensor) -> Tensor:
    return x if self.training else x * 1.0001


WRONG: dict[str, tuple[Callable[[Sabotaged, Tensor], Tensor], str]] = {
    "statistics": (_move_statistics, "buffer norm1.num_batches_tracked in training, batch of 2"),
    "random state": (_draw, "random state of torch in training, batch of 2"),
    "python's random state": (_draw_in_python, "random state of Python in training, batch of 2"),
    "gradient": (_change_gradient, "gradient of head.bias in training, batch of 3"),
    "second batch": (_only_at_three, "output 0 in training, batch of 3"),
    "evaluation": (_only_in_evaluation, "output 0 in evaluation, batch of 2"),
}


def _pair(wrong: Callable[[Sabotaged, Tensor], Tensor] | None) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = Sabotaged()
    other = copy.deepcopy(plain)
    if wrong:
        other.wrong = wrong  # type: ignore[method-assign]
    return plain, other


def test_equal_modules_do_not_differ() -> None:
    assert list(differing(*_pair(None), INPUTS)) == []


@pytest.mark.parametrize("name", WRONG)
def test_every_kind_of_difference_is_found_and_named(name: str) -> None:
    wrong, expected = WRONG[name]
    assert expected in list(differing(*_pair(wrong), INPUTS))


def test_a_paper_network_is_proved_equal() -> None:
    record = check_model("paper:cnn", structure_only=False, parts=4, img_size=16)
    assert (record.verdict, record.passed, record.partitions, record.batch_sizes) == ("equal", True, 4, (2, 3))
    structure = check_model("paper:cnn", structure_only=True, parts=4, img_size=16)
    assert (structure.verdict, structure.ops, structure.cuts) == ("captured", record.ops, record.cuts)


FACTORIES = """
import os
import torch
from torch import nn

class Restless(nn.Module):
    def forward(self, x):
        torch.seed()
        return x + torch.rand(())

class Asks(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

def restless(): return nn.Sequential(nn.Conv2d(3, 3, 1), Restless())
def asks(): return Asks()
def broken(): raise RuntimeError("no such luck")
def fine(): return nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
def dies(): os._exit(9)
"""


@pytest.fixture
def factories(tmp_path: Path) -> str:
    file = tmp_path / "factories.py"
    file.write_text(FACTORIES, encoding="utf-8")
    return str(file)


def test_what_is_wrong_with_a_model_is_in_its_record(factories: str) -> None:
    heard: list[tuple[str, int]] = []

    class Listener(Observer):
        def model_checked(self, record: CheckRecord, count: int) -> None:
            heard.append((record.model, count))

    names = [f"{factories}:{name}" for name in ("restless", "asks", "broken", "fine")]
    restless, asks, broken, fine = fxsplit.check(names, img_size=8, observer=Listener())
    assert (restless.verdict, restless.passed) == ("not deterministic", True)
    assert asks.verdict == broken.verdict == "refused"
    assert "branches on data" in str(asks.refusal)
    assert "no such luck" in str(broken.refusal)
    assert (fine.verdict, fine.partitions) == ("equal", 2)
    assert heard == [(name, 4) for name in names]
    with pytest.raises(UsageError, match="no model of paper matches 'x\\*'"):
        fxsplit.check(["paper:x*"])


def test_a_process_that_dies_loses_its_own_model_only(factories: str) -> None:
    names = [f"{factories}:{name}" for name in ("fine", "dies", "asks")]
    fine, dies, asks = fxsplit.check(names, img_size=8, jobs=2)
    assert [fine.verdict, dies.verdict, asks.verdict] == ["equal", "refused", "refused"]
    assert dies.refusal == "the process that checked it died, as it does when memory runs out"
    assert "branches on data" in str(asks.refusal)
