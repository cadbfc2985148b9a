"""Two processes that train one model together end where one process ends, within rounding."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

import fxsplit
from fxsplit.assembly.starting import Start, _fitting, check_alike
from fxsplit.data.batch import Batch
from fxsplit.data.loader import Loader
from fxsplit.distribute.concord import Concord
from fxsplit.distribute.data_parallel import DataParallel
from fxsplit.distribute.layout import own_part
from fxsplit.distribute.processes import ALONE, Processes, lost_process_named
from fxsplit.errors import FxsplitError, Terminated, UsageError
from fxsplit.execute.executor import Executor
from fxsplit.execute.settled import offload
from fxsplit.objects.snapshot import HOSTED
from fxsplit.objects.structure import is_divided
from fxsplit.plan.schedule import Phase
from fxsplit.report import Observer, StepRecord
from fxsplit.saving.run_state import RunState
from fxsplit.spec import RunSpec
from fxsplit.training.step import Step
from tests.distribute.group import together
from tests.saving.runs import MODEL

RANKS = 2
# Without BatchNorm and dropout, which each process has for its own images. Nine channels cannot be divided evenly.
WITHOUT_NORMS = """
from torch import nn


def plain(num_classes):
    layers = []
    for index, (given, made) in enumerate([(3, 4), (4, 6), (6, 9), (9, 8)]):
        norm = nn.GroupNorm(2 - made % 2, made)
        layers += [nn.Conv2d(given, made, 3, stride=2 - index % 2, padding=1), norm, nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
"""
# Of torch's class, and by the function that timm's classes call.
WITH_NORMS = """
import torch
from torch import nn
from torch.nn import functional as F


class Inline(nn.BatchNorm2d):
    def forward(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, 1e-4)


def normed(num_classes):
    layers = []
    for index, (given, made) in enumerate([(3, 4), (4, 6), (6, 6), (6, 8)]):
        norm = Inline if index % 2 else nn.BatchNorm2d
        layers += [nn.Conv2d(given, made, 3, stride=2 - index % 2, padding=1), norm(made), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
"""
# With some numbers AdamW makes far more of a difference in rounding: "views" has another optimizer.
# Of 67 images, batches of 16 leave three, which one of the two processes takes.
COMMON: dict[str, Any] = {
    "data": "synthetic", "img_size": 12, "train_limit": 67, "batch_size": 16, "device": "cpu", "lr": 1e-2,
    "deterministic": True, "log_interval": 1, "cache": "off", "weight_decay": 1e-2,
}  # fmt: skip
SETTLING: dict[str, Any] = {"schedule": "settle", "parts": 4, "settle_from": 0.25, "settle_until": 0.75, "epochs": 6}
SPECS: dict[str, dict[str, Any]] = {
    "standard": {
        "epochs": 3, "sched": "cosine", "augment": "crop-flip", "grad_accum_steps": 4, "clip_grad": 0.5,
        "soft_targets": 0.5,
    },
    "settle": {**SETTLING, "exits": 2, "average": 0.5, "anneal": 0.4},
    # With another seed rounding may decide whether a ReLU passes a gradient.
    "l2l": {
        "preset": "l2l", "epochs": 8, "settle_from": 0.25, "soft_targets": 0.8, "soft_from": "mean", "memory_aim": 0.5,
        "seed": 1,
    },
    # Partitions that waited begin to train later.
    "grow": {"schedule": "grow", "parts": 4, "epochs": 4, "opt": "momentum"},
    # Processes keep images of their own from the second phase on.
    "cache": {**SETTLING, "cache": "ram", "soft_targets": 0.5},
    "views": {**SETTLING, "cache": "disk", "augment": "crop-flip", "cache_views": 2, "epochs": 8, "opt": "momentum"},
    # Images are changed where they are read, and erased on the device; what settles takes an average.
    "changes": {
        **SETTLING, "color_jitter": 0.3, "reprob": 0.5, "augment": "crop-flip", "workers": 0, "model_ema": True,
        "model_ema_decay": 0.8, "opt": "momentum",
    },
    # What settles lies on the host, and comes back to train again.
    "offload": {**SETTLING, "settled_offload": True, "thaw_from": 0.9, "average": 0.5, "opt": "momentum"},
    # BatchNorm takes its statistics from all processes, also where activations or statistics are computed again.
    "norms of all": {**SETTLING, "sync_bn": True, "average": 0.5, "memory_aim": 0.5, "opt": "momentum", "epochs": 5},
}  # fmt: skip
CACHED = ("cache", "views")
TOGETHER = {"ddp": "together", "fsdp": "divided"}
SYNCHRONISED = ("norms of all",)
# Weights are divided, too, by --parallel fsdp.
DIVIDED = ("standard", "settle", "l2l", "cache", "changes", "offload", "norms of all")
NORMS: dict[str, dict[str, Any]] = {
    "norms": {**SETTLING, "cache": "ram", "soft_targets": 0.5, "settle_from": 0.5},
    # Of the last seven images one process has two micro-batches, and the other one.
    "micro-batches": {"sync_bn": True, "grad_accum_steps": 2, "train_limit": 71, "epochs": 2},
    "averaged norms": {**SETTLING, "cache": "ram", "model_ema": True, "model_ema_decay": 0.8},
}


def spec(folder: Path, name: str, output: str, **asked: Any) -> RunSpec:
    made = "normed" if name in SYNCHRONISED else "plain" if name in SPECS else "small"
    chosen = {**COMMON, **(SPECS | NORMS)[name], **asked}
    return RunSpec(model=f"{folder / made}.py:{made}", output=str(folder / output), experiment=name, **chosen)


def write_models(folder: Path) -> None:
    (folder / "plain.py").write_text(WITHOUT_NORMS, encoding="utf-8")
    (folder / "normed.py").write_text(WITH_NORMS, encoding="utf-8")
    (folder / "small.py").write_text(MODEL, encoding="utf-8")


def run(rank: int, folder: str) -> None:
    """One of the processes: all runs one after the other; what it found goes to a file."""
    # To torch another device than "cpu": what is offloaded is moved.
    with together(rank, RANKS, f"{folder}/store"), patch.object(offload, "HOST", torch.device("cpu", 0)):
        found: dict[str, Any] = {name: trained(Path(folder), name) for name in (*SPECS, *NORMS)}
        found["divided"] = {name: divided(Path(folder), name) for name in DIVIDED}
        found["interrupted"] = {parallel: interrupted(Path(folder), parallel) for parallel in ("ddp", "fsdp")}
        found["refused"] = refused(rank)
        found["hosted"] = hosted(rank)
        torch.save(found, f"{folder}/{rank}.pt")


def trained(folder: Path, name: str) -> dict[str, Any]:
    """Train, and compare gradients with those of the other process before each update."""
    update = Step.update
    updates: list[bool] = []

    def compared(self: Step, optimizer: torch.optim.Optimizer) -> None:
        own = [each.grad for group in optimizer.param_groups for each in group["params"]]
        assert all(gradient is not None for gradient in own)
        packed = torch.cat([gradient.reshape(-1) for gradient in own])
        first = packed.clone()
        distributed.broadcast(first, 0)
        updates.append(torch.equal(packed, first))
        update(self, optimizer)

    kept: list[nn.Module] = []
    begin = Concord.check

    def checked(self: Concord, training: Mapping[str, Callable[[], Any]]) -> None:
        kept.append(self._executor)
        check_offloaded(self._executor)
        begin(self, training)

    with patch.object(Step, "update", compared), patch.object(Concord, "check", checked):
        report = fxsplit.train(spec(folder, name, "together"))
    return {
        "folder": report.folder,
        "updates": updates,
        "phases": len(kept),
        "state": {name: value.clone() for name, value in kept[0].state_dict().items()},
        "losses": [epoch.train_loss for epoch in report.epochs],
        "confusion": report.confusion,
    }


def divided(folder: Path, name: str) -> dict[str, Any]:
    """Train with divided weights; at each change of phase, list what is divided and what trains, and hold the state."""
    found: list[tuple[list[str], list[str]]] = []
    begin = Concord.check

    def checked(self: Concord, training: Mapping[str, Callable[[], Any]]) -> None:
        executor = self._executor
        now = dict(executor.named_parameters())
        found.append(
            ([name for name in now if is_divided(now[name])], [name for name in now if now[name].requires_grad])
        )
        assert all(own_part(each).numel() < each.numel() for each in now.values() if is_divided(each))
        check_offloaded(executor)
        begin(self, training)

    with patch.object(Concord, "check", checked), patch.object(RunState, "state_dict", held_against_torch):
        report = fxsplit.train(spec(folder, name, "divided", parallel="fsdp"))
    micro_batches = [phase.micro_batches for phase in report.plan.phases]
    return {"folder": report.folder, "phases": found, "micro_batches": micro_batches}


def check_offloaded(executor: Executor) -> None:
    settled = executor.partitions[: executor.window[0]] if executor._offload else ()
    hosted = vars(executor._model).get(HOSTED, {})
    assert set(hosted) == {name for partition in settled for name in partition.state}


save = RunState.state_dict


def held_against_torch(self: RunState) -> dict[str, Any]:
    """Compare the weights and the optimizer's state with those that torch gathers by itself."""
    state, options = save(self), StateDictOptions(full_state_dict=True, cpu_offload=True)
    optimizer = self._training.optimizer.optimizer  # type: ignore[attr-defined]
    weights = get_model_state_dict(self._model, options=options)
    exits = self._training.objective.exits  # type: ignore[attr-defined]
    # It knows the parameters of one module alone.
    slots = {} if exits else get_optimizer_state_dict(self._model, optimizer, options=options).get("state", {})
    if os.environ["RANK"] == "0":
        assert all(torch.equal(each, weights[name]) for name, each in state["model"]["saved"].items())
        ours = state["training"]["optimizer"]["optimizer"]["state"]
        for name, values in slots.items():
            assert all(torch.equal(torch.as_tensor(value), ours[name][key]) for key, value in values.items())
    return state


class Interrupting(Observer):
    """Sends a signal to this process in the midst of an epoch."""

    def __init__(self, epoch: int, step: int) -> None:
        self.at = epoch, step

    def step_done(self, record: StepRecord) -> None:
        if (record.epoch, record.step) == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


def interrupted(folder: Path, parallel: str) -> list[str]:
    """One process gets a signal, both end with a checkpoint, and go on; a copy is left to go on with fewer."""
    said = []
    try:
        # In an epoch in which rows are there already, and one of the steps is still to come.
        fxsplit.train(spec(folder, "cache", f"broken {parallel}", parallel=parallel), Interrupting(5, 2))
    except Terminated as error:
        said.append(str(error))
    broken = folder / f"broken {parallel}" / "cache"
    if os.environ["RANK"] == "0":
        shutil.copytree(broken, folder / f"alone {parallel}" / "cache")
    fxsplit.train(resume=broken, trust_code=True)
    return said


def refused(rank: int) -> list[str]:
    """What is said where the processes are not alike."""
    processes, said = Processes(rank, RANKS), []
    state = {"0.weight": torch.ones(3), "1.weight": torch.full((2,), float(rank)), "2.weight": torch.ones(1) * rank}
    trace = fxsplit.trace(nn.Linear(3, 2 + rank), (torch.ones(2, 3),))
    for call in (
        lambda: processes.refuse_drifted(state),
        lambda: processes.refuse_drifted({"same": torch.arange(4), "bytes": torch.tensor([rank == 0])}),
        lambda: check_alike(trace, None, processes),  # type: ignore[arg-type]
        lambda: processes.first(lambda: int("x")),
    ):
        try:
            with patch("fxsplit.assembly.starting.identity", lambda _: {}):
                call()
        except (FxsplitError, UsageError, ValueError) as error:
            said.append(str(error))
    return said


def hosted(rank: int) -> Tensor:
    """Reduce gradients, and return one, where what is settled is on another kind of device than what trains."""
    torch.manual_seed(0)
    trace = fxsplit.trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), (torch.ones(2, 3),))
    executor = Executor(trace, fxsplit.partition(trace, count=2))
    engine = DataParallel(executor, Processes(rank, RANKS))
    executor.enter(Phase(start=1, stop=2, epochs=1))
    settled = executor.get_submodule("0")
    settled.weight = nn.Parameter(settled.weight.to("meta"), requires_grad=False)
    engine.enter()
    labels = torch.zeros(2, dtype=torch.int64)
    engine(Batch(values=(torch.full((2, 4), float(rank)),), cut=1, labels=labels, ids=labels)).sum().backward()
    gradient = executor.get_submodule("1").weight.grad
    assert isinstance(gradient, Tensor)
    return gradient.clone()


