"""Two processes that each train some of the partitions end where one process ends, bit for bit."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, multiprocessing

import fxsplit
from fxsplit.assembly.starting import Start, _fitting
from fxsplit.caching.cache import Cache
from fxsplit.data.batch import Batch
from fxsplit.distribute.concord import Concord, _tensors
from fxsplit.distribute.pipeline_parallel import PipelineParallel, refuse_too_few, stage_count
from fxsplit.distribute.processes import ALONE, Processes
from fxsplit.errors import FxsplitError, Terminated, UsageError
from fxsplit.execute.executor import Executor
from fxsplit.plan.forecast import CostModel
from fxsplit.plan.planfile import NamedPhase, PlanFile
from fxsplit.report import Observer
from fxsplit.saving.checkpoints import Found, find_checkpoint
from fxsplit.spec import RunSpec, resolve
from fxsplit.training.step import Step
from tests.distribute.group import together
from tests.distribute.test_data_parallel import (
    COMMON,
    RANKS,
    SCORES,
    Interrupting,
    found_in,
    in_processes,
    metrics,
    weights,
)
from tests.networks import HAZARDS, Chain

# Of 67 images, batches of 16 leave three: a micro-batch by itself. Of 71 they leave seven: micro-batches of 2, 2 and 3.
SPECS: dict[str, dict[str, Any]] = {
    "standard": {
        "epochs": 2, "parts": 3, "sched": "cosine", "augment": "crop-flip", "grad_accum_steps": 4, "clip_grad": 0.5,
        "smoothing": 0.1, "mixup": 0.2, "train_limit": 71,
    },
    # The second partition moves from one process to the other when the first one settles, and then settles, too.
    "settle": {
        "schedule": "settle-far", "at": ("3", "9"), "settle_from": 0.25, "settle_until": 0.8, "epochs": 4,
        "grad_accum_steps": 2, "average": 0.5, "recalibrate": True, "anneal": 0.4,
    },
    # Each process has settled partitions in the end.
    "l2l": {
        "preset": "l2l", "at": ("3", "6", "9"), "settle_from": 0.25, "settle_until": 0.8, "epochs": 4, "guard": 0.2,
        "grad_accum_steps": 2, "opt": "momentum", "pipeline_schedule": "gpipe",
    },
    # In the end one partition trains, in one process. Two phases of two epochs each fill rows and read them.
    "cached": {
        "preset": "l2l", "at": ("3", "6", "9"), "settle_from": 0.25, "settle_until": 0.75, "epochs": 8, "guard": 0.2,
        "grad_accum_steps": 2, "opt": "momentum", "cache": "ram", "soft_targets": 0.5, "clip_grad": 0.5,
        "memory_aim": None,
    },
    # Gradients pass through partitions that wait until they train.
    "grow": {
        "schedule": "grow", "parts": 4, "epochs": 4, "grad_accum_steps": 4, "pipeline_schedule": "interleaved",
        "model_ema": True, "model_ema_decay": 0.8, "train_limit": 71, "channels_last": True,
    },
    "bfloat16": {"schedule": "settle", "at": ("3", "9"), "epochs": 2, "grad_accum_steps": 4, "amp": True, "veto": True},
}  # fmt: skip
BROKEN = "settle"


def spec(folder: Path, name: str, output: str, **asked: Any) -> RunSpec:
    named = {"model": f"{folder / 'normed.py'}:normed", "output": str(folder / output), "experiment": name}
    in_pipeline = {**COMMON, "prove": name == "standard", "parallel": "pipeline", **SPECS[name]}
    return resolve(in_pipeline, {"parallel": "ddp", **named, **asked})


def run(rank: int, folder: str) -> None:
    """One of the processes: all runs one after the other; what it found goes to a file."""
    with together(rank, RANKS, f"{folder}/store"):
        found = {name: trained(Path(folder), name, "pipelined") for name in SPECS}
        found["interrupted"] = interrupted(Path(folder))
        found["failed"] = failed(Path(folder))
        torch.save(found, f"{folder}/{rank}.pt")


def trained(folder: Path, name: str, output: str) -> dict[str, Any]:
    """Train, and note what is in this process.

    At each change of phase: model, averages, and who trains what. In each step: whose optimizer, which settled
    partitions run, and how many rows are read.
    """
    borders: list[dict[str, Any]] = []
    check, update, settle, read = Concord.check, Step.update, Executor._settle, Cache._at_cut
    stated: list[set[str]] = []
    settled: list[tuple[int, int, int]] = []
    rows: list[int] = []

    def checked(self: Concord, training: Mapping[str, Callable[[], Any]]) -> None:
        check(self, training)
        executor = self._executor
        averages = {part: training[part]() for part in ("ema", "endings") if part in training}
        state = {**executor.state_dict(), **dict(_tensors(averages))}
        copied = {key: value.clone() for key, value in state.items()}
        borders.append({"window": executor.window, "homes": self._engine.homes, "state": copied})

    def updated(self: Step, optimizer: torch.optim.Optimizer) -> None:
        update(self, optimizer)
        names = {each: name for name, each in self.forward.executor.named_parameters()}
        stated.append({names[each] for each in optimizer.state})

    def settling(self: Executor, values: list[Any], cut: int, stop: int, *, tracked: bool) -> list[Any]:
        if self.training and cut < stop:
            settled.append((len(stated), cut, stop))
        return settle(self, values, cut, stop, tracked=tracked)

    def reading(self: Cache, packed: Sequence[Tensor]) -> Batch:
        batch = read(self, packed)
        if self._forward.executor.training:
            rows.extend([len(stated)] * len(batch))
        return batch

    with (
        patch.object(Concord, "check", checked),
        patch.object(Step, "update", updated),
        patch.object(Executor, "_settle", settling),
        patch.object(Cache, "_at_cut", reading),
    ):
        report = fxsplit.train(spec(folder, name, output, **({} if output == "one" else {"parallel": "pipeline"})))
    partitions = [set(partition.state) for partition in report.plan.partitions]
    noted = {"borders": borders, "stated": stated, "settled": settled, "rows": Counter(rows)}
    return {"folder": report.folder, "partitions": partitions, **noted}


def interrupted(folder: Path) -> list[str]:
    """One process gets a signal, both end with a checkpoint, and go on; a copy is left for a single process."""
    said = []
    try:
        fxsplit.train(spec(folder, BROKEN, "broken", parallel="pipeline"), Interrupting(3, 2))
    except Terminated as error:
        said.append(str(error))
    broken = folder / "broken" / BROKEN
    if os.environ["RANK"] == "0":
        shutil.copytree(broken, folder / "alone" / BROKEN)
    fxsplit.train(resume=broken, trust_code=True)
    return said


def failed(folder: Path) -> list[str]:
    """Both processes fail in the second epoch: each has the newest weights of its own partitions alone."""
    update, steps = Step.update, iter(range(100))

    def failing(self: Step, optimizer: torch.optim.Optimizer) -> None:
        if next(steps) == 7:
            raise RuntimeError("this step fails")
        update(self, optimizer)

    said: list[str] = []
    observer = Observer()
    with (
        patch.object(Step, "update", failing),
        patch.object(observer, "notice", said.append),
        pytest.raises(RuntimeError, match="this step fails"),
    ):
        fxsplit.train(spec(folder, "standard", "failed", parallel="pipeline"), observer)
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return in_processes(run, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return found_in(folder)


def run_alone(_: int, folder: str) -> None:
    """The process that the others are held against, with as many micro-batches: new, as they are."""
    torch.set_num_threads(1)
    torch.save({name: trained(Path(folder), name, "one") for name in SPECS}, f"{folder}/one.pt")


@pytest.fixture(scope="module")
def alone(folder: Path, ranks: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    assert ranks
    multiprocessing.start_processes(run_alone, (str(folder),), nprocs=1, start_method="spawn")
    found: dict[str, dict[str, Any]] = torch.load(folder / "one.pt", weights_only=False)
    return found


pytestmark = pytest.mark.usefixtures("one_thread")


def same(ours: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> bool:
    return ours.keys() == plain.keys() and all(torch.equal(ours[name], plain[name]) for name in plain)


EQUAL = ("train_loss", "train_top1", "eval_top1", "held_out_top1", "lr", "trainable_parameters")


def same_records(ours: Path | str, plain: Path | str, *, work: bool = True) -> None:
    for mine, other in zip(metrics(ours), metrics(plain), strict=True):
        for score in (*EQUAL, *(["multiply_adds"] if work else [])):
            assert mine[score] == other[score], (mine["epoch"], score)
        # Each process tests batches of its own.
        assert mine["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("name", SPECS)
def test_two_processes_end_where_one_ends_bit_for_bit(
    name: str, ranks: list[dict[str, Any]], alone: dict[str, dict[str, Any]]
) -> None:
    ours, plain = ranks[0][name], alone[name]
    # Within as much memory, one process recomputes more than each of two.
    same_records(ours["folder"], plain["folder"], work=name != "l2l")
    assert same(weights(ours["folder"]), weights(plain["folder"]))
    for of_rank in ranks:
        for mine, other in zip(of_rank[name]["borders"], plain["borders"], strict=True):
            assert mine["window"] == other["window"]
            assert same(mine["state"], other["state"])
    averages = {key for border in plain["borders"] for key in border["state"] if "/" in key}
    assert bool(averages) == (name in ("settle", "grow"))


@pytest.mark.parametrize("name", SPECS)
def test_a_checkpoint_has_the_state_of_all_processes(
    name: str, ranks: list[dict[str, Any]], alone: dict[str, dict[str, Any]]
) -> None:
    found = [find_checkpoint(Path(run["folder"]), notice=print) for run in (ranks[0][name], alone[name])]
    ours, plain = (each.data["state"]["training"] for each in found if each)
    assert ours["optimizer"]["optimizer"]["param_groups"] == plain["optimizer"]["optimizer"]["param_groups"]
    states = [each["optimizer"]["optimizer"]["state"] for each in (ours, plain)]
    assert states[0].keys() == states[1].keys()
    assert all(same(states[0][name], state) for name, state in states[1].items())
    moved = [each.get("plasticity", {}) for each in (ours, plain)]
    assert bool(moved[0]) == (name == "bfloat16")
    assert same(*(dict(_tensors(each)) for each in moved))
    quiet = [[(each["highest"], each["quiet_intervals"]) for each in found["partitions"]] for found in moved if found]
    assert quiet[1:] == quiet[:-1]


@pytest.mark.parametrize("name", SPECS)
def test_each_process_keeps_the_optimizer_of_its_partitions_alone(name: str, ranks: list[dict[str, Any]]) -> None:
    borders = [rank[name]["borders"] for rank in ranks]
    assert [border["homes"] for border in borders[0]] == [border["homes"] for border in borders[1]]
    steps = len(ranks[0][name]["stated"])
    phases = [epoch["phase"] for epoch in metrics(ranks[0][name]["folder"])]
    per_epoch = steps // len(phases)
    for rank, found in enumerate(ranks):
        for step, names in enumerate(found[name]["stated"]):
            border = found[name]["borders"][phases[step // per_epoch]]
            homes = border["homes"]
            assert names == {
                each
                for index in range(*border["window"])
                if homes[index] == rank
                for each in found[name]["partitions"][index]
                if "running" not in each and "tracked" not in each
            }


def test_partitions_are_divided_anew_for_what_still_trains(ranks: list[dict[str, Any]]) -> None:
    def of(name: str) -> list[Any]:
        return [(border["window"][0], *border["homes"]) for border in ranks[0][name]["borders"]]

    assert of("settle") == [(0, 0, 1, 1), (1, 0, 0, 1), (2, 0, 0, 1)]
    assert of("l2l")[-1] == (3, 0, 0, 1, 1)
    assert [homes for _, *homes in of("grow")] == 4 * [[0, 1, 0, 1]]


def test_the_first_process_reads_rows_and_settled_partitions_run_nowhere(
    ranks: list[dict[str, Any]], alone: dict[str, dict[str, Any]]
) -> None:
    """Each image that is not held out is read once in each epoch but those in which rows of a new cut are filled.

    Before the fifth they are read once more: statistics are estimated again for the soft targets.
    """
    first, second = (rank["cached"] for rank in ranks)
    steps = len(first["stated"]) // len(metrics(first["folder"]))
    filled, images = (4, 6, 7), 67 - 13
    assert first["rows"] == alone["cached"]["rows"]
    by_epoch = Counter({1 + step // steps: 0 for step in first["rows"]})
    for step, count in first["rows"].items():
        by_epoch[1 + step // steps] += count
    assert {epoch: by_epoch[epoch] for epoch in (5, 8)} == {5: 2 * images, 8: images}
    assert {1 + step // steps for step, *_ in first["settled"]} == set(filled)
    assert first["settled"] == alone["cached"]["settled"]
    assert not second["settled"]
    assert not second["rows"]
    assert [border["homes"] for border in first["borders"][1:]] == [(0, 0, 1, 1), (0, 0, 0, 1), (0, 0, 0, 0)]


def test_bytes_are_those_of_values_and_of_gradients_where_something_trains_before(ranks: list[dict[str, Any]]) -> None:
    """Of 16 images: 4 channels of 6 by 6 behind the first cut, 6 channels of 3 by 3 behind the other."""
    first, second = (16 * 4 * size for size in (4 * 6 * 6, 6 * 3 * 3))
    found = metrics(ranks[0]["settle"]["folder"])
    assert [epoch["sent_bytes"] for epoch in found] == [2 * first, 2 * first, 2 * second, second]
    assert {epoch["reduced_bytes"] for epoch in found} == {None}
    # In autocast they have half the bytes.
    assert metrics(ranks[0]["bfloat16"]["folder"])[0]["sent_bytes"] == first


def test_a_signal_to_one_process_ends_both_with_a_checkpoint(folder: Path, ranks: list[dict[str, Any]]) -> None:
    (said,), (other,) = (rank["interrupted"] for rank in ranks)
    assert said == other
    assert said.startswith("saved at epoch 3, step 3; go on with: fxsplit train --resume ")
    broken, whole = folder / "broken" / BROKEN, ranks[0][BROKEN]["folder"]
    for mine, untouched in zip(metrics(broken), metrics(whole), strict=True):
        assert [mine[score] for score in SCORES] == [untouched[score] for score in SCORES]
    assert same(weights(broken), weights(whole))


def test_a_single_process_goes_on_by_another_way(folder: Path, ranks: list[dict[str, Any]]) -> None:
    spec_of_it = spec(folder, BROKEN, "alone", parallel="ddp")
    report = fxsplit.train(spec_of_it, resume=folder / "alone" / BROKEN, trust_code=True)
    assert same(weights(report.folder), weights(ranks[0][BROKEN]["folder"]))


def test_no_weights_are_left_of_a_run_that_failed(folder: Path, ranks: list[dict[str, Any]]) -> None:
    said = ranks[0]["failed"]
    assert any("cannot be written: each process has a part of the weights, and one has failed" in each for each in said)
    assert not (folder / "failed" / "standard" / "model.safetensors").exists()
    assert (folder / "failed" / "standard" / "report.json").exists()


def made(model: torch.nn.Module, at: str = "conv2", **asked: Any) -> PipelineParallel:
    """The engine of the first of two processes, as far as it can be made without the other one."""
    trace = fxsplit.trace(model, (torch.empty(2, 3, 8, 8),))
    partitions = fxsplit.partition(trace, at=[at])
    costs = CostModel(partitions, trace, 2, 0)
    options = {"schedule": "1f1b", "costs": costs, "batch_size": 8, **asked}
    processes = Processes(0, RANKS)
    processes.arrange(RANKS)
    return PipelineParallel(trace, fxsplit.Executor(trace, partitions), processes, torch.device("cpu"), **options)


def hooked() -> torch.nn.Module:
    model = Chain()
    model.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("make", "asked", "sentence"),
    [
        (HAZARDS["TiedWeight"], {"at": "second"}, "'first.weight' is used by partitions 0 and 1"),
        (HAZARDS["BranchOnShape"], {}, "its value '.*' is no tensor but of type int"),
        (HAZARDS["AuxiliaryHead"], {}, "value '.*' is there in one of training and evaluation alone; cut elsewhere"),
        (hooked, {}, "the model itself has hooks, and no process of a pipeline calls all of it"),
        (
            Chain,
            {"schedule": "interleaved"},
            "interleaved needs 4 partitions that .* for 2 processes, and there are 2;",
        ),
    ],
)
def test_what_a_pipeline_cannot_run_is_refused(
    make: Callable[[], torch.nn.Module], asked: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(FxsplitError, match=sentence) as caught:
        made(make(), **asked)
    assert "\n" not in str(caught.value)


def test_there_is_a_partition_for_each_process() -> None:
    assert stage_count(5, 2, "1f1b") == stage_count(2, 2, "gpipe") == stage_count(3, 2, "interleaved") == 2
    assert stage_count(5, 2, "interleaved") == 4
    # What is left when most has settled.
    assert stage_count(1, 2, "1f1b") == stage_count(1, 3, "interleaved") == 1
    with pytest.raises(UsageError, match=r"^the schedule 1f1b needs 2 partitions .* and there is 1; give more"):
        refuse_too_few(1, 2, "1f1b")
    with (
        patch("fxsplit.distribute.pipeline_parallel.SENDS_GRADIENTS_OF_SOME", False),
        pytest.raises(UsageError, match="take a newer one for --parallel pipeline"),
    ):
        refuse_too_few(2, 2, "1f1b")


def test_a_batch_goes_through_in_as_many_micro_batches_as_there_are_processes() -> None:
    said: list[str] = []
    observer = Observer()
    start = Start(spec=RunSpec(model="timm:resnet18", data="synthetic", parallel="pipeline", mixup=0.2, batch_size=64))
    with patch.object(observer, "notice", said.append):
        assert _fitting(start, Processes(0, 4), observer).spec == replace(start.spec, grad_accum_steps=4)
        assert _fitting(start, ALONE, observer) is start
        asked = replace(start, spec=replace(start.spec, grad_accum_steps=8))
        assert _fitting(asked, Processes(0, 4), observer) == asked
        phases = [NamedPhase(start=None, stop=None, epochs=1, micro_batches=count) for count in (4, 16)]
        going_on = replace(
            start, found=Found(Path(), {}), plan=PlanFile(schedule="mine", cuts=(), phases=tuple(phases))
        )
        assert _fitting(going_on, Processes(0, 4), observer) is going_on
    assert said == [
        "4 processes train together, each some of the partitions; each batch of 64 images goes through them in 4 "
        "micro-batches, one for each process; more --grad-accum-steps leave them less to wait",
        "there are no other processes for --parallel pipeline; start several with torchrun",
        "4 processes train together, each some of the partitions; each batch of 64 images goes through them in 8 "
        "micro-batches",
        "4 processes train together, each some of the partitions; each batch of 64 images goes through them in 4 "
        "or 16 micro-batches",
    ]
    with pytest.raises(UsageError, match=r"^batch-size is 64, which 3 micro-batches, one for each process"):
        _fitting(start, Processes(0, 3), observer)
