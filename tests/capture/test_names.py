"""Many models by one pattern, the sizes they are made for, and models of transformers by type or folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision

from fxsplit.errors import DataError, UsageError
from fxsplit.models.libraries.timm import families
from fxsplit.models.registry import build, expand, native_size, sketch, smallest


def test_a_pattern_means_all_that_match_in_the_librarys_order() -> None:
    assert expand("timm:*") == tuple(f"timm:{name}" for name in timm.list_models())
    assert expand("torchvision:*") == tuple(f"torchvision:{name}" for name in torchvision.models.list_models())
    assert expand("paper:*") == ("paper:cnn", "paper:vgg16", "paper:resnext", "paper:densenet")
    assert expand("paper:*n[en]*") == ("paper:cnn", "paper:resnext", "paper:densenet")
    assert expand("torchvision:resnet?8") == ("torchvision:resnet18",)


@pytest.mark.parametrize(
    "spec", ["timm:resnet18", "no:such", "a[1].py:Net", "timm:hf-hub:timm/a", "resnet18", "hf:./a"]
)
def test_a_spec_without_wildcards_means_itself(spec: str) -> None:
    assert expand(spec) == (spec,)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("timm:resnett18*", r"no model of timm matches 'resnett18\*'; did you mean 'resnet18'"),
        ("paper:CNN*", r"no model of paper matches 'CNN\*'"),
        (
            "nets.py:*",
            r"models of 'nets.py' cannot be listed, only those of timm, torchvision, hf, paper; replace '\*'",
        ),
        ("tim:*", "'tim' cannot be listed, .*; did you mean 'timm'"),
    ],
)
def test_a_pattern_that_means_nothing_is_refused(pattern: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        expand(pattern)


def test_every_timm_model_is_in_one_family() -> None:
    known = families()
    assert list(known) == timm.list_modules()
    assert sorted(name for names in known.values() for name in names) == sorted(expand("timm:*"))
    assert known["inception_v3"] == ("timm:inception_v3",)


def test_the_smallest_has_the_fewest_parameters() -> None:
    assert smallest(["timm:resnet50", "timm:resnet18", "timm:resnet18d", "paper:densenet"]) == "paper:densenet"
    assert smallest(["torchvision:regnet_y_800mf", "torchvision:regnet_y_400mf"]) == "torchvision:regnet_y_400mf"


@pytest.mark.parametrize(("spec", "device"), [("torchvision:resnet18", "meta"), ("torchvision:regnet_x_400mf", "cpu")])
def test_a_sketch_has_memory_only_where_building_computes(spec: str, device: str) -> None:
    model = sketch(spec, num_classes=7, img_size=64)
    assert {parameter.device.type for parameter in model.parameters()} == {device}
    assert [tuple(p.shape) for p in model.parameters()] == [
        tuple(p.shape) for p in build(spec, num_classes=7, img_size=64).parameters()
    ]


def test_a_sketch_says_what_is_wrong() -> None:
    with pytest.raises(UsageError, match="timm has no model 'resnet81'"):
        sketch("timm:resnet81", num_classes=7, img_size=64)


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        ("timm:vit_base_patch14_dinov2", 518),
        ("timm:vit_base_patch16_sapiens2", 768),
        ("torchvision:efficientnet_b7", 600),
        ("torchvision:vit_l_16", 224),
        ("torchvision:ssd300_vgg16", 224),
        ("paper:cnn", 32),
        ("nets.py:Net", 224),
    ],
)
def test_the_size_a_model_is_made_for_is_known_before_it_is_built(spec: str, size: int) -> None:
    assert native_size(spec) == size


def test_the_size_of_an_unknown_model_is_refused() -> None:
    with pytest.raises(UsageError, match="torchvision has no model 'resnet81'"):
        native_size("torchvision:resnet81")


@pytest.mark.parametrize(
    "name", ["quantized_resnet18", "raft_small", "fcn_resnet50", "s3d", "keypointrcnn_resnet50_fpn"]
)
def test_torchvision_models_of_all_kinds_are_what_torchvision_builds(name: str) -> None:
    classes = {} if name == "raft_small" else {"num_classes": 7}
    backbone = {"weights_backbone": None} if name in {"fcn_resnet50", "keypointrcnn_resnet50_fpn"} else {}
    with torch.device("meta"):
        reference = torchvision.models.get_model(name, **classes, **backbone)
    state = sketch(f"torchvision:{name}", num_classes=7, img_size=64).state_dict()
    assert {key: value.shape for key, value in state.items()} == {
        key: value.shape for key, value in reference.state_dict().items()
    }


@pytest.fixture
def transformers() -> object:
    return pytest.importorskip("transformers", reason="transformers, the extra fxsplit[hf], is not installed")


def test_without_transformers_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "transformers.models.auto", None)  # as if never imported by another test
    for ask in (lambda: build("hf:bert", num_classes=2, img_size=32), lambda: expand("hf:*")):
        with pytest.raises(UsageError, match=r"not installed; run pip install 'fxsplit\[hf\]'"):
            ask()
    with pytest.raises(UsageError, match="did you mean 'timm:resnet18' or 'torchvision:resnet18'"):
        build("resnet18", num_classes=2, img_size=32)


@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("hf:berd", "transformers has no type 'berd' .*; did you mean 'bert'"),
        ("hf:dinat", "'hf:dinat' cannot be built small and offline: it needs the library natten"),
        ("hf:wav2vec2", "transformers has no type 'wav2vec2' with a head for image classes or language"),
    ],
)
def test_a_type_that_cannot_be_built_is_refused(spec: str, words: str) -> None:
    for ask in (native_size, lambda spec: build(spec, num_classes=2, img_size=32)):
        with pytest.raises(UsageError, match=words):
            ask(spec)


@pytest.mark.usefixtures("transformers")
def test_the_types_of_transformers_that_cannot_be_built_are_left_out() -> None:
    types = expand("hf:*")
    assert len(types) > 200
    assert {"hf:bert", "hf:gpt2", "hf:llama", "hf:vit", "hf:t5"} < set(types)
    assert "hf:dinat" not in types


@pytest.mark.usefixtures("transformers")
def test_a_type_has_no_pretrained_weights() -> None:
    with pytest.raises(UsageError, match="'hf:bert' has no pretrained weights"):
        build("hf:bert", num_classes=2, img_size=32, pretrained=True)


@pytest.mark.usefixtures("transformers")
def test_a_folder_is_built_as_its_configuration_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved = build("hf:vit", num_classes=3, img_size=64)
    saved.save_pretrained("saved")
    assert native_size("hf:./saved") == 64
    model = build("hf:./saved", num_classes=5, img_size=32)
    assert type(model) is type(saved)
    assert model.config.image_size == 32
    assert model.classifier.out_features == 5
    assert not torch.equal(model.vit.embeddings.cls_token, saved.vit.embeddings.cls_token)
    loaded = build("hf:./saved", num_classes=5, img_size=64, pretrained=True)
    assert loaded.classifier.out_features == 5
    kept = {key: value for key, value in loaded.state_dict().items() if not key.startswith("classifier")}
    assert len(kept) == len(saved.state_dict()) - 2
    for key, value in kept.items():
        assert torch.equal(value, saved.state_dict()[key]), key


@pytest.mark.usefixtures("transformers")
def test_a_folder_that_is_missing_or_has_no_such_head_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be downloaded or read"):
        build(f"hf:{tmp_path}/nothing", num_classes=5, img_size=32)
    (tmp_path / "config.json").write_text('{"model_type": "wav2vec2"}')
    with pytest.raises(UsageError, match="is a 'wav2vec2', which has no head"):
        build(f"hf:{tmp_path}/", num_classes=5, img_size=32)


def test_naming_a_library_imports_no_other() -> None:
    script = (
        "import sys; from fxsplit.models import registry as r; r.expand('paper:*'); r.native_size('paper:cnn');"
        "print(sorted({'timm', 'torchvision', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[]"
