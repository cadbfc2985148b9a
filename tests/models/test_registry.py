"""Models by name: what the library builds, stems for small images, one sentence for each mistake."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from urllib.error import URLError

import huggingface_hub.constants
import pytest
import timm
import torch
import torchvision
from torch import nn

from fxsplit.errors import DataError, UsageError
from fxsplit.models import downloads
from fxsplit.models.registry import Preprocessing, build, preprocessing, sketch
from tests.exact import assert_same_state

IMAGENET_MEAN, IMAGENET_STD, HALF = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (0.5, 0.5, 0.5)
USER_FILE = """
from __future__ import annotations
from dataclasses import dataclass
from torch import nn
from torchvision.ops import StochasticDepth
from beside import WIDTH

@dataclass
class Settings:
    width: int = WIDTH

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(Settings().width, num_classes)

def sized(img_size, *, num_classes=3, depth=1):
    return nn.Linear(img_size, num_classes * depth)

def plain():
    return nn.Identity()

def deep(num_classes, drop_path_rate=0.5):
    return StochasticDepth(drop_path_rate, "row")

def deep_by_keywords(**settings):
    return deep(3, **settings)

def needs_depth(drop_path_rate):
    return deep(3, drop_path_rate)

def pooled_after_block():
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2),
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)),
        nn.MaxPool2d(2),
    )

def unpadded():
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.MaxPool2d(2))

def broken(num_classes):
    raise RuntimeError("two\\nlines")

def wrong():
    return {"a": 1}

NUMBER = 1
BUILT = Net(3)
"""


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(USER_FILE)
    (tmp_path / "beside.py").write_text("WIDTH = 5\n")
    (tmp_path / "bad_syntax.py").write_text("def f(:\n")
    (tmp_path / "empty.py").write_text("NUMBER = 3\n")
    (tmp_path / "needs_more.py").write_text("import surely_not_installed\n")
    monkeypatch.chdir(tmp_path)
    for module in ("nets", "beside", "bad_syntax", "needs_more"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return tmp_path


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network and empty caches; returns the folder of Hugging Face's cache."""

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(downloads, "answers", lambda _url: True)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("spec", "stem", "reference"),
    [
        ("timm:resnet18", "original", lambda: timm.create_model("resnet18", num_classes=7)),
        (
            "timm:vit_tiny_patch16_224",
            "original",
            lambda: timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=32),
        ),
        (
            "timm:vit_tiny_patch16_224",
            "cifar",
            lambda: timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=32, patch_size=4),
        ),
        (
            "timm:mobilenetv3_small_050",  # a 3x3 stem keeps its weights
            "cifar",
            lambda: timm.create_model("mobilenetv3_small_050", num_classes=7),
        ),
        ("torchvision:resnet18", "original", lambda: torchvision.models.resnet18(num_classes=7)),
        (
            "torchvision:vit_b_32",
            "original",
            lambda: torchvision.models.vit_b_32(num_classes=7, image_size=32),
        ),
    ],
)
def test_a_library_model_is_what_the_library_builds(spec: str, stem: str, reference: Callable[[], nn.Module]) -> None:
    torch.manual_seed(3)
    model = build(spec, num_classes=7, img_size=32, stem=stem)
    random_state = torch.get_rng_state()
    torch.manual_seed(3)
    assert_same_state(model, reference())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_a_paper_network_follows_the_data() -> None:
    assert build("paper:cnn", num_classes=5, img_size=16)(torch.randn(2, 3, 16, 16)).shape == (2, 5)


