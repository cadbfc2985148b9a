"""What may import what, what stays light, and the public surface: frozen."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fxsplit

ROOT = Path(__file__).parent.parent

# Each layer may import those before it, and itself where it is a folder.
LAYERS = (
    {"errors"},
    {"arguments", "paths", "plain_data"},
    {"graph", "options", "presets", "records", "objects"},
    {"trust"},
    {"data"},
    {"plan", "models", "meta", "cuda"},
    {"spec", "report"},
    {"comparison"},
    {"capture", "resuming"},
    {"execute", "pages"},
    {"distribute"},
    {"caching", "measuring", "saving"},
    {"training", "comparing"},
    {"proving"},
    {"planning"},
    {"assembly"},
    {"trained"},
    {"api"},
)
WITHOUT_TORCH = {
    "errors", "plain_data", "graph", "options", "presets", "records", "spec", "resuming", "plan", "report", "pages",
    "comparison", "comparing", "arguments",
}  # fmt: skip
HEAVY = {"torch", "torchvision", "timm", "numpy", "sklearn", "typer", "rich"}


def imports(path: Path, *, for_types: bool = False) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in it; those for type checking alone if asked for."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
        if not for_types
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def noun(path: Path) -> str:
    return path.relative_to(ROOT / "fxsplit").with_suffix("").parts[0]


FILES = sorted(path for path in (ROOT / "fxsplit").rglob("*.py") if not path.name.startswith("__"))


def test_every_file_has_its_layer() -> None:
    assert {ROOT / "fxsplit" / name for name in ("api.py", "plan/schedule.py", "execute/executor.py")} <= set(FILES)
    assert {noun(path) for path in FILES} == set().union(*LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    level = next(index for index, layer in enumerate(LAYERS) if noun(path) in layer)
    allowed = set().union(*LAYERS[:level]) | ({noun(path)} if path.parent.name != "fxsplit" else set())
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "fxsplit":
            assert parts[1] in allowed, f"{path.name} imports {name}"
        assert parts[0] not in {"typer", "rich", "fxsplit_cli"}, f"{path.name} imports {name}"
        if noun(path) in WITHOUT_TORCH:
            assert parts[0] not in HEAVY, f"{path.name} imports {name}"


def test_no_file_imports_one_that_imports_it() -> None:
    """Not even in a circle, nor for type checking alone."""
    roots = {"fxsplit": ROOT / "fxsplit", "fxsplit_cli": ROOT / "cli"}
    files = {
        ".".join((package, *path.relative_to(root).with_suffix("").parts)): path
        for package, root in roots.items()
        for path in root.rglob("*.py")
        if path.name != "__init__.py"
    }
    assert len(files) > len(FILES)
    imported = {
        name: {
            ".".join(parts[:end])
            for each in imports(path, for_types=True)
            if (parts := each.split("."))
            for end in range(2, len(parts) + 1)
        }
        for name, path in files.items()
    }
    assert "fxsplit.plan.cuts" in imported["fxsplit.plan.partition"]
    try:
        tuple(TopologicalSorter({name: each & files.keys() for name, each in imported.items()}).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_a_folder_has_at_most_14_files() -> None:
    sizes = Counter(path.parent.relative_to(ROOT) for path in FILES)
    assert len(sizes) > 10
    assert {str(folder): size for folder, size in sizes.items() if size > 14} == {}


def test_the_wheel_holds_every_file(tmp_path: Path) -> None:
    kept = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("fxsplit", "cli"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=kept)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", build], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").iterdir()
    found = {name for name in zipfile.ZipFile(wheel).namelist() if not re.search(r"\.dist-info/|\.md$", name)}
    files = [path for name in ("fxsplit", "cli") for path in (tmp_path / name).rglob("*") if path.is_file()]
    expected = {path.relative_to(tmp_path).as_posix() for path in files if path.suffix != ".md"}
    assert len(expected) > len(FILES)
    assert found == {re.sub("^cli/", "fxsplit_cli/", name) for name in expected}


def test_only_the_terminal_is_printed_to() -> None:
    printing = {
        path.name
        for path in [*FILES, *(ROOT / "cli").glob("*.py")]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert printing == {"terminal.py"}


def test_private_torch_fx_is_imported_nowhere() -> None:
    private = [f"{path.name}: {name}" for path in FILES for name in imports(path) if name.startswith("torch.fx._")]
    assert private == []


@pytest.mark.parametrize(
    "code",
    [
        "import fxsplit; dir(fxsplit); fxsplit.RunSpec; fxsplit.Plan; fxsplit.schedule; fxsplit.FxsplitError",
        "from fxsplit_cli.main import main; main(['--help'])",
        "from fxsplit_cli.main import main; main(['train', '--help'])",
    ],
)
def test_starting_loads_no_torch(code: str) -> None:
    script = f"import sys\n{code}\nassert not {{'torch', 'timm', 'torchvision'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_inspecting_loads_no_library_that_it_does_not_use() -> None:
    code = (
        "import sys, fxsplit\n"
        "fxsplit.inspect(fxsplit.RunSpec(model='paper:cnn', preset='l2l'))\n"
        "assert not {'timm', 'sklearn', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names() -> None:
    assert fxsplit.__all__ == [
        "CheckRecord", "Comparison", "ComparisonSpec", "Evaluation", "Executor", "ExportRecord", "Forecast",
        "ForecastRecord", "FxsplitError", "Inspection", "Observer", "Partition", "Phase", "Plan", "Prediction",
        "Proof", "ProofError", "RunReport", "RunSpec", "Trace", "TrainedModel", "check", "check_forecasts", "compare",
        "device_map", "evaluate", "export", "forecast", "graphed", "inspect", "load", "load_plan", "measure",
        "partition", "predict", "prove", "save_plan", "schedule", "to_pipeline_stages", "trace", "train",
    ]  # fmt: skip
    assert all(getattr(fxsplit, name).__name__ == name for name in fxsplit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'comparing_all'"):
        _ = fxsplit.comparing_all
