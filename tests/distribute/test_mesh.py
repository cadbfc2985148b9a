"""Two pipelines of two processes end where two data-parallel processes end, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import fxsplit
from fxsplit import assembly
from fxsplit.assembly.starting import Start, _fitting
from fxsplit.data.batch import Batch
from fxsplit.distribute.concord import Concord, _tensors
from fxsplit.distribute.processes import ALONE, Processes
from fxsplit.errors import Terminated, UsageError
from fxsplit.measuring import meter
from fxsplit.models import registry
from fxsplit.plan.division import Division
from fxsplit.plan.forecast import CostModel
from fxsplit.plan.planfile import NamedPhase, PlanFile
from fxsplit.report import Observer
from fxsplit.saving.checkpoints import Found, find_checkpoint
from fxsplit.spec import RunSpec, resolve
from fxsplit.training import telemetry
from fxsplit.training.step import Step
from tests.distribute.group import together
from tests.distribute.test_data_parallel import COMMON, Interrupting, found_in, in_processes, metrics, weights
from tests.distribute.test_pipeline_parallel import EQUAL, same

PROCESSES, REPLICAS = 4, 2
# Of 71 images, batches of 16 leave seven: one pipeline takes four of them, the other three.
SPECS: dict[str, dict[str, Any]] = {
    # The second partition moves from one process to the other when the first one settles, and then settles, too. From
    # then on the first processes of both pipelines train what is left, on rows of their own.
    "settle": {
        "schedule": "settle-far", "at": ("3", "9"), "settle_from": 0.25, "settle_until": 0.7, "epochs": 6,
        "grad_accum_steps": 2, "average": 0.5, "recalibrate": True, "clip_grad": 0.5, "train_limit": 71,
        "cache": "ram", "soft_targets": 0.5,
    },
    # Of 67 images three are left: the second pipeline runs images that count for nothing.
    "grow": {
        "schedule": "grow", "parts": 4, "epochs": 4, "grad_accum_steps": 4, "pipeline_schedule": "interleaved",
        "model_ema": True, "model_ema_decay": 0.8, "opt": "momentum", "channels_last": True, "augment": "crop-flip",
    },
}  # fmt: skip
SUITE = "settle"


def spec(folder: Path, name: str, output: str, parallel: str) -> RunSpec:
    # Statistics of BatchNorm are averaged with each checkpoint, so there is one after the step with the signal anyway.
    asked = {**COMMON, "prove": False, "parallel": "ddp,pipeline", **SPECS[name], "checkpoint_every": "13s"}
    named = {"model": f"{folder / 'normed.py'}:normed", "output": str(folder / output), "experiment": name}
    return resolve(asked, {**named, "parallel": parallel})


def run(rank: int, folder: str, name: str) -> None:
    """One of four processes: a signal interrupts the mesh, which goes on; then the first two train without pipelines.

    These two also go on where the mesh was interrupted.
    """
    at = Path(folder)
    found: dict[str, Any] = {}
    with together(rank, PROCESSES, f"{folder}/store"), a_second_a_step(), noted() as found["borders"]:
        try:
            fxsplit.train(spec(at, name, "mesh", "ddp,pipeline"), Interrupting(3, 2))
        except Terminated as error:
            found["said"] = str(error)
        if rank == 0:
            shutil.copytree(at / "mesh", at / "on")
        fxsplit.train(resume=at / "mesh" / name, trust_code=True)
    if rank < REPLICAS:
        with together(rank, REPLICAS, f"{folder}/store of two"), a_second_a_step():
            with noted() as found["plain borders"]:
                fxsplit.train(spec(at, name, "ddp", "ddp"))
            fxsplit.train(spec(at, name, "on", "ddp"), resume=at / "on" / name, trust_code=True)
    torch.save(found, f"{folder}/{rank}.pt")


@contextmanager
def noted() -> Iterator[list[dict[str, Any]]]:
    """Note at each change of phase what trains where, and the state of model and averages."""
    borders: list[dict[str, Any]] = []
    check = Concord.check

    def checked(self: Concord, training: Mapping[str, Callable[[], Any]]) -> None:
        check(self, training)
        averages = {part: training[part]() for part in ("ema", "endings") if part in training}
        state = {**self._executor.state_dict(), **dict(_tensors(averages))}
        copied = {key: value.clone() for key, value in state.items()}
        borders.append({"window": self._executor.window, "homes": self._engine.homes, "state": copied})

    with patch.object(Concord, "check", checked):
        yield borders


@contextmanager
def a_second_a_step() -> Iterator[None]:
    """Inside, each step takes this process a second of the processor, and nothing else takes any."""
    spent, update = [0.0], Step.update

    def updated(self: Step, optimizer: torch.optim.Optimizer) -> None:
        spent[0] += 1
        update(self, optimizer)

    with (
        patch.object(Step, "update", updated),
        patch.object(meter, "processor_seconds", lambda: spent[0]),
        patch.object(telemetry, "processor_seconds", lambda: spent[0]),
    ):
        yield


def found(folder: Path, name: str) -> list[dict[str, Any]]:
    """Train by four processes, and return what each has noted."""
    return found_in(in_processes(run, folder, name, processes=PROCESSES), processes=PROCESSES)


@pytest.mark.parametrize("name", [SUITE, pytest.param("grow", marks=pytest.mark.slow)])
def test_two_pipelines_end_where_two_processes_end_bit_for_bit(name: str, tmp_path: Path) -> None:
    ranks = found(tmp_path, name)
    ours, plain, on = (tmp_path / output / name for output in ("mesh", "ddp", "on"))
    same_borders(ranks, averages=True)
    assert {rank["said"] for rank in ranks} == {ranks[0]["said"]}
    assert ranks[0]["said"].startswith("saved at epoch 3, step 3; go on with: fxsplit train --resume ")
    assert same(weights(ours), weights(plain))
    assert same(weights(on), weights(plain))
    same_records(ours, plain)
    same_optimizer(ours, plain)
    # Three of the five steps of the third epoch were taken by four processes, the rest by as many or by two.
    for run_folder, third, later in ((ours, 5 * PROCESSES, PROCESSES), (on, 3 * PROCESSES + 2 * REPLICAS, REPLICAS)):
        seconds = [epoch["processor_seconds"] for epoch in metrics(run_folder)]
        assert seconds == [5 * PROCESSES] * 2 + [third] + [5 * later] * (len(seconds) - 3)
        assert json.loads((run_folder / "report.json").read_text("utf-8"))["processor_seconds"] == sum(seconds)
    work = [[epoch["multiply_adds"] for epoch in metrics(each)] for each in (on, plain)]
    assert work[0] == work[1]
    if name == SUITE:
        # Of 16 images: 4 channels of 6 by 6 behind the first cut, 6 channels of 3 by 3 behind the other.
        first, second = (16 * 4 * size for size in (4 * 6 * 6, 6 * 3 * 3))
        assert [border["homes"] for border in ranks[3]["borders"]] == [(0, 1, 1), (0, 0, 1), (0, 0, 0)]
        sent = [2 * first, 2 * first, 2 * second, 2 * second, 0, 0]
        assert [epoch["sent_bytes"] for epoch in metrics(ours)] == sent


def same_borders(ranks: list[dict[str, Any]], *, averages: bool) -> None:
    plain = ranks[0]["plain borders"]
    for rank in ranks:
        for mine, other in zip(rank["borders"], plain, strict=True):
            assert mine["window"] == other["window"]
            assert same(mine["state"], other["state"])
    assert any("/" in key for border in plain for key in border["state"]) == averages


def same_records(ours: Path, plain: Path) -> None:
    for mine, other in zip(metrics(ours), metrics(plain), strict=True):
        for score in (*EQUAL, "reduced_bytes", "multiply_adds"):
            assert mine[score] == other[score], (mine["epoch"], score)
        # Each process tests batches of its own.
        assert mine["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-6)


def same_optimizer(ours: Path, plain: Path) -> None:
    checkpoints = [find_checkpoint(folder, notice=print) for folder in (ours, plain)]
    mine, other = (each.data["state"]["training"]["optimizer"]["optimizer"]["state"] for each in checkpoints if each)
    assert mine.keys() == other.keys()
    assert all(same(mine[each], state) for each, state in other.items())


def pipelines(monkeypatch: pytest.MonkeyPatch, replicas: int, count: int) -> Processes:
    """The first of so many pipelines of `count` processes, which are no processes of torch's."""
    processes = Processes(0, replicas * count)

    def arranged(self: Processes, pipeline: int) -> None:
        assert pipeline == count
        self.replicas, self.pipeline = Processes(0, replicas), Processes(0, count)

    monkeypatch.setattr(Processes, "arrange", arranged)
    arranged(processes, count)
    return processes


