"""Comparisons from arms to files: which runs there are, in which order, what interruptions change, what is refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from fxsplit.comparing.arms import read_arms
from fxsplit.comparing.compare import compare, compare_folders, planned
from fxsplit.comparing.runner import turned
from fxsplit.comparing.statistics import holm
from fxsplit.comparison import ComparisonObserver, ComparisonSpec, read_comparison
from fxsplit.errors import CheckError, FxsplitError, UsageError
from fxsplit.presets import preset
from tests.comparing.conftest import Player

RECIPES = Path(__file__).parents[2] / "recipes" / "table1"
FINETUNE = RECIPES.parent / "finetune"
RUN = {"epochs": 4, "batch_size": 100}


def asked(folder: Path, **changes: Any) -> ComparisonSpec:
    given = {"models": ("paper:cnn",), "output": str(folder), "run": RUN, **changes}
    return ComparisonSpec(**given)


def test_arms_take_turns_to_begin() -> None:
    order = list(turned(["a", "b", "c"], [7, 8, 9, 10]))
    assert [seed for seed, _ in order] == [seed for seed in (7, 8, 9, 10) for _ in range(3)]
    firsts = [arm for _, arm in order[::3]]
    assert firsts == ["a", "b", "c", "a"]
    assert Counter(order) == Counter((seed, arm) for seed in (7, 8, 9, 10) for arm in "abc")


@pytest.mark.parametrize("epochs", [10, 60])
def test_regularised_has_every_regulariser_of_the_arm_that_is_tried(epochs: int) -> None:
    standard, regularised, l2l = (
        arm.spec({"epochs": epochs}, model="paper:cnn")
        for arm in read_arms(("standard", "regularised", "l2l"), {"epochs": epochs})
    )
    switched = {
        name: value for name, value in preset("l2l", epochs).items() if name not in ("schedule", "by", "memory_aim")
    }
    assert len(switched) > 3
    for name, value in switched.items():
        assert getattr(regularised, name) == getattr(l2l, name) == value
    assert regularised.schedule == standard.schedule == "standard"
    assert regularised.memory_aim is None
    assert standard.smoothing == 0
    plain = {name: getattr(standard, name) for name in switched}
    assert replace(regularised, **plain) == standard


def test_lengths_and_memory_of_arms() -> None:
    arms = read_arms(("window@60", "checkpointed@60", "l2l@60"), {"epochs": 10})
    assert [arm.label for arm in arms] == ["window@60", "checkpointed@60", "l2l@60"]
    window, checkpointed, _ = (arm.spec({"epochs": 10}, model="paper:cnn") for arm in arms)
    assert (window.schedule, window.epochs_total) == ("window", 60)
    assert (checkpointed.schedule, checkpointed.memory_budget) == ("standard", 0.6)


def test_an_arm_may_be_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "fast.yaml").write_text("schedule: grow\nlr: 0.5\nbatch-size: 8\n", encoding="utf-8")
    (arm,) = read_arms((str(tmp_path / "fast.yaml"),), RUN)
    spec = arm.spec(RUN, model="paper:cnn")
    assert arm.label == "fast"
    assert (spec.schedule, spec.lr, spec.batch_size) == ("grow", 0.5, 100)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"arms": ",,"}, "arms is ',,', which names nothing; name some, or leave it out"),
        ({"match": ""}, "match is '', which names nothing"),
        ({"match": ()}, "match names nothing"),
        ({"devices": 3.5}, "devices is 3.5, but must be names"),
        ({"devices": " "}, "devices is ' ', which names nothing"),
        ({"jobs": 0}, "jobs is 0, but must be a whole number at least 1"),
        ({"arms": "finetun"}, "settle, settle-far, and recipes"),
        ({"arms": "standart"}, "there is no arm 'standart'; did you mean 'standard'?"),
        ({"arms": "standard,regularised"}, "regularised takes over from the arm that is tried, and there is none"),
        (
            {"arms": "l2l,regularised,window"},
            "regularised takes the regularisers of the arm that is tried, the last one",
        ),
        ({"arms": "l2l,l2l"}, "arms are l2l,l2l, but each must be there once"),
        ({"arms": "l2l@10,standard@60"}, "arms last 10 and 60 epochs"),
        ({"match": "off,time"}, "match off leaves each arm as it is, and goes with no other"),
        ({"match": "memory"}, "there is no match 'memory'"),
        ({"seeds": "1,1"}, "seeds are 1,1, but each must be there once"),
        ({"seeds": "0"}, "seeds is '0', but must be"),
        ({"seeds": ","}, "seeds is ',', but must be"),
        ({"seeds": "3,,"}, "seeds is '3,,', but must be"),
        ({"margin": 0.0}, "margin is 0.0, but must be a number above 0"),
        ({"models": ()}, "no model is given"),
    ],
)
def test_what_cannot_be_compared_is_said(
    tmp_path: Path, player: Player, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(sentence)):
        compare(asked(tmp_path, **changes), launch=player)
    assert player.launched == []


@pytest.mark.parametrize(("words", "numbers"), [("3", (0, 1, 2)), ("7,", (7,)), ("0,", (0,)), ("3,0", (3, 0))])
def test_seeds_are_a_number_of_them_or_their_names(words: str, numbers: tuple[int, ...]) -> None:
    assert ComparisonSpec(seeds=words).seed_numbers == numbers


def test_a_file_in_the_place_of_the_folder_is_said(tmp_path: Path, player: Player) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UsageError, match="cannot be read: Not a directory; choose another --output or --name"):
        compare(replace(asked(tmp_path), output=str(file)), launch=player)


def test_a_recipe_has_keys_of_both() -> None:
    found = read_comparison({"model": "paper:cnn", "seeds": 3, "arms": ["l2l"], "lr": 0.1, "batch-size": 4})
    assert found == {"models": "paper:cnn", "seeds": "3", "arms": ["l2l"], "run": {"lr": 0.1, "batch_size": 4}}
    assert [read_comparison({"seeds": seeds})["seeds"] for seeds in ([7], [3, 7], "7,")] == ["7,", "3,7", "7,"]
    with pytest.raises(UsageError, match=r"^the recipe 'x': the key 'sead' is not known; did you mean 'seed'"):
        read_comparison({"sead": 3}, source="the recipe 'x'")
    with pytest.raises(UsageError, match=r"^the recipe 'x': the arm 'l2l': the key 'parst' is not known"):
        read_comparison({"arms": {"l2l": {"parst": 3}}}, source="the recipe 'x'")


def test_arms_may_have_options_of_their_own(tmp_path: Path) -> None:
    found = read_comparison(
        {"arms": {"standard@4": None, "window@4": {"parts": 3}, "regularised@4": {"lr": 0.1}, "l2l@4": None}}
    )
    spec = asked(tmp_path, **{**found, "run": RUN})
    standard, window, regularised, l2l = (
        arm.spec(spec.run, model="paper:cnn") for arm in read_arms(spec.arms, spec.run, spec.of_arms)
    )
    assert (standard.parts, window.parts, l2l.parts) == (None, 3, None)
    assert (standard.lr, regularised.lr, regularised.smoothing) == (1e-3, 0.1, l2l.smoothing)


def test_arms_of_other_lengths_are_compared_with_the_first_alone(tmp_path: Path, player: Player) -> None:
    spec = asked(tmp_path, match="off", seeds="2", arms="standard@4,l2l@4,standard@6,l2l@6")
    (table,) = compare(spec, launch=player).tables
    assert [(each.arm, each.against) for each in table.differences if each.quantity == "accuracy"] == [
        ("l2l@4", "standard@4"),
        ("standard@6", "standard@4"),
        ("l2l@6", "standard@4"),
        ("l2l@6", "standard@6"),
    ]


def measured(folder: Path, name: str = "compare") -> Any:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def test_a_comparison(tmp_path: Path, player: Player) -> None:
    found = compare(asked(tmp_path), launch=player)
    assert len(player.launched) == 15
    assert [run.arm for run, _ in player.launched[:6]] == [
        "standard",
        "regularised",
        "l2l",
        "regularised",
        "l2l",
        "standard",
    ]
    (table,) = found.tables
    assert [(arm.arm, arm.epochs, len(arm.runs)) for arm in table.arms] == [
        ("standard", 4, 5),
        ("regularised", 4, 5),
        ("l2l", 4, 5),
    ]
    verdicts = {(each.arm, each.against, each.quantity): each.verdict for each in table.differences}
    assert verdicts["l2l", "standard", "accuracy"] == "more accurate"
    assert verdicts["l2l", "regularised", "accuracy"] in ("level", "not shown")
    assert verdicts["l2l", "standard", "time"] == "faster"
    assert verdicts["regularised", "standard", "time"] == "level"
    assert verdicts["l2l", "standard", "memory"] == "level"
    assert table.unequal == ()
    # Accuracies of the runs with the same seeds, subtracted by hand.
    runs = {arm.arm: {run.seed: run.accuracy_pct for run in arm.runs} for arm in table.arms}
    by_hand = sum(runs["l2l"][seed] - runs["standard"][seed] for seed in range(5)) / 5
    difference = next(each for each in table.differences if each.quantity == "accuracy" and each.arm == "l2l")
    assert (difference.against, difference.mean) == ("standard", pytest.approx(by_hand))
    assert measured(tmp_path)["looks"] == [[0, 1, 2, 3, 4]]
    rows = (tmp_path / "compare.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 16
    assert "more accurate" in (tmp_path / "compare.md").read_text(encoding="utf-8")


class Interrupts(ComparisonObserver):
    """Interrupts the comparison after so many looks at its processes."""

    def __init__(self, after: int) -> None:
        self.left = after

    def waiting(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("jobs", [1, 2])
def test_interrupted_at_five_places_it_ends_as_one_that_was_not(tmp_path: Path, player: Player, jobs: int) -> None:
    whole = compare(asked(tmp_path / "whole", jobs=jobs, match="epochs,time"), launch=player)
    count = len(player.launched)
    spec = asked(tmp_path / "whole", jobs=jobs, match="epochs,time", output=str(tmp_path / "broken"))
    for after in (1, 2, 7, 13, 20):
        with pytest.raises(KeyboardInterrupt):
            compare(spec, Interrupts(after), launch=player)
    broken = compare(spec, launch=player)
    # Those that were interrupted were started twice; none was done twice.
    assert count < len(player.launched) - count <= count + 5 * jobs
    progress = [len(path.read_text()) for path in tmp_path.glob("*/runs/*/*/progress")]
    assert set(progress) == {3}

    def shown(folder: Path) -> str:
        return (folder / "compare.json").read_text(encoding="utf-8").replace(folder.name, "x")

    assert broken.looks == whole.looks == ((0, 1, 2, 3, 4),)
    assert shown(tmp_path / "broken") == shown(tmp_path / "whole")


def test_equal_time_fits_the_length_once(tmp_path: Path, player: Player) -> None:
    found = compare(asked(tmp_path, match="time,work"), launch=player)
    equal = {table.match: {arm.arm: arm for arm in table.arms} for table in found.tables}
    assert list(equal) == ["epochs", "time", "work"]
    # 4 epochs of l2l at half of the cost are 2 of standard; 5 s are spent before, whatever the length.
    assert {name: arm.epochs for name, arm in equal["time"].items()} == {"standard": 2, "regularised": 2, "l2l": 4}
    assert {name: arm.epochs for name, arm in equal["work"].items()} == {"standard": 2, "regularised": 2, "l2l": 4}
    assert equal["time"]["standard"].time.mean == pytest.approx(equal["time"]["l2l"].time.mean, rel=0.02)
    shorter = [run for run, _ in player.launched if run.spec.epochs_total == 2]
    assert len(shorter) == 10  # the two tables share these runs
    regularised = next(run.spec for run in shorter if run.arm == "regularised")
    assert regularised.average == preset("l2l", 4)["average"]


def test_equal_time_is_that_of_the_last_arm_which_is_no_control(tmp_path: Path, player: Player) -> None:
    found = compare(asked(tmp_path, match="time", arms="standard,grow,l2l", seeds="1"), launch=player)
    lengths = {arm.arm: arm.epochs for table in found.tables if table.match == "time" for arm in table.arms}
    assert lengths == {"standard": 2, "grow": 2, "l2l": 4}


def test_more_seeds_are_a_second_look(tmp_path: Path, player: Player) -> None:
    compare(asked(tmp_path, seeds="5"), launch=player)
    found = compare(asked(tmp_path, seeds="7"), launch=player)
    assert found.looks == ((0, 1, 2, 3, 4), (0, 1, 2, 3, 4, 5, 6))
    assert len(player.launched) == 21
    assert "second look" in (tmp_path / "compare.md").read_text(encoding="utf-8")
    assert compare(asked(tmp_path, seeds="5"), launch=player).looks == found.looks
    with pytest.raises(UsageError, match=re.escape("was 0.3 points and is now 0.5, but it is given before the runs")):
        compare(asked(tmp_path, margin=0.5), launch=player)


def test_a_folder_with_another_run_is_refused(tmp_path: Path, player: Player) -> None:
    compare(asked(tmp_path, seeds="1"), launch=player)
    with pytest.raises(UsageError, match=r"holds a run with lr 0.001 in place of 0.1; choose another --output"):
        compare(asked(tmp_path, seeds="1", run={**RUN, "lr": 0.1}), launch=player)


def test_other_data_are_refused(tmp_path: Path, player: Player) -> None:
    player.change = lambda run, report: (
        replace(report, data={**report.data, "labels": "others"}) if run.arm == "l2l" and run.seed == 3 else report
    )
    with pytest.raises(CheckError, match=r"other data than each other's.*the labels differ with seed 3") as error:
        compare(asked(tmp_path), launch=player)
    assert error.value.exit_code == 4


def test_what_is_not_equal_is_listed(tmp_path: Path, player: Player) -> None:
    player.change = lambda run, report: (
        replace(report, environment={**report.environment, "torch": "2.15.0"}) if run.arm == "l2l" else report
    )
    (table,) = compare(asked(tmp_path, seeds="1"), launch=player).tables
    assert table.unequal == ("torch: standard 2.14.0; regularised 2.14.0; l2l 2.15.0",)


def test_a_failed_run_is_said_and_the_others_are_shown(tmp_path: Path, player: Player) -> None:
    player.change = lambda run, report: replace(report, status="failed") if run.seed == 1 else report
    with pytest.raises(FxsplitError, match=r"s1' has failed: its process ended with exit code 0"):
        compare(asked(tmp_path, seeds="2"), launch=player)
    data = measured(tmp_path)
    assert [len(arm["runs"]) for arm in data["tables"][0]["arms"]] == [1, 1, 1]
    assert len(data["missing"]) == 3


def test_a_run_that_cannot_be_done_ends_the_comparison(tmp_path: Path, player: Player) -> None:
    player.code = 2
    with pytest.raises(UsageError, match="paper:cnn cannot be trained as standard: it has no such layer"):
        compare(asked(tmp_path, jobs=2), launch=player)
    assert len(player.launched) == 2


def test_devices_are_given_in_turn(tmp_path: Path, player: Player) -> None:
    compare(asked(tmp_path, devices="cuda:0,cuda:1"), launch=player)
    assert Counter(device for _, device in player.launched) == {"cuda:0": 8, "cuda:1": 7}


def test_finished_runs_are_compared_as_they_are(tmp_path: Path, player: Player) -> None:
    before = compare(asked(tmp_path / "runs"), launch=player)
    folders = [str(path.parent) for path in (tmp_path / "runs").glob("runs/*/*/report.json")]
    found = compare_folders(folders, asked(tmp_path / "again", models=()))
    (table,) = found.tables
    assert [(arm.arm, len(arm.runs)) for arm in table.arms] == [
        ("standard@4", 5),
        ("regularised@4", 5),
        ("l2l@4", 5),
    ]
    means = sorted(arm.accuracy.mean for arm in table.arms)
    assert means == sorted(arm.accuracy.mean for arm in before.tables[0].arms)
    with pytest.raises(UsageError, match="there is no finished run in"):
        compare_folders([str(tmp_path)], asked(tmp_path / "again", models=()))


def test_tables_of_other_runs_are_not_replaced(tmp_path: Path, player: Player) -> None:
    compare(asked(tmp_path, arms="standard,l2l", seeds="2"), launch=player)
    before = (tmp_path / "compare.json").read_bytes()
    launched = len(player.launched)
    folders = sorted(str(path.parent) for path in tmp_path.glob("runs/*/*/report.json"))
    for others in ({"models": ("paper:vgg16",)}, {"arms": "l2l"}, {"run": {**RUN, "epochs": 5}}):
        with pytest.raises(UsageError, match=r"compares other runs, such as .*-s0', and is not replaced; choose"):
            compare(asked(tmp_path, **{"seeds": "2", "arms": "standard,l2l", **others}), launch=player)
    with pytest.raises(UsageError, match="is of a comparison that did its runs itself, and is not replaced"):
        compare_folders(folders, asked(tmp_path, models=()))
    assert (tmp_path / "compare.json").read_bytes() == before
    assert len(player.launched) == launched
    # One that holds them all is the same comparison, grown.
    compare(asked(tmp_path, models=("paper:cnn", "paper:vgg16"), seeds="2"), launch=player)
    assert (tmp_path / "compare.json").read_bytes() != before
    (tmp_path / "notes.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UsageError, match="is no comparison, and is not replaced; choose another --name"):
        compare_folders(folders, asked(tmp_path, models=(), name="notes"))


def test_several_models_are_one_family(tmp_path: Path, player: Player) -> None:
    found = compare(asked(tmp_path, models=("paper:cnn", "paper:vgg16")), launch=player)
    assert [table.model for table in found.tables] == ["paper:cnn", "paper:vgg16"]
    first = [run.model for run, _ in player.launched[:6]]
    assert first == ["paper:cnn"] * 3 + ["paper:vgg16"] * 3
    for pair in zip(*(table.differences for table in found.tables), strict=True):
        assert len({(each.arm, each.against, each.quantity) for each in pair}) == 1
        assert [each.p_holm for each in pair] == holm([each.p for each in pair])


@pytest.mark.parametrize("path", sorted(FINETUNE.glob("cifar10-*.yaml")), ids=lambda path: path.stem)
def test_recipes_of_fine_tuning_can_be_planned(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arms have their own rates, and one on the command line is that of all."""
    monkeypatch.chdir(FINETUNE.parents[1])
    asked = read_comparison(yaml.safe_load(path.read_text(encoding="utf-8")), source=path.name)
    for lr in (None, 5e-3):
        spec = ComparisonSpec(
            **{**asked, "run": asked["run"] | ({} if lr is None else {"lr": lr})}, output=str(tmp_path)
        )
        arms = read_arms(spec.arms, spec.run, spec.of_arms)
        runs = planned(spec, spec.models[0], arms)
        assert [arm.name for arm in arms] == ["standard", "last-block", "head-first", "finetune"]
        assert len({run.folder for run in runs}) == len(runs) == 4 * len(spec.seed_numbers)
        assert {run.spec.sched for run in runs} == {"cosine"}
        found = {run.arm: run.spec for run in runs}
        assert {name: each.schedule for name, each in found.items() if name != "standard"} == dict.fromkeys(
            ("last-block", "head-first", "finetune"), "finetune"
        )
        assert lr is None or {each.lr for each in found.values()} == {lr}
    assert f"`finetune/{path.name}`" in (FINETUNE.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["paper-cnn", "densenet"])
