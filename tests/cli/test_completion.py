"""What a shell completes, and that bash gets it although it cuts words at colons."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fxsplit_cli import completion


@pytest.fixture(autouse=True)
def _uncut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "_beginning", "")


def test_names_are_those_that_libraries_have() -> None:
    import timm
    import torchvision

    from fxsplit.data.datasets import KNOWN
    from fxsplit.models.registry import LIBRARIES

    assert set(completion.models("timm:")) == {f"timm:{name}" for name in timm.list_models()}
    assert set(completion.models("torchvision:")) == {
        f"torchvision:{name}" for name in torchvision.models.list_models()
    }
    assert set(completion.models("paper:")) == {f"paper:{name}" for name in LIBRARIES["paper"].names()}
    assert completion.data("") == list(KNOWN)


def test_libraries_come_first() -> None:
    assert completion.models("") == ["paper:", "timm:", "torchvision:"]
    assert completion.models("t") == ["timm:", "torchvision:"]
    assert completion.models("pa") == ["paper:cnn", "paper:vgg16", "paper:resnext", "paper:densenet"]
    assert completion.models("paper:v") == ["paper:vgg16"]
    assert completion.models("hf:") == []
    assert completion.models("mine.py:b") == []


def test_runs_are_the_newest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert completion.runs_to_resume("") == ["auto"]
    for age, name in enumerate(("new", "old")):
        path = tmp_path / "output" / "train" / name
        path.mkdir(parents=True)
        os.utime(path, (1000 - age, 1000 - age))
    assert completion.runs_to_resume("") == ["auto", "output/train/new", "output/train/old"]
    assert completion.runs_to_resume("output/train/o") == ["output/train/old"]


@pytest.mark.parametrize(
    ("words", "at", "joined", "last", "beginning"),
    [
        (["fxsplit", "train", "pa"], 2, ["fxsplit", "train"], "pa", ""),
        (["fxsplit", "train", "paper", ":", "c"], 4, ["fxsplit", "train"], "c", "paper:"),
        (["fxsplit", "train", "paper", ":"], 3, ["fxsplit", "train"], "", "paper:"),
        (["fxsplit", "check", "timm", ":", "a", "timm", ":", "b"], 7, ["fxsplit", "check", "timm:a"], "b", "timm:"),
        (["fxsplit", "check", "timm", ":", "a", ""], 5, ["fxsplit", "check", "timm:a"], "", ""),
        (["fxsplit", "train"], 2, ["fxsplit", "train"], "", ""),
    ],
)
def test_words_that_bash_cut_are_joined(
    words: list[str], at: int, joined: list[str], last: str, beginning: str
) -> None:
    environ = {"_FXSPLIT_COMPLETE": "complete_bash", "COMP_WORDS": "\n".join(words), "COMP_CWORD": str(at)}
    completion.join_words(environ)
    assert environ["COMP_WORDS"].split("\n") == [*joined, last]
    assert environ["COMP_CWORD"] == str(len(joined))
    assert completion._beginning == beginning


def test_other_shells_do_not_cut_words() -> None:
    environ = {"_FXSPLIT_COMPLETE": "complete_zsh", "COMP_WORDS": "fxsplit\ntrain\npaper\n:", "COMP_CWORD": "3"}
    before = dict(environ)
    completion.join_words(environ)
    assert environ == before


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["train", "paper", ":", ""], ["cnn", "vgg16", "resnext", "densenet"]),
        (["check", "paper", ":", "cnn", "paper", ":", "v"], ["vgg16"]),
        (["train", "--data", "c"], ["cifar10", "cifar100"]),
        (["train", "--schedule", "se"], ["settle", "settle-far"]),
        (["inspect", "--format", "t"], ["table", "tree"]),
    ],
)
def test_bash_completes_without_loading_torch(words: list[str], found: list[str]) -> None:
    code = (
        "import sys\nfrom fxsplit_cli.main import main\n"
        "try: main([])\n"
        "finally: assert not {'torch', 'timm', 'torchvision'} & set(sys.modules)"
    )
    environ = {
        **os.environ,
        "_FXSPLIT_COMPLETE": "complete_bash",
        "COMP_WORDS": "\n".join(["fxsplit", *words]),
        "COMP_CWORD": str(len(words)),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, found, "")
