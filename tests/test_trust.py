"""What a recipe or a run of somebody else may not do without being asked for."""

from __future__ import annotations

from typing import Any

import pytest

from fxsplit.errors import UsageError
from fxsplit.models.registry import LIBRARIES
from fxsplit.paths import expanded, leads_out
from fxsplit.spec import DEFAULTS
from fxsplit.trust import SOURCES, code_is_trusted, is_code, refuse_recipe, refuse_run, trusting_code


def test_the_libraries_of_models_are_known_without_torch() -> None:
    assert set(SOURCES) == set(LIBRARIES)


@pytest.mark.parametrize(
    ("recipe", "refused"),
    [
        ({"model": "paper:cnn", "output": "output/mine", "data_dir": "data"}, ""),
        ({"model": "hf:./folder"}, ""),
        ({"model": "evil.py:f"}, "model is 'evil.py:f', which runs code; .* --trust-recipe, or give model yourself"),
        ({"model": "os:abort"}, "model is 'os:abort', which runs code"),
        ({"model": "evil"}, "model is 'evil', which runs code"),
        ({"output": "/tmp/x"}, "output is '/tmp/x', outside of the current folder"),
        ({"output": "a/../../x"}, "outside of the current folder"),
        ({"output": "~/x"}, "outside of the current folder"),
        ({"output": "C:/x"}, "outside of the current folder"),
        ({"output": "..\\x"}, "outside of the current folder"),
        ({"data_dir": "/etc"}, "data-dir is '/etc', outside"),
        ({"data_dir": DEFAULTS["data_dir"], "output": DEFAULTS["output"]}, ""),
        ({"data": "folder:/srv/images", "plan": "/srv/plan.json"}, ""),  # read, and not run
        ({"data": "evil.py:f"}, "data is 'evil.py:f', which runs code; .* --trust-recipe, or give data yourself"),
        ({"data": "os:abort"}, "data is 'os:abort', which runs code"),
        ({"data": "cifar10"}, ""),
    ],
)
def test_what_a_recipe_may_decide(recipe: dict[str, Any], refused: str) -> None:
    if not refused:
        refuse_recipe(recipe, (), DEFAULTS)
        return
    with pytest.raises(UsageError, match=refused):
        refuse_recipe(recipe, ("lr",), DEFAULTS)
    refuse_recipe(recipe, tuple(recipe), DEFAULTS)  # the user gives it too, and wins


def test_everything_refused_is_told_at_once() -> None:
    with pytest.raises(
        UsageError, match=r"output is .*; data-dir is .*; model is .*give output and data-dir and model"
    ):
        refuse_recipe({"model": "a.py:f", "output": "/x", "data_dir": "/y"}, (), DEFAULTS)


def test_code_is_trusted_inside_alone() -> None:
    with trusting_code(True):
        assert code_is_trusted()
        with trusting_code(False):
            assert not code_is_trusted()
    assert not code_is_trusted()


def test_a_run_of_code_asks() -> None:
    mine = {"model": "a.py:f", "data": "folder:a.py:f"}
    refuse_run({"model": "paper:cnn", "data": "digits"}, "run", trust_code=False)
    refuse_run(mine, "run", trust_code=True)
    refuse_run(mine, "run", given=["model"], trust_code=False)
    with pytest.raises(UsageError, match=r"the run in 'run' is of 'a.py:f', which runs code; .* add --trust-code"):
        refuse_run(mine, "run", given=["data"], trust_code=False)
    both = {"model": "a.py:f", "data": "b:g"}
    for given, missing in (([], "model and the data"), (["model"], "data"), (["data"], "model")):
        with pytest.raises(UsageError, match=f"name the {missing} beside --resume"):
            refuse_run(both, "run", given=given, trust_code=False)
    assert [is_code(model) for model in ("timm:a", "torchvision:a", "hf:a", "paper:a", "a.py:b", "a.b:c", "a")] == [
        *[False] * 4,
        *[True] * 3,
    ]


def test_homes() -> None:
    assert str(expanded("~/x")) != "~/x"
    assert not leads_out("a/b.c/..d")
    for path in ("~nosuchuser/x", "a\0b"):
        with pytest.raises(UsageError):
            expanded(path)
