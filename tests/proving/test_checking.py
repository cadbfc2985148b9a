"""The check finds every difference between two modules, and survives whatever a model does."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import fxsplit
from fxsplit.errors import UsageError
from fxsplit.execute import pointwise
from fxsplit.models.examples import Example
from fxsplit.proving import checking
from fxsplit.proving.checking import check_model, differing
from fxsplit.report import CheckRecord, Observer
from fxsplit_cli.main import main
from tests.networks import Chain

INPUTS = [Example(args=(torch.randn(count, 3, 8, 8),)) for count in (2, 3)]


def _one_value(x: Tensor) -> Tensor:
    wrong = torch.zeros_like(x)
    wrong.view(-1)[0] = x.detach().view(-1)[0] / 1000
    return x + wrong


class Broken(fxsplit.Executor):
    """An executor with one thing wrong."""

    wrong: ClassVar[str]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        if self.wrong == ("value in training" if self.training else "value in evaluation"):
            return _one_value(found)
        if self.wrong == "second batch" and len(found) == 3:
            return found + 1e-7
        if self.wrong == "type of the output":
            return (found,)
        if self.wrong == "random state of torch":
            torch.rand(1)
        if self.wrong == "random state of Python":
            random.random()
        if self.wrong == "random state of numpy":
            np.random.rand()
        if self.wrong == "input":
            args[0].data.view(-1)[0] += 1
        if self.wrong == "buffer" and self.training:
            self.get_buffer("1.running_mean").data.view(-1)[0] *= 1.001
        return found


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

class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.steady, self.random, self.restless = nn.Linear(3, 3), nn.Linear(3, 3), Restless()

    def forward(self, x):
        x = x.mean((2, 3))
        return {"steady": self.steady(x), "random": self.restless(self.random(x))}

def norms(): return nn.Sequential(
    nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 5), nn.Dropout(0.1))
def two_heads(): return TwoHeads()
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


WRONG = {
    "value in training": "output in training, batch of 2",
    "value in evaluation": "output in evaluation, batch of 2",
    "second batch": "output in training, batch of 3",
    "type of the output": "type of output in training, batch of 2",
    "random state of torch": "random state of torch in training, batch of 2",
    "random state of Python": "random state of Python in training, batch of 2",
    "random state of numpy": "random state of numpy in training, batch of 2",
    "input": "input[0] in training, batch of 2",
    "buffer": "buffer 1.running_mean in training, batch of 2",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_broken_executor_fails_and_is_named(
    factories: str, wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Broken, "wrong", wrong, raising=False)
    monkeypatch.setattr(checking, "Executor", Broken)
    assert main(["check", f"{factories}:norms", "--img-size", "8", "--json"]) == 4
    (record,) = json.loads(capsys.readouterr().out)
    assert (record["verdict"], record["passed"], record["own_differences"]) == ("differs", False, [])
    assert record["differences"][0].startswith(f"{WRONG[wrong]} (")


GRADIENTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "one number": (_one_value, "gradient of 4.weight in training, batch of 2 (by "),
    "a nan": (lambda gradient: gradient * torch.nan, "gradient of 4.weight in training, batch of 2 (where one is not "),
}


@pytest.mark.parametrize("case", GRADIENTS)
def test_one_wrong_gradient_fails(factories: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, expected = GRADIENTS[case]

    class Hooked(fxsplit.Executor):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.get_parameter("4.weight").register_hook(change)

    monkeypatch.setattr(checking, "Executor", Hooked)
    record = check_model(f"{factories}:norms", structure_only=False, parts=3, img_size=8)
    assert [each.partition(" (")[0] for each in record.differences] == [
        f"gradient of 4.weight in training, batch of {count}" for count in (2, 3)
    ]
    assert record.differences[0].startswith(expected)


def test_a_gradient_in_only_one_of_the_two_fails(factories: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Frozen(fxsplit.Executor):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.get_parameter("4.bias").requires_grad_(False)

    monkeypatch.setattr(checking, "Executor", Frozen)
    record = check_model(f"{factories}:norms", structure_only=False, parts=3, img_size=8)
    assert record.differences == tuple(
        f"gradient of 4.bias in training, batch of {count} (nothing instead of Tensor)" for count in (2, 3)
    )


def test_a_random_model_is_excused_in_its_own_names_alone(factories: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> CheckRecord:
        return check_model(f"{factories}:two_heads", structure_only=False, parts=3, img_size=8)

    record = check()
    assert (record.verdict, record.passed, record.differences) == ("not deterministic", True, ())
    assert any(each.startswith("output['random'] in training") for each in record.own_differences)

    class Wrong(fxsplit.Executor):
        head: ClassVar[str]
        change: ClassVar[Callable[[Tensor], Tensor]]

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            found = super().forward(*args, **kwargs)
            return {**found, self.head: type(self).change(found[self.head])}

    monkeypatch.setattr(checking, "Executor", Wrong)
    for head, change in (("steady", _one_value), ("random", lambda x: x.double()), ("random", lambda x: x[:, :2])):
        monkeypatch.setattr(Wrong, "head", head, raising=False)
        monkeypatch.setattr(Wrong, "change", staticmethod(change), raising=False)
        record = check()
        assert (record.verdict, record.passed) == ("differs", False)
        assert record.differences[0].startswith(f"output['{head}'] in training, batch of 2 (")


def test_equal_modules_do_not_differ() -> None:
    torch.manual_seed(0)
    plain = Chain()
    assert list(differing(plain, copy.deepcopy(plain), INPUTS)) == []


def test_a_paper_network_is_proved_equal() -> None:
    record = check_model("paper:cnn", structure_only=False, parts=4, img_size=16)
    assert (record.verdict, record.passed, record.partitions, record.batch_sizes) == ("equal", True, 4, (2, 3))
    structure = check_model("paper:cnn", structure_only=True, parts=4, img_size=16)
    assert (structure.verdict, structure.ops, structure.cuts) == ("captured", record.ops, record.cuts)


def test_in_channels_last_products_are_held_to_their_convolutions(
    factories: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check() -> CheckRecord:
        return check_model(f"{factories}:norms", structure_only=False, parts=3, img_size=8, channels_last=True)

    assert check().verdict == "equal"
    product = pointwise.as_product
    for off in (1.001, 1 + 1e-5):
        monkeypatch.setattr(pointwise, "as_product", lambda *given, off=off: product(*given) * off)
        assert "rounding cannot explain" in str(check().refusal)


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


@pytest.mark.parametrize("wrong", ["paper:x*", "timm:nope", "nope.py:fine", "nowhere:fine", "nope", "hf:nope"])
def test_a_name_that_means_no_model_keeps_no_other_from_its_check(factories: str, wrong: str) -> None:
    asks, unknown, fine = fxsplit.check([f"{factories}:asks", wrong, f"{factories}:fine"], img_size=8)
    assert (unknown.model, unknown.verdict, unknown.passed) == (wrong, "unknown", False)
    assert (asks.verdict, fine.verdict) == ("refused", "equal")
    with pytest.raises(UsageError) as raised:
        fxsplit.check([wrong])
    assert str(raised.value) == unknown.refusal
    forecast = fxsplit.api.check_forecasts([wrong, f"{factories}:asks"], img_size=8, device="cpu")
    assert [each.verdict for each in forecast] == ["unknown", "refused"]
    assert main(["check", wrong]) == 2


def test_a_process_that_dies_loses_its_own_model_only(factories: str) -> None:
    names = [f"{factories}:{name}" for name in ("fine", "dies", "asks")]
    fine, dies, asks = fxsplit.check(names, img_size=8, jobs=2)
    assert [fine.verdict, dies.verdict, asks.verdict] == ["equal", "refused", "refused"]
    assert dies.refusal == "the process that checked it died, as it does when memory runs out"
    assert "branches on data" in str(asks.refusal)
