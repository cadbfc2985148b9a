"""A pipeline of three processes that keeps rows, or would like to, ends where one process ends, bit for bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

import fxsplit
from fxsplit.assembly.training import _share_of_rows
from fxsplit.distribute.pipeline_parallel import PipelineParallel
from fxsplit.distribute.processes import Processes
from fxsplit.spec import RunSpec
from tests.distribute.group import together
from tests.distribute.test_data_parallel import COMMON, found_in, in_processes, weights
from tests.distribute.test_pipeline_parallel import same, same_records

PROCESSES = 3
CACHED: dict[str, Any] = {
    "preset": "l2l", "at": ("3", "6", "9"), "settle_from": 0.25, "settle_until": 0.75, "epochs": 8, "guard": 0.2,
    "grad_accum_steps": 4, "cache": "ram", "soft_targets": 0.5, "memory_aim": None,
}  # fmt: skip
SPECS: dict[str, dict[str, Any]] = {
    "rows": CACHED,
    # Rows of a cut that was settled before are kept while a later one has settled.
    "views": {**CACHED, "cache": "disk", "augment": "crop-flip", "cache_views": 2, "opt": "momentum", "epochs": 12},
    # There is room for no row, which is known with the first batch: settled partitions are divided, too, from then on.
    "no room": {**CACHED, "cache_limit": 1e-7},
}


def spec(folder: Path, name: str, parallel: str) -> RunSpec:
    asked = {**COMMON, "prove": False, **SPECS[name], "parallel": parallel}
    return RunSpec(model=f"{folder / 'normed.py'}:normed", output=str(folder / parallel), experiment=name, **asked)


def run(rank: int, folder: str) -> None:
    """One of the processes, and the one that they are held against."""
    homes: dict[str, list[tuple[int, ...]]] = {}
    enter = PipelineParallel.enter

    def entered(self: PipelineParallel, *beside: torch.nn.Module, cut: int = 0) -> None:
        enter(self, *beside, cut=cut)
        homes[name].append(self.homes)

    with together(rank, PROCESSES, f"{folder}/store"), patch.object(PipelineParallel, "enter", entered):
        for name in SPECS:
            homes[name] = []
            fxsplit.train(spec(Path(folder), name, "pipeline"))
    if rank == 0:
        for name in SPECS:
            fxsplit.train(spec(Path(folder), name, "ddp"))
    torch.save(homes, f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_three_processes_end_where_one_ends_bit_for_bit(tmp_path: Path) -> None:
    ranks = found_in(in_processes(run, tmp_path, processes=PROCESSES), processes=PROCESSES)
    for name in SPECS:
        ours, plain = (tmp_path / parallel / name for parallel in ("pipeline", "ddp"))
        same_records(ours, plain)
        assert same(weights(ours), weights(plain)), name
    assert ranks[0] == ranks[1] == ranks[2]
    # With rows, what is left is in the first processes.
    everything, *settled = [(0, 1, 2, 2), (0, 0, 1, 2), (0, 0, 0, 1), (0, 0, 0, 0)]
    assert ranks[0]["rows"] == ranks[0]["views"] == [everything, *settled]
    # The third phase lasts an epoch, after which nothing is divided anew.
    assert ranks[0]["no room"] == [everything, settled[0], (0, 1, 2, 2), *settled[1:], (0, 1, 1, 2)]


def test_rows_to_train_on_are_kept_by_the_first_process_of_a_pipeline() -> None:
    data: Any = SimpleNamespace(train=range(80), test=range(12), held_out=range(10))
    asked = RunSpec(model="paper:cnn", parallel="ddp,pipeline")

    def shares(local_count: int, *, pipeline: int) -> list[float]:
        found = []
        for rank in range(local_count):
            processes = Processes(rank, 6, local_rank=rank, local_count=local_count)
            processes.replicas = Processes(rank // pipeline, 6 // pipeline)
            processes.pipeline = Processes(rank % pipeline, pipeline)
            found.append(_share_of_rows(asked, data, processes))
        return found

    # Each tests two images. A first process trains on 40, or 80 / 6, and tests those that are held out.
    assert shares(3, pipeline=3) == [52 / 56, 2 / 56, 2 / 56]
    assert shares(6, pipeline=1) == pytest.approx([1 / 6] * 6)
    assert shares(1, pipeline=3) == [1]