ASKED: dict[str, Any] = {"model": "paper:cnn", "data": "synthetic", "parallel": "ddp,pipeline"}


def test_batches_are_divided_among_pipelines_and_then_into_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    observer = Observer()
    start = Start(spec=RunSpec(**ASKED, batch_size=66))
    three = pipelines(monkeypatch, 3, 2)
    with patch.object(observer, "notice", said.append):
        assert _fitting(start, three, observer).spec.grad_accum_steps == 2
        assert _fitting(start, ALONE, observer) is start
        for asked, sentence in (
            ({"batch_size": 2}, "batch-size is 2, and 3 pipelines divide each batch among them"),
            ({"mixup": 0.2}, "--mixup mixes images of a batch, of which each of 3 pipelines has only a part"),
        ):
            refused = Start(spec=replace(start.spec, **asked))
            with pytest.raises(UsageError, match=f"^{sentence}"):
                _fitting(refused, three, observer)
    assert said == [
        "6 processes train together, in 3 pipelines of 2; of each batch of 66 images 22 images go through one of them "
        "in 2 micro-batches, one for each process; more --grad-accum-steps leave them less to wait",
        "there are no other processes for --parallel ddp,pipeline; start several with torchrun",
    ]
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"^3 processes cannot be divided into pipelines of 2; start a multiple of 2"):
        _fitting(start, Processes(0, 3), observer)