def in_processes(run: Callable[..., None], folder: Path, *given: Any, processes: int = RANKS) -> Path:
    """Call a function in each of so many new processes: with its rank, a folder with the models, and what is given."""
    write_models(folder)
    multiprocessing.start_processes(run, (str(folder), *given), nprocs=processes, start_method="spawn")
    return folder


def found_in(folder: Path, *, processes: int = RANKS) -> list[dict[str, Any]]:
    """What each process has found, by rank."""
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return in_processes(run, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return found_in(folder)


def metrics(folder: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text("utf-8").splitlines()]


def weights(folder: Path | str) -> dict[str, Tensor]:
    return load_file(Path(folder) / "model.safetensors")


pytestmark = pytest.mark.usefixtures("one_thread")
SCORES = ("train_loss", "train_top1", "eval_loss", "eval_top1")


@pytest.fixture(scope="module")
def alone(folder: Path, ranks: list[dict[str, Any]]) -> Callable[[str], Path]:
    """Trains in this process, once, and returns the folder of the run."""

    @cache
    def train(name: str) -> Path:
        ours, order = metrics(ranks[0][name]["folder"]), Loader.order
        kept = [epoch["epoch"] - 1 for epoch in ours if epoch["cache_resident_bytes"] or epoch["cache_file_bytes"]]
        assert bool(kept) == (name in CACHED)

        def divided(self: Loader, epoch: int, *, shards: int = 1) -> Tensor:
            # One process can take batches in the order of two that keep images of their own.
            return order(self, epoch, shards=RANKS if epoch in kept else shards)

        with patch.object(Loader, "order", divided):
            return Path(fxsplit.train(spec(folder, name, "one")).folder)

    return train


def same_end(ours: str, plain: Path) -> None:
    for mine, other in zip(metrics(ours), metrics(plain), strict=True):
        assert mine["start"] == other["start"]
        for score in SCORES:
            # One image in 67 may be on the border between two classes.
            allowed = 1.5 if score.endswith("top1") else 1e-9
            assert mine[score] == pytest.approx(other[score], rel=1e-5, abs=allowed), (mine["epoch"], score)
    expected = weights(plain)
    for key, value in weights(ours).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SPECS)