def test_a_paper_network_needs_neither_timm_nor_torchvision() -> None:
    script = (
        "import sys; from fxsplit.models.registry import build; build('paper:cnn', num_classes=2, img_size=8);"
        "print(sorted({'timm', 'torchvision'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[]"


@pytest.mark.parametrize(
    "spec", ["torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", "torchvision:lraspp_mobilenet_v3_large"]
)
@pytest.mark.usefixtures("offline")
def test_a_backbone_is_not_downloaded_unasked(spec: str) -> None:
    assert isinstance(build(spec, num_classes=5, img_size=32), nn.Module)


def test_a_model_that_torchvision_warns_about_is_built_quietly() -> None:
    build("torchvision:googlenet", num_classes=5, img_size=32)


def test_a_hub_model_gets_the_image_size_that_its_configuration_asks_for(offline: Path) -> None:
    repository = offline / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    config = {"input_size": [3, 224, 224], "fixed_input_size": True, "num_classes": 1000}
    (snapshot / "config.json").write_text(
        json.dumps({"architecture": "vit_tiny_patch16_224", "pretrained_cfg": config})
    )
    model = build("timm:hf-hub:someone/tiny", num_classes=7, img_size=32)
    assert model.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize(
    ("spec", "block", "original", "cifar"),
    [
        ("timm:resnet18", "layer1", (64, 8, 8), (64, 32, 32)),
        ("timm:resnet50d", "layer1", (64, 8, 8), (64, 32, 32)),
        ("timm:resnext50_32x4d", "layer1", (64, 8, 8), (64, 32, 32)),
        ("timm:densenet121", "features.denseblock1", (64, 8, 8), (64, 32, 32)),
        ("timm:efficientnet_b0", "blocks", (32, 16, 16), (32, 32, 32)),
        ("timm:tf_efficientnet_b0", "blocks", (32, 16, 16), (32, 32, 32)),
        ("timm:mobilenetv3_small_100", "blocks", (16, 16, 16), (16, 32, 32)),
        ("timm:convnext_tiny", "stages", (96, 8, 8), (96, 32, 32)),
        ("timm:vit_tiny_patch16_224", "blocks", (1 + 2 * 2, 192), (1 + 8 * 8, 192)),
        ("torchvision:resnet18", "layer1", (64, 8, 8), (64, 32, 32)),
        ("torchvision:mobilenet_v3_small", "features.1", (16, 16, 16), (16, 32, 32)),
    ],
)
def test_the_cifar_stem_keeps_the_image(
    spec: str, block: str, original: tuple[int, ...], cifar: tuple[int, ...]
) -> None:
    reached: list[tuple[int, ...]] = []
    for stem in ("original", "cifar"):
        model = build(spec, num_classes=4, img_size=32, stem=stem).eval()
        model.get_submodule(block).register_forward_pre_hook(
            lambda _module, inputs: reached.append(tuple(inputs[0].shape[1:]))
        )
        with torch.no_grad():
            assert model(torch.randn(1, 3, 32, 32)).shape == (1, 4)
    assert reached == [original, cifar]


def test_the_cifar_stem_changes_nothing_else() -> None:
    original = build("timm:resnet18", num_classes=4, img_size=32)
    changed = build("timm:resnet18", num_classes=4, img_size=32, stem="cifar")
    types = {path: type(module) for path, module in original.named_modules()}
    assert {path: type(m) for path, m in changed.named_modules()} == types | {"maxpool": nn.Identity}
    shapes = {key: value.shape for key, value in original.state_dict().items()}
    small = {"conv1.weight": torch.Size([64, 3, 3, 3])}
    assert {key: value.shape for key, value in changed.state_dict().items()} == shapes | small


@pytest.mark.usefixtures("user_folder")
def test_the_cifar_stem_leaves_a_pooling_after_a_block() -> None:
    model = build("nets.py:pooled_after_block", num_classes=4, img_size=32, stem="cifar")
    assert [type(module) for module in model.children()] == [nn.Conv2d, nn.Sequential, nn.MaxPool2d]
    first = model[0]
    assert (first.kernel_size, first.stride, first.padding) == ((3, 3), (1, 1), (1, 1))
    assert first.bias is not None


@pytest.mark.usefixtures("user_folder")
def test_the_cifar_stem_pads_a_convolution_that_did_not() -> None:
    model = build("nets.py:unpadded", num_classes=4, img_size=32, stem="cifar")
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 8, 32, 32)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("timm:vgg16", "does not begin with a strided convolution"),
        ("paper:resnext", "does not begin with a strided convolution"),
        ("nets.py:plain", "does not begin with a strided convolution"),
        ("torchvision:vit_b_16", "all its layers depend on it"),
        ("timm:vit_base_patch16_sapiens2", "all its layers depend on its patches"),
        ("timm:coatnet_pico_rw_224", "with num_classes=4, img_size=32, patch_size=4"),
    ],
)
@pytest.mark.usefixtures("user_folder")
def test_a_model_without_such_a_stem_is_refused(spec: str, reason: str) -> None:
    with torch.device("meta"), pytest.raises(UsageError, match=reason) as caught:
        build(spec, num_classes=4, img_size=32, stem="cifar")
    assert spec.partition(":")[2] in str(caught.value)


