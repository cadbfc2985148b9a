"""The settled prefix: what the settled partitions compute in evaluation, within rounding, and nothing else touched."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from fxsplit.capture.tracing import trace
from fxsplit.execute.executor import Executor
from fxsplit.plan.cuts import cuts
from fxsplit.plan.partition import partition
from fxsplit.plan.schedule import Phase
from tests.networks import HAZARDS, SHORTER, Chain, FunctionalNorm

pytestmark = pytest.mark.usefixtures("one_thread")


class Calls(TorchDispatchMode):
    """Counts what reaches the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def count(self, part: str) -> int:
        return sum(part in name for name in self.names)


def lived(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Weights and statistics of which none is 0 or 1."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() == 1:
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=random))
        model.train()
        model(torch.randn(shape, generator=random))
    return model


def settled(
    model: nn.Module, shape: tuple[int, ...], *, at: Sequence[str] = (), count: int | None = None, **options: Any
) -> Executor:
    """An executor in whose phase only the last partition trains."""
    captured = trace(model, (torch.empty(shape),))
    net = Executor(captured, partition(captured, at=at, count=count), **options)
    stop = len(net.partitions)
    net.enter(Phase(start=stop - 1, stop=stop, epochs=1))
    return net


def at_cut(net: Executor, images: Tensor) -> list[Tensor]:
    """What the settled partitions deliver, by themselves, without the prefix."""
    values = [images]
    with torch.no_grad():
        for index in range(net.window[0]):
            values = net._evaluate(index, values)
    return [value for value in values if isinstance(value, Tensor)]


def by_prefix(net: Executor, images: Tensor) -> list[Tensor]:
    with net._freezing.evaluating(*range(net.window[0])):
        values = net._prefix(net._model, [images], 0, net.window[0])
    return [value for value in values if isinstance(value, Tensor)]


def close(ours: list[Tensor], plain: list[Tensor], bound: float = 1e-5) -> bool:
    return all(float((a - b).abs().max()) <= bound * float(b.abs().max()) for a, b in zip(ours, plain, strict=True))


def norms(function: Callable[[], object]) -> int:
    with Calls() as calls:
        function()
    return calls.count("batch_norm")


def body(*layers: nn.Module) -> nn.Module:
    """The layers, which shall settle, and a layer that trains."""
    return nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.LazyLinear(5))


IMAGES = (4, 8, 6, 6)
FOLDED: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "bias": (lambda: [nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU()], IMAGES),
    "no bias, stride, padding": (
        lambda: [
            nn.Conv2d(8, 6, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(6, eps=0.1),
            nn.ReLU(inplace=True),
        ],
        IMAGES,
    ),
    "depthwise": (lambda: [nn.Conv2d(8, 16, 3, groups=8), nn.BatchNorm2d(16), nn.Hardswish()], IMAGES),
    "grouped, dilated": (lambda: [nn.Conv2d(8, 12, 3, groups=4, dilation=2), nn.BatchNorm2d(12)], IMAGES),
    "padding by name": (lambda: [nn.Conv2d(8, 6, 3, padding="same"), nn.BatchNorm2d(6)], IMAGES),
    "norm without weight": (lambda: [nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6, affine=False)], IMAGES),
    "dropout between": (lambda: [nn.Conv2d(8, 6, 3), nn.Dropout2d(), nn.Identity(), nn.BatchNorm2d(6)], IMAGES),
    "two in a row": (
        lambda: [nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)],
        IMAGES,
    ),
    "1D": (lambda: [nn.Conv1d(8, 6, 3), nn.BatchNorm1d(6)], (4, 8, 6)),
    "3D": (lambda: [nn.Conv3d(8, 6, 3), nn.BatchNorm3d(6)], (4, 8, 6, 6, 6)),
    "linear": (lambda: [nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU()], (4, 8)),
}


