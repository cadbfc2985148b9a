"""Sentences: short, printable, and none of them an error by itself."""

from __future__ import annotations

import pytest

from fxsplit.errors import MOST_MESSAGE, MOST_REASON, MOST_SHOWN, joined, nearest, reason, shortened, shown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\x1b]0;x\x07", r"'a\\x1b]0;x\\x07'"),
        ("\ud800", r"'\\ud800'"),
        (10**5000, "a value of type int"),
        ([10**5000], "a value of type list"),
        ("é", "'é'"),
    ],
    ids=["escapes", "surrogate", "digits", "list", "letter"],
)
def test_values_are_shown_printable(value: object, text: str) -> None:
    assert shown(value) == text.replace("\\\\", "\\")


def test_long_values_lose_their_middle() -> None:
    text = shown(list(range(1000)))
    assert len(text) == MOST_SHOWN
    assert text.startswith("[0, 1, ")
    assert " ... " in text
    assert text.endswith("998, 999]")
    assert shortened("a" * MOST_MESSAGE) == "a" * MOST_MESSAGE


def test_faults_are_joined_as_far_as_there_is_room() -> None:
    assert joined(["a", "b"], "it: ") == "it: a; b"
    assert joined([]) == ""
    for length in (1, 30, 100, 400, 5000):
        text = joined([f"{number} {'x' * length}" for number in range(700)], "p" * 80 + ": ")
        assert len(text) <= MOST_MESSAGE
        shown_faults = text.count(";")
        assert text.endswith(f"; and {700 - shown_faults} more faults")
    assert joined(["a" * 300, "b" * 300]).endswith("; and 1 more fault")


def test_an_error_that_cannot_be_told_is_told_by_its_kind() -> None:
    class StrangeError(Exception):
        def __str__(self) -> str:
            raise ValueError

    assert reason(StrangeError()) == "StrangeError"
    assert len(reason(ValueError("a" * 5000))) == MOST_REASON


def test_long_words_are_no_misspellings() -> None:
    assert nearest("a" * 100, ["a" * 101]) == ""
    assert nearest("a" * 101, ["a" * 100]) == ""
    assert nearest("epoch", ["epochs"]) == "; did you mean 'epochs'?"
