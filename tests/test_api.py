"""The verbs, whole: what a run leaves behind, and what a user who errs is told."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import safetensors.torch
import torch
import torchvision
import yaml
from torch import fx, nn
from torch.nn import functional as F

import fxsplit
from fxsplit import assembly
from fxsplit.assembly import choose_device, determinism
from fxsplit.assembly.training import cache_policy
from fxsplit.capture.tracing import Trace
from fxsplit.cuda.replay import Recordings
from fxsplit.data import datasets
from fxsplit.data.loader import Loader
from fxsplit.distribute.processes import Processes
from fxsplit.errors import DataError, PartitionError, ProofError, UsageError
from fxsplit.execute.passes import Pass
from fxsplit.execute.pointwise import pointwise_products
from fxsplit.graph import Graph
from fxsplit.models import downloads, registry
from fxsplit.pages.page import inspection_page
from fxsplit.plan import cuts as cut_places
from fxsplit.plan.cuts import cuts
from fxsplit.plan.planfile import read_file
from fxsplit.report import CheckRecord, EpochRecord, ForecastRecord, Observer, RunReport
from fxsplit.saving.run_folder import COLUMNS
from fxsplit.spec import read_recipe, resolve
from fxsplit_cli.main import main
from tests.cuda.simulated import SimulatedRecorder, Tape

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MODEL = """
from torch import nn

class Pixels(nn.Linear):
    def forward(self, x):
        return {"none": x.relu().shape}

def pixels(num_classes):
    return Pixels(1, 1)

def small(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes),
    )
