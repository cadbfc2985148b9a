"""Functions of the user's that build models, and how they end otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxsplit.errors import UsageError
from fxsplit.objects import factories

OTHERS = factories.Others("library", ("timm",), UsageError)
FILE = """
import sys

def leaves(): sys.exit(0)
def leaves_empty(): sys.exit()
def leaves_with_words(): sys.exit("bye")
def base(): raise BaseException("stop")
def generator(): raise GeneratorExit
def interrupted(): raise KeyboardInterrupt
def silent():
    class Silent(Exception):
        def __str__(self): raise ValueError
    raise Silent
def long(): raise ValueError("a" * 5000 + "\\nb")
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("leaves", "called sys.exit(0)"),
        ("leaves_empty", "called sys.exit()"),
        ("leaves_with_words", "called sys.exit('bye')"),
        ("base", "raised BaseException: stop"),
        ("generator", "raised GeneratorExit: GeneratorExit"),
        ("silent", "raised Silent: Silent"),
    ],
)
def test_a_factory_that_leaves_the_program_is_an_error(tmp_path: Path, name: str, words: str) -> None:
    path = tmp_path / "nets.py"
    path.write_text(FILE)
    with pytest.raises(UsageError) as caught:
        factories.call(str(path), name, {}, others=OTHERS)
    assert str(caught.value).endswith(f"nets.py:{name}' {words}")


def test_an_interruption_is_none(tmp_path: Path) -> None:
    path = tmp_path / "nets.py"
    path.write_text(FILE)
    with pytest.raises(KeyboardInterrupt):
        factories.call(str(path), "interrupted", {}, others=OTHERS)
    with pytest.raises(UsageError) as caught:
        factories.call(str(path), "long", {}, others=OTHERS)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; sys.exit(0)", "cannot be imported: called sys.exit(0)"),
        ("raise BaseException('x')", "cannot be imported: BaseException: x"),
    ],
)
def test_so_is_a_file_that_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, words: str) -> None:
    (tmp_path / "quitting.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    for source in ("quitting.py", "quitting"):
        with pytest.raises(UsageError) as caught:
            factories.call(source, "f", {}, others=OTHERS)
        assert str(caught.value) == f"{source!r} {words}"
