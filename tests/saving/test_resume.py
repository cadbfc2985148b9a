"""A run that is interrupted and goes on ends as one that was not, to the last bit."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxsplit
from fxsplit.data import datasets
from fxsplit.errors import Terminated, UsageError
from fxsplit.models import registry
from fxsplit.report import Observer, RunReport, StepRecord
from fxsplit.resuming import CHECKPOINTS
from fxsplit.saving.checkpoint import read_checkpoint
from fxsplit.saving.checkpoints import Checkpoints
from fxsplit.saving.lock import LOCK
from fxsplit.saving.run_state import load_model_state, model_state
from fxsplit.spec import read_recipe, resolve
from fxsplit.training.accuracy import Score
from fxsplit.training.evaluator import Evaluator
from tests.saving.runs import COMMON, KINDS, MODEL, differences, left_by, model_in

pytestmark = pytest.mark.usefixtures("one_thread")


class Interrupts(Observer):
    """Interrupts a run after a step of it, as Ctrl-C does, and keeps what is said."""

    def __init__(self, step: int | None = None, by: int = signal.SIGINT) -> None:
        self.step, self.by = step, by
        self.sentences: list[str] = []

    def notice(self, sentence: str) -> None:
        self.sentences.append(sentence)

    def step_done(self, record: StepRecord) -> None:
        if (record.epoch - 1) * record.steps + record.step == self.step:
            signal.raise_signal(self.by)


def spec(folder: Path, kind: str, **changes: Any) -> fxsplit.RunSpec:
    return fxsplit.RunSpec(**{**COMMON, **KINDS[kind], "model": model_in(folder), "output": str(folder), **changes})


def whole(folder: Path, kind: str, **changes: Any) -> tuple[dict[str, Any], int]:
    """An untouched run: what it leaves, and its steps."""
    steps = Steps()
    report = fxsplit.train(spec(folder, kind, experiment="whole", **changes), steps)
    assert report.status == "finished"
    return left_by(Path(report.folder)), steps.count


class Steps(Observer):
    count = 0

    def step_done(self, _: StepRecord) -> None:
        self.count += 1


def interrupted(folder: Path, kind: str, step: int, **changes: Any) -> Path:
    """A run that ends after so many steps; its folder."""
    name = f"step{step}"
    with pytest.raises(KeyboardInterrupt, match=r"saved at epoch \d+, step \d+; go on with: fxsplit train --resume "):
        fxsplit.train(spec(folder, kind, experiment=name, **changes), Interrupts(step))
    return folder / name


def resumed(folder: Path, heard: Interrupts | None = None) -> RunReport:
    """Go on with a run, and not from its beginning."""
    heard = heard or Interrupts()
    report = fxsplit.train(observer=heard, resume=folder, trust_code=True)
    assert any(re.match(r"goes on after epoch|all \d+ epochs are done", sentence) for sentence in heard.sentences)
    return report


# Float16 is left to the slow sweep below: on a CPU its numbers have differed after other tests of the suite.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "float16"])
def test_a_run_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """Each is interrupted in four places, which differ by kind; the last one twice."""
    expected, steps = whole(tmp_path, kind)
    places = range(1 + len(kind) % 3, steps, steps // 4)
    for place in places:
        folder = interrupted(tmp_path, kind, place)
        if place == places[-1] and place + 2 <= steps:
            with pytest.raises(KeyboardInterrupt, match="saved at"):
                fxsplit.train(observer=Interrupts(place + 2), resume=folder, trust_code=True)
        report = resumed(folder)
        assert report.status == "finished"
        assert differences(expected, left_by(folder)) == []


@pytest.mark.parametrize("kind", ["standard", "exits"])
@pytest.mark.parametrize("epoch", [3, 4])
def test_a_test_that_is_interrupted_begins_again(
    kind: str, epoch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after the last epoch, where what trained has ended by then: that is done once."""
    changes: dict[str, Any] = {"average": 0.5, "recalibrate": True}
    expected, _ = whole(tmp_path, kind, **changes)
    tests, evaluate = iter(range(1, 5)), Evaluator.score

    def interrupted_test(evaluator: Evaluator, **kwargs: Any) -> Score:
        if next(tests) == epoch:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(evaluator, **kwargs)

    folder = tmp_path / "mine"
    with monkeypatch.context() as patched:
        patched.setattr(Evaluator, "score", interrupted_test)
        with pytest.raises(Terminated, match=f"saved at epoch {epoch}, step 5; go on with"):
            fxsplit.train(spec(tmp_path, kind, experiment="mine", **changes))
    assert len((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == epoch - 1
    resumed(folder)
    assert differences(expected, left_by(folder)) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_bit_for_bit_from_every_step(kind: str, tmp_path: Path) -> None:
    expected, steps = whole(tmp_path, kind)
    for place in range(1, steps + 1):
        folder = interrupted(tmp_path, kind, place)
        resumed(folder)
        assert differences(expected, left_by(folder)) == [], place


@pytest.mark.parametrize("kind", ["standard", "exits"])
def test_a_run_goes_on_from_any_checkpoint_in_a_copy_elsewhere(kind: str, tmp_path: Path) -> None:
    """As after SIGKILL: records are ahead of the checkpoint, and a line of them is cut off."""
    expected, steps = whole(tmp_path, kind, checkpoint_every="1s", checkpoint_keep=99)
    there = sorted((tmp_path / "whole" / CHECKPOINTS).iterdir())
    assert len(there) == steps + 1  # after each step, and after the last epoch
    for path in (there[2], there[-2]):
        folder = tmp_path / "elsewhere" / path.stem
        shutil.copytree(tmp_path / "whole", folder)
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"epoch": 9, "lo')
        (folder / CHECKPOINTS / ".epoch-000009-step-00000001.safetensors.part").write_bytes(b"x")
        heard = Interrupts()
        report = resumed(folder / CHECKPOINTS / path.name, heard)
        assert report.folder == str(folder)
        assert differences(expected, left_by(folder)) == []
        later = ", ".join(each.name for each in there if each.name > path.name)
        assert f"later checkpoints are removed: {later}" in heard.sentences
        assert not [each for each in folder.rglob("*") if each.name.endswith(".part")]
        assert [(e.epoch, e.phase) for e in report.epochs] == [(m["epoch"], m["phase"]) for m in expected["metrics"]]


def test_where_no_more_can_be_written_the_one_that_it_went_on_from_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    folder, heard = interrupted(tmp_path, "standard", 3), Interrupts()
    monkeypatch.setattr(Checkpoints, "write", full)
    resumed(folder, heard)
    stays = "no checkpoint of epoch 1 can be written (No space left on device); that of epoch 1, step 3 stays"
    assert stays in heard.sentences


def test_seconds_add_up(tmp_path: Path) -> None:
    folder = interrupted(tmp_path, "standard", 8)
    before = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    data = read_checkpoint(max((folder / CHECKPOINTS).iterdir()))
    elapsed = data["state"]["training"]["telemetry"]["seconds"]
    report = resumed(folder)
    assert report.total_seconds > before["total_seconds"]
    assert report.setup_seconds > before["setup_seconds"]
    assert report.prove_seconds == before["prove_seconds"] > 0  # it was proven once
    assert report.epochs[1].train_seconds > elapsed > 0
    processor = data["state"]["training"]["telemetry"]["processor"]
    assert report.processor_seconds is not None
    assert report.processor_seconds > before["processor_seconds"] > processor
    spent = [each.processor_seconds or 0.0 for each in report.epochs]
    assert spent[1] > processor > 0
    assert report.processor_seconds > sum(spent)
    assert report.total_seconds > sum(e.train_seconds + e.eval_seconds for e in report.epochs) + report.setup_seconds


# What is asked for otherwise


def test_a_run_can_become_longer(tmp_path: Path) -> None:
    """The last phase does; what was done stays."""
    for kind, name in (("l2l", "epochs"), ("window", "epochs_total")):
        first = fxsplit.train(spec(tmp_path, kind, experiment=kind))
        before, heard = len(first.epochs), Interrupts()
        longer = replace(spec(tmp_path, kind, experiment=kind), **{name: before + 2})
        report = fxsplit.train(longer, heard, resume=first.folder)
        key = name.replace("_", "-")
        assert heard.sentences[0] == f"{key} was {before} and is now {before + 2}: the last phase lasts longer"
        assert [e.epoch for e in report.epochs] == list(range(1, before + 3))
        assert report.epochs[:before] == first.epochs
        assert [p.epochs for p in report.plan.phases[:-1]] == [p.epochs for p in first.plan.phases[:-1]]
        assert {e.phase for e in report.epochs[before - 1 :]} == {len(first.plan.phases) - 1}
        # It can be interrupted, and goes on from there, as any other.
        recipe = resolve(read_recipe(Path(first.folder) / "args.yaml"))
        assert getattr(recipe, name) == before + 2
        again = resumed(Path(first.folder))
        assert (again.epochs, again.confusion) == (report.epochs, report.confusion)
        # It is of the last test alone.
        assert sum(sum(row.values()) for row in again.confusion.values()) == again.data["test"]
        right = sum(row.get(label, 0) for label, row in again.confusion.items())
        assert 100 * right / again.data["test"] == pytest.approx(again.accuracy_pct)


def test_a_run_that_was_killed_when_it_had_just_become_longer_stays_so(tmp_path: Path) -> None:
    """Its recipe says more epochs than its checkpoint."""
    expected, _ = whole(tmp_path, "standard", epochs=6, sched="constant", warmup_epochs=0)
    first = fxsplit.train(spec(tmp_path, "standard", experiment="mine", sched="constant", warmup_epochs=0))
    recipe = Path(first.folder) / "args.yaml"
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("epochs: 4", "epochs: 6", 1), encoding="utf-8")
    assert len(resumed(Path(first.folder)).epochs) == 6
    found = left_by(Path(first.folder))
    assert [differences(expected[name], found[name]) for name in ("weights", "metrics", "epochs")] == [[], [], []]


def test_a_longer_run_does_not_average_weights_of_its_midst(tmp_path: Path) -> None:
    """Interrupted while weights are averaged for an end that lies later now."""
    changes = {"average": 0.5, "sched": "constant", "warmup_epochs": 0}
    expected, _ = whole(tmp_path, "standard", **changes, epochs=6)
    folder = interrupted(tmp_path, "standard", 14, **changes)
    fxsplit.train(spec(tmp_path, "standard", **changes, epochs=6), resume=folder)
    assert differences(expected["weights"], left_by(folder)["weights"]) == []


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    expected, _ = whole(tmp_path, "standard")
    heard = Interrupts()
    report = resumed(tmp_path / "whole", heard)
    assert "all 4 epochs are done; more --epochs go on" in heard.sentences
    assert len(report.epochs) == 4
    assert differences(expected, left_by(tmp_path / "whole")) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"batch_size": 8},
            "batch-size was 16 and is now 8: a run goes on as it began; leave it out, or begin another",
        ),
        (
            {"seed": 1, "schedule": "grow"},
            "schedule was standard and is now grow, seed was 42 and is now 1: a run goes",
        ),
        ({"model": "paper:cnn"}, "model was .*:small and is now paper:cnn: a run goes on as it began"),
        ({"data": "digits"}, "data was synthetic and is now digits"),
        ({"epochs": 3}, "epochs was 4 and is now 3, but the run has 4 epochs; one that goes on can become longer, not"),
        ({"lr": 0.5, "at": ("3",)}, "lr was 0.01 and is now 0.5, at was  and is now 3"),
    ],
)
def test_what_cannot_change_is_refused_before_anything_is_written(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = interrupted(tmp_path, "standard", 7)
    before = contents(folder)
    with pytest.raises(UsageError, match=words):
        fxsplit.train(spec(tmp_path, "standard", **changes), resume=folder)
    assert contents(folder) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK}


