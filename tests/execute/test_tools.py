"""Tools that take a model take an executor as they take the model."""

from __future__ import annotations

import copy
import inspect
import io
import tempfile
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from fxsplit.capture.tracing import trace
from fxsplit.execute.executor import Executor
from fxsplit.plan.partition import partition
from fxsplit.plan.schedule import Phase
from tests.networks import Chain

pytestmark = pytest.mark.usefixtures("one_thread")


def executor(model: nn.Module, *args: Any, **kwargs: Any) -> Executor:
    captured = trace(model, args, kwargs)
    return Executor(captured, partition(captured, count=2))


def vit() -> Any:
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **options)


def test_what_the_executor_lacks_is_the_models() -> None:
    model = vit()
    net: Any = executor(model, torch.randn(2, 3, 16, 16))
    assert inspect.signature(net.forward) == inspect.signature(model.forward)
    assert net.no_weight_decay() == model.no_weight_decay()
    assert net.num_features == model.num_features
    assert net.group_matcher() == model.group_matcher()
    assert not hasattr(net, "no_such_attribute")
    net.num_classes = 7
    assert model.num_classes == 7
    net.own = 1
    assert not hasattr(model, "own")
    # A class that somebody wraps is used.
    assert inspect.isfunction(Executor.forward)


@pytest.mark.parametrize(
    "options",
    [
        {"opt": "adamw", "layer_decay": 0.7, "weight_decay": 0.05},
        {"opt": "sgd", "weight_decay": 0.1, "momentum": 0.9},
        {"opt": "lamb", "weight_decay": 0.1, "filter_bias_and_bn": False},
    ],
)
def test_timms_optimizers_make_the_same_groups(options: dict[str, Any]) -> None:
    model = vit()
    net = executor(model, torch.randn(2, 3, 16, 16))

    def groups(module: nn.Module) -> list[Any]:
        made = create_optimizer_v2(module, lr=0.1, **options)
        return [
            {**{key: value for key, value in group.items() if key != "params"}, "ids": [id(p) for p in group["params"]]}
            for group in made.param_groups
        ]

    assert groups(net) == groups(model)
    assert len(groups(net)) == {"adamw": 8, "sgd": 2, "lamb": 2}[str(options["opt"])]


def vit_of_transformers() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    # Otherwise forward itself writes down, in the configuration, which of its problems this is.
    kind = {"problem_type": "single_label_classification", "num_labels": 3}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, **kind))


def test_the_trainer_of_transformers_trains_it_as_it_trains_the_model() -> None:
    pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")
    from transformers import Trainer, TrainingArguments

    plain = vit_of_transformers()
    model = copy.deepcopy(plain)
    random = torch.Generator().manual_seed(0)
    data = [
        # The Trainer takes out what forward does not name.
        {"pixel_values": torch.randn(3, 16, 16, generator=random), "labels": index % 3, "path": str(index)}
        for index in range(8)
    ]
    example = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    losses = []
    for module in (plain, executor(model, **example)):
        options = TrainingArguments(
            tempfile.mkdtemp(), per_device_train_batch_size=4, num_train_epochs=2, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True, label_names=["labels"],
        )  # fmt: skip
        trainer = Trainer(module, options, train_dataset=data, eval_dataset=data)
        losses.append((trainer.train().training_loss, trainer.evaluate()["eval_loss"]))
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def test_what_the_trainer_asks() -> None:
    model = vit_of_transformers()
    example = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    net: Any = executor(model, **example)
    assert list(inspect.signature(net.forward).parameters)[:2] == ["pixel_values", "labels"]
    assert net.config is model.config
    assert net.accepts_loss_kwargs is False
    assert executor(model, **example, num_items_in_batch=torch.tensor(2)).accepts_loss_kwargs is True


def test_copies_and_exports_keep_working() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 8, 8)
    net = executor(Chain(), images)
    net.enter(Phase(start=1, stop=2, epochs=1))
    with torch.no_grad():
        expected = net.eval()(images)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    exported = torch.export.export(net, (images,)).module()
    others: list[Any] = [copy.deepcopy(net), torch.load(file, weights_only=False), exported]
    torch.compiler.reset()
    others.append(torch.compile(net, backend="eager"))
    with torch.no_grad():
        for other in others:
            assert torch.equal(other(images), expected)
    torch.compiler.reset()


def test_a_model_keeps_its_mode_when_an_executor_is_made() -> None:
    for training in (True, False):
        model = Chain().train(training)
        net = executor(model, torch.randn(2, 3, 8, 8))
        assert net.training is model.training is training
        model.train(not training)
        assert net.training is not training
        assert isinstance(net(torch.randn(2, 3, 8, 8)), Tensor)
