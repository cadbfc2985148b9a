"""What the documents say holds: snippets run, commands are understood, links lead somewhere, what is public is shown.

In a document, blocks of Python run one after the other, in an empty folder. Commands in a `sh` block are read by the
command line's own parser; one before a `text` block runs, and must write what stands there but for numbers. A document
that is a story runs as a whole, commands and Python in their order.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import fxsplit
from fxsplit_cli.commands.job import Job
from fxsplit_cli.main import app, main
from tests.test_layers import LAYERS

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(path.parent for path in (ROOT / "fxsplit").glob("*/__init__.py"))
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "recipes/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "docs" / "results" / "README.md",
    *(package / "README.md" for package in PACKAGES),
]
STORY = ROOT / "docs" / "use.md"
# Of commands that are run here: little is learnt, and nothing is left behind.
QUICKLY = {"train": ("--train-limit", "64"), "inspect": ()}
TOOLS = {"pytest", "ruff", "mypy", "dot"}


class Block(NamedTuple):
    """What stands between two fences, and where it begins."""

    language: str
    text: str
    line: int


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [Block(each[1], each[2], text[: each.start(2)].count("\n")) for each in found]


def having(language: str) -> list[Path]:
    return [path for path in DOCUMENTS if any(block.language == language for block in blocks(path))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where snippets run: one process of one, and the recipes are at hand."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def the_loop_settles(scope: dict[str, Any], _: str) -> None:
    start = scope["plan"].phases[-1].start
    settled = {name for part in scope["parts"][:start] for name in part.state}
    assert settled
    assert {name for name, each in scope["model"].named_parameters() if not each.requires_grad} == settled
    assert scope["optimizer"].state.keys() == {each for each in scope["model"].parameters() if each.requires_grad}


def the_pipeline_learns(_: dict[str, Any], output: str) -> None:
    first, second, third = map(float, output.split()[:3])
    assert first > second > third


AFTERWARDS = {"README.md": the_loop_settles, "docs/devices.md": the_pipeline_learns}


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("path", [path for path in having("python") if path != STORY], ids=name_of)
def test_python_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, Any] = {"__name__": "document"}
    for block in blocks(path):
        if block.language == "python":
            # So that a traceback has the line of the document.
            exec(compile("\n" * block.line + block.text, path, "exec"), scope)
    if check := AFTERWARDS.get(name_of(path)):
        check(scope, capsys.readouterr().out)


@pytest.mark.usefixtures("folder")
def test_the_plan_that_is_shown_is_a_whole_plan() -> None:
    (shown,) = [block.text for block in blocks(ROOT / "docs" / "plans.md") if block.language == "json"]
    Path("plan.json").write_text(shown, encoding="utf-8")
    plan = fxsplit.inspect(fxsplit.RunSpec(model="timm:resnet18", plan="plan.json")).plan
    assert [(phase.start, phase.stop, phase.epochs) for phase in plan.phases] == [(0, 3, 6), (1, 3, 3), (2, 3, 1)]


def commands(script: str) -> Iterator[list[str]]:
    """The words of each command; files that it writes into are left out."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|>;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if set(word) <= set("&|;"):
                yield words
                words = []
            else:
                words.append(word)
        if words:
            yield words[: words.index(">")] if ">" in words else words


def is_understood(words: list[str]) -> bool:
    """Whether there is such a command, and it takes these words."""
    program, *rest = words
    if program == "fxsplit":
        return isinstance(app(rest, prog_name="fxsplit", standalone_mode=False), Job)
    if program == "python":
        return importlib.util.find_spec(rest[1]) is not None if rest[0] == "-m" else (ROOT / rest[0]).is_file()
    if program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        return rest[:2] == ["install", "-e"] and rest[2][2:-1] in extras
    return program in TOOLS


@pytest.mark.parametrize("path", having("sh"), ids=name_of)
def test_commands_are_understood(path: Path, folder: Path) -> None:
    (folder / "output" / "train" / "mine").mkdir(parents=True)
    recipe = fxsplit.RunSpec(model="paper:cnn", img_size=16, preset="l2l", experiment="mine")
    (folder / "output" / "train" / "mine" / "args.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    for block in blocks(path):
        if block.language == "json":
            for name in ("plan.json", "old.json"):
                (folder / name).write_text(block.text, encoding="utf-8")
    for block in blocks(path):
        if block.language == "sh":
            for words in commands(block.text):
                assert is_understood(words), f"{name_of(path)}: {' '.join(words)}"


def shape(output: str) -> list[str]:
    """Lines without their numbers, and without what only aligns them or only a GPU can tell."""
    figure = r"\d[\d.,]*( [kMG]?B\b| [kM]\b)?"
    plain = re.sub(r"─+|run folder: .*|(peak memory: (CUDA|device)|energy) .*", "", re.sub(figure, "0", output))
    return [" ".join(line.split()) for line in plain.splitlines() if line.strip()]


SHOWN = [
    pytest.param(command, shown, id=f"{name_of(path)}-{command.line}")
    for path in DOCUMENTS
    if path != STORY
    for command, shown in zip(blocks(path), blocks(path)[1:], strict=False)
    if (command.language, shown.language) == ("sh", "text")
]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("command", "shown"), SHOWN)
def test_output_is_as_shown(command: Block, shown: Block, capsys: pytest.CaptureFixture[str]) -> None:
    (words,) = commands(command.text)
    assert main([*words[1:], *QUICKLY[words[1]]]) == 0
    assert shape(capsys.readouterr().out) == shape(shown.text)


