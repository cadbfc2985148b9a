"""Recipes and runs of somebody else on the command line: what asks for a flag, and what a named run is called."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fxsplit.errors import MOST_MESSAGE
from fxsplit.report import Observer, RunReport
from fxsplit.spec import RunSpec
from fxsplit_cli.main import main


@pytest.fixture
def asked(report: RunReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[RunSpec, bool]]:
    """The specs of all runs, and whether their code is trusted; in an empty folder."""
    found: list[tuple[RunSpec, bool]] = []

    def train(spec: RunSpec, _: Observer, *, trust_code: bool, **__: Any) -> RunReport:
        found.append((spec, trust_code))
        return report

    for name in os.environ:
        if name.startswith("FXSPLIT_"):
            monkeypatch.delenv(name)
    monkeypatch.setitem(sys.modules, "fxsplit.api", SimpleNamespace(train=train))
    monkeypatch.setattr("fxsplit.api", sys.modules["fxsplit.api"], raising=False)
    monkeypatch.chdir(tmp_path)
    return found


Asked = list[tuple[RunSpec, bool]]


def test_a_recipe_that_runs_code_asks(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("recipe.yaml").write_text("model: evil.py:f\noutput: ../elsewhere\n")
    train = ["train", "-c", "recipe.yaml", "-q"]
    for line in (train, [*train, "--output", "here"], [*train, "evil.py:f"], [*train, "--trust-code"]):
        assert main(line) == 2
        assert "the recipe decides what is yours to decide: " in capsys.readouterr().err
    assert not asked
    assert main([*train, "--print-config"]) == 0  # which runs nothing
    assert main([*train, "--trust-recipe"]) == 0
    assert main([*train, "evil.py:f", "--output", "here"]) == 0
    monkeypatch.setenv("FXSPLIT_MODEL", "mine.py:g")
    assert main([*train, "--output", "here"]) == 0
    assert [(spec.model, spec.output) for spec, _ in asked] == [
        ("evil.py:f", "../elsewhere"),
        ("evil.py:f", "here"),
        ("mine.py:g", "here"),
    ]
    assert not any(trusted for _, trusted in asked)


@pytest.mark.usefixtures("asked")
def test_inspect_asks_too(capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yaml").write_text("model: evil.py:f\n")
    assert main(["inspect", "-c", "recipe.yaml"]) == 2
    assert "model is 'evil.py:f', which runs code" in capsys.readouterr().err


def test_a_run_that_goes_on_asks(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path("output/train/run")
    run.mkdir(parents=True)
    (run / "args.yaml").write_text(RunSpec(model="own.py:f").to_yaml())
    train = ["train", "--resume", str(run), "-q"]
    assert main(train) == 2
    assert "the run in 'output/train/run' is of 'own.py:f', which runs code" in capsys.readouterr().err
    assert main(["train", "--resume", "auto", "-q"]) == 2
    assert not asked
    assert main([*train, "--trust-code"]) == 0
    assert main([*train, "own.py:f"]) == 0
    assert [trusted for _, trusted in asked] == [True, False]
    Path("recipe.yaml").write_text("model: own.py:f\n")
    assert main([*train, "-c", "recipe.yaml"]) == 2
    assert main([*train, "-c", "recipe.yaml", "--trust-recipe"]) == 0


def test_the_recipe_of_a_named_run_makes_another_one(asked: Asked) -> None:
    run = Path("output/train/mine")
    run.mkdir(parents=True)
    (run / "args.yaml").write_text(RunSpec(model="paper:cnn", experiment="mine").to_yaml())
    train = ["train", "-c", str(run / "args.yaml"), "-q"]
    assert main(train) == 0
    Path("output/train/mine-2").mkdir()
    assert main(train) == 0
    assert main([*train, "--output", "elsewhere"]) == 0
    assert main([*train, "--experiment", "mine"]) == 0  # asked for: the library says that it is taken
    assert main(["train", "--resume", str(run), "-q"]) == 0
    assert [spec.experiment for spec, _ in asked] == ["mine-2", "mine-3", "mine", "mine", "mine"]


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", ".", "..", "a\\b", "a\nb", "a" * 101])
def test_an_experiment_is_a_name(asked: Asked, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "paper:cnn", "--experiment", name]) == 2
    assert "but must be a name of up to 100 letters, without / and" in capsys.readouterr().err
    assert not asked


@pytest.mark.usefixtures("asked")
def test_a_sentence_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    line: list[Any] = ["train", "--nosuch" + "x" * 5000]
    assert main(line) == 2
    assert len(capsys.readouterr().err) <= len("fxsplit: \n") + MOST_MESSAGE


@pytest.mark.usefixtures("asked")
def test_code_that_leaves_the_program_is_no_success(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*_: Any, **__: Any) -> None:
        sys.exit(0)

    monkeypatch.setattr(sys.modules["fxsplit.api"], "train", train)
    assert main(["train", "paper:cnn"]) == 1
    assert "the model's code ended the run: it raised SystemExit" in capsys.readouterr().err
