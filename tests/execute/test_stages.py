"""A stage is a module: hooks and wrappers take it, and the model stays the one owner of what it holds."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard

from fxsplit.capture.tracing import trace
from fxsplit.execute import recompute
from fxsplit.execute.executor import Executor
from fxsplit.plan.partition import partition
from fxsplit.plan.schedule import Phase
from tests.networks import Chain, OtherTensors

pytestmark = pytest.mark.usefixtures("one_thread")


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def executor(model: nn.Module, count: int = 3) -> Executor:
    captured = trace(model, (torch.empty(2, 3, 8, 8),))
    return Executor(captured, partition(captured, count=count))


def phase(start: int, stop: int = 3, **how: Any) -> Phase:
    return Phase(start=start, stop=stop, epochs=1, **how)


@pytest.mark.parametrize(
    ("entered", "training", "calls"),
    [
        (None, True, [0, 1, 2]),
        (None, False, [0, 1, 2]),
        (phase(1), True, [0, 1, 2]),  # the first one is settled
        (phase(0, 2), True, [0, 1, 2]),  # the last one is frozen
        (phase(0, recompute=2), True, [0, 1, 2]),  # to make values again ends before the end of the stage
    ],
)
def test_a_hook_on_a_stage_sees_and_changes_what_it_delivers(
    entered: Phase | None, training: bool, calls: list[int]
) -> None:
    torch.manual_seed(0)
    net = executor(Chain())
    if entered is not None:
        net.enter(entered)
    net.train(training)
    seen: list[int] = []
    for index in range(3):
        net.stage_at(index).register_forward_hook(lambda *_, index=index: seen.append(index))
    output = net(images())
    if output.requires_grad:
        output.sum().backward()
    assert seen == calls
    net.stage_at(1).register_forward_hook(lambda _stage, _values, made: [value * 0 for value in made])
    (flat,) = {tuple(row) for row in net(images()).tolist()}
    assert flat == tuple(net.get_parameter("head.bias").tolist())


@pytest.mark.parametrize("kind", [Chain, OtherTensors])
def test_stages_share_what_the_model_holds_under_its_names(kind: type[nn.Module]) -> None:
    model = kind()
    names, tensors = list(model.state_dict()), {id(each) for each in (*model.parameters(), *model.buffers())}
    net = executor(model, 2)
    assert list(net.state_dict()) == list(model.state_dict()) == names
    stages = [net.stage_at(index) for index in range(2)]
    assert set(stages).isdisjoint(net.modules())
    held = [name for stage in stages for name in stage.state_dict()]
    assert set(held) <= set(names)
    assert all(name in held for name in names if name.endswith(("weight", "bias")))
    assert {id(each) for stage in stages for each in stage.parameters()} <= tensors


def test_a_stage_follows_a_module_that_is_replaced() -> None:
    model = Chain()
    net = executor(model)
    model.head = nn.Linear(model.head.in_features, model.head.out_features)
    net.train()
    assert [id(each) for each in net.stage_at(2).parameters()] == [id(each) for each in model.head.parameters()]
    assert torch.equal(net(images()), copy.deepcopy(model).train()(images()))


def test_a_stage_of_a_copy_runs_over_the_copy() -> None:
    net = executor(Chain())
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert not torch.equal(other.eval()(images()), net.eval()(images()))
    assert {id(each) for each in other.stage_at(0).parameters()} <= {id(each) for each in other.parameters()}


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_fsdp_shards_a_stage_and_freezes_with_it() -> None:
    torch.manual_seed(0)
    model = Chain()
    plain = copy.deepcopy(model)
    net = executor(model)
    for index in range(3):
        fully_shard(net.stage_at(index))
    assert {type(each).__name__ for each in model.parameters()} == {"DTensor"}

    def gradients(module: nn.Module) -> list[Tensor]:
        module.zero_grad()
        module(images()).square().sum().backward()
        return [each.grad for each in module.parameters() if each.grad is not None]

    ours, theirs = gradients(net), gradients(plain)
    assert len(ours) == len(theirs) == 10
    assert all(torch.equal(mine.full_tensor(), other) for mine, other in zip(ours, theirs, strict=True))  # type: ignore[attr-defined]
    net.enter(phase(1))
    assert len(gradients(net.train())) == 8


def test_segments_are_made_when_a_phase_first_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Chain()
    asked: list[int] = []
    plan = recompute.segments

    def counted(partitions: Any, modes: Any) -> Any:
        asked.append(len(partitions))
        return plan(partitions, modes)

    monkeypatch.setattr(recompute, "segments", counted)
    net = executor(model, 2)
    net.enter(phase(0, 2, recompute=1))
    net.train()(images())
    assert asked == []
    other = copy.deepcopy(net)
    assert asked == [2]
    results = []
    for each in (net, other):
        each.enter(phase(0, 2, recompute=1, segmented=True))
        each.train()(images()).square().sum().backward()
        results.append([parameter.grad for parameter in each.parameters()])
    assert all(torch.equal(mine, its) for mine, its in zip(*results, strict=True))  # type: ignore[arg-type]
    assert asked == [2]
