"""What resuming breaks in other trainers: each step after it is the one that an uninterrupted run takes."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fxsplit.data import datasets
from fxsplit.execute.forward import Forward
from fxsplit.training.optimizers import parameters_of
from fxsplit.training.trainer import Trainer
from fxsplit_cli.main import main
from tests.faults.folders import images_in
from tests.saving.runs import differences, left_by
from tests.saving.test_resume import interrupted, resumed, spec, whole

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


class Trail:
    """Notes what each step of training is taken with, and checks what must hold in each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[tuple[Any, ...]] = []
        take, run = Trainer._take_step, Forward.__call__
        batches: list[Any] = []

        def called(forward: Forward, batch: Any, **kwargs: Any) -> Any:
            batches.append(batch)
            return run(forward, batch, **kwargs)

        def taken(trainer: Trainer, key: Any, *, done: int) -> None:
            batches.clear()
            take(trainer, key, done=done)
            executor, optimizer = trainer.executor, trainer.optimizer.optimizer
            held = parameters_of(optimizer)
            exits = trainer.objective.exits
            trains = [parameter for parameter in executor.parameters() if parameter.requires_grad]
            trains += [] if exits is None else exits.modules.parameters()
            # Everything that trains is in one group, and nothing else is in any.
            assert len(held) == len({*map(id, held)}) == len(trains)
            assert {*map(id, held)} == {*map(id, trains)}
            settled = [parameter for owned in executor.owned[: executor.window[0]] for parameter in owned]
            assert not any(parameter.requires_grad or parameter.grad is not None for parameter in settled)
            names = {id(parameter): name for name, parameter in executor.named_parameters()}
            self.steps.append(
                (
                    done,
                    trainer.position.phase,
                    sorted(names[id(parameter)] for parameter in trains if id(parameter) in names),
                    [batch.ids.tolist() for batch in batches],
                    # What augmentation has made of them.
                    [float(each.sum()) for batch in batches for each in batch.values if each is not None],
                    [float(group["lr"]) for group in optimizer.param_groups],
                    trainer.step.state_dict()["scaler"].get("scale"),
                    trainer.endings.state_dict()["mean"]["counts"],
                    [module.training for module in executor.modules()],
                )
            )

        monkeypatch.setattr(Trainer, "_take_step", taken)
        monkeypatch.setattr(Forward, "__call__", called)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("exits", {"augment": "crop-flip", "cache": "off", "sched": "cosine"}),
        ("window", {"sched": "cosine", "average": 0.5}),
    ],
)
def test_each_step_is_that_of_a_run_that_was_not_interrupted(
    kind: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images and their augmentation, learning rate, loss scale, what trains, what is averaged, modes of modules.

    At a border of phases and in the midst of an epoch; what happens once at an epoch happens once.
    """
    trail = Trail(monkeypatch)
    expected, steps = whole(tmp_path, kind, **changes)
    taken, trail.steps = trail.steps, []
    assert [step[0] for step in taken] == list(range(steps))
    for place in (5, 12):
        folder = interrupted(tmp_path, kind, place, **changes)
        assert trail.steps == taken[:place]
        trail.steps = []
        resumed(folder)
        assert trail.steps == taken[place:]
        trail.steps = []
        assert differences(expected, left_by(folder)) == []


def test_sigterm_to_the_whole_group_saves_before_the_workers_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler sends it to the processes that read images, too."""
    folder = images_in(tmp_path / "images")
    load = datasets.load
    monkeypatch.setattr(datasets, "load", lambda *args, **kwargs: load(*args, **kwargs, memory_limit_bytes=0))
    changes = {"data": f"folder:{folder}", "train_limit": None, "batch_size": 3, "workers": 2, "epochs": 4}
    expected, _ = whole(tmp_path, "standard", **changes)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(spec(tmp_path, "standard", **changes).to_yaml(), encoding="utf-8")
    log = tmp_path / "log"

    def run() -> None:
        os.setsid()
        sys.stderr = log.open("w", encoding="utf-8", buffering=1)
        os._exit(main(["train", "-c", str(recipe), "--experiment", "mine", "--no-progress"]))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    while process.is_alive() and b"epoch 1" not in (log.read_bytes() if log.exists() else b""):
        time.sleep(0.01)
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGTERM)
    process.join()
    said = log.read_text(encoding="utf-8").splitlines()[-1]
    assert process.exitcode == 143, said
    assert re.search(r"terminated; saved at epoch \d+.*; go on with: fxsplit train --resume ", said), said
    resumed(tmp_path / "mine")
    assert differences(expected, left_by(tmp_path / "mine")) == []