def test_another_model_or_other_data_under_the_same_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = interrupted(tmp_path, "standard", 7)
    before = contents(folder)
    names: dict[str, Any] = {}
    exec(MODEL.replace("(6, 8)", "(6, 10)").replace("Linear(8", "Linear(10"), names)
    with monkeypatch.context() as patched:
        patched.setattr(registry, "build", lambda *_, num_classes, **__: names["small"](num_classes))
        words = "the checkpoint is of another model: '10.weight' is 8 x 6 x 3 x 3 there and 10 x 6 x 3 x 3 here"
        with pytest.raises(UsageError, match=words):
            resumed(folder)
    load = datasets.load

    def fewer(*args: Any, **kwargs: Any) -> Any:
        data = load(*args, **kwargs)
        return dataclasses.replace(data, train=data.train.subset(torch.arange(60)))

    monkeypatch.setattr(datasets, "load", fewer)
    with pytest.raises(
        UsageError, match="the data are others than those of the run: images to train on were 68 and are"
    ):
        resumed(folder)
    assert contents(folder) == before


def test_a_buffer_of_another_shape_comes_back_on_its_own_device() -> None:
    """Settled weights, which may be the first of the model, may lie on the host."""
    model = nn.Linear(2, 2)
    model.register_buffer("seen", torch.zeros(2, device="meta"), persistent=False)
    state = model_state(model)
    load_model_state(model, {**state, "buffers": {"seen": torch.zeros(3)}})
    assert model.seen.shape == (3,)
    assert model.seen.device.type == "meta"
