"""A device map covers every parameter and buffer once, where the partition runs that uses it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

import fxsplit
from fxsplit.errors import PartitionError, UsageError
from tests.networks import CalledTwice, Chain, FunctionalNorm, RootParameter, TiedWeight


class Unused(Chain):
    """A module that forward never calls, and one that is registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.again = nn.Linear(2, 2), self.head


def resnet() -> nn.Module:
    model: nn.Module = timm.create_model("resnet18", num_classes=5)
    return model


def mapped(model: nn.Module, at: list[str], devices: list[str | int]) -> dict[str, str | int]:
    trace = fxsplit.trace(model, (torch.empty(2, 3, 8, 8),))
    return fxsplit.device_map(trace, fxsplit.partition(trace, at=at), devices)


def device_of(name: str, devices: dict[str, str | int]) -> str | int:
    (key,) = (key for key in devices if key in ("", name) or name.startswith(f"{key}."))
    return devices[key]


@pytest.mark.parametrize(
    ("make", "at"),
    [
        (Chain, ["conv2"]),
        (Unused, ["conv2", "head"]),
        (FunctionalNorm, ["fused:relu"]),
        (RootParameter, ["head"]),
        (resnet, ["layer2.0.conv2", "layer3", "fc"]),
    ],
)
def test_every_parameter_and_buffer_is_covered_once_by_the_partition_that_owns_it(
    make: Callable[[], nn.Module], at: list[str]
) -> None:
    model = make()
    trace = fxsplit.trace(model, (torch.empty(2, 3, 8, 8),))
    parts = fxsplit.partition(trace, at=at)
    devices = fxsplit.device_map(trace, parts, [part.index for part in parts])
    owners = {name: part.index for part in parts for name in part.state}
    owners |= {name.replace("head", "again"): owner for name, owner in owners.items()}
    held = [name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())]
    assert {name: device_of(name, devices) for name in held} == {name: owners.get(name, 0) for name in held}


def test_a_divided_module_is_resolved_into_its_children() -> None:
    devices = mapped(resnet(), ["layer2.0.conv2"], ["cpu", 0])
    assert {path: device for path, device in devices.items() if path.startswith("layer")} == {
        "layer1": "cpu", "layer2.0.conv1": "cpu", "layer2.0.bn1": "cpu", "layer2.0.drop_block": "cpu",
        "layer2.0.act1": "cpu", "layer2.0.aa": "cpu", "layer2.0.conv2": 0, "layer2.0.bn2": 0, "layer2.0.act2": 0,
        "layer2.0.downsample": 0, "layer2.1": 0, "layer3": 0, "layer4": 0,
    }  # fmt: skip


def test_partitions_on_one_device_are_one() -> None:
    assert mapped(resnet(), ["layer2.0.conv2"], ["cpu", "cpu"]) == {"": "cpu"}


def test_parameters_and_buffers_of_a_divided_module_have_keys_of_their_own() -> None:
    devices = mapped(RootParameter(), ["head"], [0, 1])
    assert devices == {
        "scale": 0, "shift": 0, "calls": 0, "conv1": 0, "norm1": 0, "conv2": 0, "norm2": 0, "head": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("make", "at", "name"),
    [
        (RootParameter, "conv2", "scale"),
        (TiedWeight, "second", "first.weight"),
        (CalledTwice, "conv2_1", "conv2.weight"),
    ],
)
def test_what_two_devices_would_share_is_refused(make: Callable[[], nn.Module], at: str, name: str) -> None:
    with pytest.raises(PartitionError, match=rf"'{name}' is used by partitions 0 and 1, .* all uses$"):
        mapped(make(), [at], [0, 1])
    assert mapped(make(), [at], [0, 0]) == {"": 0}


def test_every_partition_needs_a_device() -> None:
    with pytest.raises(UsageError, match="there are 2 partitions and 1 devices"):
        mapped(Chain(), ["conv2"], ["cpu"])
    trace, other = (fxsplit.trace(make(), (torch.empty(2, 3, 8, 8),)) for make in (Chain, CalledTwice))
    with pytest.raises(PartitionError, match="from another trace"):
        fxsplit.device_map(trace, fxsplit.partition(other, count=2), [0, 1])