def test_two_processes_end_where_one_ends(name: str, alone: Callable[[str], Path], ranks: list[dict[str, Any]]) -> None:
    same_end(ranks[0][name]["folder"], alone(name))


def test_what_trains_is_reduced_beside_settled_weights_on_the_host(ranks: list[dict[str, Any]]) -> None:
    assert all(torch.equal(each["hosted"], torch.ones(2, 4)) for each in ranks)


@pytest.mark.parametrize("name", DIVIDED)
def test_with_divided_weights_they_end_there_too(
    name: str, alone: Callable[[str], Path], ranks: list[dict[str, Any]]
) -> None:
    same_end(ranks[0]["divided"][name]["folder"], alone(name))


@pytest.mark.parametrize("name", DIVIDED)
def test_what_trains_is_divided_and_what_settles_is_whole(name: str, ranks: list[dict[str, Any]]) -> None:
    phases = ranks[0]["divided"][name]["phases"]
    assert phases == ranks[1]["divided"][name]["phases"]
    assert all(divided == trains for divided, trains in phases)
    assert all(before != after for (_, before), (_, after) in pairwise(phases))


@pytest.mark.parametrize("name", DIVIDED)
def test_divided_weights_are_gathered_twice_a_step_and_their_gradients_reduced_once(
    name: str, ranks: list[dict[str, Any]]
) -> None:
    run = ranks[0]["divided"][name]
    for epoch in metrics(run["folder"]):
        trains, micro_batches = 4 * epoch["trainable_parameters"], run["micro_batches"][epoch["phase"]]
        # Parts are rounded up to rows of the same number.
        assert trains <= epoch["reduced_bytes"] < 1.2 * trains
        # Small batches have fewer micro-batches, and exits are gathered once.
        assert 1.5 * trains <= epoch["gathered_bytes"] / micro_batches < 2.4 * trains


