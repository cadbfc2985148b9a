"""A RunSpec cannot hold a bad value, and everything that makes one is read strictly."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fxsplit.errors import UsageError
from fxsplit.graph import Graph
from fxsplit.options import key
from fxsplit.plan.partition import partition
from fxsplit.plan.planfile import PlanFile, write_file
from fxsplit.plan.schedule import Phase, Plan
from fxsplit.presets import PRESETS, preset
from fxsplit.spec import PLANNED, RunSpec, read_environment, read_recipe, read_values, resolve
from tests.pairs import both

# Text that can be written, and names no home folder.
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0~"), min_size=1)
names = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/\\."), min_size=1, max_size=100)
whole = st.integers(min_value=1, max_value=10**6)
small = st.integers(min_value=1, max_value=1000)
finite = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)
below_one = st.floats(min_value=0, max_value=1, exclude_max=True)
maybe = st.none()

STRATEGIES: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("model", "data", "data_dir", "opt", "sched", "output"), words),
    "torchcompile": maybe | words,
    "experiment": maybe | names,
    **dict.fromkeys(("epochs", "log_interval"), whole),
    **dict.fromkeys(("train_limit", "train_batches_per_epoch", "epochs_total"), maybe | whole),
    "img_size": maybe | small.map(lambda side: side + 1),
    **dict.fromkeys(("warmup_epochs", "exits", "max_bad_samples"), whole | st.just(0)),
    "workers": small,
    **dict.fromkeys(("weight_decay", "min_lr", "exit_weight"), finite),
    **dict.fromkeys(("mixup", "cutmix"), st.floats(min_value=0, max_value=1e6)),
    **dict.fromkeys(("momentum", "smoothing", "drop_path", "soft_targets", "average", "anneal"), below_one),
    **dict.fromkeys(("settle_from", "settle_until", "settle_share", "settle_front"), maybe),
    **dict.fromkeys(("color_jitter", "reprob", "model_ema_decay"), below_one),
    "crop_pct": st.just(0.875),
    "hflip": maybe | below_one,
    "aa": maybe | st.sampled_from(["rand-m9-mstd0.5-inc1", "trivial", "original"]),
    **dict.fromkeys(
        ("pretrained", "amp", "channels_last", "deterministic", "dry_run", "prove", "recalibrate", "veto", "sync_bn"),
        st.booleans(),
    ),
    **dict.fromkeys(("model_ema", "model_ema_warmup"), st.booleans()),
    **dict.fromkeys(("scale", "ratio"), st.just(())),
    **dict.fromkeys(("lr", "decay_rate", "soft_temperature"), positive),
    **dict.fromkeys(("clip_grad", "decay_epochs", "cache_limit", "memory_aim"), maybe | positive),
    "memory_budget": maybe | positive | st.just("auto"),
    "decay_milestones": st.lists(positive).map(tuple),
    "seed": st.integers(min_value=0, max_value=2**32 - 1),
    "device": st.sampled_from(["auto", "cpu", "cuda", "cuda:3"]),
    "batch_size": whole,
    "grad_accum_steps": st.just(1),
    "cache_views": maybe,
    "mean": st.just(()),
    "std": st.just(()),
    "parts": maybe,
    "plan": maybe,
    "layer_decay": maybe,
    "at": st.lists(words).map(tuple),
    **{item.name: st.sampled_from(item.metadata["choices"]) for item in fields(RunSpec) if item.metadata["choices"]},
    "shift": st.just("none"),
    "force": st.just(True),
    "train_interpolation": maybe,
}
channels = st.integers(0, 2).flatmap(
    lambda n: st.fixed_dictionaries(
        {
            "mean": st.lists(finite, min_size=(0, 1, 3)[n], max_size=(0, 1, 3)[n]),
            "std": st.lists(positive, min_size=(0, 1, 3)[n], max_size=(0, 1, 3)[n]),
        }
    )
)
unchanged = {"augment": "none", "hflip": None, "aa": None, "color_jitter": 0.0, "reprob": 0.0}
unmixed, one_policy = {"mixup": 0.0, "cutmix": 0.0}, {"color_jitter": 0.0}
batches = st.tuples(small, small).map(lambda n: {"batch_size": n[0] * n[1], "grad_accum_steps": n[0]})
changed_at_random = st.one_of(
    st.just({**unchanged, **unmixed}),
    st.fixed_dictionaries(
        {"cache": st.sampled_from(("off", "auto")), "cache_views": st.none(), "augment": st.just("resized-crop")}
    ).map(lambda given: {**given, **one_policy, "soft_targets": 0.0, "scale": (0.5, 1.0), "ratio": (0.75, 1.5)}),
    st.fixed_dictionaries({"cache_views": whole.map(lambda count: 2 * count)}).map(
        lambda given: {**given, **unmixed, **one_policy, "hflip": None}
    ),
)
ends = st.one_of(st.fixed_dictionaries({"veto": st.just(False)}), st.fixed_dictionaries({"anneal": st.just(0.0)}))
means = st.one_of(
    st.fixed_dictionaries({"model_ema": st.just(False)}), st.fixed_dictionaries({"average": st.just(0.0)})
)
together = st.one_of(
    st.fixed_dictionaries({"parallel": st.just("ddp"), "sync_bn": st.just(False)}),
    st.fixed_dictionaries(
        {
            "parallel": st.sampled_from(("ddp", "fsdp")),
            "torchcompile": st.none(),
            "amp": st.booleans(),
            "amp_dtype": st.just("bfloat16"),
        }
    ),
    st.fixed_dictionaries(
        {
            "parallel": st.sampled_from(("pipeline", "ddp,pipeline")),
            "torchcompile": st.none(),
            "amp_dtype": st.just("bfloat16"),
        }
    ).map(lambda given: {**given, "exits": 0, "sync_bn": False}),
)
cuts = st.one_of(
    st.fixed_dictionaries({"parts": small}),
    st.fixed_dictionaries({"at": st.lists(words)}),
    st.fixed_dictionaries({"plan": words, "epochs": whole}),
)
specs = st.builds(
    lambda *layers: resolve(*layers),
    st.fixed_dictionaries(STRATEGIES),
    channels,
    batches,
    changed_at_random,
    ends,
    means,
    together,
    cuts,
)


@given(specs)
def test_reads_back_what_it_writes(spec: RunSpec) -> None:
    flat = yaml.safe_load(spec.to_yaml())
    assert flat == spec.to_flat()
    assert tuple(flat) == RunSpec.keys()
    assert resolve(read_values(flat, source="text")) == spec


def test_recipe_file_reads_back(tmp_path: Path) -> None:
    spec = RunSpec(model="paper:cnn", lr=1e-5, at=("3", "layer.1"), mean=(0.5,), std=(0.25,), experiment="123")
    path = tmp_path / "args.yaml"
    path.write_text(spec.to_yaml())
    assert resolve(read_recipe(path)) == spec


def test_every_field_has_a_key_and_help() -> None:
    assert RunSpec.keys() == tuple(item.name.replace("_", "-") for item in fields(RunSpec))
    assert all(item.metadata["help"].endswith(".") and item.metadata["group"] for item in fields(RunSpec))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"model": ""}, "model is '', but must be timm:NAME, torchvision:NAME, "),
        ({"epochs": 0}, "epochs is 0, but must be a whole number at least 1"),
        ({"epochs": "ten"}, "epochs is 'ten', but must be a whole number at least 1"),
        ({"epochs": True}, "epochs is True, but must be a whole number at least 1"),
        ({"epochs": 10.0}, "epochs is 10.0, but must be a whole number at least 1"),
        ({"epochs": None}, "epochs is None, but must be a whole number at least 1"),
        ({"batch_size": 0}, "batch-size is 0, but must be a whole number at least 1"),
        ({"lr": 0}, "lr is 0, but must be a number above 0"),
        ({"lr": float("nan")}, "lr is nan, but must be a number above 0"),
        ({"lr": float("inf")}, "lr is inf, but must be a number above 0"),
        ({"lr": "fast"}, "lr is 'fast', but must be a number above 0"),
        ({"smoothing": 1.0}, "smoothing is 1.0, but must be a number at least 0 and below 1"),
        ({"momentum": -0.1}, "momentum is -0.1, but must be a number at least 0 and below 1"),
        ({"parts": 0}, "parts is 0, but must be a whole number at least 1"),
        ({"seed": 2**32}, "seed is 4294967296, but must be a whole number at least 0 and below 4294967296"),
        ({"amp": 1}, "amp is 1, but must be true or false"),
        ({"data": 10}, "data is 10, but must be text"),
        ({"data": "a\0"}, r"data is 'a\x00', which holds a character that no path and no file can have"),
        ({"at": ("a", "b\0")}, r"at is ('a', 'b\x00'), which holds a character that no path"),
        ({"checkpoint_every": "0s"}, "checkpoint-every is '0s', but must be N (epochs), Ns (steps) or off"),
        ({"checkpoint_every": True}, "checkpoint-every is True, but must be N (epochs), Ns (steps) or off"),
        ({"device": "cude"}, "device is 'cude', but must be auto, cpu, cuda or cuda:N"),
        (
            {"schedule": "setle"},
            "schedule is 'setle', but must be one of standard, window, grow, settle, settle-far, finetune; did you",
        ),
        ({"at": ["layer1", ""]}, "at is ['layer1', ''], but must be module paths"),
        ({"std": [1, 0, 1], "mean": [0, 0, 0]}, "std is [1, 0, 1], but must be numbers above 0"),
        (
            {"mean": [0.5, 0.5], "std": [1, 1]},
            "mean has length 2 and std has length 2, but both must have 1, 3 or no numbers",
        ),
        (
            {"mean": [0.5]},
            "mean has length 1 and std has length 0, but both must have 1, 3 or no numbers",
        ),
        (
            {"cache": "ram", "augment": "crop-flip"},
            "cache is 'ram' and augment is 'crop-flip', but of images that are changed at random only a fixed",
        ),
        ({"cache": "ram", "aa": "trivial"}, "cache is 'ram' and aa is 'trivial', but of images that are changed at"),
        (
            {"scale": [0.1, 1], "train_interpolation": "random"},
            "scale, train-interpolation can be given only with augment resized-crop, and augment is 'none'",
        ),
        (
            {"augment": "resized-crop", "scale": [0.5], "ratio": [2, 1]},
            "scale is 0.5, but must be two numbers, the smaller first; ratio is 2.0,1.0, but must be two",
        ),
        ({"scale": [0, 1]}, "scale is [0, 1], but must be numbers above 0 and at most 1"),
        ({"augment": "flip-alternate", "hflip": 0.5}, "hflip is 0.5 and augment is 'flip-alternate', which mirrors by"),
        (
            {"augment": "flip-alternate", "cache_views": 3},
            "cache-views is 3, but must be even where images are mirrored",
        ),
        ({"aa": "rand", "color_jitter": 0.4}, "aa is 'rand' and color-jitter is 0.4, but only one can change colours"),
        ({"aa": "rant-m9"}, "aa is 'rant-m9', but must be Policy that changes colours and shapes"),
        (
            {"mixup": 0.2, "cache": "disk"},
            "mixup is 0.2 and cache or cache-views are given, but rows are kept of single",
        ),
        ({"cutmix": 1, "cache_views": 2}, "cutmix is 1.0 and cache or cache-views are given, but rows are kept"),
        ({"cutmix": 1, "soft_targets": 0.5}, "cutmix is 1.0 and soft-targets is 0.5, but earlier outputs for an image"),
        (
            {"model_ema": True, "average": 0.5},
            "average is 0.5 and model-ema is true, but a partition ends with one mean",
        ),
        (
            {"batch_size": 32, "grad_accum_steps": 5},
            "grad-accum-steps is 5, but must divide batch-size 32",
        ),
        (
            {"plan": "plan.json", "preset": "none", "epochs": 3, "schedule": "grow", "parts": 3},
            "the plan file says itself where to cut and what trains when, so leave out schedule, parts, or the plan",
        ),
        ({"plan": "none.json"}, "the plan 'none.json' cannot be read: No such file"),
        ({"preset": "l3l"}, "preset is 'l3l', but must be one of none, l2l, finetune; did you mean 'l2l'?"),
        (
            {"epochs": 10**13},
            f"epochs is {10**13}, but must be a whole number at least 1 and at most {10**6}",
        ),
        (
            {"log_interval": 10**13},
            f"log-interval is {10**13}, but must be a whole number at least 1; the greatest number is {10**12}",
        ),
        ({"preset": ["l2l"]}, "preset is ['l2l'], but must be one of none, l2l"),
        ({"preset": "l2l", "epochs": "ten"}, "epochs is 'ten', but must be a whole number at least 1"),
        (
            {"schedule": "l2l"},
            "schedule is 'l2l', but must be one of standard, window, grow, settle, settle-far, finetune; l2l is a "
            "preset: ask for it as such, by --l2l or preset=l2l; its phases alone are settle-far",
        ),
        (
            {"parallel": "fsdp", "torchcompile": "inductor"},
            "parallel is 'fsdp' and torchcompile is 'inductor', but compiled stages cannot wait for the weights",
        ),
        ({"parallel": "fsdp", "amp": True, "amp_dtype": "float16"}, "parallel is 'fsdp' and amp-dtype is 'float16'"),
        (
            {"settled_offload": True, "torchcompile": "inductor"},
            "settled-offload is true and torchcompile is 'inductor', but compiled stages keep the weights",
        ),
        ({"sync_bn": True, "torchcompile": "inductor"}, "sync-bn is true and torchcompile is 'inductor', but compiled"),
        (
            {"parallel": "pipelines"},
            "parallel is 'pipelines', but must be one of ddp, fsdp, pipeline, ddp,pipeline; did",
        ),
        ({"pipeline_schedule": "1F1B"}, "pipeline-schedule is '1F1B', but must be one of gpipe, 1f1b, interleaved"),
        *(
            ({"parallel": "pipeline", **asked}, f"parallel is 'pipeline', which takes no {named}: ")
            for named, asked in {
                "exits": {"exits": 1},
                "sync-bn": {"sync_bn": True},
                "torchcompile": {"torchcompile": "inductor"},
            }.items()
        ),
        (
            {"parallel": "ddp,pipeline", "sync_bn": True},
            "parallel is 'ddp,pipeline', which takes no sync-bn: pipelines run their micro-batches at other times, and",
        ),
        ({"parallel": "pipeline", "amp": True, "amp_dtype": "float16"}, "parallel is 'pipeline' and amp-dtype is 'flo"),
        ({"veto": True, "anneal": 0.2}, "anneal is 0.2 and veto is true, but a partition that settles later"),
        ({"shift": "input"}, "shift can be given only with schedule finetune, and schedule is 'standard'"),
        ({"interpolation": "cubic"}, "interpolation is 'cubic', but must be one of bilinear, bicubic; did you mean"),
        ({"initial_checkpoint": 3}, "initial-checkpoint is 3, but must be text"),
        (
            {"pretrained": True, "initial_checkpoint": "a.pth"},
            "pretrained is true and initial-checkpoint is given, but a run starts from one of the two",
        ),
        ({"parts": 3, "at": ["a", "b"]}, "parts is 3 and at is 'a,b', but only one can say where to cut"),
    ],
)
def test_refuses_bad_values(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        RunSpec(**{"model": "paper:cnn", **values})
    assert str(caught.value).startswith(sentence)
    assert str(caught.value).count(" is ") + str(caught.value).count(" has ") <= 2


def test_tells_all_that_is_wrong_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        RunSpec(epochs=0, batch_size=0, grad_accum_steps=3, mean=(0.5,), parts=2, at=("a",))
    subjects = [sentence.split()[0] for sentence in str(caught.value).split("; ")]
    assert subjects == ["model", "batch-size", "epochs", "parts", "mean"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("lr: 1e-3", {"lr": 0.001}),
        ("lr: 1", {"lr": 1.0}),
        ("batch-size: 64\ntrain_limit: 100", {"batch_size": 64, "train_limit": 100}),
        ("at: [layer2, layer3.0]", {"at": ("layer2", "layer3.0")}),
        ("at: layer2, layer3.0", {"at": ("layer2", "layer3.0")}),
        ("at: [3, 6]", {"at": ("3", "6")}),
        ("at: 3", {"at": ("3",)}),
        ("mean: 0.5,0.25,1e-1", {"mean": (0.5, 0.25, 0.1)}),
        ("std: 1", {"std": (1.0,)}),
        ("train-limit: null", {"train_limit": None}),
        ("checkpoint-every: 5", {"checkpoint_every": "5"}),
        ("checkpoint-every: 5s", {"checkpoint_every": "5s"}),
        ("checkpoint-every: off\ncache: off", {"checkpoint_every": "off", "cache": "off"}),
        ("cuda-graphs: on", {"cuda_graphs": "on"}),
    ],
)
def test_recipe_values(tmp_path: Path, text: str, values: dict[str, Any]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    read = read_recipe(path)
    assert read == values
    assert {name: type(value) for name, value in read.items()} == {n: type(v) for n, v in values.items()}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("epoch: 3", "the key 'epoch' is not known; did you mean 'epochs'"),
        ("batch_sise: 3", "the key 'batch_sise' is not known; did you mean 'batch-size'"),
        ("batch-size: 3\nbatch_size: 4", "batch-size is given twice"),
        (
            "epochs: ten\namp: 1",
            "epochs is 'ten', but must be a whole number at least 1 and at most 1000000; amp is 1, but must be ",
        ),
        ("at: 1.10", "at is 1.1, but must be module paths"),
        ("data: null", "data is None, but must be text"),
        ("- lr: 1", "must be a mapping"),
        ("", "must be a mapping"),
        ("lr: [1\nepochs: 3", "is not valid YAML near line 2"),
    ],
)
def test_refuses_bad_recipes(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_recipe(path)
    assert f"the recipe {str(path)!r}" in str(caught.value)
    assert sentence in str(caught.value)


def test_refuses_unreadable_recipes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "image.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UsageError, match="is no text in UTF-8"):
        read_recipe(tmp_path / "image.yaml")


def test_environment() -> None:
    read = read_environment(
        {
            "PATH": "/bin",
            "FXSPLIT_LR": "1e-1",
            "FXSPLIT_EPOCHS": "3",
            "FXSPLIT_AMP": "1",
            "FXSPLIT_PRETRAINED": "False",
            "FXSPLIT_AT": "0,layer1",
            "FXSPLIT_EXPERIMENT": "7",
        }
    )
    assert read == {
        "lr": 0.1,
        "epochs": 3,
        "amp": True,
        "pretrained": False,
        "at": ("0", "layer1"),
        "experiment": "7",
    }


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        ({"FXSPLIT_EPOCS": "3"}, "the variable FXSPLIT_EPOCS is not known; did you mean 'FXSPLIT_EPOCHS'"),
        (
            {"FXSPLIT_EPOCHS": "3.5"},
            "the environment: epochs is '3.5', but must be a whole number",
        ),
        ({"FXSPLIT_AMP": "maybe"}, "the environment: amp is 'maybe', but must be true or false"),
    ],
)
def test_refuses_bad_environment(environ: dict[str, str], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_environment(environ)
    assert str(caught.value).startswith(sentence)


def test_later_layers_win() -> None:
    recipe = {"model": "paper:cnn", "lr": 0.1, "epochs": 3, "parts": 4}
    spec = resolve(recipe, {"lr": 0.2, "seed": 7}, {"lr": 0.3})
    assert spec == RunSpec(model="paper:cnn", lr=0.3, epochs=3, seed=7, parts=4)


@pytest.fixture
def plan_file(graph: Graph, tmp_path: Path) -> str:
    """Fourteen epochs, for the preset l2l."""
    phases = (Phase(start=0, stop=2, epochs=9), Phase(start=1, stop=2, epochs=5))
    plan = Plan(schedule="mine", preset="l2l", partitions=partition(both(graph), count=2), phases=phases)
    write_file(PlanFile.of(plan), str(tmp_path / "plan.json"))
    return str(tmp_path / "plan.json")


def test_a_plan_names_the_preset_and_the_epochs_unless_given(plan_file: str) -> None:
    asked = {"model": "paper:cnn", "plan": plan_file}
    spec = RunSpec(**asked)
    assert spec == RunSpec(**asked, preset="l2l", epochs=14)
    assert (spec.preset, spec.epochs, spec.smoothing, spec.average) == ("l2l", 14, 0.1, 0.1)
    # It says itself what would else be of the preset: which partitions train when, and what recomputes.
    assert (spec.schedule, spec.by, spec.memory_aim) == ("standard", "op", None)
    longer = RunSpec(**asked, epochs=15)
    assert (longer.preset, longer.epochs, longer.average) == ("l2l", 15, 0.25)
    plain = RunSpec(**asked, preset="none")
    assert (plain.preset, plain.epochs, plain.smoothing, plain.average) == ("none", 14, 0, 0)
    assert resolve(read_values(spec.to_flat())) == spec


def test_a_later_plan_withdraws_what_it_says_itself(plan_file: str) -> None:
    recipe = {"model": "paper:cnn", "lr": 0.1, "parts": 4, "by": "natural", "schedule": "grow", "epochs_total": 9}
    recipe |= {"epochs": 9, "memory_aim": 0.3}
    assert resolve(recipe, {"plan": plan_file}) == RunSpec(model="paper:cnn", lr=0.1, plan=plan_file)
    assert resolve({"model": "paper:cnn", "plan": plan_file}, {"epochs": 3}).epochs == 3
    assert resolve(recipe, {"plan": plan_file, "epochs": 3, "memory_aim": 0.5}).memory_aim == 0.5
    assert resolve({**recipe, "preset": "none"}, {"plan": plan_file}).preset == "none"
    with pytest.raises(UsageError, match="leave out epochs-total, or the plan"):
        resolve({"model": "paper:cnn", "plan": plan_file}, {"epochs_total": 3})


def test_only_schedules_that_settle_heed_when() -> None:
    early = {"settle_from": 0.1, "settle_share": 0.5}
    with pytest.raises(UsageError, match="settle-from, settle-share can be given only with schedule settle or settle-"):
        RunSpec(model="paper:cnn", **early)
    recipe = {"model": "paper:cnn", "schedule": "settle-far", **early}
    assert resolve(recipe, {"schedule": "settle"}) == RunSpec(model="paper:cnn", schedule="settle", **early)
    assert resolve(recipe, {"schedule": "standard"}) == RunSpec(model="paper:cnn")
    with pytest.raises(UsageError, match="schedule is 'grow'"):
        resolve(recipe, {"schedule": "grow", "settle_until": 0.5})


@pytest.mark.parametrize(
    ("name", "heeding", "other", "values"),
    [
        ("parallel", "pipeline", "ddp", {"pipeline_schedule": "gpipe"}),
        ("parallel", "ddp,pipeline", "pipeline", {"pipeline_processes": 3}),
        ("augment", "resized-crop", "none", {"scale": (0.5, 1.0), "train_interpolation": "bicubic"}),
        ("schedule", "finetune", "settle", {"settle_front": 0.5, "shift": "input"}),
    ],
)
def test_what_a_value_does_not_heed_is_refused_beside_it_and_dropped_under_it(
    name: str, heeding: str, other: str, values: dict[str, Any]
) -> None:
    recipe = {"model": "paper:cnn", name: heeding, **values}
    assert resolve(recipe, {"lr": 0.5}) == RunSpec(**recipe, lr=0.5)
    assert resolve(recipe, {name: other}) == RunSpec(model="paper:cnn", **{name: other})
    refused = f"{', '.join(map(key, values))} can be given only with {name} .*, and {name} is '{other}'"
    with pytest.raises(UsageError, match=refused):
        resolve(recipe, {name: other, **values})


def test_l2l_switches_on_more_the_longer_the_run() -> None:
    def differing(**values: Any) -> dict[str, Any]:
        plain, spec = RunSpec(model="any"), RunSpec(model="any", **values)
        names = [item.name for item in fields(spec) if item.name not in ("preset", "epochs", "epochs_total")]
        return {name: getattr(spec, name) for name in names if getattr(spec, name) != getattr(plain, name)}

    short = {
        "schedule": "settle-far", "by": "natural", "smoothing": 0.1, "soft_from": "mean", "soft_temperature": 2.0,
        "average": 0.1, "recalibrate": True, "memory_aim": 0.6,
    }  # fmt: skip
    long = {**short, "average": 0.25, "soft_targets": 0.8}
    assert differing(epochs=60) == differing() == {}
    assert differing(preset="l2l", epochs=14) == preset("l2l", 14) == short
    assert differing(preset="l2l", epochs=15) == differing(preset="l2l", epochs=39) == {**short, "average": 0.25}
    assert differing(preset="l2l", epochs=40) == preset("l2l", 40) == long
    assert differing(preset="l2l", epochs=10, epochs_total=40) == long
    assert differing(preset="l2l", epochs=60, soft_targets=0.0, average=0.0, schedule="standard") == {
        name: value for name, value in short.items() if name not in ("average", "schedule")
    }
    assert differing(preset="none", epochs=60) == {}
    with pytest.raises(UsageError, match="there is no preset 'l2'; did you mean 'l2l'"):
        preset("l2", 10)


def test_a_preset_lies_under_the_recipe_and_chooses_the_schedule_anew() -> None:
    recipe = {"model": "paper:cnn", "smoothing": 0.3, "schedule": "standard"}
    spec = resolve(recipe, {"average": 0.5}, {"preset": "l2l"})
    assert (spec.smoothing, spec.average, spec.schedule, spec.recalibrate) == (0.3, 0.5, "settle-far", True)
    assert resolve({**recipe, "preset": "l2l"}).schedule == "standard"
    assert resolve({"model": "paper:cnn", "preset": "l2l"}, {"preset": "none"}) == RunSpec(model="paper:cnn")


def test_what_presets_set_are_fields_that_may_have_it() -> None:
    for name, settings in PRESETS.items():
        assert [setting.from_epochs for setting in settings if setting.from_epochs < 1] == []
        for setting in settings:
            assert RunSpec(**{"model": "any", setting.field: setting.value}) is not None
        assert RunSpec(model="any", preset=name, epochs=10**6).preset == name


def test_a_field_that_there_is_not_is_refused() -> None:
    with pytest.raises(TypeError, match="RunSpec has no field 'epoch'; did you mean 'epochs'"):
        RunSpec(model="paper:cnn", epoch=3)  # type: ignore[call-arg]


def test_every_choice_is_one_that_the_code_has() -> None:
    """What lies beside torch is named a second time, in the spec, which starts without it."""
    from fxsplit.data.augmentation.crops import AUGMENTATIONS
    from fxsplit.models.registry import STEMS

    choices = {item.name: item.metadata["choices"] for item in fields(RunSpec)}
    assert choices["stem"] == STEMS
    assert choices["augment"] == tuple(AUGMENTATIONS)


def test_what_a_plan_says_are_all_fields_of_its_group() -> None:
    group = [item.name for item in fields(RunSpec) if item.metadata["group"] == "Layer-to-layer"]
    assert sorted(PLANNED) == sorted({*group, "epochs_total"} - {"plan", "preset"})


def test_a_later_way_to_cut_withdraws_the_earlier() -> None:
    by_count = resolve({"model": "paper:cnn", "at": ("3", "6")}, {"parts": 4})
    assert (by_count.parts, by_count.at) == (4, ())
    by_path = resolve({"model": "paper:cnn", "parts": 4}, {"at": ("3",)})
    assert (by_path.parts, by_path.at) == (None, ("3",))
    with pytest.raises(UsageError, match="only one can say where to cut"):
        resolve({"model": "paper:cnn", "parts": 4, "at": ("3",)})


def test_an_average_of_steps_gives_way_to_one_that_is_asked_for() -> None:
    """Of a preset, and of a recipe; two on one line contradict each other."""
    assert resolve({"model": "paper:cnn", "preset": "l2l"}, {"model_ema": True}).average == 0
    assert RunSpec(model="paper:cnn", preset="l2l", model_ema=True).average == 0
    assert RunSpec(model="paper:cnn", preset="l2l").average > 0


def test_a_memory_budget_is_a_number_or_auto() -> None:
    assert RunSpec(model="m", memory_budget="auto").memory_budget == "auto"
    assert resolve(read_values({"memory-budget": "0.5", "model": "m"})).memory_budget == 0.5
    with pytest.raises(UsageError, match="memory-budget is 'outo', but must be a number above 0 or auto"):
        RunSpec(model="m", memory_budget="outo")