@pytest.mark.parametrize("source", ["nets.py", "./nets.py", "nets"])
@pytest.mark.usefixtures("user_folder")
def test_a_factory_gets_what_its_signature_names(source: str) -> None:
    search_path = sys.path.copy()
    net = build(f"{source}:Net", num_classes=7, img_size=32)
    assert net.fc.weight.shape == (7, 5)
    assert build(f"{source}:sized", num_classes=7, img_size=32).weight.shape == (7, 32)
    assert isinstance(build(f"{source}:plain", num_classes=7, img_size=32), nn.Identity)
    assert sys.path == search_path
    build(f"{source}:Net", num_classes=7, img_size=32)  # a second look at the source leaves the first model whole
    assert_same_state(pickle.loads(pickle.dumps(net)), net)


def test_a_file_elsewhere_imports_what_lies_beside_it(user_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(user_folder.parent)
    net = build(f"{user_folder}/nets.py:Net", num_classes=7, img_size=32)
    assert net.fc.weight.shape == (7, 5)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("resnet18", "'timm:resnet18' or 'torchvision:resnet18'"),
        ("vgg16", "'timm:vgg16' or 'torchvision:vgg16' or 'paper:vgg16'"),
        ("densenet12", "did you mean 'timm:densenet121' or 'torchvision:densenet121'?"),
        ("", "write timm:NAME"),
        ("timm:", "write timm:NAME"),
        (":resnet18", "'timm:resnet18' or 'torchvision:resnet18'"),
        ("timm:resnet81", "timm has no model 'resnet81'; did you mean 'resnet18'"),
        ("timm:resnet18.no_such_tag", "no_such_tag"),
        ("timm:elsewhere:resnet18", "Unknown model source 'elsewhere'"),
        ("torchvision:resnet81", "torchvision has no model 'resnet81'; did you mean 'resnet18'"),
        ("torchvision:vit_h_14", "torchvision cannot build 'vit_h_14' with image_size=32, num_classes=7"),
        ("paper:cnnn", "only cnn, vgg16, resnext, densenet; did you mean 'cnn'?"),
        ("tim:resnet18", "'tim' in 'tim:resnet18' is no library .*; did you mean 'timm'?"),
        ("no_such_package.nets:Net", "no module that can be imported"),
        ("net.py:Net", "there is no file 'net.py'; did you mean 'nets.py'"),
        ("nets.py:Nett", "'nets.py' has no function or class 'Nett'; did you mean 'Net'?"),
        ("nets:NUMBER", "'nets' has no function or class 'NUMBER'"),
        ("nets.py", "is a file; .* nets.py:Settings, nets.py:Net, nets.py:sized, .*, nets.py:broken, nets.py:wrong$"),
        ("nets.py:", "is a file; .* nets.py:Settings, nets.py:Net, "),
        ("empty.py", "is a file; .* builds the model: it defines none$"),
        ("nets.py:BUILT", "is a module already built; name a function"),
        ("nets.py:broken", "'nets.py:broken' raised RuntimeError: two$"),
        ("nets.py:wrong", "'nets.py:wrong' returned dict, not a torch.nn.Module"),
        ("bad_syntax.py:f", "'bad_syntax.py' cannot be imported: SyntaxError"),
        ("bad_syntax:f", "'bad_syntax' cannot be imported: SyntaxError"),
        ("needs_more.py:f", "'needs_more.py' cannot be imported: .*surely_not_installed"),
        ("needs_more:f", "'needs_more' cannot be imported: .*surely_not_installed"),
    ],
)
@pytest.mark.usefixtures("user_folder")
def test_a_wrong_name_is_told_in_one_sentence(spec: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        build(spec, num_classes=7, img_size=32)
    assert "\n" not in str(caught.value)


def test_a_file_can_be_mended_after_an_error(user_folder: Path) -> None:
    with pytest.raises(UsageError, match="cannot be imported"):
        build("bad_syntax.py:f", num_classes=7, img_size=32)
    (user_folder / "bad_syntax.py").write_text("from torch.nn import Identity\n")
    assert isinstance(build("bad_syntax.py:Identity", num_classes=7, img_size=32), nn.Identity)


@pytest.mark.usefixtures("user_folder")
def test_the_error_of_a_factory_is_kept_as_the_cause() -> None:
    with pytest.raises(UsageError) as caught:
        build("nets.py:broken", num_classes=7, img_size=32)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_an_unknown_stem_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no stem 'cifer'.*did you mean 'cifar'"):
        build("timm:resnet18", num_classes=7, img_size=32, stem="cifer")


def rates(model: nn.Module) -> list[float]:
    """Of stochastic depth, in the order of the blocks."""
    names = {torchvision.ops.StochasticDepth: "p", timm.layers.DropPath: "drop_prob"}
    return [getattr(module, names[type(module)]) for module in model.modules() if type(module) in names]


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("timm:resnet18", [0.2 * block / 7 for block in range(1, 8)]),
        ("torchvision:convnext_tiny", [0.2 * block / 17 for block in range(18)]),
        ("paper:resnext", [0.05, 0.1, 0.15, 0.2]),
        ("nets.py:deep", [0.2]),
        ("nets.py:deep_by_keywords", [0.2]),
    ],
)
@pytest.mark.usefixtures("user_folder")
def test_stochastic_depth_reaches_the_model(spec: str, wanted: list[float]) -> None:
    assert rates(build(spec, num_classes=4, img_size=32, drop_path=0.2)) == pytest.approx(wanted)


