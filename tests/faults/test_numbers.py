"""Losses, gradients and weights that are not finite: the cause is named, and the last good state is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fxsplit
from fxsplit.data.batch import Batch
from fxsplit.errors import NotFiniteError
from fxsplit.resuming import CHECKPOINTS
from fxsplit.saving.checkpoint import read_checkpoint
from fxsplit.training import recovery
from fxsplit.training.objective import Losses, Objective
from fxsplit.training.step import Step
from fxsplit.training.trainer import Trainer
from tests.saving.runs import differences, left_by
from tests.saving.test_resume import Interrupts, interrupted, resumed, spec, whole

pytestmark = pytest.mark.usefixtures("one_thread")

# Runs have 5 steps an epoch. A fault strikes whenever this step of the second epoch is taken.
EPOCH, STEP = 1, 2
NAN = {
    "output": "the loss is not finite: the first output that is not finite is that of partition 2 of 4, '3'",
    "loss": "the loss is not finite: every output is finite, so it comes from the loss itself",
    "gradient": "the loss is finite, but the gradients are not, first in partition 3 of 4, '4'",
}


At = Callable[[int, int], bool]


def strikes(kind: str, monkeypatch: pytest.MonkeyPatch, at: At = lambda *place: place == (EPOCH, STEP)) -> None:
    """Let a number of a step become NaN, each time that it is taken."""
    compute, take_step = Objective.__call__, Trainer._take_step
    now = [False]

    def taken(self: Trainer, key: Any, *, done: int) -> None:
        now[0] = at(self.position.epoch, self.position.step)
        weights = dict(self.executor.named_parameters())
        former = weights["3.weight"].detach().clone()
        hooks = []
        if now[0] and kind == "gradient":
            # Backward reaches that of the later partition first.
            hooks += [weights[name].register_hook(lambda each: each * math.nan) for name in ("0.weight", "6.weight")]
        if now[0] and kind == "output":
            weights["3.weight"].data.fill_(math.inf)
        try:
            take_step(self, key, done=done)
        finally:
            for hook in hooks:
                hook.remove()
            if now[0] and kind == "output":
                weights["3.weight"].data.copy_(former)

    def computed(self: Objective, *args: Any, **kwargs: Any) -> Losses:
        total, loss, logits = compute(self, *args, **kwargs)
        factor = math.nan if now[0] and kind == "loss" else 1.0
        return Losses(total * factor, loss * factor, logits)

    monkeypatch.setattr(Trainer, "_take_step", taken)
    monkeypatch.setattr(Objective, "__call__", computed)


def run(tmp_path: Path, heard: Interrupts, kind: str = "standard", **changes: Any) -> fxsplit.RunReport:
    return fxsplit.train(spec(tmp_path, kind, experiment="mine", parts=4, **changes), heard)


def are_finite(state: Any) -> bool:
    if isinstance(state, dict):
        return all(map(are_finite, state.values()))
    if isinstance(state, list | tuple):
        return all(map(are_finite, state))
    return not isinstance(state, Tensor) or bool(state.isfinite().all())


@pytest.mark.parametrize(("kind", "interval"), [("output", 1), ("loss", 5), ("gradient", 5)])
def test_the_run_stops_with_the_cause_and_the_last_good_weights(
    kind: str, interval: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However late it is noticed."""
    strikes(kind, monkeypatch)
    heard = Interrupts()
    with pytest.raises(NotFiniteError) as raised:
        run(tmp_path, heard, log_interval=interval)
    advice = "try a lower --lr, --clip-grad, or --on-nan skip"
    assert str(raised.value) == f"epoch 2, step 3: {NAN[kind]}; the weights of epoch 1 are kept; {advice}"
    assert "to find the cause, the steps after epoch 1 are taken again" in heard.sentences[-1]
    folder = tmp_path / "mine"
    (kept,) = (folder / CHECKPOINTS).iterdir()
    state = read_checkpoint(kept)["state"]
    assert are_finite(state["model"])
    assert differences(load_file(folder / "model.safetensors"), state["model"]["saved"]) == []
    assert len((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 1
    assert json.loads((folder / "report.json").read_text(encoding="utf-8"))["status"] == "failed"


def test_in_the_first_epoch_it_goes_back_to_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strikes("output", monkeypatch, lambda *place: place == (0, 2))
    with pytest.raises(NotFiniteError) as raised:
        run(tmp_path, Interrupts(), checkpoint_every="off")
    assert str(raised.value).startswith(f"epoch 1, step 3: {NAN['output']}; the weights of the start are kept; ")
    assert are_finite(dict(load_file(tmp_path / "mine" / "model.safetensors")))


def test_without_a_checkpoint_it_is_said_that_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strikes("loss", monkeypatch)
    with pytest.raises(
        NotFiniteError, match="epoch 2, step 3: the loss is not finite; there is no checkpoint to go back"
    ):
        run(tmp_path, Interrupts(), checkpoint_every="off")


def test_a_checkpoint_of_weights_that_are_not_finite_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the loss of the step itself was finite, and it is saved right after it."""
    strikes("gradient", monkeypatch)
    heard = Interrupts()
    with pytest.raises(NotFiniteError, match="the weights of epoch 2, step 2 are kept"):
        run(tmp_path, heard, checkpoint_every="1s", log_interval=100)
    assert heard.sentences == [
        "epoch 2, step 3: weights are not finite; to find the cause, the steps after epoch 2, step 2 are taken again"
    ]
    for path in (tmp_path / "mine" / CHECKPOINTS).iterdir():
        assert are_finite(read_checkpoint(path)["state"]["model"])


@pytest.mark.parametrize(("kind", "interval"), [("standard", 5), ("l2l", 1), ("exits", 5)])
def test_a_step_is_left_out_and_nothing_of_it_remains(
    kind: str, interval: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends as one that passes over the batch: weights, averages, statistics, random states, optimizer."""
    with monkeypatch.context() as patched:
        leave_out(patched, EPOCH, STEP)
        expected, _ = whole(tmp_path, kind, parts=4, on_nan="skip")
    strikes("output", monkeypatch)
    heard = Interrupts()
    run(tmp_path, heard, kind, on_nan="skip", log_interval=interval)
    assert differences(expected, left_by(tmp_path / "mine")) == []
    assert f"epoch 2, step 3: {NAN['output']}; the step is left out (number 1 so far)" in heard.sentences


def leave_out(monkeypatch: pytest.MonkeyPatch, *place: int) -> None:
    """Let all runs pass over a step."""
    begin = Trainer.begin

    def without(self: Trainer) -> None:
        self.leave_out(*place)
        begin(self)

    monkeypatch.setattr(Trainer, "begin", without)


def test_other_steps_have_their_batches_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that is left out is one that fills a cache, which is filled again alike when the run is resumed."""
    taken: list[tuple[int, list[int]]] = []
    backward = Step.backward

    def noted(self: Step, batch: Batch, *args: Any, **kwargs: Any) -> int:
        taken.append((batch.cut, batch.ids.tolist()))
        return backward(self, batch, *args, **kwargs)

    monkeypatch.setattr(Step, "backward", noted)
    whole(tmp_path, "exits")
    untouched, taken[:] = taken[:], []
    leave_out(monkeypatch, 2, 2)
    fxsplit.train(spec(tmp_path, "exits", experiment="left", on_nan="skip"))
    assert untouched[12][0] > 0
    assert taken == untouched[:12] + untouched[13:]
    taken.clear()
    folder = interrupted(tmp_path, "exits", 15, on_nan="skip")
    resumed(folder)
    assert differences(left_by(tmp_path / "left"), left_by(folder)) == []


def test_a_step_that_is_finite_when_it_is_taken_again_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a fault of the machine: nothing else is lost."""
    expected, _ = whole(tmp_path, "standard", parts=4)
    first = [True]

    def once(epoch: int, step: int) -> bool:
        strikes = first[0] and (epoch, step) == (EPOCH, STEP)
        first[0] = first[0] and not strikes
        return strikes

    strikes("output", monkeypatch, once)
    run(tmp_path, Interrupts())
    assert differences(expected, left_by(tmp_path / "mine")) == []


def test_many_steps_in_a_row_are_no_fault_of_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "MOST_IN_A_ROW", 3)
    strikes("loss", monkeypatch, lambda epoch, step: (epoch, step) >= (1, 3))
    heard = Interrupts()
    with pytest.raises(NotFiniteError, match="epoch 3, step 2: the loss is not finite"):
        run(tmp_path, heard, on_nan="skip", log_interval=2)
    assert [each for each in heard.sentences if "left out" in each][-1].endswith(
        "the step is left out (number 3 so far)"
    )


def test_states_that_are_kept_in_memory_are_not_written_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of an epoch are left out, each after the same state was gone back to."""
    monkeypatch.setattr(recovery, "KEEP_EVERY", 10**9)
    strikes("output", monkeypatch, lambda epoch, step: epoch == 1 and step in (1, 3))
    run(tmp_path, Interrupts(), on_nan="skip")
    once = left_by(tmp_path / "mine")
    monkeypatch.setattr(recovery, "KEEP_EVERY", 1)
    fxsplit.train(spec(tmp_path, "standard", experiment="other", parts=4, on_nan="skip"))
    assert differences(once, left_by(tmp_path / "other")) == []


def test_a_scaled_step_with_infinite_gradients_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale of float16 falls, and the step is left out by it."""
    made = torch.amp.GradScaler.__init__

    def large(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **{**kwargs, "init_scale": 2.0**120})

    monkeypatch.setattr(torch.amp.GradScaler, "__init__", large)
    heard = Interrupts()
    assert run(tmp_path, heard, "float16", epochs=1).status == "finished"
    state = read_checkpoint(next((tmp_path / "mine" / CHECKPOINTS).iterdir()))["state"]
    assert state["training"]["step"]["scaler"]["scale"] < 2.0**120
    assert not [sentence for sentence in heard.sentences if "finite" in sentence]


def test_scaled_steps_with_infinite_gradients_are_not_taken_for_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Step, "is_scaled", property(lambda _: True))
    strikes("gradient", monkeypatch, lambda *place: place == (0, 1))
    with pytest.raises(NotFiniteError, match=r"epoch 1, step 3: the loss is not finite: "):
        run(tmp_path, Interrupts(), log_interval=1)