"""


@pytest.fixture
def spec(tmp_path: Path) -> Callable[..., fxsplit.RunSpec]:
    file = tmp_path / "model.py"
    file.write_text(MODEL, encoding="utf-8")

    def make(**changes: Any) -> fxsplit.RunSpec:
        given = {
            "model": f"{file}:small", "data": "synthetic", "img_size": 12, "train_limit": 40, "batch_size": 16,
            "epochs": 4, "parts": 3, "output": str(tmp_path / "runs"), "device": "cpu", **changes,
        }  # fmt: skip
        if "plan" in changes:  # which says these itself
            given = {name: value for name, value in given.items() if name in changes or name not in ("parts", "epochs")}
        return fxsplit.RunSpec(**given)

    return make


def train(spec: fxsplit.RunSpec, observer: Observer | None = None) -> RunReport:
    return fxsplit.train(spec, observer)


def test_a_model_with_fewer_scores_than_classes_is_refused(
    spec: Callable[..., fxsplit.RunSpec], tmp_path: Path
) -> None:
    file = tmp_path / "few.py"
    file.write_text(MODEL + "\ndef few():\n    return small(3)\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"few.py:few' gives 3 class scores, and 'synthetic' has 10 classes"):
        train(spec(model=f"{file}:few"))


def test_a_run_leaves_all_its_files(spec: Callable[..., fxsplit.RunSpec]) -> None:
    asked = spec(schedule="settle", experiment="mine")
    report = train(asked)
    folder = Path(report.folder)
    assert folder.name == "mine"
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock", "args.yaml", "checkpoints", "env.json", "metrics.jsonl", "model.json", "model.safetensors",
        "plan.json", "report.html", "report.json", "summary.csv",
    ]  # fmt: skip
    assert resolve(read_recipe(folder / "args.yaml")) == asked
    assert json.loads((folder / "env.json").read_text(encoding="utf-8"))["torch"].startswith("2.")
    with (folder / "summary.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0])[:6] == ("epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr")
    assert tuple(rows[0]) == COLUMNS
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [EpochRecord(**line) for line in lines] == list(report.epochs)
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    assert [float(row["train_top1"]) for row in rows] == [record.train_top1 for record in report.epochs]
    assert [float(row["eval_top1"]) for row in rows] == [record.eval_top1 for record in report.epochs]
    data = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert (data["status"], data["accuracy_pct"]) == ("finished", report.epochs[-1].eval_top1)
    page = (folder / "report.html").read_text(encoding="utf-8")
    told = [f"epoch {r.epoch}: training {r.train_top1:.2f} %, test {r.eval_top1:.2f} %" for r in report.epochs]
    assert all(words in page for words in told)


class Notices(Observer):
    def __init__(self) -> None:
        self.sentences: list[str] = []

    def notice(self, sentence: str) -> None:
        self.sentences.append(sentence)


def test_a_plan_is_saved_edited_and_trained_by(spec: Callable[..., fxsplit.RunSpec], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    inspected = fxsplit.inspect(spec(schedule="settle", batch_size=8, img_size=16), save_to=str(path))
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["graph"] == inspected.train.digest()
    assert (data["model"], data["torch"]) == (inspected.model, torch.__version__)
    data["phases"] = [{"epochs": 1}, {"from": data["cuts"][0], "epochs": 2}]
    data["schedule"] = "by hand"
    path.write_text(json.dumps(data), encoding="utf-8")

    heard = Notices()
    asked = spec(plan=str(path))
    report = train(asked, heard)
    assert [(record.start, record.stop) for record in report.epochs] == [(0, 3), (1, 3), (1, 3)]
    assert "-by-hand-" in Path(report.folder).name
    assert not any("plan" in sentence for sentence in heard.sentences)
    # What the run leaves behind runs again, and says the same.
    kept = str(Path(report.folder) / "plan.json")
    again = fxsplit.inspect(spec(plan=kept)).plan
    assert (again.schedule, again.phases) == ("by hand", report.plan.phases)
    assert [part.state for part in again.partitions] == [part.state for part in report.plan.partitions]
    assert read_file(kept).recorded_plan() == report.plan


def test_a_plan_keeps_its_preset_and_the_report_can_be_trained_by(
    spec: Callable[..., fxsplit.RunSpec], tmp_path: Path
) -> None:
    path = str(tmp_path / "plan.json")
    asked = {"by": "op", "deterministic": True}
    inspected = fxsplit.inspect(spec(preset="l2l", epochs=15, **asked), save_to=path)
    whole = train(spec(preset="l2l", epochs=15, **asked))
    assert "-l2l-settle-far-s42" in Path(whole.folder).name
    assert "l2l (settle-far), 15 epochs" in (Path(whole.folder) / "report.html").read_text(encoding="utf-8")
    assert whole.plan.phases == inspected.plan.phases
    planned = train(spec(plan=path, deterministic=True))
    assert (planned.plan, planned.spec["average"]) == (whole.plan, 0.25)
    figures = [(record.train_loss, record.eval_loss) for record in whole.epochs]
    assert [(record.train_loss, record.eval_loss) for record in planned.epochs] == figures
    text = (Path(whole.folder) / "report.json").read_text(encoding="utf-8")
    assert RunReport.from_dict(json.loads(text)) == whole
    saved = tmp_path / "of-report.json"
    saved.write_text(json.dumps(json.loads(text)["plan"]), encoding="utf-8")
    again = fxsplit.inspect(spec(plan=str(saved), epochs=30)).plan
    assert (again.epochs, again.preset) == (30, "l2l")
    assert [phase.epochs for phase in again.phases] == [2 * phase.epochs for phase in whole.plan.phases]
    plain = train(spec(plan=path, preset="none", deterministic=True))
    assert (plain.plan.preset, plain.plan.phases, plain.spec["smoothing"]) == ("none", whole.plan.phases, 0)
    assert [(record.train_loss, record.eval_loss) for record in plain.epochs] != figures


def test_a_plan_for_another_model_is_used_where_it_fits(spec: Callable[..., fxsplit.RunSpec], tmp_path: Path) -> None:
    path = str(tmp_path / "plan.json")
    fxsplit.inspect(fxsplit.RunSpec(model="timm:resnet18", at=("layer2", "layer4.1")), save_to=path)
    heard = Notices()
    found = fxsplit.inspect(fxsplit.RunSpec(model="timm:resnet34", plan=path), observer=heard)
    assert [part.name for part in found.partitions] == ["conv1", "layer2", "layer4.1"]
    assert heard.sentences == [f"the plan {path!r} was made for another model, but fits this one"]
    with pytest.raises(PartitionError, match=r"was made for another model .*'layer4\.1'"):
        fxsplit.inspect(spec(plan=path))


def test_a_plan_of_ones_own_loop_is_saved_and_read_back(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    trace = fxsplit.trace(model, (torch.rand(2, 3),))
    plan = fxsplit.schedule("grow", partitions=fxsplit.partition(trace, at=["2"]), epochs=3)
    fxsplit.save_plan(plan, trace, str(tmp_path / "plan.json"))
    assert fxsplit.load_plan(str(tmp_path / "plan.json"), trace) == plan
    assert read_file(str(tmp_path / "plan.json")).model == "Sequential"


def test_where_to_cut_reaches_planning() -> None:
    def names(by: str) -> list[str]:
        found = fxsplit.inspect(fxsplit.RunSpec(model="torchvision:vgg11", img_size=64, by=by))
        return [part.name for part in found.partitions[1:]]

    assert names("block") == ["avgpool", "classifier"]
    assert names("natural") == [
        "features.3", "features.6", "features.11", "features.16", "avgpool", "classifier.2", "classifier.5",
    ]  # fmt: skip
    assert names("op") not in (names("block"), names("natural"))


def test_the_weights_file_holds_the_models_own_names_and_scores_the_same(
    spec: Callable[..., fxsplit.RunSpec], tmp_path: Path
) -> None:
    report = train(spec(preset="l2l", by="op"))
    scope: dict[str, Any] = {}
    exec(MODEL, scope)
    model = scope["small"](10)
    safetensors.torch.load_model(model, f"{report.folder}/model.safetensors")
    model.eval()
    data = datasets.load(
        "synthetic", img_size=12, data_dir=str(tmp_path), seed=42, train_limit=40, workers=0, notice=print
    )
    test = data.test
    batches = [test.pixels[start : start + 16] for start in range(0, len(test), 16)]  # type: ignore[union-attr]
    scores = torch.cat([model(pixels / 255).argmax(1) for pixels in batches])
    assert report.accuracy_pct == 100 * (scores == test.labels).sum().item() / len(test)


@pytest.mark.parametrize("schedule", ["standard", "window", "grow", "settle", "settle-far"])
def test_the_same_seed_gives_the_same_run_and_another_one_another(
    spec: Callable[..., fxsplit.RunSpec], schedule: str
) -> None:
    def outcome(seed: int) -> list[tuple[float, float]]:
        report = train(spec(schedule=schedule, seed=seed, augment="crop-flip", deterministic=True, epochs=2, by="op"))
        return [(record.train_loss, record.eval_loss) for record in report.epochs]

    assert outcome(1) == outcome(1) != outcome(2)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark


OUTPUT_CLASS = """
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class Scores:
    logits: Tensor


class Classifier(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))

    def forward(self, images: Tensor) -> Scores:
        return Scores(self.body(images))
