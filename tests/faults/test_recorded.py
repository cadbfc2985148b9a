"""Runs whose steps are recorded and replayed, as CUDA graphs are, on a simulated recorder: they go on bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fxsplit
from fxsplit.assembly import training
from fxsplit.capture.tracing import Trace
from fxsplit.cuda.replay import Recordings
from fxsplit.report import Observer
from fxsplit.training import recovery
from tests.cuda.simulated import SimulatedRecorder
from tests.faults.test_numbers import strikes
from tests.saving.runs import differences, left_by
from tests.saving.test_resume import Interrupts, interrupted, resumed, spec, whole

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[SimulatedRecorder]:
    """The recorders of all runs that are begun."""
    made: list[SimulatedRecorder] = []

    def recordings(
        _: fxsplit.RunSpec, trace: Trace, device: torch.device, _processes: object, observer: Observer
    ) -> Recordings:
        made.append(SimulatedRecorder(most=2))
        return Recordings(made[-1], device, held=(trace.model,), notice=observer.notice)

    monkeypatch.setattr("fxsplit.assembly.recordings", recordings)
    return made


def record_updates(monkeypatch: pytest.MonkeyPatch, *, updates: bool) -> None:
    monkeypatch.setattr(training, "_update_is_recorded", lambda *_: updates)


# By kind, whether updates are recorded. On the CPU only SGD's can be, and nothing is where activations are recomputed.
KINDS: list[tuple[str, bool, dict[str, Any]]] = [
    ("standard", True, {}),
    ("l2l", False, {"memory_aim": None, "cache": "device", "epochs": 6}),
    ("exits", False, {"cache": "device"}),
]


@pytest.mark.parametrize(("kind", "updates", "changes"), KINDS, ids=[kind for kind, *_ in KINDS])
def test_a_recorded_run_that_is_interrupted_goes_on_bit_for_bit(
    kind: str,
    updates: bool,
    changes: dict[str, Any],
    recorders: list[SimulatedRecorder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the midst of an epoch, when steps are replayed; the next process warms up and records anew."""
    record_updates(monkeypatch, updates=updates)
    expected, steps = whole(tmp_path, kind, **changes)
    assert recorders[0].replays
    for place in (4, steps - 6):
        folder = interrupted(tmp_path, kind, place, **changes)
        resumed(folder)
        assert recorders[-1].replays
        assert differences(expected, left_by(folder)) == []


def test_a_recorded_run_leaves_a_step_out(
    recorders: list[SimulatedRecorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are looked at without a recording; it goes back in memory that its recordings read."""
    monkeypatch.setattr(recovery, "KEEP_EVERY", 3)
    record_updates(monkeypatch, updates=True)
    heard = Interrupts()
    with monkeypatch.context() as patched:
        strikes("output", patched)
        fxsplit.train(spec(tmp_path, "standard", experiment="mine", on_nan="skip"), heard)
    assert any("the step is left out" in sentence for sentence in heard.sentences)
    assert recorders[0].replays
    record_updates(monkeypatch, updates=True)

    def without(self: Any) -> None:
        self.leave_out(1, 2)
        BEGIN(self)

    monkeypatch.setattr("fxsplit.training.trainer.Trainer.begin", without)
    expected, _ = whole(tmp_path, "standard", on_nan="skip")
    assert differences(expected, left_by(tmp_path / "mine")) == []


BEGIN = recovery.Trainer.begin
