"""The command line: what it accepts, what it calls, what it writes where, and with which exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main
import yaml

import fxsplit
from fxsplit.errors import CheckError, DataError, FxsplitError, PartitionError, Terminated, UsageError
from fxsplit.plan.forecast import PhaseForecast
from fxsplit.plan.planfile import PlanFile, write_file
from fxsplit.plan.schedule import Plan
from fxsplit.report import (
    CheckRecord,
    ForecastRecord,
    Inspection,
    Observer,
    PhaseCheck,
    PhaseMeasurement,
    RunReport,
)  # fmt: skip
from fxsplit.spec import RunSpec, read_recipe, read_values, resolve
from fxsplit_cli.main import app, main

TRAIN_OPTIONS = """
--aa --amp --amp-dtype --at --augment --balance --batch-size -b --by --channels-last --color-jitter --crop-pct --cutmix
--hflip --mixup --model-ema --model-ema-decay --model-ema-warmup --no-model-ema --no-model-ema-warmup
--ratio --reprob --scale --train-interpolation
--checkpoint-every --checkpoint-keep --clip-grad --config -c --cuda-graphs
--data
--cache --cache-dtype --cache-limit --cache-views
--decay-epochs --decay-milestones --decay-rate
--data-dir --deterministic --device --drop-path --dry-run --ensemble --epochs --epochs-total
--exit-weight --exits --experiment
--finetune --force --guard --layer-decay --no-ensemble --no-force --settle-front --shift --thaw-from
--grad-accum-steps
--img-size --initial-checkpoint --interpolation --json --l2l --log-interval --lr --max-bad-samples --mean --memory-aim
--memory-budget --min-lr --momentum --no-amp --no-channels-last
--no-deterministic --no-dry-run --no-pretrained --no-progress --no-prove --on-nan --opt --output -o --output-dir
--parallel --parts --pipeline-processes --pipeline-schedule --plan --preset --pretrained --print-config
--progress --prove --quiet -q
--resume --sched --schedule --seed --settled-dtype --settled-offload
--smoothing --std --stem
--anneal --average --no-recalibrate --no-settled-offload --no-sync-bn --no-veto --recalibrate --settle-from
--settle-share --settle-until --soft-fade --soft-from --soft-targets --soft-temperature --sync-bn --veto
--torchcompile --train-batches-per-epoch --train-limit --trust-code --trust-recipe
--verbose -v --warmup-epochs --wd --weight-decay
--workers -j
"""
INSPECT_OPTIONS = """
--bandwidth --device-memory --devices
--grad-accum-steps --memory-aim --memory-budget --no-settled-offload --preset --settled-offload
--settle-from --settle-share --settle-until
--at --balance --batch-size -b --by --channels-last --config -c --data --device --diff --drop-path --epochs
--epochs-total --finetune --format --img-size --json --l2l --measure --momentum --no-channels-last --opt --output -o
--parts --settle-front --shift --thaw-from --plan --save-plan --schedule --stem --trust-code --trust-recipe --verbose -v
"""

CHECK_OPTIONS = """
models --batch-size -b --channels-last --device --forecast --img-size --jobs -j --json --meta --parts --schedule
--trust-code --verbose -v
"""


class FakeApi(SimpleNamespace):
    """Stands for fxsplit.api: keeps the spec that it is called with and returns ready records."""

    spec: RunSpec
    measured: bool
    saved_to: str | None
    resumed: str | None
    trusted: bool
    checked: tuple[list[str], dict[str, object]]
    records: tuple[CheckRecord | ForecastRecord, ...]
    report: RunReport
    inspection: Inspection

    def train(self, spec: RunSpec, observer: Observer, *, resume: str | None, trust_code: bool) -> RunReport:
        self.spec, self.resumed, self.trusted = spec, resume, trust_code
        observer.notice("a notice")
        print("a library prints")
        return self.report

    def check(
        self, specs: list[str], *, observer: Observer, **options: object
    ) -> tuple[CheckRecord | ForecastRecord, ...]:
        self.checked = (specs, options)
        print("a library prints")
        for record in self.records:
            observer.model_checked(record, len(self.records))
        return self.records

    check_forecasts = check

    def inspect(
        self,
        spec: RunSpec,
        *,
        measured: bool,
        save_to: str | None,
        trust_code: bool,
        observer: Observer,
        **several: float | None,
    ) -> Inspection:
        self.several = several
        self.spec, self.measured, self.saved_to, self.trusted = spec, measured, save_to, trust_code
        observer.notice("a notice")
        print("a library prints")
        return self.inspection


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("FXSPLIT_"):
            monkeypatch.delenv(name)


@pytest.fixture
def api(report: RunReport, inspection: Inspection, monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    fake = FakeApi(report=report, inspection=inspection)
    monkeypatch.setitem(sys.modules, "fxsplit.api", fake)
    monkeypatch.setattr(fxsplit, "api", fake, raising=False)
    return fake


Failing = Callable[[BaseException], None]


@pytest.fixture
def failing(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> Failing:
    """Makes training end with an exception."""

    def fail(error: BaseException) -> None:
        def train(*_: object, **__: object) -> RunReport:
            raise error

        monkeypatch.setattr(api, "train", train)

    return fail


@pytest.mark.parametrize(("command", "options"), [("train", TRAIN_OPTIONS), ("inspect", INSPECT_OPTIONS)])
def test_options_are_frozen(command: str, options: str) -> None:
    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    found = [name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)]
    assert sorted(found) == sorted(["model", *options.split()])


def test_the_options_of_check_are_frozen() -> None:
    parameters = typer.main.get_command(app).commands["check"].params  # type: ignore[attr-defined]
    found = [name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)]
    assert sorted(found) == sorted(CHECK_OPTIONS.split())


GOOD = CheckRecord(model="timm:a", ops=10, opaque={"block": "it has hooks"}, cuts=9, partitions=4, batch_sizes=(2, 3))
WRONG = CheckRecord(
    model="timm:b", ops=10, partitions=4, batch_sizes=(2, 3), differences=("loss", "output 0", "x", "y")
)
REFUSED = CheckRecord(model="timm:[red]", refusal="it cannot be traced")


def test_check_calls_the_library_and_shows_a_row_for_each_model(
    api: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    api.records = (GOOD,)
    assert main(["check", "timm:a", "timm:b*", "--meta", "--parts", "3", "-j", "2", "--img-size", "64"]) == 0
    assert api.checked == (
        ["timm:a", "timm:b*"],
        {"structure_only": True, "parts": 3, "jobs": 2, "img_size": 64},
    )
    out, err = capsys.readouterr()
    assert re.search(r"timm:a +equal +10 +1 +0 +9 +4 ", out)
    assert "timm:a: kept whole: block, because it has hooks" in out
    assert "1 of 1 passed" in out
    assert "1/1 timm:a: equal, 0.0 s" in err


def test_a_failed_check_has_its_own_exit_code(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.records = (GOOD, WRONG, REFUSED)
    assert main(["check", "timm:*"]) == CheckError.exit_code == 4
    out, err = capsys.readouterr()
    assert "timm:b differs: loss; output 0; x; and 1 more" in out
    assert "timm:[red]: it cannot be traced" in out
    assert "fxsplit: 2 of 3 models failed: timm:b, timm:[red]" in err
    assert main(["check", "timm:*", "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    assert [record["verdict"] for record in found] == ["equal", "differs", "refused"]
    assert sorted(found[0]) == [
        "batch_sizes", "cuts", "differences", "eval_ops", "guards", "model", "opaque", "ops", "own_differences",
        "parameters", "partitions", "passed", "refusal", "seconds", "unknown", "verdict",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [CheckRecord, ForecastRecord])
def test_where_only_a_name_is_wrong_the_exit_code_says_so(
    kind: type[CheckRecord | ForecastRecord], api: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = kind(model="timm:nope", refusal="timm has no model 'nope'", unknown=True)
    arguments = ["check", "timm:a", "timm:nope", *(["--forecast"] if kind is ForecastRecord else [])]
    api.records = (kind(model="timm:a"), missing)
    assert main(arguments) == UsageError.exit_code == 2
    out, err = capsys.readouterr()
    assert "timm:nope: timm has no model 'nope'" in out
    assert "1 of 2 passed" in out
    assert err.endswith("fxsplit: timm has no model 'nope'\n")
    api.records = (kind(model="timm:a", refusal="it cannot be traced"), missing)
    assert main(arguments) == 4
    assert "2 of 2 models failed: timm:a, timm:nope" in capsys.readouterr().err


def phase_check(*, told: int) -> PhaseCheck:
    """A phase with a peak of 1,000,000 bytes, of which `told` were forecast."""
    ahead = PhaseForecast(
        step_cost=0.5, step_seconds=1.0, activation_bytes=500_000, parameter_bytes=1, buffer_bytes=1, gradient_bytes=1,
        optimizer_bytes=1, peak_bytes=told,
    )  # fmt: skip
    real = PhaseMeasurement(step_cost=0.8, step_seconds=2.0, activation_bytes=500_000, peak_bytes=1_000_000)
    return PhaseCheck(start=1, stop=4, forecast=ahead, measured=real)


@pytest.mark.parametrize(("told", "code"), [(901_000, 0), (1_099_000, 0), (899_000, 4), (1_101_000, 4)])
def test_a_forecast_may_miss_memory_by_a_tenth(
    told: int, code: int, api: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    api.records = (ForecastRecord(model="timm:a", batch_size=8, partitions=6, phases=(phase_check(told=told),)),)
    arguments = ["--forecast", "--schedule", "grow", "--parts", "6", "--batch-size", "8", "--device", "cpu"]
    assert main(["check", "timm:a", *arguments]) == code
    options = {"schedule": "grow", "parts": 6, "batch_size": 8, "device": "cpu"}
    assert api.checked == (["timm:a"], options)
    out, _ = capsys.readouterr()
    assert re.search(r"timm:a +2 to 4 of 6 +0.50 +0.80 +500.0 kB +500.0 kB ", out)
    assert "time         off by 37.5% (median), 37.5% (worst)" in out
    assert f"{1 - code // 4} of 1 passed" in out
    assert main(["check", "timm:a", "--forecast", "--json"]) == code
    assert json.loads(capsys.readouterr().out)[0]["phases"][0]["errors"]["peak_bytes"] == told / 1_000_000 - 1


@pytest.mark.usefixtures("api")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--forecast", "--meta"], "takes no --meta"),
        (["--forecast", "-j", "2"], "no --jobs"),
        (["--batch-size", "8"], "--batch-size says how a forecast is checked, and needs --forecast"),
    ],
)
def test_options_of_the_two_checks_are_kept_apart(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "timm:a", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_ops_are_measured_where_asked(api: FakeApi) -> None:
    assert main(["inspect", "paper:cnn"]) == 0
    assert not api.measured
    assert main(["inspect", "paper:cnn", "--measure"]) == 0
    assert api.measured
    assert api.several["devices"] is None
    assert main(["inspect", "paper:cnn", "--devices", "8", "--bandwidth", "2.5", "--device-memory", "80"]) == 0
    assert api.several == {"devices": 8, "bandwidth": 2.5e9, "device_bytes": 80e9}


def test_every_field_is_an_option(api: FakeApi) -> None:
    values = {
        bool: lambda old: not old,
        int: lambda old: 2 * old or 3,
        float: lambda old: (old + 0.5) / 2,
        str: lambda old: f"{old}x",
    }
    special = {
        "device": "cpu",
        "stem": "cifar",
        "augment": "resized-crop",
        "scale": "0.5,0.9",
        "ratio": "0.5,2",
        "train-interpolation": "random",
        "hflip": 0.25,
        "aa": "trivial",
        "preset": "l2l",
        "memory-aim": 0.5,
        "schedule": "finetune",
        "shift": "input",
        "settle-front": 0.4,
        "thaw-from": 0.9,
        "layer-decay": 0.75,
        "balance": "params",
        "by": "natural",
        "soft-from": "mean",
        "amp-dtype": "float16",
        "cuda-graphs": "on",
        "checkpoint-every": "500s",
        "on-nan": "skip",
        "mean": "0.5,0.25,0.125",
        "std": "1,2,3",
        "at": "layer1,layer2.0",
        "img-size": 64,
        "interpolation": "bicubic",
        "train-limit": 100,
        "train-batches-per-epoch": 3,
        "epochs-total": 30,
        "settled-dtype": "bfloat16",
        "cache": "ram",
        "cache-limit": 0.5,
        "cache-views": 3,
        "cache-dtype": "float16",
        "clip-grad": 1.5,
        "memory-budget": 0.5,
        "settle-from": 0.2,
        "settle-until": 0.6,
        "settle-share": 0.7,
        "decay-epochs": 2.5,
        "decay-milestones": "3,7.5",
        "torchcompile": "inductor",
        "experiment": "mine",
    }
    # They contradict others.
    left_out = (
        *("initial-checkpoint", "parts", "plan", "veto", "color-jitter", "mixup", "cutmix", "model-ema"),
        *("parallel", "pipeline-schedule", "pipeline-processes", "sync-bn", "settled-offload"),
    )
    plain = RunSpec(model="paper:cnn").to_flat()
    changed = {
        key: special[key] if key in special else values[type(value)](value)
        for key, value in plain.items()
        if key not in ("model", *left_out)
    }
    flags = {True: "--{}", False: "--no-{}"}
    arguments = [
        flags[value].format(key) if isinstance(value, bool) else f"--{key}={value}" for key, value in changed.items()
    ]
    assert main(["train", "paper:vgg16", *arguments]) == 0
    assert api.spec == resolve(read_values({"model": "paper:vgg16", **changed}, source="test"))
    assert all(api.spec.to_flat()[key] != value for key, value in plain.items() if key not in left_out)
    assert main(["train", "paper:cnn", "--veto"]) == 0
    assert api.spec == RunSpec(model="paper:cnn", veto=True)
    assert main(["train", "paper:cnn", "--parallel=fsdp", "--sync-bn"]) == 0
    assert api.spec == RunSpec(model="paper:cnn", parallel="fsdp", sync_bn=True)
    assert main(["train", "paper:cnn", "--color-jitter=0.4", "--mixup=0.2", "--cutmix=1", "--model-ema"]) == 0
    assert api.spec == RunSpec(model="paper:cnn", color_jitter=0.4, mixup=0.2, cutmix=1, model_ema=True)


def test_train_calls_the_library_with_defaults(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "paper:cnn"]) == 0
    assert api.spec == RunSpec(model="paper:cnn")
    out, err = capsys.readouterr()
    assert "test accuracy" in out
    assert err == "a notice\na library prints\n"


def test_command_line_wins_over_environment_over_recipe(
    api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: paper:cnn\nlr: 0.1\nepochs: 3\nbatch-size: 16\namp: true\n")
    monkeypatch.setenv("FXSPLIT_LR", "0.2")
    monkeypatch.setenv("FXSPLIT_EPOCHS", "4")
    assert main(["train", "-c", str(recipe), "--lr", "0.3", "--no-amp"]) == 0
    assert api.spec == RunSpec(model="paper:cnn", lr=0.3, epochs=4, batch_size=16, amp=False)


def test_l2l_is_a_preset(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "paper:cnn", "--l2l", "--wd", "0.5", "-b", "4", "-o", "runs"]) == 0
    assert api.spec == RunSpec(model="paper:cnn", preset="l2l", weight_decay=0.5, batch_size=4, output="runs")
    assert main(["inspect", "paper:cnn", "--l2l", "--preset", "l2l", "--schedule", "grow"]) == 0
    assert api.spec == RunSpec(model="paper:cnn", preset="l2l", schedule="grow")
    assert main(["inspect", "paper:cnn", "--l2l", "--preset", "none"]) == 2
    assert "--l2l means --preset l2l and contradicts --preset none" in capsys.readouterr().err
    assert main(["inspect", "paper:cnn", "--schedule", "l2l"]) == 2
    assert "l2l is a preset: ask for it as such, by --l2l or" in capsys.readouterr().err


def test_a_plan_file_names_its_preset_and_the_command_line_wins(api: FakeApi, plan: Plan, tmp_path: Path) -> None:
    path = str(tmp_path / "plan.json")
    write_file(PlanFile.of(replace(plan, preset="l2l")), path)
    given = ["train", "paper:cnn", "--plan", path]
    assert main(given) == 0
    assert api.spec == RunSpec(model="paper:cnn", plan=path, preset="l2l", epochs=6)
    assert (api.spec.smoothing, api.spec.memory_aim, api.spec.schedule) == (0.1, None, "standard")
    assert main([*given, "--epochs", "40"]) == 0
    assert (api.spec.soft_targets, api.spec.epochs) == (0.8, 40)
    assert main([*given, "--preset", "none"]) == 0
    assert api.spec == RunSpec(model="paper:cnn", plan=path, preset="none", epochs=6)
    assert api.spec.smoothing == 0
    write_file(PlanFile.of(plan), path)
    assert main(given) == 0
    assert (api.spec.preset, api.spec.smoothing) == ("none", 0)
    assert main([*given, "--l2l", "--average", "0.5"]) == 0
    assert (api.spec.preset, api.spec.smoothing, api.spec.average) == ("l2l", 0.1, 0.5)


def run_in(folder: Path, **given: Any) -> Path:
    """The folder of a run that was killed."""
    folder.mkdir(parents=True)
    text = RunSpec(**{"model": "paper:cnn", "preset": "l2l", "epochs": 20, **given}).to_yaml()
    (folder / "args.yaml").write_text(text, encoding="utf-8")
    return folder


def test_a_run_goes_on_without_other_options(api: FakeApi, tmp_path: Path) -> None:
    folder = run_in(tmp_path / "mine")
    (folder / "checkpoints").mkdir()
    checkpoint = folder / "checkpoints" / "epoch-000003-step-00000000.safetensors"
    checkpoint.touch()
    for path in (folder, checkpoint):
        assert main(["train", "--resume", str(path)]) == 0
        assert (api.spec, api.resumed) == (RunSpec(model="paper:cnn", preset="l2l", epochs=20), str(path))
    assert main(["train", "--resume", str(folder), "paper:cnn", "--l2l", "--epochs", "30", "-j", "3"]) == 0
    assert (api.spec.epochs, api.spec.workers, api.spec.average) == (30, 3, 0.25)


def test_what_cannot_change_is_refused_without_loading_torch(
    api: FakeApi, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_in(tmp_path / "mine")
    assert main(["train", "--resume", str(folder), "--batch-size", "32", "--lr", "0.5"]) == 2
    assert capsys.readouterr().err == (
        "fxsplit: batch-size was 64 and is now 32, lr was 0.001 and is now 0.5: a run goes on as it began; leave them "
        "out, or begin another run without --resume\n"
    )
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "there is no run to go on with at" in capsys.readouterr().err
    assert not hasattr(api, "spec")


def test_auto_is_the_newest_run_that_can_go_on_or_a_new_one(api: FakeApi, tmp_path: Path) -> None:
    asked = ["train", "paper:cnn", "--output", str(tmp_path), "--resume", "auto"]
    assert main(asked) == 0
    assert (api.spec, api.resumed) == (RunSpec(model="paper:cnn", output=str(tmp_path)), None)
    plain = {"preset": "none", "output": str(tmp_path)}
    for age, (name, given) in enumerate(
        {"other": {"lr": 0.5}, "new": {}, "old": {}, "vgg": {"model": "paper:vgg16"}}.items()
    ):
        folder = run_in(tmp_path / name, **{**plain, **given})
        os.utime(folder / "args.yaml", (1e9 - age, 1e9 - age))
    # The options of a run are those that it began with, unless they are given now.
    assert main([*asked, "--lr", "0.001"]) == 0
    assert (api.resumed, api.spec.epochs) == (str(tmp_path / "new"), 20)
    assert main(["train", "--output", str(tmp_path), "--resume", "auto", "--lr", "0.5"]) == 0
    assert api.resumed == str(tmp_path / "other")
    (tmp_path / "old" / "checkpoints").mkdir()
    (tmp_path / "old" / "checkpoints" / "epoch-000001-step-00000000.safetensors").touch()
    assert main([*asked, "--lr", "0.001"]) == 0
    assert api.resumed == str(tmp_path / "old")
    # A run is as old as the newest of its checkpoints.
    (tmp_path / "new" / "checkpoints").mkdir()
    for folder, epoch, seconds in (("old", 1, 2e9), ("new", 1, 1e9), ("new", 2, 3e9)):
        checkpoint = tmp_path / folder / "checkpoints" / f"epoch-{epoch:06}-step-00000000.safetensors"
        checkpoint.touch()
        os.utime(checkpoint, (seconds, seconds))
    assert main([*asked, "--lr", "0.001"]) == 0
    assert api.resumed == str(tmp_path / "new")
    assert main([*asked, "--experiment", "vgg"]) == 2
    assert main([*asked, "--experiment", "mine", "--seed", "3"]) == 0
    assert (api.resumed, api.spec.seed, api.spec.experiment) == (None, 3, "mine")


def test_print_config_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "paper:cnn", "--at", "3,6", "--lr", "1e-5", "--print-config"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    path = tmp_path / "printed.yaml"
    path.write_text(out)
    assert resolve(read_recipe(path)) == RunSpec(model="paper:cnn", at=("3", "6"), lr=1e-5)
    assert tuple(yaml.safe_load(out)) == RunSpec.keys()


@pytest.mark.parametrize("flag", ["--json", "--quiet"])
def test_quiet_and_json_keep_stdout_for_the_result(api: FakeApi, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "paper:cnn", flag]) == 0
    out, err = capsys.readouterr()
    assert "a library prints" not in out
    assert ("a notice" in err) is (flag == "--json")
    if flag == "--json":
        assert json.loads(out) == json.loads(json.dumps(api.report.to_dict()))


def test_inspect(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "paper:cnn", "--parts", "3", "--json"]) == 0
    assert api.spec == RunSpec(model="paper:cnn", parts=3)
    out, err = capsys.readouterr()
    assert json.loads(out)["totals"]["ops"] == 6
    assert err == "a notice\na library prints\n"
    assert main(["inspect", "paper:cnn", "--format", "json"]) == 0
    assert capsys.readouterr().out == out
    assert main(["inspect", "paper:cnn"]) == 0
    assert api.saved_to is None
    assert "kept whole: block.norm" in capsys.readouterr().out


def test_a_plan_is_saved_where_asked(
    api: FakeApi, plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = str(tmp_path / "old.json")
    write_file(PlanFile.of(plan), old)
    assert main(["inspect", "paper:cnn", "--plan", old, "--save-plan", "new.json", "--json"]) == 0
    assert (api.spec, api.saved_to) == (RunSpec(model="paper:cnn", plan=old), "new.json")
    assert capsys.readouterr().err == "a notice\na library prints\nplan file: new.json\n"


def test_two_plan_files_are_compared(tmp_path: Path, plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = str(tmp_path / "old.json"), str(tmp_path / "new.json")
    write_file(PlanFile.of(plan, model="paper:cnn", graph="0", torch="2"), old)
    longer = replace(plan, phases=(*plan.phases[:2], replace(plan.phases[2], epochs=9)))
    write_file(PlanFile.of(longer, model="paper:cnn", graph="0", torch="2"), new)
    assert main(["inspect", "--diff", old, new, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"what": "phase 3", "before": "all, 2 epochs", "after": "all, 9 epochs"},
        {"what": "epochs", "before": 6, "after": 13},
    ]
    assert main(["inspect", "--diff", old, new]) == 0
    assert re.search(r"\nepochs +6 +13\n", re.sub(" +\n", "\n", capsys.readouterr().out))
    assert main(["inspect", "--diff", old, "none.json"]) == 2
    assert "the plan 'none.json' cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["train"],
            "fxsplit: no model is given; name one here or in a recipe, as timm:NAME, torchvision:NAME, hf:NAME, ",
        ),
        (["train", "paper:cnn", "--epoch", "3"], "fxsplit: No such option: --epoch"),
        (["train", "paper:cnn", "--epochs", "ten"], "fxsplit: epochs is 'ten', but must be a whole number"),
        (["train", "paper:cnn", "--epochs", "0"], "fxsplit: epochs is 0, but must be"),
        (["train", "paper:cnn", "--schedule", "windw"], "did you mean 'window'?"),
        (
            ["train", "paper:cnn", "--mean", "a"],
            "fxsplit: mean is 'a', but must be numbers",
        ),
        (["train", "paper:cnn", "-c", "none.yaml"], "fxsplit: the recipe 'none.yaml' cannot be read"),
        (
            ["train", "paper:cnn", "--plan", "{plan}", "--schedule", "grow", "--parts", "3"],
            "fxsplit: the plan file says itself where to cut and what trains when, so leave out schedule, parts, or "
            "the plan",
        ),
        # A default that is asked for contradicts a plan too.
        (["train", "paper:cnn", "--plan", "{plan}", "--balance", "macs"], "so leave out balance, or the plan"),
        (["train", "paper:cnn", "--plan", "none.json"], "fxsplit: the plan 'none.json' cannot be read: No such file"),
        (["inspect", "--diff", "a", "b", "paper:cnn", "--l2l", "--parts", "3"], "takes no model, l2l, parts beside"),
        (
            ["inspect", "m", "--format", "cvs"],
            "there is no format 'cvs'; did you mean 'csv'? (have: table, tree, json,",
        ),
        (["inspect", "m", "--format", "csv", "--json"], "--json means --format json and contradicts --format csv"),
        (["inspect", "--diff", "a", "b", "--format", "md", "-o", "c"], "takes no format, output beside"),
        (["inspect", "--diff", "a"], "fxsplit: Option '--diff' requires 2 arguments."),
        (["trian", "paper:cnn"], "fxsplit: No such command 'trian'."),
    ],
)
def test_bad_usage_is_one_sentence(
    arguments: list[str], sentence: str, plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "plan.json")
    write_file(PlanFile.of(plan), path)
    assert main([path if word == "{plan}" else word for word in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1


def test_misspelt_recipe_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: paper:cnn\nepoch: 3\n")
    assert main(["train", "-c", str(recipe)]) == 2
    assert "the key 'epoch' is not known; did you mean 'epochs'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (FxsplitError("it broke"), 1, "fxsplit: it broke"),
        (UsageError("no [such] model"), 2, "fxsplit: no [such] model"),
        (PartitionError("no cut"), 3, "fxsplit: no cut"),
        (DataError("no network"), 1, "fxsplit: no network"),
        (CheckError("not equal"), 4, "fxsplit: not equal"),
        (KeyboardInterrupt(), 130, "fxsplit: interrupted"),
        (Terminated(), 143, "fxsplit: terminated"),
        (Terminated("go on with: x"), 143, "fxsplit: terminated; go on with: x"),
        (MemoryError(), 1, "fxsplit: out of memory; use a smaller --batch-size"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), 1, "fxsplit: out of memory"),
        (RuntimeError("can't allocate memory: you tried to allocate 9 bytes"), 1, "fxsplit: out of memory"),
        (
            ValueError("two\nlines"),
            1,
            "fxsplit: unexpected ValueError: two lines; run with -v for the traceback",
        ),
    ],
)
def test_errors_are_one_sentence_and_a_code(
    failing: Failing, error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(error)
    assert main(["train", "paper:cnn"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_verbose_shows_the_traceback_of_unexpected_errors_only(
    failing: Failing, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(ValueError("strange"))
    assert main(["train", "paper:cnn", "-v"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("fxsplit: unexpected ValueError: strange\n")
    failing(DataError("no network"))
    assert main(["train", "paper:cnn", "-v"]) == 1
    assert capsys.readouterr().err == "fxsplit: no network\n"


def test_sigterm_ends_training(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []

    def train(spec: RunSpec, _: Observer, *, resume: str | None, trust_code: bool) -> RunReport:
        assert resume is None
        assert not trust_code
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except KeyboardInterrupt:
            saved.append(spec)
            raise
        raise AssertionError("the signal was lost")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(api, "train", train)
    assert main(["train", "paper:cnn"]) == 143
    assert saved == [RunSpec(model="paper:cnn")]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["--version"], 0),
        ([], 2),
        (["train", "paper:cnn", "--epoch"], 2),
        (["train", "paper:cnn", "--print-config"], 0),
        (["inspect", "--diff", "none", "none"], 2),
    ],
)
def test_starts_without_torch(arguments: list[str], code: int) -> None:
    script = (
        "import sys; from fxsplit_cli.main import main; code = main(sys.argv[1:]);"
        "print(*{'torch', 'timm', 'torchvision'} & set(sys.modules), file=sys.stderr); sys.exit(code)"
    )
    ended = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert ended.returncode == code
    assert ended.stderr.splitlines()[-1] == ""


def test_paragraphs_of_help_fill_their_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["check", "--help"]) == 0
    out = capsys.readouterr().out
    (paragraph,) = [line for line in out.splitlines() if "Output, loss, gradients" in line]
    assert paragraph.strip().endswith("2 if all that is wrong is a name.")
    schedules = ", ".join(RunSpec.__dataclass_fields__["schedule"].metadata["choices"])
    assert f"[{schedules}; default: settle]" in out


def test_runs_as_a_module() -> None:
    ended = subprocess.run([sys.executable, "-m", "fxsplit", "--version"], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("fxsplit 0.")


def test_a_closed_pipe_is_quiet() -> None:
    command = [sys.executable, "-m", "fxsplit", "train", "paper:cnn", "--print-config"]
    # An unbuffered stdout would fail while it is written, not when it is flushed at the end.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


@pytest.mark.parametrize("option", ["--bandwidth", "--device-memory"])
def test_what_is_about_several_devices_is_refused_without_them(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "paper:cnn", option, "5"]) == 2
    assert capsys.readouterr().err == f"fxsplit: {option} is given, but no --devices, which it is about\n"
