"""A small part of the fuzz of what people hand in; all of it is in docs/results."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest


@pytest.mark.parametrize(("kind", "count"), [("recipes", 200), ("plans", 200), ("commands", 15), ("images", 100)])
@pytest.mark.filterwarnings("ignore")  # commands are run as a shell would run them
def test_whatever_is_handed_in_is_used_or_refused_in_a_sentence(
    kind: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = import_module(f"tests.fuzz_input.{kind}").run
    monkeypatch.chdir(tmp_path)
    outcomes = [run(seed, tmp_path) for seed in range(count)]
    assert [each.why for each in outcomes if each.status == "failed"] == []
    assert {each.status for each in outcomes} == {"done", "refused"}