def test_recipes_of_the_factorial_are_half_of_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece is in four of eight arms of l2l, and each two of them in two."""
    monkeypatch.chdir(FINETUNE.parents[1])
    asked = read_comparison(yaml.safe_load(Path(f"recipes/factorial/{name}.yaml").read_text(encoding="utf-8")))
    spec = ComparisonSpec(**asked, output=str(tmp_path))
    runs = planned(spec, spec.models[0], read_arms(spec.arms, spec.run, spec.of_arms))
    assert len({run.folder for run in runs}) == len(runs) == 10 * 6
    found = {run.arm: run.spec for run in runs}
    pieces = {
        arm: (s.soft_fade > 0, s.anneal > 0, s.augment != "none", s.thaw_from is not None) for arm, s in found.items()
    }
    assert {pieces[arm] for arm in found if arm.startswith("l2l")} == {
        each for each in product((False, True), repeat=4) if sum(each) % 2 == 0
    }
    assert [pieces[arm] for arm in ("regularised", "regularised-fade-flip")] == [
        (False,) * 4,
        (True, False, True, False),
    ]
    for arm, each in found.items():
        assert each.schedule == ("settle-far" if arm.startswith("l2l") else "standard")
        assert each.sched == "cosine"
        names = zip(("fade", "anneal", "flip", "thaw"), pieces[arm], strict=True)
        assert all((piece in arm) == there for piece, there in names)


def test_runs_that_differ_by_more_than_the_seed_are_two_arms(tmp_path: Path, player: Player) -> None:
    compare(asked(tmp_path / "one", arms="l2l", seeds="2"), launch=player)
    compare(asked(tmp_path / "two", arms="l2l", seeds="2", run={**RUN, "lr": 0.1}), launch=player)
    folders = sorted(str(path.parent) for path in tmp_path.glob("*/runs/*/*/report.json"))
    (table,) = compare_folders(folders, asked(tmp_path / "again", models=())).tables
    assert [(arm.arm, len(arm.runs)) for arm in table.arms] == [("l2l@4", 2), ("l2l@4-2", 2)]
    assert table.unequal == ("lr: l2l@4 0.001; l2l@4-2 0.1",)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_of_the_papers_table_can_be_planned(path: Path, tmp_path: Path) -> None:
    found = read_comparison(yaml.safe_load(path.read_text(encoding="utf-8")), source=path.name)
    spec = ComparisonSpec(**found, output=str(tmp_path))
    arms = read_arms(spec.arms, spec.run, spec.of_arms)
    runs = [run for model in spec.models for run in planned(spec, model, arms)]
    assert len(runs) == len(spec.models) * len(arms) * len(spec.seed_numbers)
    assert len({run.folder for run in runs}) == len(runs)
    for run in runs:
        if "window" in run.arm:
            assert run.spec.schedule == "window"
            assert len(run.spec.at) >= 10
    assert f"`table1/{path.name}`" in (RECIPES.parent / "README.md").read_text(encoding="utf-8")