def built(layers: list[nn.Module], shape: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    model = body(*layers)
    model(torch.zeros(shape))
    return lived(model, shape)


@pytest.mark.parametrize("name", FOLDED)
def test_a_norm_is_folded_into_the_op_before_it(name: str) -> None:
    layers, shape = FOLDED[name]
    model = built(layers(), shape)
    net = settled(model, shape, at=["1"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    given = images.clone()
    assert norms(lambda: at_cut(net, images)) > 0
    assert norms(lambda: by_prefix(net, images)) == 0
    ours, plain = by_prefix(net, images), at_cut(net, images)
    assert close(ours, plain)
    assert [value.stride() for value in ours] == [value.stride() for value in plain]
    assert torch.equal(images, given)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def hooked() -> list[nn.Module]:
    norm = nn.BatchNorm2d(6)
    norm.register_forward_hook(lambda _module, _args, output: 2 * output)
    return [nn.Conv2d(8, 6, 3), norm]


def prehooked() -> list[nn.Module]:
    conv = nn.Conv2d(8, 6, 3)
    conv.register_forward_pre_hook(lambda _module, args: (2 * args[0],))
    return [conv, nn.BatchNorm2d(6)]


class Scaled(nn.Conv2d):
    """Looks like a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Skip(nn.Module):
    """What the convolution delivers is needed without the norm too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x + self.norm(x)


class Columns(nn.Module):
    """A linear layer over the last of three dimensions, while the norm goes by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x.mean(3)))


KEPT: dict[str, Callable[[], list[nn.Module]]] = {
    "hook": hooked,
    "pre-hook": prehooked,
    "parametrization": lambda: [parametrizations.weight_norm(nn.Conv2d(8, 6, 3)), nn.BatchNorm2d(6)],
    "subclass": lambda: [Scaled(8, 6, 3), nn.BatchNorm2d(6)],
    "padding with reflections": lambda: [nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6)],
    "used twice": lambda: [Skip()],
    "norm over another dimension": lambda: [Columns()],
    "norm without statistics": lambda: [nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)],
    "norm first": lambda: [nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)],
    "transposed": lambda: [nn.ConvTranspose2d(8, 6, 3), nn.BatchNorm2d(6)],
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_not_surely_exact_is_left_as_it_is(name: str) -> None:
    model = built(KEPT[name](), IMAGES)
    net = settled(model, IMAGES, at=["1"])
    images = torch.randn(IMAGES, generator=torch.Generator().manual_seed(2))
    assert norms(lambda: by_prefix(net, images)) == norms(lambda: at_cut(net, images)) == 1
    assert close(by_prefix(net, images), at_cut(net, images))
    with torch.no_grad():
        assert close([net.eval()(images)], [model.eval()(images)])


def test_hooks_and_parametrizations_that_come_later_are_heeded() -> None:
    images = torch.randn(4, 3, 8, 8)
    for change in (
        lambda model: model.norm1.register_forward_hook(lambda _module, _args, output: 2 * output),
        lambda model: model.conv1.register_forward_pre_hook(lambda _module, args: (2 * args[0],)),
        lambda model: parametrizations.weight_norm(model.conv1),
    ):
        model = lived(Chain(), (4, 3, 8, 8))
        net = settled(model, (4, 3, 8, 8), at=["conv2"])
        assert norms(lambda net=net: by_prefix(net, images)) == 0
        change(model)
        with torch.no_grad():
            assert close([net.eval()(images)], [model.eval()(images)])
        assert norms(lambda net=net: by_prefix(net, images)) == 1


def check_settled(name: str) -> None:
    """Hold what the prefix of a hazard delivers, at each of its cuts, against what its stages do."""
    torch.manual_seed(0)
    model = lived(HAZARDS[name](), (4, 3, 8, 8))
    captured = trace(model, (torch.empty(2, 3, 8, 8),))
    most = 1 + sum(cut.refusal is None for cut in cuts(captured))
    parts = partition(captured, count=min(most, 5))
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    for count in range(1, len(parts)):
        net = Executor(captured, parts)
        net.enter(Phase(start=count, stop=len(parts), epochs=1))
        # Copies, because two of the models move on with every call.
        plain, ours = copy.deepcopy(net), copy.deepcopy(net)
        given = images.clone()
        assert close(by_prefix(ours, images), at_cut(plain, images))
        assert torch.equal(images, given)


@pytest.mark.parametrize("name", HAZARDS)
def test_every_hazard_settles(name: str) -> None:
    check_settled(name)


NETWORKS = {
    "resnext50_32x4d": 64,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "mobilenetv3_small_100": 32,
    "vit_tiny_patch16_224": 32,
    "convnext_atto": 32,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_real_networks_within_one_part_in_100000(name: str) -> None:
    torch.manual_seed(0)
    size = NETWORKS[name]
    options = {"img_size": size} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=5, **options, **SHORTER.get(name, {}))
    images = torch.randn(4, 3, size, size)
    with torch.no_grad():
        for _ in range(3):
            model.train()(images)
    net = settled(model, (2, 3, size, size), count=4)
    ours, plain = by_prefix(net, images), at_cut(net, images)
    assert all(float((a - b).norm()) <= 1e-5 * float(b.norm()) for a, b in zip(ours, plain, strict=True))
    # Every second norm of a DenseNet has no convolution to go into, and three cuts may part the two.
    kept = norms(lambda: at_cut(net, images)) // 2 if name == "densenet121" else 0
    assert norms(lambda: by_prefix(net, images)) <= kept + 3
    with torch.no_grad():
        expected = model.eval()(images)
        assert float((net.eval()(images) - expected).norm()) <= 1e-5 * float(expected.norm())


def test_weights_follow_the_model() -> None:
    shape = (4, 3, 8, 8)
    images = torch.randn(shape)
    model = lived(FunctionalNorm(), shape)
    net = settled(model, shape, at=["conv2", "head"])

    def right() -> bool:
        return close(by_prefix(net, images), at_cut(net, images)) and norms(lambda: by_prefix(net, images)) == 0

    first = by_prefix(net, images)
    assert right()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    model.load_state_dict(other.state_dict())
    assert right()
    assert not close(by_prefix(net, images), first)
    model.load_state_dict({key: value.clone() for key, value in other.state_dict().items()}, assign=True)
    assert right()
    with torch.no_grad():
        model.fused.running_var.mul_(3)
    assert right()
    net.enter(Phase(start=1, stop=3, epochs=1))
    assert right()
    net.double()
    images = images.double()
    assert right()


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_fold_their_own_weights(copy_of: Callable[[Executor], Executor]) -> None:
    shape = (4, 3, 8, 8)
    images = torch.randn(shape)
    net = settled(lived(FunctionalNorm(), shape), shape, at=["conv2"])
    before = by_prefix(net, images)
    other = copy_of(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert close(by_prefix(other, images), at_cut(other, images))
    assert all(torch.equal(a, b) for a, b in zip(by_prefix(net, images), before, strict=True))


class Viewing(Chain):
    """A view that only contiguous tensors allow, on what a convolution delivers."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x.view(len(x), -1).view(x.shape))).relu()
        return self.head(x.mean((2, 3)))


class WritingThroughReshape(Chain):
    """A reshape that views a contiguous tensor, and copies another, is written into."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x))
        x.reshape(x.shape[0], -1).clamp_(-0.1, 0.1)
        return self.head(self.norm2(self.conv2(x)).relu().mean((2, 3)))


class Drawing(Chain):
    """A number is drawn for each element of what a convolution delivers, in the order in which these lie in memory."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        torch.manual_seed(0)
        x = self.norm2(self.conv2(x + torch.rand_like(x))).relu()
        return self.head(F.dropout(x, 0.5, training=self.training).mean((2, 3)))


@pytest.mark.parametrize("kind", [Viewing, WritingThroughReshape, Drawing])
def test_layouts_that_the_model_counts_on_are_kept(kind: type[nn.Module]) -> None:
    shape = (4, 3, 8, 8)
    images = torch.randn(shape)
    model = lived(kind(), shape)
    net = settled(model, shape, at=["norm2"])
    assert close(by_prefix(net, images), at_cut(net, images))


def test_images_and_models_in_channels_last_stay_so() -> None:
    shape = (4, 3, 8, 8)
    images = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    model = lived(Chain(), shape).to(memory_format=torch.channels_last)
    net = settled(model, shape, at=["conv2"])
    assert close(by_prefix(net, images), at_cut(net, images))
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in by_prefix(net, images))


def test_lower_precision_is_for_training_alone() -> None:
    shape = (4, 3, 8, 8)
    images = torch.randn(shape)
    model = lived(Chain(), shape)
    (exact,) = settled(model, shape, at=["conv2"]).train().settle(images)
    net = settled(model, shape, at=["conv2"], settled_dtype=torch.bfloat16).train()
    (low,) = net.settle(images)
    with torch.autocast("cpu", torch.bfloat16):
        (under_autocast,) = net.settle(images)
    assert low.dtype is exact.dtype is torch.float32
    assert under_autocast.dtype is torch.bfloat16
    assert torch.equal(low, under_autocast.float())
    assert not close([low], [exact])
    assert close([low], [exact], 2e-2)
    assert torch.equal(net.eval().settle(images)[0], at_cut(net, images)[0])


def test_weights_that_were_cast_for_autocast_are_not_used_without_it() -> None:
    shape = (4, 3, 8, 8)
    images = torch.randn(shape)
    model = lived(Chain(), shape)
    (exact,) = settled(model, shape, at=["conv2"]).train().settle(images)
    net = settled(model, shape, at=["conv2"]).train()
    with torch.autocast("cpu", torch.bfloat16):
        assert net.settle(images)[0].dtype is torch.bfloat16
    assert torch.equal(net.settle(images)[0], exact)


def test_settled_state_keeps_its_hash_whatever_is_called() -> None:
    shape = (4, 3, 8, 8)
    model = lived(FunctionalNorm(), shape)
    net = settled(model, shape, at=["conv2", "head"])
    names = sorted(name for part in net.partitions[:2] for name in part.state)

    def digest() -> str:
        state = model.state_dict()
        return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in names)).hexdigest()

    before = digest()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for step in range(3):
        model.train()
        net.train(bool(step % 2))
        model.fused.train()
        F.cross_entropy(net(torch.randn(shape)), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
    assert digest() == before


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_variants_are_used_again_when_the_cut_moves() -> None:
    compiled: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = lived(Chain(), (4, 3, 8, 8))
    captured = trace(model, (torch.empty(2, 3, 8, 8),))
    net = Executor(captured, partition(captured, count=3), backend=backend)
    images = torch.randn(4, 3, 8, 8)
    found = []
    for start in (0, 1, 2, 1, 2, 0):
        net.enter(Phase(start=start, stop=3, epochs=1))
        net.train()(images)
        with torch.no_grad():
            net.eval()(images)
        found.append(len(compiled))
    # Both modes of all three. Then at each cut that is new: the partition before it, settled, and in evaluation, where
    # its weights want no gradient any more, and the one after it in training, whose input wants none. Then nothing.
    assert found == [6, 9, 12, 12, 12, 12]
    torch.compiler.reset()