MORE = ", one for each process; more --grad-accum-steps leave them less to wait"
FEW = ", since none has a single image; with a larger --batch-size processes wait less"


@pytest.mark.parametrize(
    ("replicas", "batch_size", "asked", "taken", "says"),
    [
        (2, 8, {}, 2, f"in 2 micro-batches{MORE}"),
        (2, 6, {}, 1, f"in 1 micro-batch{FEW}"),
        (2, 6, {"grad_accum_steps": 2}, 1, "in 1 micro-batch"),
        # One pipeline takes eight images, the other seven, in micro-batches of three and of two.
        (2, 15, {"grad_accum_steps": 5}, 4, "in 3 or 4 micro-batches"),
        # Two of four pipelines take three images, and the others do not divide their two either.
        (4, 10, {"grad_accum_steps": 2}, 1, "in 1 micro-batch"),
        (2, 18, {"grad_accum_steps": 6}, 3, "in 3 micro-batches"),
        (2, 18, {"grad_accum_steps": 6, "memory_aim": 1.0}, 3, "in at least 3 micro-batches"),
    ],
)
def test_as_many_micro_batches_are_announced_planned_and_forecast_as_are_run(
    replicas: int, batch_size: int, asked: dict[str, Any], taken: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    observer = Observer()
    processes = pipelines(monkeypatch, replicas, 2)
    with patch.object(observer, "notice", said.append):
        spec = _fitting(Start(spec=RunSpec(**ASKED, batch_size=batch_size, **asked)), processes, observer).spec
        phases = (NamedPhase(start=None, stop=None, epochs=1, micro_batches=spec.grad_accum_steps),)
        saved = PlanFile(schedule="standard", cuts=(), phases=phases)
        _fitting(Start(spec=spec, found=Found(Path(), {}), plan=saved), processes, observer)
    assert said[0].endswith(f"go through one of them {says}")
    # Of a plan that is there nothing more is to come.
    assert said[1].endswith(f"go through one of them {says.partition(',')[0].replace('at least ', '')}")
    trace = fxsplit.trace(registry.build("paper:cnn", num_classes=10, img_size=32), (torch.empty(2, 3, 32, 32),))
    plan = assembly.plan(spec, trace, Observer(), processes=processes)
    assert [phase.micro_batches for phase in plan.phases] == [taken]
    own = -(-batch_size // replicas)
    labels = torch.zeros(own)
    batch = Batch(values=(labels,), labels=labels, ids=labels)
    run = [len(part) for part in batch.divided(plan.phases[0].micro_batches, batch_size=own)]
    assert len(run) == taken
    costs = CostModel(plan.partitions, trace, own, 2, micro_batches=len(run), division=Division("pipeline", 2))
    ahead = assembly.forecast(spec, plan, trace, measured=False, processes=processes)
    assert ahead.phases == (costs.phase(plan.phases[0]),)
    # One process that goes on takes as many as if it had begun.
    alone = assembly.plan(spec, trace, Observer(), PlanFile.of(plan), ALONE)
    assert alone == assembly.plan(spec, trace, Observer(), processes=ALONE)