def test_some_output_is_shown() -> None:
    assert len(SHOWN) == 2


def killed_after_an_epoch(words: list[str]) -> None:
    """Run a command in a process of its own, and kill it when it has told of its first epoch."""
    arguments = [sys.executable, "-m", *words, "--checkpoint-every", "1", "--device", "cpu"]
    with subprocess.Popen(
        arguments, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as run:
        assert run.stderr is not None
        assert any(line.startswith("epoch 1/") for line in run.stderr)
        run.kill()


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:FutureWarning")
def test_the_story_runs_from_its_beginning_to_its_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, Any] = {"__name__": "document"}
    runs = folder / "output" / "train"
    for block, following in zip(blocks(STORY), [*blocks(STORY)[1:], None], strict=True):
        if block.language == "python":
            exec(compile("\n" * block.line + block.text, STORY, "exec"), scope)
        if block.language != "sh":
            continue
        (words,) = commands(block.text)
        if not (runs / "mine").exists():
            killed_after_an_epoch(words)
            assert not (runs / "mine" / "model.safetensors").exists()
            continue
        capsys.readouterr()
        assert main(words[1:]) == 0
        shown = capsys.readouterr().out
        if following is not None and following.language == "text":
            assert shape(shown) == shape(following.text)
    records = [json.loads(line) for line in (runs / "mine" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    assert main(["evaluate", str(runs / "mine"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["top1_pct"] == records[-1]["eval_top1"]
    assert {"mistakes.html", "photo.png", "digits.onnx"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)", text):
        there = path.parent / target if target else path
        assert there.exists(), f"{name_of(path)} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles]
            assert anchor[1:] in slugs, f"{name_of(path)} links to {target}{anchor}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1000


def test_every_public_name_has_an_example() -> None:
    code = "\n".join(block.text for block in blocks(ROOT / "docs" / "library.md") if block.language == "python")
    assert set(re.findall(r"fxsplit\.(\w+)", code)) >= set(fxsplit.__all__)


def test_the_map_has_every_folder() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[`(\w+)/`\].*\| `([\w.]+)` \|$", text, flags=re.MULTILINE)
    assert sorted(folder for folder, _ in rows) == [package.name for package in PACKAGES]
    for folder, first in rows:
        assert (ROOT / "fxsplit" / folder / first).is_file()


def test_the_layers_are_drawn_as_they_are() -> None:
    drawing = next(block.text for block in blocks(ROOT / "docs" / "architecture.md") if "assembly  " in block.text)
    above, below = drawing.split("-" * 50, 1)
    assert above.split()[0] == "cli"
    drawn = [set(line.strip().split("  ")[0].split(", ")) for line in below.splitlines()[1:]]
    assert drawn == [set(layer) for layer in reversed(LAYERS)]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_the_readme_of_a_folder_names_its_files(package: Path) -> None:
    files = (package / "README.md").read_text(encoding="utf-8").partition("**Files**")[2]
    entries = {path.stem for path in package.iterdir() if not path.name.startswith("_")} - {"README"}
    assert sorted(re.findall(r"`(\w+)`", files)) == sorted(entries)


def test_every_page_of_results_is_in_the_index() -> None:
    pages = {path.name for path in (ROOT / "docs" / "results").glob("20*.md")}
    rows = re.findall(
        r"^\| \[[^]]*\]\(([^)]*)\) \|", (ROOT / "docs/results/README.md").read_text("utf-8"), re.MULTILINE
    )
    assert sorted(rows) == sorted(pages)


def test_pictures_are_small() -> None:
    pictures = sorted((ROOT / "docs" / "pictures").iterdir())
    assert [picture.name for picture in pictures] == ["inspect.png", "train.svg"]
    assert all(picture.stat().st_size <= 150_000 for picture in pictures)
