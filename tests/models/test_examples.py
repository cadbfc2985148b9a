"""Inputs that suit a model: its own forward takes them, at any batch size, alike on every device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxsplit.models import registry
from fxsplit.models.examples import Example, example, takes_images


def built(spec: str, **settings: Any) -> nn.Module:
    return registry.sketch(spec, num_classes=10, img_size=settings.get("img_size") or registry.native_size(spec))


def inputs(spec: str, batch_size: int = 2, **settings: Any) -> Example:
    return example(spec, nn.Identity(), batch_size=batch_size, **settings)


@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        ("timm:resnet18", [(3, 3, 224, 224)]),
        ("timm:inception_v3", [(3, 3, 299, 299)]),
        ("timm:vit_tiny_patch16_384", [(3, 3, 384, 384)]),
        ("torchvision:resnet18", [(3, 3, 224, 224)]),
        ("torchvision:inception_v3", [(3, 3, 299, 299)]),
        ("torchvision:swin_v2_t", [(3, 3, 256, 256)]),
        ("torchvision:vit_h_14", [(3, 3, 224, 224)]),
        ("torchvision:fcn_resnet50", [(3, 3, 224, 224)]),
        ("torchvision:r3d_18", [(3, 3, 16, 112, 112)]),
        ("torchvision:mvit_v2_s", [(3, 3, 16, 224, 224)]),
        ("torchvision:raft_small", [(3, 3, 224, 224)] * 2),
        ("paper:cnn", [(3, 3, 32, 32)]),
    ],
)
def test_inputs_have_the_size_that_the_model_is_made_for(spec: str, shapes: list[tuple[int, ...]]) -> None:
    suited = inputs(spec, batch_size=3, device="meta")
    assert [tuple(value.shape) for value in suited.args] == shapes
    assert suited.kwargs == {}
    assert built(spec)(*(value.to("meta") for value in suited.args)) is not None


def test_the_seed_alone_decides() -> None:
    first, again = (inputs("paper:cnn", seed=3).args[0] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, inputs("paper:cnn", seed=4).args[0])
    before = torch.get_rng_state()
    inputs("torchvision:maskrcnn_resnet50_fpn", training=True, img_size=16)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("spec", "extra"),
    [
        ("torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", set()),
        ("torchvision:maskrcnn_resnet50_fpn", {"masks"}),
        ("torchvision:keypointrcnn_resnet50_fpn", {"keypoints"}),
    ],
)
def test_a_detector_learns_from_targets_inside_its_images(spec: str, extra: set[str]) -> None:
    images, targets = inputs(spec, batch_size=2, img_size=64, training=True).args
    assert [image.shape for image in images] == [(3, 64, 64)] * 2
    assert len(targets) == 2
    for target in targets:
        assert set(target) == {"boxes", "labels"} | extra
        low, high = target["boxes"][:, :2], target["boxes"][:, 2:]
        assert (low < high).all()
        assert (low >= 0).all()
        assert (high <= 64).all()
        if "keypoints" in extra:
            places = target["keypoints"][..., :2]
            assert ((places >= low[:, None]) & (places <= high[:, None])).all()
    assert inputs(spec, batch_size=2, img_size=64).args[1:] == ()


@pytest.mark.parametrize(
    "spec", ["torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", "torchvision:ssdlite320_mobilenet_v3_large"]
)
def test_a_detector_trains_and_detects(spec: str) -> None:
    torch.manual_seed(0)
    model = registry.build(spec, num_classes=4, img_size=64)
    losses = model(*example(spec, model, batch_size=2, img_size=64, training=True).args)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert len(model.eval()(*example(spec, model, batch_size=3, img_size=64).args)) == 3


def test_a_detector_resizes_to_the_size_it_was_built_for() -> None:
    model = built("torchvision:retinanet_resnet50_fpn", img_size=96)
    assert model.transform.min_size == (96,)


class Stated(nn.Module):
    def __init__(self, example_input_array: Any) -> None:
        super().__init__()
        self.example_input_array = example_input_array


ROWS = torch.arange(6.0).reshape(3, 2)


@pytest.mark.parametrize("batch_size", [2, 3, 7])
def test_a_users_own_inputs_are_cut_or_repeated(batch_size: int) -> None:
    rows = ROWS[[0, 1, 2, 0, 1, 2, 0][:batch_size]]
    table = torch.ones(5, 2)
    for given, args, kwargs in [
        (ROWS, (rows,), {}),
        ((ROWS, table, 4), (rows, table, 4), {}),
        ({"x": ROWS, "table": table, "flag": True}, (), {"x": rows, "table": table, "flag": True}),
    ]:
        suited = example("nets.py:Net", Stated(given), batch_size=batch_size)
        for value, expected in zip(tree_leaves((suited.args, suited.kwargs)), tree_leaves((args, kwargs)), strict=True):
            assert torch.equal(value, expected) if isinstance(value, Tensor) else value == expected
        assert list(suited.kwargs) == list(kwargs)
    assert example("nets.py:Net", Stated(ROWS), batch_size=batch_size, device="meta").args[0].is_meta


def test_a_user_who_says_nothing_gets_images() -> None:
    for model in (Stated(None), nn.Identity()):
        assert example("nets.py:Net", model, batch_size=2).args[0].shape == (2, 3, 224, 224)
        assert example("nets.py:Net", model, batch_size=2, img_size=16).args[0].shape == (2, 3, 16, 16)


def huggingface() -> None:
    pytest.importorskip("transformers", reason="transformers, the extra fxsplit[hf], is not installed")


@pytest.mark.parametrize(
    ("kind", "class_name", "output"),
    [
        ("bert", "BertForMaskedLM", (3, 16, 256)),
        ("gpt2", "GPT2LMHeadModel", (3, 16, 256)),
        ("llama", "LlamaForCausalLM", (3, 16, 256)),
        ("mixtral", "MixtralForCausalLM", (3, 16, 256)),
        ("t5", "T5ForConditionalGeneration", (3, 16, 256)),
        ("bart", "BartForConditionalGeneration", (3, 16, 256)),
        ("vit", "ViTForImageClassification", (3, 10)),
        ("deit", "DeiTForImageClassification", (3, 10)),
        ("swin", "SwinForImageClassification", (3, 10)),
        ("convnext", "ConvNextForImageClassification", (3, 10)),
        ("resnet", "ResNetForImageClassification", (3, 10)),
    ],
)
def test_a_type_of_transformers_is_small_and_runs(kind: str, class_name: str, output: tuple[int, ...]) -> None:
    huggingface()
    spec = f"hf:{kind}"
    model = registry.build(spec, num_classes=10, img_size=registry.native_size(spec)).eval()
    assert type(model).__name__ == class_name
    assert sum(parameter.numel() for parameter in model.parameters()) < 30e6
    suited = example(spec, model, batch_size=3)
    assert suited.args == ()
    with torch.no_grad():
        answer = model(**suited.kwargs)
    assert answer.logits.shape == output
    assert "past_key_values" not in answer


def test_a_model_says_whether_it_takes_images() -> None:
    huggingface()
    assert [takes_images(built(spec)) for spec in ("hf:vit", "hf:bert", "hf:t5")] == [True, False, False]
    assert takes_images(nn.Identity())
    assert [takes_images(Stated(given)) for given in (torch.ones(1, 3, 8, 8), torch.ones(1, 8), None)] == [
        True,
        False,
        True,
    ]


def test_tokens_reach_a_type_without_images() -> None:
    huggingface()
    kwargs = example("hf:t5", built("hf:t5"), batch_size=5, device="meta").kwargs
    assert {name: tuple(value.shape) for name, value in kwargs.items()} == {
        "input_ids": (5, 16),
        "decoder_input_ids": (5, 16),
    }
    assert all(value.is_meta and value.dtype == torch.int64 for value in kwargs.values())


@pytest.mark.parametrize("img_size", [64, 224])
def test_an_image_type_follows_the_image_size(img_size: int) -> None:
    huggingface()
    model = built("hf:vit", img_size=img_size)
    kwargs = example("hf:vit", model, batch_size=2, img_size=img_size, device="meta").kwargs
    assert kwargs["pixel_values"].shape == (2, 3, img_size, img_size)
    assert model.to("meta")(**kwargs).logits.shape == (2, 10)


DETECTORS = {"fasterrcnn", "fcos", "keypointrcnn", "maskrcnn", "retinanet", "ssd300", "ssdlite320"}


@pytest.mark.slow
@pytest.mark.parametrize("spec", registry.expand("torchvision:*"))
def test_every_model_of_torchvision_takes_its_example(spec: str) -> None:
    model = registry.sketch(spec, num_classes=10, img_size=64 if _detects(spec) else registry.native_size(spec))
    if _detects(spec):  # boxes depend on numbers, so it has to run where there are some
        model = registry.build(spec, num_classes=10, img_size=64)
    device = next(model.parameters()).device
    for training in (True, False):
        suited = example(
            spec, model.train(training), batch_size=2, img_size=64 if _detects(spec) else None, training=training,
            device=device,
        )  # fmt: skip
        with torch.no_grad():
            answer = model(*suited.args)
        assert all(value.device == device for value in tree_leaves(answer))
        if isinstance(answer, Tensor):
            assert answer.shape == (2, 10)


def _detects(spec: str) -> bool:
    return spec.partition(":")[2].partition("_")[0] in DETECTORS


@pytest.mark.slow
def test_every_type_of_transformers_takes_its_example() -> None:
    huggingface()
    specs = registry.expand("hf:*")
    assert len(specs) > 200
    broken: dict[str, Exception] = {}
    for spec in specs:
        try:
            model = registry.build(spec, num_classes=10, img_size=registry.native_size(spec))
            for training in (True, False):
                model.train(training)(**example(spec, model, batch_size=2, training=training).kwargs)
        except Exception as error:
            broken[spec] = error
    assert broken == {}