"""


def test_scores_may_lie_in_an_output_class(spec: Callable[..., fxsplit.RunSpec], tmp_path: Path) -> None:
    """As those of Hugging Face do."""
    (tmp_path / "net.py").write_text(OUTPUT_CLASS, encoding="utf-8")
    assert train(spec(model=f"{tmp_path / 'net.py'}:Classifier", epochs=1)).status == "finished"
    pytest.importorskip("transformers")
    assert train(spec(model="hf:resnet", epochs=1, img_size=32)).status == "finished"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"schedule": "settle", "grad_accum_steps": 2, "batch_size": 20},
        {"amp": True, "augment": "crop-flip"},
        {"channels_last": True},
    ],
    ids=lambda given: ",".join(given),
)
def test_the_proof_of_the_first_batch_changes_nothing(
    spec: Callable[..., fxsplit.RunSpec], changes: dict[str, Any]
) -> None:
    weights, losses = [], []
    for prove in (True, False):
        report = train(spec(prove=prove, epochs=2, **changes))
        weights.append(safetensors.torch.load_file(Path(report.folder) / "model.safetensors"))
        losses.append([(record.train_loss, record.eval_loss) for record in report.epochs])
        data = json.loads((Path(report.folder) / "report.json").read_text(encoding="utf-8"))
        assert (data["prove_seconds"] > 0) is prove
        assert data["setup_seconds"] + data["prove_seconds"] < data["total_seconds"]
    assert losses[0] == losses[1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_run_whose_partitions_are_wrong_ends_before_its_first_step(
    spec: Callable[..., fxsplit.RunSpec], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    true = fxsplit.Executor.forward
    monkeypatch.setattr(fxsplit.Executor, "forward", lambda self, *args: true(self, *args) * 1.001)
    asked = spec(epochs=1)
    with pytest.raises(ProofError, match="output"):
        train(asked)
    model = ["train", asked.model, "--data", "synthetic", "--img-size", "12", "--train-limit", "40", "--epochs", "1"]
    options = [*model, "--parts", "3", "--output", asked.output, "--no-progress"]
    capsys.readouterr()
    assert main(options) == 4
    assert "do not compute what the model computes" in capsys.readouterr().err
    assert main([*options, "--no-prove"]) == 0


def test_the_seed_fixes_what_weights_are_drawn() -> None:
    def drawn(seed: int) -> list[float]:
        with determinism(seed, deterministic=False):
            return torch.rand(3).tolist()

    assert drawn(1) == drawn(1) != drawn(2)


def test_kernels_are_chosen_within_a_run_alone() -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def settings() -> tuple[bool, ...]:
        return torch.are_deterministic_algorithms_enabled(), cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32

    before = settings()
    for deterministic in (False, True):
        with determinism(0, deterministic):
            assert settings() == (deterministic, *[not deterministic] * 3)
        assert settings() == before


def test_the_newer_settings_of_a_user_are_left_alone() -> None:
    matmul = torch.backends.cuda.matmul
    try:
        matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError, match="mix"):
            _ = matmul.allow_tf32
        with determinism(0, True):
            assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = "none"


def test_options_reach_training(spec: Callable[..., fxsplit.RunSpec]) -> None:
    def last(**changes: Any) -> EpochRecord:
        return train(spec(epochs=2, **changes)).epochs[-1]

    plain = last()
    changes: list[dict[str, Any]] = [
        {"opt": "sgd"}, {"opt": "sgd", "clip_grad": 0.01}, {"lr": 0.02}, {"weight_decay": 0.3}, {"smoothing": 0.1},
        {"augment": "crop-flip"}, {"std": (0.1, 0.5, 0.9), "mean": (0.5,) * 3}, {"amp": True}, {"sched": "cosine"},
        {"train_batches_per_epoch": 1}, {"train_limit": 20}, {"batch_size": 8}, {"grad_accum_steps": 2},
        {"warmup_epochs": 1}, {"exits": 1}, {"exits": 2}, {"exits": 2, "exit_weight": 1.0},
    ]  # fmt: skip
    losses = {plain.train_loss, *(last(**change).train_loss for change in changes)}
    assert len(losses) == 1 + len(changes)
    assert last(channels_last=True).train_loss == pytest.approx(plain.train_loss, rel=1e-4)


@pytest.mark.parametrize("channels_last", [True, False])
def test_products_are_asked_for_and_reported(
    monkeypatch: pytest.MonkeyPatch, spec: Callable[..., fxsplit.RunSpec], channels_last: bool
) -> None:
    given = []

    def listening(*arguments: Any, passes: tuple[Pass, ...], **options: Any) -> fxsplit.Trace:
        given.append(passes)
        return fxsplit.measure(*arguments, passes=passes, **options)

    monkeypatch.setattr("fxsplit.api.measure_ops", listening)
    heard = Notices()
    report = fxsplit.train(spec(channels_last=channels_last, balance="seconds", epochs=1), heard)
    names = ["pointwise_products"] if channels_last else []
    assert json.loads((Path(report.folder) / "report.json").read_text(encoding="utf-8"))["passes"] == names
    assert any("matrix products" in sentence for sentence in heard.sentences) is channels_last
    fxsplit.inspect(spec(channels_last=channels_last), measured=True)
    assert given == [(pointwise_products,) if channels_last else ()] * 2


def test_a_plan_file_is_read_before_the_model_is_built(spec: Callable[..., fxsplit.RunSpec], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = {"schema": 3, "preset": "l3l", "schedule": "mine", "cuts": ["9"], "phases": [{"epoch": 2}]}
    path.write_text(json.dumps(plan), encoding="utf-8")
    with pytest.raises(UsageError, match=r"preset is \"l3l\", but .*; phase 1: the key 'epoch' is not known"):
        spec(plan=str(path))
    path.write_text(json.dumps({**plan, "preset": "none", "phases": [{"epochs": 2}]}), encoding="utf-8")
    asked = spec(plan=str(path))
    for verb in (fxsplit.train, fxsplit.inspect):
        with pytest.raises(PartitionError, match="no operation of the model lies in '9'"):
            verb(asked)
    path.write_text("{}", encoding="utf-8")
    for verb in (fxsplit.train, fxsplit.inspect):
        with pytest.raises(UsageError, match="the key 'schema' is missing"):
            verb(replace(asked, model="no_such_file.py:build", preset="none", epochs=2))


def test_a_run_speaks_of_the_passes_that_it_has(
    monkeypatch: pytest.MonkeyPatch, spec: Callable[..., fxsplit.RunSpec]
) -> None:
    def nothing_changed(graph: fx.Graph, _model: nn.Module) -> fx.Graph:
        return graph

    monkeypatch.setattr("fxsplit.assembly.passes", lambda *_: (nothing_changed,))
    heard = Notices()
    fxsplit.train(spec(epochs=1), heard)
    assert [each for each in heard.sentences if "matrix products" in each or "pass" in each] == [
        "graphs are rewritten by the pass nothing_changed"
    ]


def recorded_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> SimulatedRecorder:
    """Let runs with CUDA graphs record in a simulation."""
    recorder = SimulatedRecorder(most=2)

    def recordings(spec: fxsplit.RunSpec, trace: Trace, device: torch.device, _: Processes, observer: Observer) -> Any:
        made = Recordings(recorder, device, held=(trace.model,), notice=observer.notice)
        return made if spec.cuda_graphs == "on" else None

    monkeypatch.setattr(assembly, "recordings", recordings)
    return recorder


# Learning rates that float32 holds exactly.
RATES = {"lr": 2.0**-7, "sched": "step", "decay_rate": 0.5, "decay_epochs": 1.0}


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "standard", "opt": "sgd", "clip_grad": 0.5},
        {"preset": "l2l", "cache": "ram", "by": "op", "epochs": 8, "amp": True},
        {"schedule": "settle", "opt": "lamb", "weight_decay": 0.05, "exits": 1},
    ],
    ids=["standard", "l2l", "update eager"],
)
def test_a_run_with_cuda_graphs_ends_as_one_without(
    spec: Callable[..., fxsplit.RunSpec], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    listener, recorder = Notices(), recorded_on_the_cpu(monkeypatch)
    saved = []
    for graphs in ("on", "off"):
        report = train(spec(cuda_graphs=graphs, train_limit=100, **RATES, **options), listener)
        state = safetensors.torch.load_file(f"{report.folder}/model.safetensors")
        saved.append([*state.values(), torch.tensor([[each.train_loss, each.eval_loss] for each in report.epochs])])
    assert all(map(torch.equal, *saved))
    assert recorder.replays > 10
    eagerly = [each for each in listener.sentences if "eager" in each]
    assert len(eagerly) == (options.get("opt") == "lamb")
    assert all(each.startswith("lamb steps eagerly, after a") for each in eagerly)


def test_replays_that_differ_are_not_used(
    spec: Callable[..., fxsplit.RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    listener, recorder = Notices(), recorded_on_the_cpu(monkeypatch)
    monkeypatch.setattr(Tape, "replay", lambda _: setattr(recorder, "replays", recorder.replays + 1))
    train(spec(cuda_graphs="on"), listener)
    assert any("replayed steps differ from eager ones in loss of step 5" in each for each in listener.sentences)
    # Those of the trial of the optimizer, and of the proof.
    assert recorder.replays == 12 + 2


def test_without_a_gpu_a_notice_says_that_nothing_is_recorded(spec: Callable[..., fxsplit.RunSpec]) -> None:
    listener = Notices()
    train(spec(cuda_graphs="on"), listener)
    assert "CUDA graphs are recorded on a GPU alone; steps run eagerly" in listener.sentences


def test_exits_leave_no_trace_in_what_is_saved(spec: Callable[..., fxsplit.RunSpec]) -> None:
    plain, more = (train(spec(epochs=6, schedule="settle", exits=count)) for count in (0, 2))
    saved = [safetensors.torch.load_file(Path(report.folder) / "model.safetensors") for report in (plain, more)]
    assert saved[0].keys() == saved[1].keys()
    # The first exits are linear layers from 4 channels to 10 classes; to the last partition belongs none.
    extra = [b.trainable_parameters - a.trainable_parameters for a, b in zip(plain.epochs, more.epochs, strict=True)]
    assert extra[0] == 2 * 50
    assert extra[-1] == 50 * (2 - plain.plan.phases[-1].start)


def test_stochastic_depth_is_part_of_the_model(spec: Callable[..., fxsplit.RunSpec]) -> None:
    named = {"model": "paper:resnext", "img_size": 16, "train_limit": 32}
    plain, deep = (train(spec(epochs=1, drop_path=rate, **named)) for rate in (0.0, 0.5))
    assert plain.epochs[0].train_loss != deep.epochs[0].train_loss
    assert fxsplit.inspect(spec(drop_path=0.5, **named)).train.digest() == deep.graph_digest != plain.graph_digest
    with pytest.raises(UsageError, match="takes no drop_path_rate"):
        train(spec(drop_path=0.5))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_stages_train_alike(spec: Callable[..., fxsplit.RunSpec]) -> None:
    plain, compiled = (
        [record.train_loss for record in train(spec(schedule="settle", torchcompile=backend)).epochs]
        for backend in (None, "eager")
    )
    assert compiled == pytest.approx(plain, rel=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_proof_is_of_stages_as_they_are_and_the_training_of_compiled_ones(
    spec: Callable[..., fxsplit.RunSpec],
) -> None:
    def rounded(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Callable[..., Any]:
        return lambda *given: [value * 1.001 for value in graph(*given)]

    torch._dynamo.register_backend(rounded, name="rounded")
    torch.compiler.reset()
    plain, compiled = (train(spec(epochs=1, torchcompile=backend)) for backend in (None, "rounded"))
    assert compiled.prove_seconds > 0
    assert compiled.epochs[0].train_loss != plain.epochs[0].train_loss
    torch.compiler.reset()


def test_cuts_are_worked_out_once_a_run(spec: Callable[..., fxsplit.RunSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    worked: list[int] = []
    twins = cut_places._twins

    def counted(train: Graph, evaluation: Graph) -> list[int]:
        worked.append(len(train))
        return twins(train, evaluation)

    monkeypatch.setattr(cut_places, "_twins", counted)
    report = train(spec(preset="l2l", by="op"))
    assert (Path(report.folder) / "report.html").exists()
    assert len(worked) == 1
    inspection_page(fxsplit.inspect(spec(preset="l2l", by="op")))
    assert len(worked) == 2


def test_a_dry_run_writes_nothing(spec: Callable[..., fxsplit.RunSpec], tmp_path: Path) -> None:
    report = train(spec(dry_run=True, data="digits"))
    assert (len(report.epochs), report.folder) == (1, "")
    # One batch of 16 was tested.
    assert report.accuracy_pct * 16 / 100 == pytest.approx(round(report.accuracy_pct * 16 / 100), abs=1e-9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.py"]


class Stop(Observer):
    def epoch_done(self, record: EpochRecord) -> None:
        if record.epoch == 2:
            raise KeyboardInterrupt


def test_an_interrupted_run_keeps_its_epochs_and_weights(spec: Callable[..., fxsplit.RunSpec]) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(spec(experiment="mine"), Stop())
    folder = Path(spec().output) / "mine"
    data = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert (data["status"], [epoch["epoch"] for epoch in data["epochs"]]) == ("interrupted", [1, 2])
    assert safetensors.torch.load_file(folder / "model.safetensors")["0.weight"].shape == (4, 3, 3, 3)


def test_a_named_run_is_never_overwritten_and_others_get_names_of_their_own(
    spec: Callable[..., fxsplit.RunSpec],
) -> None:
    train(spec(experiment="mine", epochs=1))
    with pytest.raises(UsageError, match="already holds a run"):
        train(spec(experiment="mine", epochs=1))
    folders = {train(spec(epochs=1)).folder for _ in range(3)}
    assert len(folders) == 3


def test_a_batch_of_one_image_trains_where_norms_see_more_than_one_value(spec: Callable[..., fxsplit.RunSpec]) -> None:
    asked = spec(epochs=1, batch_size=1, train_limit=3, balance="seconds")
    assert train(asked).status == "finished"
    few = {"img_size": 7, "train_limit": 10, "epochs": 1}  # a value a channel at the second norm
    assert train(spec(**few, batch_size=4, grad_accum_steps=2)).status == "finished"
    before = sorted(Path(asked.output).iterdir())
    for wrong in ({"batch_size": 1, "balance": "seconds"}, {"batch_size": 4, "grad_accum_steps": 4, "dry_run": True}):
        with pytest.raises(UsageError, match=r"BatchNorm '4' sees a single value a channel of an image"):
            train(spec(**few, **wrong))
    assert sorted(Path(asked.output).iterdir()) == before


def test_inspect_needs_neither_weights_nor_data(spec: Callable[..., fxsplit.RunSpec]) -> None:
    found = fxsplit.inspect(spec(data="cifar100", img_size=None, schedule="window"))
    assert found.input_shape == (16, 3, 32, 32)
    assert found.train.values["8"].shape == (16, 100)
    assert [part.name for part in found.partitions] == [part.name for part in found.plan.partitions]
    whole = fxsplit.inspect(fxsplit.RunSpec(model="torchvision:regnet_y_400mf", parts=2))
    assert sum(part.parameters for part in whole.partitions) == 3_907_554


def test_a_budget_that_recomputing_alone_cannot_keep_is_kept_by_micro_batches() -> None:
    asked = {"model": "paper:cnn", "data": "cifar10", "batch_size": 128, "preset": "l2l"}
    found = fxsplit.inspect(fxsplit.RunSpec(**asked, memory_budget=0.6))
    assert [phase.micro_batches for phase in found.plan.phases[:1]] == [2]
    assert found.forecast is not None
    most = 0.6 * found.forecast.standard.activation_bytes
    assert all(phase.activation_bytes <= most for phase in found.forecast.phases)
    # Without a budget l2l has this one, and takes what is nearest to it where a budget would be refused.
    assert fxsplit.inspect(fxsplit.RunSpec(**asked)).plan == found.plan
    assert fxsplit.inspect(fxsplit.RunSpec(**asked, memory_budget=1)).plan != found.plan
    assert fxsplit.inspect(fxsplit.RunSpec(**asked | {"model": "paper:resnext"})).plan.phases[0].recompute
    with pytest.raises(PartitionError, match=r"not in micro-batches: 'group1\.bn1' needs a batch as a whole"):
        fxsplit.inspect(fxsplit.RunSpec(**asked | {"model": "paper:resnext"}, memory_budget=0.1))


@pytest.mark.parametrize(
    ("device", "ratios", "micro_batches"),
    [
        ("cuda", [1.02], 8),
        ("cuda", [1.2, 1.03], 2),
        ("cuda", [1.2, 1.04], 1),
        ("cuda", [torch.OutOfMemoryError()], 8),
        ("cpu", [], 8),
    ],
)
def test_a_gpu_comes_as_near_to_a_memory_aim_as_measured_time_allows(
    monkeypatch: pytest.MonkeyPatch, device: str, ratios: list[Any], micro_batches: int
) -> None:
    def measured(_executor: Any, _plan: Any, other: Any, _loss: Any, **_: Any) -> float:
        assert other.phases[0].micro_batches == 1
        ratio = left.pop(0)
        if isinstance(ratio, Exception):
            raise ratio
        return float(ratio)

    left, notices = list(ratios), Notices()
    monkeypatch.setattr("fxsplit.assembly.plans.time_ratio", measured)
    asked = fxsplit.RunSpec(model="paper:cnn", data="digits", img_size=32, batch_size=128, memory_aim=0.3)
    data = assembly.data(asked, notices)
    kind, cpu = assembly.kind(asked), torch.device("cpu")
    found = assembly.trace(asked, assembly.model(asked, kind, cpu, notices), kind, cpu)
    plan = assembly.plan(asked, found, notices)
    assert plan.phases[0].micro_batches == 8
    net = fxsplit.Executor(found, plan.partitions)
    chosen = assembly.paying_plan(asked, found, net, plan, data, torch.device(device), notices)
    assert not left
    assert chosen.phases[0].micro_batches == micro_batches
    assert len(notices.sentences) == (micro_batches < 8)
    for unmeasured in (replace(asked, deterministic=True), replace(asked, cuda_graphs="on")):
        assert assembly.paying_plan(unmeasured, found, net, plan, data, torch.device(device), notices) == plan
    recomputing = replace(plan, phases=(replace(plan.phases[0], recompute=2),))
    chosen = assembly.paying_plan(
        replace(asked, cuda_graphs="on"), found, net, recomputing, data, torch.device("cuda"), notices
    )
    assert (chosen.phases[0].recompute, chosen.phases[0].micro_batches) == (0, 1)
    insisted = replace(asked, memory_budget=0.3)
    assert assembly.paying_plan(insisted, found, net, plan, data, torch.device("cuda"), notices) == plan


def test_gradients_that_accumulate_are_micro_batches_of_the_plan(
    spec: Callable[..., fxsplit.RunSpec], tmp_path: Path
) -> None:
    asked = {"model": "paper:cnn", "data": "cifar10", "batch_size": 128, "preset": "l2l", "memory_budget": 0.6}
    found = fxsplit.inspect(fxsplit.RunSpec(**asked, grad_accum_steps=4)).forecast
    whole = fxsplit.inspect(fxsplit.RunSpec(**asked)).forecast
    assert found is not None
    assert whole is not None
    assert all(phase.activation_bytes <= 0.6 * found.standard.activation_bytes for phase in found.phases)
    # Of 32 images instead of 128, and of a gradient until it is added.
    assert 0.25 < found.standard.activation_bytes / whole.standard.activation_bytes < 0.5
    # What the plan says more of is not multiplied by what is asked for, and stays.
    path = tmp_path / "plan.json"
    phases = [{"epochs": 1, "micro_batches": 4}, {"from": "3", "epochs": 1}]
    path.write_text(json.dumps({"schema": 3, "schedule": "mine", "cuts": ["3"], "phases": phases}), encoding="utf-8")
    report = train(spec(plan=str(path), grad_accum_steps=2))
    assert [phase.micro_batches for phase in report.plan.phases] == [4, 2]
    again = train(spec(plan=f"{report.folder}/plan.json", grad_accum_steps=2))
    assert [r.train_loss for r in again.epochs] == [r.train_loss for r in report.epochs]


def test_inspect_measures_ops_where_it_must(spec: Callable[..., fxsplit.RunSpec]) -> None:
    plain = fxsplit.inspect(spec(schedule="settle"))
    assert plain.forecast.standard.step_seconds is None
    assert all(op.seconds is None for op in plain.train.ops)
    balanced = fxsplit.inspect(spec(schedule="settle", balance="seconds"))
    for found in (balanced, fxsplit.inspect(spec(schedule="settle"), measured=True)):
        assert (found.forecast.standard.step_seconds or 0) > 0
        assert all((op.seconds or 0) > 0 for op in found.train.ops)
    seconds = [op.seconds or 0 for op in balanced.train.ops]
    # The largest of three runs of ops, wherever they could be divided.
    spans = [sum(seconds[part.start : part.stop]) for part in balanced.partitions]
    legal = [cut.index for cut in cuts(balanced) if cut.refusal is None]
    best = min(
        max(sum(seconds[:first]), sum(seconds[first:second]), sum(seconds[second:]))
        for first, second in combinations(legal, 2)
    )
    assert max(spans) == pytest.approx(best, rel=1e-6)


def test_training_balances_partitions_by_seconds(spec: Callable[..., fxsplit.RunSpec]) -> None:
    assert len(train(spec(balance="seconds", epochs=1)).plan.partitions) == 3


def test_a_forecast_knows_its_optimizer(spec: Callable[..., fxsplit.RunSpec]) -> None:
    for opt, momentum, slots in (("adamw", 0.9, 2), ("momentum", 0.9, 1), ("momentum", 0.0, 0)):
        standard = fxsplit.inspect(spec(opt=opt, momentum=momentum)).forecast.standard
        assert standard.optimizer_bytes == slots * standard.gradient_bytes


def test_forecasts_are_held_against_measurement(spec: Callable[..., fxsplit.RunSpec]) -> None:
    asked = spec()
    heard: list[str] = []

    class Listener(Observer):
        def model_checked(self, record: CheckRecord | ForecastRecord, count: int) -> None:
            heard.append(f"{record.model} of {count}")

    names = [asked.model, "paper:cnn", asked.model.replace("small", "pixels")]
    records = fxsplit.check_forecasts(names, parts=3, img_size=32, batch_size=16, device="cpu", observer=Listener())
    assert heard == [f"{name} of 3" for name in names]
    small, cnn, pixels = records
    assert [(phase.start, phase.stop) for phase in small.phases] == [(0, 3), (1, 3)]
    assert small.partitions == 3
    assert cnn.verdict == "as forecast"
    assert all(phase.measured.step_seconds > 0 for record in (small, cnn) for phase in record.phases)
    assert pixels.verdict == "refused"
    assert "holds no parameter that could train" in (pixels.refusal or "")


def test_the_default_number_of_partitions_fits_any_model(spec: Callable[..., fxsplit.RunSpec]) -> None:
    assert len(fxsplit.inspect(spec(parts=None)).partitions) == 8
    assert len(fxsplit.inspect(fxsplit.RunSpec(model="timm:test_vit")).partitions) == 8


def test_a_device_that_is_not_there_is_refused() -> None:
    if torch.cuda.device_count() < 8:
        with pytest.raises(UsageError, match="there is no device 'cuda:7'"):
            choose_device("cuda:7")
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["train", "timm:resnext50_32x4"], 2, "timm has no model 'resnext50_32x4'"),
        (["train", "paper:cnn", "--at", "conv2,poool1"], 3, "'pool1'"),
        (["train", "paper:cnn", "--data", "digit"], 2, "there is no data set 'digit'"),
        (["train", "paper:cnn", "--opt", "adamm"], 2, "timm has no optimizer 'adamm'; did you mean"),
        (["train", "paper:cnn", "--sched", "cos"], 2, "no learning-rate schedule 'cos'"),
        (["train", "paper:cnn", "--parts", "99"], 3, "99"),
        (["train", "paper:cnn", "--data", "folder:/nowhere"], 1, "'/nowhere'"),
        (["inspect", "paper:cnn", "--at", "conv1"], 3, "conv1"),
        (["inspect", "paper:cnn", "--parts", "9", "--by", "natural"], 3, "natural ones; ask for at most"),
        (["train", "paper:cnn", "--plan", "nowhere.json"], 2, "the plan 'nowhere.json' cannot be read"),
    ],
)
def test_who_errs_is_told_in_one_sentence(
    arguments: list[str], code: int, sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = ["--output", str(tmp_path / "runs")] if arguments[0] == "train" else []
    assert main([*arguments, *output]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fxsplit: ")
    assert sentence in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_run_starts_from_the_weights_of_another(spec: Callable[..., fxsplit.RunSpec]) -> None:
    before = train(spec(epochs=1)).folder
    notices = Notices()
    # A learning rate so small that no parameter changes.
    after = train(spec(epochs=1, initial_checkpoint=before, opt="sgd", lr=1e-30), notices).folder
    first, second = (safetensors.torch.load_file(f"{folder}/model.safetensors") for folder in (before, after))
    other = safetensors.torch.load_file(f"{train(spec(epochs=1, opt='sgd', lr=1e-30)).folder}/model.safetensors")
    for name in ("0.weight", "1.bias", "8.weight", "8.bias"):
        assert torch.equal(first[name], second[name]), name
        assert not torch.equal(first[name], other[name]), name
    assert f"16 of 16 tensors start from {before!r}" in notices.sentences


def test_a_run_that_goes_on_needs_no_weights_to_start_from(spec: Callable[..., fxsplit.RunSpec]) -> None:
    before = train(spec(epochs=1)).folder
    whole = spec(epochs=2, initial_checkpoint=before, deterministic=True)
    expected = train(whole).folder
    stopped = train(replace(whole, epochs=1, experiment="stopped")).folder
    shutil.rmtree(before)
    assert fxsplit.train(whole, resume=stopped).folder == stopped
    first, second = (safetensors.torch.load_file(f"{folder}/model.safetensors") for folder in (expected, stopped))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_weights_that_do_not_fit_are_refused_before_data_are_loaded(
    spec: Callable[..., fxsplit.RunSpec],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load(*_args: Any, **_options: Any) -> None:
        raise AssertionError("data are loaded")

    monkeypatch.setattr(datasets, "load", load)
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"PK")
    arguments = ["train", spec().model, "--data", "synthetic", "--output", str(tmp_path / "runs")]
    for name, sentence in (
        ("none.pth", "there is no file of weights"),
        ("broken.pth", "cannot be read"),
        ("other.pth", "holds the weights of another model: of 16 tensors 16 are missing"),
    ):
        assert main([*arguments, "--initial-checkpoint", str(tmp_path / name)]) == 2
        err = capsys.readouterr().err
        assert sentence in err
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "wanted", "said"),
    [
        ({}, {"img_size": 224, "mean": MEAN, "std": STD, "interpolation": "bilinear"}, "img-size 224"),
        (
            {"img_size": 32},
            {"img_size": 32, "mean": MEAN, "std": STD, "interpolation": "bilinear"},
            "have interpolation bilinear, mean 0.485,0.456,0.406, std",
        ),
        (
            {"mean": (0.0,), "std": (1.0,), "interpolation": "bicubic"},
            {"img_size": 224, "mean": (0.0,), "std": (1.0,), "interpolation": "bicubic"},
            "images have img-size 224; options win",
        ),
        ({"pretrained": False}, {"img_size": None, "mean": (), "std": (), "interpolation": None}, ""),
    ],
)
def test_images_are_prepared_as_pretrained_weights_want_them_unless_the_user_says_otherwise(
    changes: dict[str, Any], wanted: dict[str, Any], said: str
) -> None:
    notices = Notices()
    asked = fxsplit.RunSpec(**{"model": "torchvision:resnet18", "pretrained": True, "train_limit": 4, **changes})
    found = assembly.with_preprocessing(asked, notices)
    assert found == replace(asked, **wanted)
    assert len(notices.sentences) == bool(said)
    assert said in "".join(notices.sentences)
    assert assembly.with_preprocessing(found, notices) == found
    assert len(notices.sentences) == bool(said)
    loader, _ = assembly.loaders(found, assembly.data(found, notices))
    (batch,) = loader.batches(0)
    (plain,) = replace(loader, mean=(), std=()).batches(0)
    shape = (1, -1, 1, 1)
    mean, std = (torch.tensor(each).view(shape) for each in (found.mean or (0.0,), found.std or (1.0,)))
    assert torch.equal(batch.images, (plain.images - mean) / std)
    assert loader.interpolation == (found.interpolation or "bilinear")


def test_a_run_takes_the_images_that_its_pretrained_weights_want(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = registry.Preprocessing(img_size=40, mean=(0.5, 0.25, 0.125), std=(0.5, 0.5, 0.25), interpolation="lanczos")
    library = replace(registry.LIBRARIES["torchvision"], preprocessing=lambda _name: known)
    monkeypatch.setitem(registry.LIBRARIES, "torchvision", library)
    published = torchvision.models.get_model("mobilenet_v3_small").state_dict()
    monkeypatch.setattr(downloads, "answers", lambda _url: True)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_args, **_options: published)
    asked = fxsplit.RunSpec(
        model="torchvision:mobilenet_v3_small", pretrained=True, train_limit=4, batch_size=4, epochs=1, device="cpu",
        data="synthetic", prove=False, output=str(tmp_path),
    )  # fmt: skip
    report = train(asked)
    values = {name: report.spec[name] for name in ("img-size", "mean", "std", "interpolation")}
    assert values == {"img-size": 40, "mean": [0.5, 0.25, 0.125], "std": [0.5, 0.5, 0.25], "interpolation": None}
    # It goes on as it began, and asks for no weights again.
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", None)
    longer = fxsplit.train(replace(asked, epochs=2), resume=report.folder)
    assert {name: longer.spec[name] for name in values} == values
    assert len(longer.epochs) == 2


def test_weights_whose_images_nobody_describes_are_said() -> None:
    notices = Notices()
    asked = fxsplit.RunSpec(model="hf:someone/tiny", pretrained=True)
    assert assembly.with_preprocessing(asked, notices) == asked
    assert len(notices.sentences) == 1
    assert "give --mean and --std" in notices.sentences[0]


def test_a_misspelt_key_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: paper:cnn\nepoch: 3\n", encoding="utf-8")
    assert main(["train", "-c", str(recipe)]) == 2
    err = capsys.readouterr().err
    assert "'epoch'" in err
    assert "'epochs'" in err
    assert len(err.splitlines()) == 1


def test_no_network_is_one_sentence(monkeypatch: pytest.MonkeyPatch, spec: Callable[..., fxsplit.RunSpec]) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", unreachable)
    with pytest.raises(DataError, match=r"cannot be downloaded .*folder:PATH") as caught:
        train(spec(data="cifar10", data_dir=str(Path(spec().output) / "data")))
    assert "\n" not in str(caught.value)


RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_loads_and_can_be_planned(path: Path) -> None:
    asked = resolve(read_recipe(path))
    plan = fxsplit.inspect(asked).plan
    wanted = asked.epochs * len(plan.phases) if asked.schedule == "window" else asked.epochs
    assert plan.epochs == wanted
    assert yaml.safe_load(asked.to_yaml())["model"] == asked.model
    readme = (path.parent / "README.md").read_text(encoding="utf-8")
    assert f"`{path.name}`" in readme


def test_the_notebooks_recipe_is_the_notebooks_experiment() -> None:
    assert len(RECIPES) == 4
    plan = fxsplit.inspect(resolve(read_recipe(RECIPES[0].with_name("paper-cnn-window.yaml")))).plan
    assert [(phase.start, phase.stop, phase.epochs) for phase in plan.phases] == [(i, 12 - i, 10) for i in range(6)]
    assert all(phase.fresh_optimizer for phase in plan.phases)
    assert [part.name for part in plan.partitions[1:]] == [
        "conv2", "pool1", "drop1", "conv3", "conv4", "pool2", "drop2", "flatten", "fc1", "drop3", "fc2",
    ]  # fmt: skip


@pytest.mark.parametrize(("schedule", "epochs"), [("settle", 6), ("grow", 6), ("window", 2)])
def test_a_plain_loop_with_the_executor_ends_with_the_weights_of_train(
    schedule: str, epochs: int, spec: Callable[..., fxsplit.RunSpec]
) -> None:
    asked = spec(model="paper:cnn", img_size=16, parts=6, schedule=schedule, epochs=epochs, lr=0.01, seed=3)
    report = train(asked)
    assert len(report.plan.phases) > 1
    trained = safetensors.torch.load_file(Path(report.folder) / "model.safetensors")
    data = datasets.load(asked.data, img_size=16, data_dir="", seed=3, train_limit=40, notice=print, workers=0)
    with determinism(3, False):
        model = registry.build(asked.model, num_classes=len(data.classes), img_size=16)
        net = fxsplit.Executor(fxsplit.trace(model, (torch.empty(2, 3, 16, 16),)), report.plan.partitions)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.0, fused=True)
        for epoch in range(report.plan.epochs):
            net.enter(report.plan.phase_at(epoch), optimizer)
            net.train()
            for batch in Loader(data.train, batch_size=16, training=True, seed=3).batches(epoch):
                optimizer.zero_grad()
                F.cross_entropy(net(batch.images), batch.labels).backward()
                optimizer.step()

    assert trained.keys() == model.state_dict().keys()
    assert all(torch.equal(trained[name], value) for name, value in model.state_dict().items())
    assert optimizer.state.keys() == {p for p in model.parameters() if p.requires_grad}


@pytest.fixture
def settling(tmp_path: Path, spec: Callable[..., fxsplit.RunSpec]) -> Callable[..., fxsplit.RunSpec]:
    """Two epochs of everything, three with the first layers settled."""
    plan = tmp_path / "plan.json"
    phases = [{"epochs": 2}, {"from": "3", "epochs": 3}]
    plan.write_text(json.dumps({"schema": 3, "schedule": "mine", "cuts": ["3"], "phases": phases}), encoding="utf-8")
    return lambda **changes: spec(plan=str(plan), **changes)


@pytest.mark.parametrize("augment", [{}, {"augment": "crop-flip", "cache_views": 2}])
def test_a_cache_changes_nothing_but_what_is_kept(
    settling: Callable[..., fxsplit.RunSpec], augment: dict[str, Any]
) -> None:
    media = ("off", "device", "ram", "disk")
    off, device, ram, disk = (train(settling(cache=cache, experiment=cache, **augment)) for cache in media)
    for cached in (device, ram, disk):
        assert [record.train_loss for record in cached.epochs] == [record.train_loss for record in off.epochs]
        assert cached.accuracy_pct == off.accuracy_pct
    kept = [(run.epochs[-1].cache_resident_bytes, run.epochs[-1].cache_file_bytes) for run in (device, ram, disk)]
    assert kept[0] == kept[1]
    assert kept[1][0]
    assert kept[2][1]
    assert kept[1][1] == kept[2][0] == 0


def test_a_cache_leaves_what_training_needs_of_a_gpu(settling: Callable[..., fxsplit.RunSpec]) -> None:
    chosen = settling()
    images = assembly.data(chosen, Observer())
    kind, cpu = assembly.kind(chosen), torch.device("cpu")
    captured = assembly.trace(chosen, assembly.model(chosen, kind, cpu, Observer()), kind, cpu)
    plan = assembly.plan(chosen, captured, Observer())
    assert cache_policy(chosen, captured, plan, images).peak_bytes == 0
    train = SimpleNamespace(device=torch.device("cuda", 0), resident=images.train.resident)
    on_gpu: Any = SimpleNamespace(train=train, test=SimpleNamespace(resident=None))
    needed = max(phase.peak_bytes for phase in assembly.forecast(chosen, plan, captured, measured=False).phases)
    policy = cache_policy(chosen, captured, plan, on_gpu)
    assert policy.peak_bytes == needed + images.train.resident.nbytes


def test_a_cache_that_is_refused_is_told(settling: Callable[..., fxsplit.RunSpec]) -> None:
    class Heard(Observer):
        sentences: ClassVar[list[str]] = []

        def notice(self, sentence: str) -> None:
            self.sentences.append(sentence)

    train(settling(cache="ram", cache_limit=1e-6), Heard())
    assert any("GiB and may take" in sentence for sentence in Heard.sentences)
    with pytest.raises(UsageError, match="give cache-views"):
        settling(cache="disk", augment="crop-flip")


def test_a_model_without_images_is_inspected_and_not_trained() -> None:
    pytest.importorskip("transformers")
    found = fxsplit.inspect(fxsplit.RunSpec(model="hf:bert", batch_size=4, parts=3))
    assert found.input_shape == (4, 16)
    with pytest.raises(UsageError, match="train takes image classifiers, and 'hf:bert' takes no images"):
        fxsplit.train(fxsplit.RunSpec(model="hf:bert", data="digits", dry_run=True))


def test_a_forecast_of_several_devices_is_of_the_batch_that_was_given() -> None:
    """Though ops are timed on fewer images, which one device may take."""
    found = fxsplit.inspect(fxsplit.RunSpec(model="paper:cnn", img_size=8, batch_size=40, device="cpu"), devices=2)
    assert found.input_shape == (40, 3, 8, 8)
    assert found.train.batch_size == 32
    assert [(each.kind, each.devices) for each in found.scaling][:2] == [("ddp", 1), ("ddp", 2)]
