"""What is said of a plan when it is made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import fxsplit
from fxsplit import assembly
from fxsplit.assembly.plans import _first_batch_loss
from fxsplit.distribute.processes import ALONE, Processes
from fxsplit.errors import UsageError
from fxsplit.models import registry
from fxsplit.plan.division import Division
from fxsplit.plan.forecast import CostModel
from fxsplit.report import Observer


class Sentences(Observer):
    def __init__(self) -> None:
        self.found: list[str] = []

    def notice(self, sentence: str) -> None:
        self.found.append(sentence)


@pytest.mark.parametrize(
    ("epochs", "schedule", "says"), [(1, "settle", True), (4, "settle", False), (1, "grow", False)]
)
def test_a_run_in_which_nothing_settles_says_so(epochs: int, schedule: str, says: bool, tmp_path: Path) -> None:
    heard = Sentences()
    options = {"data": "synthetic", "img_size": 16, "device": "cpu", "output": str(tmp_path), "dry_run": True}
    fxsplit.train(fxsplit.RunSpec(model="paper:cnn", epochs=epochs, schedule=schedule, **options), heard)
    assert [
        each for each in heard.found if each.startswith("nothing settles in 1 epoch of 8 partitions")
    ] != [] or not says
    assert any("nothing settles" in each for each in heard.found) is says


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_the_head_is_one_of_the_parts_that_were_asked_for(parts: int) -> None:
    spec = fxsplit.RunSpec(model="paper:cnn", schedule="finetune", parts=parts, epochs=8)
    found = fxsplit.inspect(spec).partitions
    assert len(found) == parts
    if parts > 1:  # all parameters of its last one are those of the classifier
        assert found[-1].parameters == 5130


def test_partitions_are_asked_for_by_their_number_alone() -> None:
    trace = fxsplit.trace(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)), (torch.ones(2, 4),))
    assert fxsplit.partition(trace, 3) == fxsplit.partition(trace, count=3)


def test_a_guard_with_nothing_to_undo_is_told() -> None:
    sentence = "guard is 0.1, but nothing settles, so there is nothing to undo; its images are held out all the same"
    for schedule, expected in (("standard", [sentence]), ("settle", [])):
        heard = Sentences()
        fxsplit.inspect(fxsplit.RunSpec(model="paper:cnn", guard=0.1, schedule=schedule, epochs=10), observer=heard)
        assert [each for each in heard.found if "guard" in each] == expected


def test_a_guard_that_leaves_nothing_to_train_on_is_refused() -> None:
    spec = fxsplit.RunSpec(model="paper:cnn", guard=0.999999, schedule="settle", train_limit=20)
    with pytest.raises(
        UsageError, match=r"guard is 0\.999999, which holds out 19 of 20 images to train on and leaves too"
    ):
        assembly.data(spec, Observer())


@pytest.mark.parametrize(
    ("parallel", "order", "division", "batch_size"),
    [
        ("ddp", "1f1b", None, 16),
        ("fsdp", "1f1b", Division("fsdp", 4), 16),
        ("pipeline", "1f1b", Division("pipeline", 4), 64),
        ("pipeline", "gpipe", Division("pipeline", 4, keeps_all=True), 64),
        ("ddp,pipeline", "1f1b", Division("pipeline", 2), 32),
    ],
)
def test_memory_is_forecast_of_one_process_as_they_divide_the_model(
    parallel: str, order: str, division: Division | None, batch_size: int
) -> None:
    """And a budget that its forecast just keeps needs no saving."""
    spec = fxsplit.RunSpec(
        model="paper:cnn", parallel=parallel, pipeline_schedule=order, batch_size=64, grad_accum_steps=4
    )
    processes = Processes(0, 4)
    if "pipeline" in parallel:
        processes.replicas, processes.pipeline = Processes(0, 64 // batch_size), Processes(0, batch_size // 16)
    trace = fxsplit.trace(registry.build("paper:cnn", num_classes=10, img_size=32), (torch.empty(2, 3, 32, 32),))
    plan = assembly.plan(spec, trace, Observer())
    ahead = assembly.forecast(spec, plan, trace, measured=False, processes=processes)
    costs = CostModel(plan.partitions, trace, batch_size, 2, micro_batches=4, division=division)
    assert ahead.phases == tuple(map(costs.phase, plan.phases))
    given = replace(spec, memory_budget=float(ahead.phases[0].peak_bytes))
    assert assembly.plan(given, trace, Observer(), processes=processes).phases == plan.phases


def test_beside_a_cpu_what_settles_is_on_the_host_already() -> None:
    """A GPU that is named need not be there."""
    spec = fxsplit.RunSpec(model="paper:cnn", schedule="settle", epochs=10, settled_offload=True)

    def last(device: str) -> int:
        heard = Sentences()
        ahead = fxsplit.inspect(replace(spec, device=device), observer=heard).forecast
        assert any(each.startswith("settled-offload changes nothing on a CPU") for each in heard.found) == (
            device != "cuda"
        )
        assert ahead is not None
        return ahead.phases[-1].parameter_bytes

    assert last("cpu") == last("auto") > last("cuda")


def test_phases_of_a_plan_file_take_no_more_micro_batches_than_a_batch_makes(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    fxsplit.inspect(fxsplit.RunSpec(model="paper:cnn"), save_to=str(file))
    given = json.loads(file.read_text("utf-8"))
    given["phases"][0]["micro_batches"] = 4
    file.write_text(json.dumps(given), encoding="utf-8")
    for batch_size, taken in ((8, 4), (6, 3), (3, 3)):  # of three images each has one
        spec = fxsplit.RunSpec(model="paper:cnn", plan=str(file), batch_size=batch_size)
        assert [phase.micro_batches for phase in fxsplit.inspect(spec).plan.phases] == [taken]


def test_a_first_batch_that_is_not_full_is_timed_in_as_many_micro_batches() -> None:
    spec = fxsplit.RunSpec(model="paper:cnn", data="synthetic", train_limit=5, batch_size=16)
    data = assembly.data(spec, Observer())
    loss = _first_batch_loss(spec, data, ALONE)
    given: list[int] = []

    class Net(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            given.append(len(images))
            return torch.zeros(len(images), len(data.classes))

    for index in range(4):
        loss(Net(), index, 4)
    assert given == [2, 3, 2, 3]


def test_steps_that_copy_settled_weights_are_not_recorded() -> None:
    trace = fxsplit.trace(nn.Linear(3, 2), (torch.ones(2, 3),))
    spec = fxsplit.RunSpec(model="paper:cnn", cuda_graphs="on", settled_offload=True)
    heard = Sentences()
    assert assembly.recordings(spec, trace, torch.device("cuda"), ALONE, heard) is None
    assert heard.found == ["copies of settled weights from the host are not recorded as CUDA graphs; steps run eagerly"]
