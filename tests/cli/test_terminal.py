"""What is drawn and written: right marks, and no character that the terminal does not know."""

from __future__ import annotations

import io

import pytest
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fxsplit.plan.schedule import Phase
from fxsplit_cli import terminal

GROW, WINDOW, ALL = (
    Phase(start=0, stop=1, epochs=2),
    Phase(start=1, stop=2, epochs=2),
    Phase(start=0, stop=3, epochs=2),
)


@pytest.mark.parametrize(
    ("phase", "bar"),
    [
        (ALL, "███ ███ ████"),
        (GROW, "███│▒▒▒ ▒▒▒▒"),
        (WINDOW, "░░░│███ ▒▒▒▒"),
        (Phase(start=2, stop=3, epochs=2), "░░░ ░░░│████"),
    ],
)
def test_draws_a_phase(phase: Phase, bar: str) -> None:
    assert terminal.draw(phase, 3, 12).plain == bar


@pytest.mark.parametrize(("count", "width"), [(1, 20), (3, 20), (7, 20), (20, 20), (50, 20)])
def test_a_drawing_has_its_width(count: int, width: int) -> None:
    for start in range(count):
        bar = terminal.draw(Phase(start=start, stop=count, epochs=1), count, width).plain
        assert len(bar) == width


@pytest.mark.parametrize(
    ("encoding", "bar"), [("utf-8", "░░░│███ ▒▒▒▒"), ("ascii", "...|### ----"), ("latin-1", "...|### ----")]
)
def test_a_terminal_gets_what_it_can_show(encoding: str, bar: str) -> None:
    raw = io.BytesIO()
    console = terminal.Terminal(file=io.TextIOWrapper(raw, encoding=encoding), width=40)
    console.print(terminal.draw(WINDOW, 3, 12), Text("épée \x1b[31m中"), Panel("a"), Table("a"), terminal.legend())
    console.file.flush()
    text = raw.getvalue().decode(encoding)
    assert text.startswith(bar)
    assert "\\x1b[31m" in text
    assert ("中" in text) is (encoding == "utf-8")
    assert ("épée" in text) is (encoding != "ascii")


def test_text_is_written_to_what_knows_ascii_only_or_all(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    terminal.write("é │ 中\n")
    assert raw.getvalue() == b"\\xe9 | \\u4e2d\n"
    assert terminal.encodable("2 × 3 · 4", "ascii") == "2 x 3 - 4"
    monkeypatch.setattr("sys.stdout", memory := io.StringIO())
    terminal.write("é │ 中\n")
    assert memory.getvalue() == "é │ 中\n"