@pytest.mark.usefixtures("user_folder")
def test_without_a_rate_models_keep_their_own() -> None:
    assert max(rates(build("torchvision:convnext_tiny", num_classes=4, img_size=32))) == 0.1
    assert rates(build("nets.py:deep", num_classes=4, img_size=32)) == [0.5]


@pytest.mark.parametrize(
    ("spec", "parameter"),
    [
        ("timm:vgg16", "drop_path_rate"),
        ("timm:hrnet_w18_small", "drop_path_rate"),
        ("torchvision:resnet18", "stochastic_depth_prob"),
        ("torchvision:swin_t", "stochastic_depth_prob"),
        ("hf:vit", "drop_path_rate"),
        ("paper:densenet", "drop_path_rate"),
        ("nets.py:plain", "drop_path_rate"),
    ],
)
@pytest.mark.usefixtures("user_folder")
def test_a_model_without_stochastic_depth_is_refused(spec: str, parameter: str) -> None:
    with pytest.raises(UsageError) as caught:
        sketch(spec, num_classes=4, img_size=32, drop_path=0.2)
    assert str(caught.value) == f"{spec!r} takes no {parameter}, the rate of stochastic depth; leave out drop-path"


@pytest.mark.usefixtures("user_folder")
def test_a_factory_that_lacks_the_rate_is_told_so_in_its_own_words() -> None:
    with pytest.raises(UsageError, match="missing 1 required positional argument: 'drop_path_rate'"):
        build("nets.py:needs_depth", num_classes=4, img_size=32)


