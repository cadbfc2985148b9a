"""Fine-tuning by its preset: what trains when, and at which rate."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import fxsplit
from fxsplit.errors import UsageError
from fxsplit.plan.schedule import Phase
from fxsplit.saving.checkpoint import read_checkpoint
from fxsplit.training.optimizers import anneal, make_optimizer, make_scheduler
from tests.saving.runs import COMMON, model_in

pytestmark = pytest.mark.usefixtures("one_thread")


def finetuned(folder: Path, **changes: Any) -> tuple[fxsplit.Plan, list[dict[str, Tensor]]]:
    """The plan of a run, and the model's state after each of its epochs."""
    options = {"model": model_in(folder), "output": str(folder), "preset": "finetune", "force": True, "parts": 4}
    report = fxsplit.train(fxsplit.RunSpec(**{**COMMON, **options, "checkpoint_keep": 9, **changes}))
    files = sorted(Path(report.folder, "checkpoints").glob("*.safetensors"))
    assert len(files) == len(report.epochs)
    return report.plan, [read_checkpoint(file)["state"]["model"]["saved"] for file in files]


def kept(name: str) -> bool:
    """Whether a tensor is saved and tells of what was learnt: no counter of batches."""
    return not name.endswith(("num_batches_tracked", "seen"))


def test_the_head_trains_alone_and_the_front_never(tmp_path: Path) -> None:
    """Runs at two learning rates are equal, to the last bit, in what has not trained by then, and in nothing else."""
    plan, low = finetuned(tmp_path, lr=1e-2)
    _, high = finetuned(tmp_path, lr=3e-2)
    assert [(phase.start, phase.epochs) for phase in plan.phases] == [(3, 1), (1, 1), (2, 2)]
    starts = [plan.phase_at(epoch).start for epoch in range(4)]
    for epoch, states in enumerate(zip(low, high, strict=True)):
        for index, partition in enumerate(plan.partitions):
            equal = [torch.equal(*(state[name] for state in states)) for name in partition.state if kept(name)]
            assert all(equal) if index < min(starts[: epoch + 1]) else not any(equal), (epoch, index)
    for epoch in range(1, 4):
        for partition in plan.partitions[: starts[epoch]]:
            assert all(torch.equal(low[epoch][name], low[epoch - 1][name]) for name in partition.state if kept(name))


def test_random_weights_are_not_fine_tuned_unless_that_is_insisted_on(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the weights are random, and a front of random weights learns nothing"):
        finetuned(tmp_path, force=False)
    assert list(tmp_path.glob("2*")) == []


def test_what_thaws_is_as_if_it_had_never_been_settled() -> None:
    """Its weights were folded meanwhile, its norms in evaluation mode."""
    torch.manual_seed(0)
    model, images = timm.create_model("test_resnet", num_classes=10), torch.randn(4, 3, 32, 32)
    plain = copy.deepcopy(model)
    trace = fxsplit.trace(model, (images,))
    parts = fxsplit.partition(trace, count=3)
    net = fxsplit.Executor(trace, parts)
    net.enter(Phase(start=2, stop=3, epochs=1))
    net.train()
    assert not torch.equal(net(images), plain.train()(images))
    plain.load_state_dict(model.state_dict())
    net.enter(Phase(start=0, stop=3, epochs=1, thaws=True))
    net.train()
    outputs = [each(images) for each in (net, plain.train())]
    for each in outputs:
        each.square().sum().backward()
    assert torch.equal(*outputs)
    pairs = zip(model.named_parameters(), plain.parameters(), strict=True)
    assert [name for (name, own), other in pairs if not torch.equal(own.grad, other.grad)] == []
    assert [
        name for name, value in model.state_dict().items() if not torch.equal(value, plain.state_dict()[name])
    ] == []


def rates(model: nn.Module, decay: float, *, annealed_at: int | None = None) -> dict[str, float]:
    optimizer = make_optimizer(model, name="momentum", lr=1.0, momentum=0.0, weight_decay=0.0, layer_decay=decay)
    scheduler = make_scheduler(optimizer, name="constant", epochs=2, steps_per_epoch=5, warmup_epochs=0, min_lr=0.0)
    if annealed_at is not None:
        for group in optimizer.param_groups:
            group["end"] = 10
        anneal(optimizer, annealed_at, steps=10)
    scheduler.step_update(0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[each]: group["lr"] for group in optimizer.param_groups for each in group["params"]}


def test_each_layer_has_a_share_of_the_rate_of_the_next() -> None:
    model = timm.create_model("test_vit", num_classes=10)
    found = rates(model, 0.5)
    assert found["head.weight"] == 1.0
    depth = len(model.blocks)
    assert [found[f"blocks.{index}.norm1.weight"] for index in range(depth)] == [
        0.5 ** (depth - index) for index in range(depth)
    ]
    assert set(rates(model, 1.0).values()) == {1.0}
    halfway = rates(model, 0.5, annealed_at=5)
    assert halfway == pytest.approx({name: rate / 2 for name, rate in found.items()})


def test_layers_that_nobody_names_have_no_rates_of_their_own() -> None:
    with pytest.raises(UsageError, match="only timm's models say what their layers are, and Sequential is none"):
        rates(nn.Sequential(nn.Linear(2, 2)), 0.5)