@pytest.mark.parametrize("name", [*SPECS, *NORMS])
def test_gradients_and_weights_are_the_same_in_all_processes(name: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank[name] for rank in ranks)
    steps = 5 * len(first["losses"])
    assert first["updates"] == second["updates"] == [True] * steps
    assert first["phases"] == second["phases"] == len({epoch["phase"] for epoch in metrics(first["folder"])})
    assert first["losses"] == second["losses"]
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key]), key


@pytest.mark.parametrize("name", SPECS)
def test_what_does_not_train_takes_no_traffic(name: str, ranks: list[dict[str, Any]]) -> None:
    found = metrics(ranks[0][name]["folder"])
    assert [epoch["reduced_bytes"] for epoch in found] == [4 * epoch["trainable_parameters"] for epoch in found]


def test_the_confusion_is_that_of_the_images_of_all_processes(ranks: list[dict[str, Any]]) -> None:
    found = [rank["standard"]["confusion"] for rank in ranks]
    assert found[0] == found[1]
    right = sum(taken.get(name, 0) for name, taken in found[0].items())
    every = sum(sum(taken.values()) for taken in found[0].values())
    assert 100 * right / every == pytest.approx(metrics(ranks[0]["standard"]["folder"])[-1]["eval_top1"], rel=1e-12)