@pytest.mark.parametrize(
    ("spec", "pretrained"),
    [("timm:resnet18", True), ("timm:hf-hub:timm/resnet18.a1_in1k", False), ("torchvision:resnet18", True)],
)
@pytest.mark.usefixtures("offline")
def test_without_a_network_one_sentence_says_what_to_do(spec: str, pretrained: bool) -> None:
    with pytest.raises(DataError, match="connect to the network, copy its files into") as caught:
        build(spec, num_classes=7, img_size=32, pretrained=pretrained)
    assert f"'{spec}'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("timm:nf_resnet26", "No pretrained weights exist for nf_resnet26"),
        ("paper:cnn", "'paper:cnn' has no pretrained weights"),
        ("nets.py:plain", "'nets.py:plain' has no pretrained weights"),
    ],
)
@pytest.mark.usefixtures("user_folder", "offline")
def test_weights_that_nobody_has_are_refused(spec: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build(spec, num_classes=7, img_size=32, pretrained=True)


@pytest.mark.parametrize(
    ("spec", "img_size", "mean", "std", "interpolation"),
    [
        ("timm:resnet18", 224, IMAGENET_MEAN, IMAGENET_STD, "bicubic"),
        ("timm:resnet18.tv_in1k", 224, IMAGENET_MEAN, IMAGENET_STD, "bilinear"),
        ("timm:vit_base_patch16_384", 384, HALF, HALF, "bicubic"),
        ("timm:vit_base_patch16_sapiens2", 768, IMAGENET_MEAN, IMAGENET_STD, "bilinear"),
        ("torchvision:resnet18", 224, IMAGENET_MEAN, IMAGENET_STD, "bilinear"),
        ("torchvision:efficientnet_b1", 240, IMAGENET_MEAN, IMAGENET_STD, "bilinear"),
        ("torchvision:efficientnet_b3", 300, IMAGENET_MEAN, IMAGENET_STD, "bicubic"),
    ],
)
def test_pretrained_weights_say_how_images_were_prepared(
    spec: str, img_size: int, mean: tuple[float, ...], std: tuple[float, ...], interpolation: str
) -> None:
    expected = Preprocessing(img_size=img_size, mean=mean, std=std, interpolation=interpolation)
    assert preprocessing(spec) == expected


@pytest.mark.parametrize(
    "spec", ["torchvision:raft_small", "torchvision:r3d_18", "hf:vit", "paper:cnn", "nets.py:plain"]
)
@pytest.mark.usefixtures("offline")
def test_where_nobody_says_how_images_were_prepared_nothing_is_made_up(spec: str) -> None:
    assert preprocessing(spec) is None


@pytest.mark.parametrize("spec", ["timm:resnet18.no_such_tag", "torchvision:resnet81", "resnet18"])
def test_a_wrong_name_is_told_before_weights_are_looked_for(spec: str) -> None:
    with pytest.raises(UsageError):
        preprocessing(spec)


def publish(reference: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the state of `reference` the weights that torchvision downloads."""
    monkeypatch.setattr(downloads, "answers", lambda _url: True)
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *_args, **_kwargs: reference.state_dict()
    )


@pytest.mark.parametrize(("name", "classifier"), [("resnet18", "fc"), ("mobilenet_v3_small", "classifier.3")])
def test_pretrained_weights_keep_all_but_the_classifier(
    name: str, classifier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = torchvision.models.get_model(name)
    publish(published, monkeypatch)
    assert_same_state(build(f"torchvision:{name}", num_classes=1000, img_size=32, pretrained=True), published)
    model = build(f"torchvision:{name}", num_classes=7, img_size=32, pretrained=True)
    assert model.get_submodule(classifier).weight.shape[0] == 7
    # Random weights of a new head would send random gradients into the others.
    assert not any(parameter.any() for parameter in model.get_submodule(classifier).parameters())
    published.set_submodule(classifier, model.get_submodule(classifier))
    assert_same_state(model, published)


@pytest.mark.parametrize(("num_classes", "is_zero"), [(7, True), (1000, False)])
def test_a_head_of_timm_starts_at_zero_where_it_is_new(
    num_classes: int, is_zero: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxsplit.models.libraries.timm._download", lambda *_: nullcontext())
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_args, **_kwargs: None)
    model = build("timm:resnet18", num_classes=num_classes, img_size=32, pretrained=True)
    assert [not parameter.any() for parameter in model.get_submodule("fc").parameters()] == [is_zero, is_zero]


@pytest.mark.parametrize("name", ["squeezenet1_1", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_a_pretrained_model_without_a_linear_classifier_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    no_backbone = {"weights_backbone": None} if "rcnn" in name else {}
    publish(torchvision.models.get_model(name, **no_backbone), monkeypatch)
    with pytest.raises(UsageError, match=r"does not end in a linear layer .* 7 classes"):
        build(f"torchvision:{name}", num_classes=7, img_size=32, pretrained=True)
