"""The commands that use a trained model: what they call, what they write where, and their exit codes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import fxsplit
from fxsplit.errors import ProofError, UsageError
from fxsplit.report import ClassScore, Evaluation, ExportRecord, Mistake, Observer, Prediction
from fxsplit_cli.main import app, main

OPTIONS = {
    "evaluate": "run --batch-size -b --data --device --json --output -o --trust-code --verbose -v",
    "predict": "run images --batch-size -b --device --json --top --trust-code --verbose -v",
    "export": "run --format --json --output -o --pixels --trust-code --verbose -v",
}
EVALUATION = Evaluation(
    run="runs/a", model="paper:cnn", data="digits", device="cpu", batch_size=8, images=5, loss=0.51234, top1_pct=60.0,
    top5_pct=100.0,
    classes=(
        ClassScore(name="[red]cat", count=3, predicted=4, correct=2),
        ClassScore(name="dog\x1b[2J", count=2, predicted=1, correct=1),
        ClassScore(name="cow", count=0, predicted=0, correct=0),
    ),
    confusion=((2, 1, 0), (1, 1, 0), (0, 0, 0)),
    mistakes=(
        Mistake(
            index=1, image="a.png", truth="cat", predicted="dog", truth_probability=0.25, predicted_probability=0.5
        ),
    ),
)  # fmt: skip
EXPORTED = ExportRecord(
    path="out.onnx", format="onnx", bytes=2_400_000, takes="pixels", batch_sizes=(1, 2, 3), difference=2.5e-7
)


class Calls:
    """Stands for the library's functions: keeps what they are called with, and returns ready records."""

    predictions: tuple[Prediction, ...] = ()

    def __init__(self) -> None:
        self.given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def evaluate(self, *given: Any, observer: Observer, **options: Any) -> Evaluation:
        self.given = given, options
        observer.notice("a notice")
        print("a library prints")
        return EVALUATION

    def predict(self, *given: Any, observer: Observer, **options: Any) -> Iterator[Prediction]:
        self.given = given, options
        observer.notice("a notice")
        print("a library prints")
        return iter(self.predictions)

    def export(self, *given: Any, **options: Any) -> ExportRecord:
        self.given = given, options
        print("a library prints")
        return EXPORTED


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    made = Calls()
    for name in OPTIONS:
        monkeypatch.setattr(fxsplit, name, getattr(made, name), raising=False)
    return made


@pytest.mark.parametrize("command", OPTIONS)
def test_options_are_frozen(command: str) -> None:
    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    found = [name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)]
    assert sorted(found) == sorted(OPTIONS[command].split())


def test_evaluate_shows_a_row_for_each_class(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "runs/a"]) == 0
    options = {"data": None, "batch_size": None, "device": "auto", "page": None, "trust_code": False}
    assert calls.given == (("runs/a",), options)
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert ["[red]cat", "3", "50.00", "%", "66.67", "%"] in rows
    assert ["dog\\x1b[2J", "2", "100.00", "%", "50.00", "%"] in rows
    assert ["cow", "0", "-", "-"] in rows
    assert "1 of [red]cat taken for dog" in out
    assert ["loss", "0.5123"] in rows
    assert "a library prints" not in out
    assert "a notice" in err

    given = ["--data", "cifar10", "-b", "3", "--device", "cpu", "-o", "p.html", "--trust-code", "--json"]
    assert main(["evaluate", "runs/a", *given]) == 0
    options = {"data": "cifar10", "batch_size": 3, "device": "cpu", "page": "p.html", "trust_code": True}
    assert calls.given == (("runs/a",), options)
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads(json.dumps(EVALUATION.to_dict()))
    assert "page: p.html" in err


def test_predict_shows_classes_under_each_file(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    calls.predictions = (
        Prediction(file="[red]a.png", classes=(("cat", 0.75), ("a longer name", 0.125))),
        Prediction(file="b.png", classes=(("\x1b", 1.0),)),
    )
    assert main(["predict", "runs/a", "a.png", "b", "--top", "2", "-b", "3"]) == 0
    options = {"top": 2, "batch_size": 3, "device": "auto", "trust_code": False}
    assert calls.given == (("runs/a", ["a.png", "b"]), options)
    assert capsys.readouterr().out.splitlines() == [
        "[red]a.png", "  cat             75.00 %", "  a longer name   12.50 %", "b.png", "  \\x1b  100.00 %",
    ]  # fmt: skip


def test_a_file_that_is_no_image_is_named_and_the_exit_code_is_1(
    calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    calls.predictions = (
        Prediction(file="a.png", error="'a.png' is broken"),
        Prediction(file="b.png", classes=(("cat", 0.75),)),
    )
    assert main(["predict", "runs/a", "."]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "b.png"
    assert err.splitlines()[-2:] == ["'a.png' is broken", "fxsplit: 1 of 2 images could not be read"]
    assert main(["predict", "runs/a", ".", "--json"]) == 1
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"file": "a.png", "error": "'a.png' is broken"},
        {"file": "b.png", "classes": [{"class": "cat", "probability": 0.75}]},
    ]


def test_export_says_how_the_file_was_checked(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "runs/a"]) == 0
    assert calls.given == (("runs/a", None), {"format": "onnx", "pixels": False, "trust_code": False})
    out = capsys.readouterr().out
    assert out.splitlines() == [
        "exported  out.onnx", "takes     pixels", "size      2.4 MB",
        "checked   loaded again, its scores equal the model's within 2e-07 of the largest, on 1, 2 and 3 images",
    ]  # fmt: skip
    assert main(["export", "runs/a", "--format", "torchscript", "-o", "x", "--pixels", "--trust-code", "--json"]) == 0
    assert calls.given == (("runs/a", "x"), {"format": "torchscript", "pixels": True, "trust_code": True})
    assert json.loads(capsys.readouterr().out)["difference"] == 2.5e-7


@pytest.mark.parametrize(("error", "code"), [(UsageError("no"), 2), (ProofError("no"), 4)])
def test_errors_are_a_sentence_and_an_exit_code(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    for name in OPTIONS:
        monkeypatch.setattr(fxsplit, name, fail, raising=False)
        assert main([name, "runs/a", *(["a.png"] if name == "predict" else [])]) == code
        assert capsys.readouterr().err == "fxsplit: no\n"


def test_the_commands_do_what_they_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--format", "onx"]) == 2
    assert "did you mean 'onnx'?" in capsys.readouterr().err
    assert main(["predict", str(tmp_path / "nowhere"), "a.png"]) == 2
    assert "there is no run" in capsys.readouterr().err
    assert main(["predict", str(tmp_path)]) == 2
