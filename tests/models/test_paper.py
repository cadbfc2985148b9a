"""The paper's networks: the counts it states, the structure it describes, the initialisation of Keras."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch import nn

from fxsplit.errors import UsageError
from fxsplit.models.libraries.paper import NETWORKS, DenseLayer, ResNeXtGroup

KERAS_LAYERS = [
    "conv1",
    "conv2",
    "pool1",
    "drop1",
    "conv3",
    "conv4",
    "pool2",
    "drop2",
    "flatten",
    "fc1",
    "drop3",
    "fc2",
]


def parameters_by_layer(network: nn.Module) -> dict[str, int]:
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in network.named_children()}
    return {name: count for name, count in counts.items() if count}


def test_there_are_four_networks() -> None:
    assert list(NETWORKS) == ["cnn", "vgg16", "resnext", "densenet"]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("img_size", "in_channels", "num_classes"), [(16, 3, 10), (32, 3, 100), (64, 1, 7)])
def test_images_become_logits(name: str, img_size: int, in_channels: int, num_classes: int) -> None:
    network = NETWORKS[name](num_classes, img_size, in_channels)
    logits = network(torch.randn(2, in_channels, img_size, img_size))
    assert logits.shape == (2, num_classes)
    assert logits.min() < 0, "these are probabilities"


@pytest.mark.parametrize("name", ["cnn", "vgg16"])
@pytest.mark.parametrize("num_classes", [10, 100])
def test_parameters_are_those_the_paper_states(name: str, num_classes: int) -> None:
    assert parameters_by_layer(NETWORKS[name](num_classes, 32, 3)) == {
        "conv1": 896,
        "conv2": 9_248,  # the paper says 896, for an input of 3 channels
        "conv3": 18_496,
        "conv4": 36_928,  # the paper says 18,496, for an input of 32 channels
        "fc1": 2_097_664,
        "fc2": 513 * num_classes,
    }


def test_cnn_has_one_child_a_keras_layer() -> None:
    network = NETWORKS["cnn"](10, 32, 3)
    assert [name for name, _ in network.named_children()] == KERAS_LAYERS
    rates = [child.p for child in network.children() if isinstance(child, nn.Dropout)]
    assert rates == [0.25, 0.25, 0.5]
    with_relu = [n for n, child in network.named_children() if any(isinstance(m, nn.ReLU) for m in child.modules())]
    assert with_relu == ["conv1", "conv2", "conv3", "conv4", "fc1"]


def test_resnext_has_four_groups_of_two_convolutions_that_double_the_filters() -> None:
    network = NETWORKS["resnext"](10, 32, 3)
    groups = [child for child in network.children() if isinstance(child, ResNeXtGroup)]
    assert [(g.conv1.out_channels, g.conv2.out_channels) for g in groups] == [
        (64, 64),
        (128, 128),
        (256, 256),
        (512, 512),
    ]
    assert [(g.conv1.groups, g.conv2.groups) for g in groups] == [(1, 32)] * 4
    assert [name for name, _ in network.named_children()] == (
        ["group1", "pool1", "group2", "pool2", "group3", "pool3", "group4", "pool4", "gap", "flatten", "fc"]
    )


def test_resnext_group_adds_its_shortcut_before_the_last_relu() -> None:
    group = ResNeXtGroup(32, 64).eval()
    x = torch.randn(2, 32, 8, 8)
    branch = group.bn2(group.conv2(torch.relu(group.bn1(group.conv1(x)))))
    torch.testing.assert_close(group(x), torch.relu(branch + group.shortcut(x)), rtol=0, atol=0)


def test_resnext_paths_are_transformed_alone() -> None:
    group = ResNeXtGroup(32, 64)
    x = torch.randn(1, 64, 4, 4)
    changed = x.clone()
    changed[:, :2] += 1  # the first of 32 paths
    difference = (group.conv2(changed) - group.conv2(x)).abs().amax(dim=(0, 2, 3))
    assert difference[:2].min() > 0
    assert difference[2:].max() == 0


def test_resnext_leaves_out_transformed_paths_in_training_only() -> None:
    group = ResNeXtGroup(32, 64, drop_path=0.5)
    x = torch.randn(64, 32, 4, 4)
    kept = group(x)
    alone = torch.relu(group.shortcut(x))
    left_out = (kept == alone).flatten(1).all(1)
    assert 16 < left_out.sum() < 48
    branch = group.bn2(group.conv2(torch.relu(group.bn1(group.conv1(x)))))
    torch.testing.assert_close(kept[~left_out], torch.relu(2 * branch + group.shortcut(x))[~left_out])
    group.eval()
    plain = ResNeXtGroup(32, 64).eval()
    plain.load_state_dict(group.state_dict())
    assert torch.equal(group(x), plain(x))


def test_resnext_without_stochastic_depth_draws_nothing() -> None:
    network = NETWORKS["resnext"](10, 16, 3)
    before = torch.get_rng_state()
    network(torch.randn(2, 3, 16, 16, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before)
    assert not any("drop" in name for name, _ in network.named_modules())


def test_densenet_layers_keep_their_input_and_add_the_growth_rate() -> None:
    layer = DenseLayer(24, 12)
    x = torch.randn(2, 24, 8, 8)
    y = layer(x)
    assert y.shape == (2, 36, 8, 8)
    assert torch.equal(y[:, :24], x)
    assert layer.bottleneck.conv.out_channels == 48


def test_densenet_is_bc_of_depth_40() -> None:
    network = NETWORKS["densenet"](10, 32, 3)
    weighted = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == 40
    assert [len(child) for name, child in network.named_children() if name.startswith("block")] == [6, 6, 6]
    sides: list[tuple[int, int]] = []
    for name, child in network.named_children():
        if name.startswith("block"):
            child.register_forward_hook(lambda _m, _i, y: sides.append((y.shape[1], y.shape[2])))
    network(torch.randn(1, 3, 32, 32))
    assert sides == [(24 + 72, 32), (48 + 72, 16), (60 + 72, 8)]


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_are_glorot_uniform_and_biases_zero(name: str) -> None:
    torch.manual_seed(0)
    checked = 0
    for module in NETWORKS[name](10, 32, 3).modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            area = module.weight[0, 0].numel()
            bound = sqrt(6 / (area * (module.weight.shape[1] + module.weight.shape[0])))
            largest = module.weight.abs().max().item()
            assert 0.95 * bound < largest <= bound
            assert module.bias is None or not module.bias.any()
            checked += 1
    assert checked == {"cnn": 6, "vgg16": 6, "resnext": 13, "densenet": 40}[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_one_step_moves_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name](10, 16, 3)
    before = {key: value.detach().clone() for key, value in network.named_parameters()}
    loss = nn.functional.cross_entropy(network(torch.randn(8, 3, 16, 16)), torch.arange(8))
    loss.backward()
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    assert torch.isfinite(loss)
    assert [key for key, value in network.named_parameters() if torch.equal(value, before[key])] == []


@pytest.mark.parametrize("name", NETWORKS)
def test_the_seed_decides_the_weights(name: str) -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(NETWORKS[name](10, 16, 3).parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("name", NETWORKS)
def test_no_op_works_in_place(name: str) -> None:
    assert not any(getattr(module, "inplace", False) for module in NETWORKS[name](10, 16, 3).modules())


@pytest.mark.parametrize(("name", "too_small"), [("cnn", 3), ("vgg16", 3), ("resnext", 15), ("densenet", 3)])
def test_an_image_that_vanishes_is_refused(name: str, too_small: int) -> None:
    with pytest.raises(UsageError, match=f"{too_small} x {too_small} pixels.*at least {too_small + 1}"):
        NETWORKS[name](10, too_small, 3)
    smallest = NETWORKS[name](10, too_small + 1, 3).eval()
    assert smallest(torch.randn(1, 3, too_small + 1, too_small + 1)).shape == (1, 10)
