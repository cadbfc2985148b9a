"""Files by strangers: what is refused, in which words, and before anything is made of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fxsplit.errors import MOST_MESSAGE, UsageError
from fxsplit.plain_data import MOST_RECIPE_BYTES, parse_json, read_json, read_yaml

ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (ALIASES, "not valid YAML near line 2: write out what '*a' stands for"),
        ("<<: &a {lr: 1}\nmodel: *a", "near line 2: write out what '*a' stands for"),
        ("lr: !!float 1", "near line 1: leave out the tag 'tag:yaml.org,2002:float'"),
        ("lr: !!int x", "leave out the tag"),
        ("model: !!python/object/apply:os.system [id]", "leave out the tag"),
        ("model: !mine x", "leave out the tag '!mine'"),
        ("lr: 1\nlr: 2", "the key 'lr' is given twice"),
        ("lr: 1\n'lr': 2", "the key 'lr' is given twice"),
        ("a:\n  b: 1\n  b: 1", "near line 2: the key 'b' is given twice"),
        ("[1]: 2", "is not valid YAML"),
        (f"seed: {'9' * 5000}", "a number of 5000 digits is too long"),
        (f"seed: 0x{'f' * 5000}", "a number of 5002 digits is too long"),
        (f"seed: {'9:' * 3000}9", "a number of 6001 digits is too long"),
        ("a: " + "[" * 2000, "it is nested too deeply"),
        ("- " * 2000, "it is nested too deeply"),
        ("a: " + "{b: " * 17 + "c" + "}" * 17, "it is nested too deeply"),
        ('output: "\\uD800"', "holds '\\ud800', which is no text in UTF-8"),
        ('"a\\0b": 1', "holds 'a\\x00b', which is no text"),
        ("x" * MOST_RECIPE_BYTES + "x", "more than 128 kB, too much for a recipe"),
        ("a: b: c", "is not valid YAML near line 1"),
        ("a: 1\n--- \nb: 2", "is not valid YAML"),
    ],
)
def test_yaml_that_is_no_plain_data(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=re.escape(why)) as caught:
        read_yaml(path, "recipe")
    assert str(caught.value).startswith(f"the recipe {str(path)!r} ")
    assert len(str(caught.value)) <= MOST_MESSAGE


def test_words_stay_words(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("a: 2020-13-45\nb: 2026-11-27\nc: [1, 1.5, true, null, é]\n2: x\n", encoding="utf-8")
    assert read_yaml(path, "recipe") == {"a": "2020-13-45", "b": "2026-11-27", "c": [1, 1.5, True, None, "é"], 2: "x"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' is given twice"),
        ('[{"b": {"a": 1, "a": 1}}]', "the key 'a' is given twice"),
        ("9" * 5000, "a number of 5000 digits is too long"),
        ("[NaN]", "NaN is no number of JSON"),
        ("[-Infinity]", "-Infinity is no number of JSON"),
        ('["\\ud800"]', "holds '\\ud800', which is no text in UTF-8"),
        ('{"\\ud800": 1}', "holds '\\ud800', which is no text in UTF-8"),
        ("[" * 17 + "]" * 17, "nested too deeply for a plan"),
        ("[" * 100_000, "nested too deeply for a plan"),
        ("{", "is not valid JSON near line 1"),
    ],
)
def test_json_that_is_no_plain_data(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=re.escape(why)):
        parse_json(text, origin="p.json", noun="plan")


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for path, why in [
        (tmp_path / "bytes", "it is no text in UTF-8"),
        (tmp_path, "Is a directory"),
        (tmp_path / "none", "No such file"),
        (tmp_path / ("a" * 300), "File name too long"),
        ("a\0b", "null"),
        ("/dev/zero", "more than 16384 kB"),
    ]:
        with pytest.raises(UsageError, match=why):
            read_json(path, "plan")


def test_deep_and_wide_data_that_are_allowed() -> None:
    text = "[" * 16 + "]" * 16
    assert parse_json(text, origin="p.json", noun="plan") == eval(text)
