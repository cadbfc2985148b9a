"""What may import what, what stays light, and the public surface: frozen."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fxsplit

ROOT = Path(__file__).parent.parent

# Each layer may import those before it, and itself where it is a folder.
LAYERS = (
    {"errors"},
    {"graph", "options", "presets", "records", "data", "objects"},
    {"plan", "models", "meta"},
    {"spec", "report"},
    {"capture"},
    {"execute", "pages"},
    {"caching", "measuring", "distribute"},
    {"training"},
    {"proving"},
    {"planning"},
    {"assembly"},
    {"api"},
)
WITHOUT_TORCH = {"errors", "graph", "options", "presets", "records", "spec", "plan", "report", "pages"}
HEAVY = {"torch", "torchvision", "timm", "numpy", "sklearn", "typer", "rich"}


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in it, but not for type checking alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
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
    assert len(FILES) == 102
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


def test_public_names() -> None:
    assert fxsplit.__all__ == [
        "CheckRecord", "Executor", "Forecast", "ForecastRecord", "FxsplitError", "Inspection", "Observer", "Partition",
        "Phase", "Plan", "Proof", "ProofError", "RunReport", "RunSpec", "Trace", "check", "check_forecasts",
        "device_map", "forecast", "inspect", "load_plan", "measure", "partition", "prove", "save_plan", "schedule",
        "to_pipeline_stages", "trace", "train",
    ]  # fmt: skip
    assert all(getattr(fxsplit, name).__name__ == name for name in fxsplit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'compare'"):
        _ = fxsplit.compare