@pytest.mark.parametrize("name", ["standard"])
def test_the_work_is_that_of_all_processes(
    name: str, ranks: list[dict[str, Any]], alone: Callable[[str], Path]
) -> None:
    """Apart from the proof, which each process makes on its own part of the first batch."""
    several, single = metrics(ranks[0][name]["folder"]), metrics(alone(name))
    assert [epoch["multiply_adds"] for epoch in several[1:]] == [epoch["multiply_adds"] for epoch in single[1:]]


def test_each_process_keeps_rows_of_its_own_images(ranks: list[dict[str, Any]], alone: Callable[[str], Path]) -> None:
    kept = [epoch["cache_resident_bytes"] for epoch in metrics(ranks[0]["cache"]["folder"]) if epoch["start"]]
    single = [epoch["cache_resident_bytes"] for epoch in metrics(alone("cache")) if epoch["start"]]
    # 35 of 67 images, and half of the test images.
    assert [mine / other for mine, other in zip(kept, single, strict=True)] == pytest.approx([99 / 195] * len(kept))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_signal_to_one_process_ends_both_with_a_checkpoint(
    parallel: str, folder: Path, ranks: list[dict[str, Any]]
) -> None:
    (said,), (other,) = (rank["interrupted"][parallel] for rank in ranks)
    assert said == other
    assert said.startswith("saved at epoch 5, step 3; go on with: fxsplit train --resume ")
    ours, whole = (folder / output / "cache" for output in (f"broken {parallel}", TOGETHER[parallel]))
    for mine, other_epoch in zip(metrics(ours), metrics(whole), strict=True):
        assert [mine[score] for score in SCORES] == [other_epoch[score] for score in SCORES]
    expected = weights(whole)
    assert all(torch.equal(value, expected[key]) for key, value in weights(ours).items())


def test_a_process_that_is_gone_is_named() -> None:
    """In the words of gloo, and as an error of NCCL; other errors stay what they are."""
    words = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Connection closed by peer [127.0.0.1]:4504"
    for lost in (RuntimeError(words), distributed.DistBackendError("NCCL error: remote process exited")):
        with (
            pytest.raises(FxsplitError, match=r"another process of the run has ended.* --resume") as caught,
            lost_process_named(),
        ):
            raise lost
        assert caught.value.__cause__ is lost
    with pytest.raises(RuntimeError, match="shapes differ"), lost_process_named():
        raise RuntimeError("shapes differ")


def test_a_vote_is_read_when_it_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnItsWay:
        def __init__(self, given: Tensor, *_: Any, group: object, async_op: bool) -> None:
            assert async_op
            assert group is None
            self.given = given

        def wait(self) -> None:
            self.given.fill_(5)

    monkeypatch.setattr(distributed, "all_reduce", OnItsWay)
    processes = Processes(0, 2)
    assert [processes.vote(number) for number in (3, 0)] == [0, 5]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_goes_on_with_fewer_processes_and_counts_nothing_twice(
    parallel: str, folder: Path, ranks: list[dict[str, Any]]
) -> None:
    assert ranks
    said: list[str] = []
    observer = Observer()
    with patch.object(observer, "notice", said.append):
        report = fxsplit.train(observer=observer, resume=folder / f"alone {parallel}" / "cache", trust_code=True)
    assert "a batch was divided in 2 parts and is now in 1 part: numbers may differ by rounding from here on" in said
    whole = metrics(folder / TOGETHER[parallel] / "cache")
    assert len(report.epochs) == len(whole)
    for score in SCORES:
        assert getattr(report.epochs[4], score) == pytest.approx(whole[4][score], rel=1e-5)


def test_what_differs_between_processes_is_named_in_all(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["refused"] == ranks[1]["refused"]
    drifted, in_bytes, models, passed_on = ranks[0]["refused"]
    assert drifted.startswith("'1.weight' of process 1 is no longer that of process 0")
    assert in_bytes.startswith("'bytes' of process 1")
    assert models.startswith("process 1 has another model than process 0: ")
    assert passed_on == "invalid literal for int() with base 10: 'x'"


@pytest.mark.parametrize(("asked", "named"), [({"mixup": 0.2}, "--mixup"), ({"cutmix": 1.0}, "--cutmix")])
def test_images_are_not_mixed_with_those_of_another_process(asked: dict[str, Any], named: str) -> None:
    start = Start(spec=RunSpec(model="timm:resnet18", data="synthetic", **asked))
    with pytest.raises(UsageError, match=f"^{named} mixes images of a batch"):
        _fitting(start, Processes(0, RANKS), Observer())
    assert _fitting(start, ALONE, Observer()) is start
