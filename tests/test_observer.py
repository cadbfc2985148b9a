"""What an observer is told of a run, and in which order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import fxsplit
from fxsplit.plan.forecast import Forecast
from fxsplit.plan.schedule import Phase, Plan
from fxsplit.report import EpochRecord, Observer, StepRecord
from fxsplit.spec import RunSpec
from fxsplit.training.optimizers import SLOTS, slots_of


class Heard(Observer):
    """Keeps what it is told, in order."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.notices: list[str] = []
        self.forecast: Forecast | None = None

    def working(self, what: str) -> None:
        self.told.append(what)

    def run_started(self, *, folder: str, device: str, plan: Plan, train_images: int, test_images: int) -> None:
        assert Path(folder).is_dir()
        self.told.append(f"{device}, {len(plan.phases)} phases, {train_images} and {test_images} images")

    def forecast_made(self, forecast: Forecast) -> None:
        self.forecast = forecast
        self.told.append("forecast")

    def notice(self, sentence: str) -> None:
        self.notices.append(sentence)

    def phase_started(self, index: int, phase: Phase) -> None:
        self.told.append(f"phase {index} of {phase.epochs} epochs")

    def step_done(self, record: StepRecord) -> None:
        self.told.append(f"step {record.step} of {record.steps}")

    def epoch_done(self, record: EpochRecord) -> None:
        self.told.append(f"epoch {record.epoch}")


@pytest.fixture
def spec(tmp_path: Path) -> Callable[..., RunSpec]:
    def make(**changes: str) -> RunSpec:
        return RunSpec(
            model="paper:cnn", data="synthetic", img_size=16, train_limit=16, batch_size=8, epochs=2, parts=2,
            schedule="grow", output=str(tmp_path), device="cpu", **changes,
        )  # fmt: skip

    return make


def test_what_takes_long_is_told_before_it_begins(spec: Callable[..., RunSpec]) -> None:
    heard = Heard()
    fxsplit.train(spec(), heard)
    assert heard.told == [
        "building paper:cnn", "tracing the model", "reading synthetic", "cpu, 2 phases, 16 and 128 images", "forecast",
        "proving the first batch", "phase 0 of 1 epochs", "step 2 of 2", "epoch 1",
        "phase 1 of 1 epochs", "step 2 of 2", "epoch 2",
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiling_is_said(spec: Callable[..., RunSpec]) -> None:
    heard = Heard()
    fxsplit.train(spec(torchcompile="eager"), heard)
    assert any(sentence.startswith("torch.compile with eager: ") for sentence in heard.notices)
    places = [index for index, told in enumerate(heard.told) if told == "compiling"]
    assert [heard.told[index - 1] for index in places] == ["phase 0 of 1 epochs", "phase 1 of 1 epochs"]


def test_the_forecast_of_a_run_is_that_of_its_inspection(spec: Callable[..., RunSpec]) -> None:
    heard = Heard()
    report = fxsplit.train(spec(), heard)
    assert heard.forecast == fxsplit.inspect(spec()).forecast
    page = (Path(report.folder) / "report.html").read_text(encoding="utf-8")
    assert page.count(", forecast ") == 2  # of the seconds of two epochs


@pytest.mark.parametrize("name", SLOTS)
def test_slots_of_usual_optimizers_are_as_counted(spec: Callable[..., RunSpec], name: str) -> None:
    from fxsplit.assembly.steps import optimizer_of

    asked = spec(opt=name)
    assert slots_of(lambda parameters: optimizer_of(asked, parameters)) == SLOTS[name]
