"""Convolutions of settled partitions together with what follows them: the pattern, the choice, the numbers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxsplit.capture.tracing import trace
from fxsplit.execute.executor import Executor
from fxsplit.execute.settled import fusing
from fxsplit.execute.settled.fusing import Device, Kernel
from fxsplit.measuring.op_costs import measure
from tests.execute.settled.test_prefix import Calls, at_cut, by_prefix, check_settled, close, lived, settled
from tests.execute.test_code import calls
from tests.networks import HAZARDS, SHORTER, Chain

pytestmark = pytest.mark.usefixtures("one_thread")

LOW = torch.bfloat16
SHAPE = (4, 3, 8, 8)


class Fake:
    """A device whose fused kernels are those of the CPU, one after the other, and whose clock prefers what it is told.

    Args:
        fastest: "fused" or "plain".
        wrong_by: what the fused kernels add to their results.
        fails: whether they have no kernel.
    """

    def __init__(self, fastest: str = "fused", *, wrong_by: float = 0.0, fails: bool = False) -> None:
        self.fastest, self.wrong_by, self.fails = fastest, wrong_by, fails
        self.timed, self.fused, self.added, self.is_free = 0, 0, 0, True
        self.device = Device(self.relu, self.add_relu, self.seconds, lambda: self.is_free)

    def relu(self, x: Tensor, weight: Tensor, bias: Tensor, *where: Any) -> Tensor:
        assert x.dtype is weight.dtype is bias.dtype
        if self.fails:
            raise RuntimeError("no kernel")
        self.fused += 1
        return torch.relu(F.conv2d(x, weight, bias, *where)) + self.wrong_by

    def add_relu(self, x: Tensor, weight: Tensor, shortcut: Tensor, factor: float, bias: Tensor, *where: Any) -> Tensor:
        assert x.dtype is weight.dtype is bias.dtype is shortcut.dtype
        if self.fails:
            raise RuntimeError("no kernel")
        self.added += 1
        with torch.autocast("cpu", enabled=False):
            exact = F.conv2d(x.float(), weight.float(), bias.float(), *where)
            assert shortcut.shape == exact.shape
            exact += factor * shortcut.float()
        return torch.relu(exact).to(x.dtype) + self.wrong_by

    def seconds(self, run: Callable[[], object], device: torch.device) -> float:
        assert device.type == "cpu"
        self.timed += 1
        before = self.fused + self.added
        run()
        is_fused = self.fused + self.added > before
        self.fused -= is_fused
        return 1.0 if is_fused is (self.fastest == "fused") else 2.0

    def counted(self, run: Callable[[], object]) -> tuple[int, int]:
        """How often the fused kernels are called, without and with a shortcut."""
        self.fused = self.added = 0
        run()
        return self.fused, self.added


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fake]:
    def use(*args: Any, **options: Any) -> Fake:
        made = Fake(*args, **options)
        monkeypatch.setitem(fusing.DEVICES, "cpu", made.device)
        return made

    return use


def network(name: str, size: int) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **SHORTER.get(name, {}))
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(8, 3, size, size))
    return model


def test_a_cpu_folds() -> None:
    assert fusing.DEVICES.keys() == {"cuda"}


# Where the head begins, which alone trains; before it: ReLUs after a convolution or its norm, those after a sum with a
# shortcut, and norms without a convolution before or a ReLU behind.
NETWORKS = {
    "resnet18": ("global_pool", 1 + 8, 8, 3),
    "resnext50_32x4d": ("global_pool", 1 + 2 * 5, 5, 4),
    "densenet121": ("global_pool", 1 + 9, 0, 9 + 4),
    "vgg11_bn": ("pre_logits", 8, 0, 0),
    "mobilenetv3_small_100": ("global_pool", 5 + 9, 0, 34 - 5),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_fused_is_as_exact_as_autocast(name: str, fake: Callable[..., Fake]) -> None:
    head, relus, sums, norms = NETWORKS[name]
    device = fake()
    # Which of the two is nearer varies with the images, so these are always the same.
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    images = images.contiguous(memory_format=torch.channels_last)
    net = settled(network(name, 32), (2, 3, 32, 32), at=[head])
    exact = at_cut(net, images)
    with torch.autocast("cpu", LOW):
        by_hand = at_cut(net, images)
        by_prefix(net, images)
        assert device.counted(lambda: by_prefix(net, images)) == (relus, sums)
        with Calls() as calls:
            ours = by_prefix(net, images)
        assert calls.count("batch_norm") == norms
    for fused, plain, right in zip(ours, by_hand, exact, strict=True):
        assert fused.dtype is plain.dtype
        assert fused.stride() == plain.stride()
        error, of_plain = (float((each.double() - right.double()).norm()) for each in (fused, plain))
        assert 0 < error <= 1.1 * of_plain


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenetv3_small_100", "vit_tiny_patch16_224"])
def test_plain_is_what_autocast_computes_with_weights_that_are_cast_once(name: str, fake: Callable[..., Fake]) -> None:
    size = 224 if "vit" in name else 32
    fake("plain")
    images = torch.randn(2, 3, size, size)
    net = settled(network(name, size), (2, 3, size, size), count=4)
    with torch.autocast("cpu", LOW):
        by_hand = at_cut(net, images)
        assert all(torch.equal(a, b) for a, b in zip(by_prefix(net, images), by_hand, strict=True))
        with Calls() as plain:
            at_cut(net, images)
        with Calls() as ours:
            assert all(torch.equal(a, b) for a, b in zip(by_prefix(net, images), by_hand, strict=True))
    weights = sum(
        isinstance(module, nn.Conv2d | nn.Linear) and any(f"{path}." in name for name in net.settled_state())
        for path, module in net.named_modules()
        for name in [f"{path}.weight"]
    )
    assert ours.count("_to_copy") <= plain.count("_to_copy") - weights


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenetv3_small_100"])
@pytest.mark.parametrize("way", ["folded", "product", "fused"])
def test_every_way_delivers_the_same(
    name: str, way: str, fake: Callable[..., Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake()
    used: list[str] = []

    def choose(kernel: Kernel, _precision: torch.dtype | None, x: Tensor, *_shortcut: Tensor) -> str:
        used.append(way if way in kernel._possible(x) else "plain")
        return used[-1]

    monkeypatch.setattr(Kernel, "_fastest", choose)
    images = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    net = settled(network(name, 32), (2, 3, 32, 32), at=[NETWORKS[name][0]])
    for ours, plain in zip(by_prefix(net, images), at_cut(net, images), strict=True):
        assert fusing._is_alike(ours, plain)
        assert float((ours - plain).norm()) <= 1e-5 * float(plain.norm())
    # All 1x1 convolutions of a ResNet-18 have strides.
    assert (way in used) is ((name, way) != ("resnet18", "product"))


def test_folded_weights_are_cast_once_too() -> None:
    images = torch.randn(SHAPE)
    net = settled(lived(Chain(), SHAPE), SHAPE, at=["head"], settled_dtype=LOW).train()
    net.settle(images)
    with Calls() as calls:
        net.settle(images)
    # The images, and what is delivered.
    assert calls.count("_to_copy") == 2


def head_of(model: nn.Module) -> Executor:
    return settled(lived(model, SHAPE), SHAPE, at=["head"])


def test_each_form_is_timed_once(fake: Callable[..., Fake]) -> None:
    device = fake()
    net = head_of(Chain()).train()
    images = torch.randn(4, 3, 8, 8)

    def timed(given: Tensor) -> int:
        before = device.timed
        net.settle(given)
        return device.timed - before

    # Two sites, three ways each; the second one reads the first one's output.
    assert timed(images) == 2 * 3 * fusing.ROUNDS
    assert timed(images) == timed(images[:-1].repeat(2, 1, 1, 1)[:4]) == 0
    # What was found is kept over phases and epochs; a copy, which may run elsewhere, finds it anew.
    net.enter(net._phase)
    net.train()
    assert timed(images) == 0
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        before = device.timed
        copied.settle(images)
        assert device.timed == before + 2 * 3 * fusing.ROUNDS
    # Other sizes, types and layouts, and batches of another order of magnitude, are timed by themselves.
    layout = images.contiguous(memory_format=torch.channels_last)
    for others in (torch.randn(4, 3, 6, 6), torch.randn(64, 3, 8, 8), layout):
        assert timed(others) > 0
        assert timed(others) == 0
    with torch.autocast("cpu", LOW):
        assert timed(images) > 0
    for size in range(9, 9 + 2 * fusing.MOST_FORMS):
        timed(torch.randn(4, 3, size, size))
    assert timed(torch.randn(4, 3, 5, 5)) == 0


def test_the_faster_way_runs(fake: Callable[..., Fake]) -> None:
    images = torch.randn(SHAPE)
    for fastest, expected in (("fused", (2, 0)), ("plain", (0, 0))):
        device = fake(fastest)
        net = head_of(Chain())
        assert device.counted(lambda net=net: (net.settle(images), net.settle(images))[1]) >= expected
        assert device.counted(lambda net=net: net.settle(images)) == expected


def test_without_cudnn_nothing_is_fused(fake: Callable[..., Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    device = fake()
    net, images = head_of(Chain()), torch.randn(SHAPE)
    assert device.counted(lambda: by_prefix(net, images)) == (0, 0)


def test_a_wrong_or_missing_kernel_is_left_out(fake: Callable[..., Fake]) -> None:
    images = torch.randn(SHAPE)
    for device in (fake(wrong_by=1e-3), fake(fails=True)):
        fusing.DEVICES["cpu"] = device.device
        net = head_of(Chain())
        by_prefix(net, images)
        assert device.counted(lambda net=net: by_prefix(net, images)) == (0, 0)
        assert close(by_prefix(net, images), at_cut(net, images))


def test_nothing_is_timed_while_a_graph_is_recorded_or_in_a_deterministic_run(fake: Callable[..., Fake]) -> None:
    device = fake()
    images = torch.randn(SHAPE)
    net = head_of(Chain())
    device.is_free = False
    assert all(torch.equal(a, b) for a, b in zip(by_prefix(net, images), at_cut(net, images), strict=True))
    assert device.timed == 0
    device.is_free = True
    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.equal(a, b) for a, b in zip(by_prefix(net, images), at_cut(net, images), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert device.timed == 0
    net = head_of(Chain())
    by_prefix(net, images)
    timed = device.timed
    assert timed > 0
    # In the next epoch the faster way is known, and its weights are not made yet.
    net.train()
    device.is_free = False
    assert all(torch.equal(a, b) for a, b in zip(by_prefix(net, images), at_cut(net, images), strict=True))
    device.is_free = True
    assert device.counted(lambda: by_prefix(net, images)) == (2, 0)
    assert device.timed == timed


@pytest.mark.parametrize("name", HAZARDS)
def test_every_hazard_is_fused_or_left_alone(name: str, fake: Callable[..., Fake]) -> None:
    fake()
    check_settled(name)


class Residual(nn.Module):
    """A convolution, a norm, and what `end` does with that and the input; `relu` is no ReLU, and `add` no sum."""

    def __init__(self, end: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.SiLU()
        self.add, self.end, self.head = nn.CosineSimilarity(), end, nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        return self.head(self.end(self, self.norm(self.conv(x)), x).mean((2, 3)))


def written_between(_: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    kept = x + 1
    x.mul_(2)
    return (y + kept).relu()


def written_shortcut(_: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    kept = x
    x += y
    return F.relu(x) + kept


def in_region(_: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    with torch.autocast("cpu", LOW):
        return (y + x).relu()


# `m` is the model, `y` comes from the norm, `x` is the input of the convolution.
ENDS: dict[str, tuple[Callable[[Any, Tensor, Tensor], Tensor], tuple[int, int]]] = {
    "relu": (lambda m, y, x: y.relu(), (1, 0)),
    "relu in place": (lambda m, y, x: y.relu_(), (1, 0)),
    "function in place": (lambda m, y, x: F.relu(y, inplace=True), (1, 0)),
    "sum": (lambda m, y, x: torch.relu(y + x), (0, 1)),
    "sum the other way around": (lambda m, y, x: torch.relu(x + y), (0, 1)),
    "sum in place": (lambda m, y, x: y.add_(x).relu_(), (0, 1)),
    "sum with a factor": (lambda m, y, x: torch.add(y, x, alpha=2).relu(), (0, 0)),
    "sum with itself": (lambda m, y, x: (y + y).relu(), (0, 0)),
    "sum with a number": (lambda m, y, x: (y + 1).relu(), (0, 0)),
    "sum with one row": (lambda m, y, x: (y + x[:, :, :1]).relu(), (0, 0)),
    "sum that is used twice": (lambda m, y, x: (lambda z: z.relu() * z)(y + x), (0, 0)),
    "another name": (lambda m, y, x: m.relu(y), (0, 0)),
    "another sum": (lambda m, y, x: m.add(y, x).relu()[:, None].expand(-1, 3, -1, -1), (0, 0)),
    "sum, another name": (lambda m, y, x: m.relu(y + x), (0, 0)),
    "used before the relu": (lambda m, y, x: y.relu() * y, (0, 0)),
    "written between": (written_between, (0, 0)),
    "written shortcut": (written_shortcut, (0, 0)),
    "in a region": (in_region, (0, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("precision", [None, LOW])
def test_what_follows_is_fused_where_that_is_the_same(
    name: str, precision: torch.dtype | None, fake: Callable[..., Fake]
) -> None:
    device = fake()
    end, expected = ENDS[name]
    net = head_of(Residual(end))
    images = torch.randn(SHAPE)
    exact = at_cut(net, images)
    with torch.autocast("cpu", LOW, enabled=precision is not None):
        by_prefix(net, images)
        found = device.counted(lambda: by_prefix(net, images))
        # In lower precision the shortcut is one that autocast leaves in float32, as no kernel takes it.
        assert found == (expected if precision is None or not expected[1] else (0, 0))
        assert close(by_prefix(net, images), exact, 1e-5 if precision is None else 3e-2)
        assert [each.dtype for each in by_prefix(net, images)] == [each.dtype for each in at_cut(net, images)]


def test_weights_that_change_are_followed_and_hooks_heeded(fake: Callable[..., Fake]) -> None:
    device = fake()
    images = torch.randn(SHAPE)
    net = head_of(Chain())
    model = net._model
    first = by_prefix(net, images)
    with torch.no_grad():
        model.conv1.weight.mul_(2)
        model.norm2.running_var.mul_(3)
    assert close(by_prefix(net, images), at_cut(net, images))
    assert not close(by_prefix(net, images), first)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    assert close(by_prefix(net, images), at_cut(net, images))
    handle = model.norm1.register_forward_hook(lambda _module, _args, output: 2 * output)
    assert device.counted(lambda: by_prefix(net, images)) == (0, 0)
    assert close(by_prefix(net, images), at_cut(net, images))
    handle.remove()
    assert device.counted(lambda: by_prefix(net, images)) == (2, 0)


def test_a_model_in_lower_precision_is_fused_in_it(fake: Callable[..., Fake]) -> None:
    device = fake()
    net = head_of(Chain())
    images = torch.randn(SHAPE)
    exact = at_cut(net, images)
    net.to(LOW)
    assert close(by_prefix(net, images.to(LOW)), exact, 3e-2)
    assert device.counted(lambda: by_prefix(net, images.to(LOW))) == (2, 0)


def test_compiled_the_prefix_is_one_graph_of_fixed_shapes() -> None:
    compiled: list[list[Any]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compiled.append([each for each in inputs if not isinstance(each, Tensor)])
        assert sum(node.target in (F.conv2d, torch.conv2d) for node in graph.graph.nodes) == 2
        return graph.forward

    torch.compiler.reset()
    model = lived(Chain(), SHAPE)
    images = torch.randn(SHAPE)
    (plain,) = at_cut(settled(copy.deepcopy(model), SHAPE, at=["conv2", "head"]), images)
    net = settled(model, SHAPE, at=["conv2", "head"], backend=backend).train()
    for batch in (images, images[:3], images[:2], images):
        (found,) = net.settle(batch)
        assert close([found], [plain[: len(batch)]])
    # A batch of another size is compiled by itself: no size is a symbol.
    assert compiled == [[], [], []]
    torch.compiler.reset()


def test_what_is_fused_is_measured_so(fake: Callable[..., Fake]) -> None:
    device = fake()
    model = lived(Residual(lambda m, y, x: torch.relu(y + x)), SHAPE)
    captured = trace(model, (torch.empty(SHAPE),))
    measured = measure(captured, (torch.randn(SHAPE),), steps=1).eval
    assert device.added > 0
    settled_ops = {op.name for op in measured.ops if op.settled_seconds}
    assert {op.name for op in measured.ops if op.forward_seconds} - settled_ops == {"norm", "add", "relu"}


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
@pytest.mark.parametrize("fuses", [True, False])
def test_what_is_settled_costs_the_host_no_more_than_by_hand(name: str, fuses: bool, fake: Callable[..., Fake]) -> None:
    if fuses:
        fake()
    images = torch.randn(2, 3, 32, 32)
    net = settled(network(name, 32), (2, 3, 32, 32), at=[NETWORKS[name][0]])
    by_prefix(net, images)
    by_hand, ours = (calls(lambda run=run: run(net, images))[0] for run in (at_cut, by_prefix))
    assert ours <= by_hand


def test_cudnn_is_called_as_it_wants_to_be(fake: Callable[..., Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU all that can be seen is that it takes the arguments, and then has no kernel for the device."""
    refused: list[str] = []

    def of(name: str) -> Callable[..., Tensor]:
        def call(*given: Any) -> Tensor:
            with pytest.raises(NotImplementedError, match=f"'aten::{name}' with arguments from the 'CPU' backend"):
                getattr(fusing.DEVICES["cuda"], name.removeprefix("cudnn_"))(*given)
            refused.append(name)
            raise NotImplementedError

        return call

    device = fake().device._replace(
        convolution_relu=of("cudnn_convolution_relu"), convolution_add_relu=of("cudnn_convolution_add_relu")
    )
    monkeypatch.setitem(fusing.DEVICES, "cpu", device)
    net = settled(network("resnet18", 32), (2, 3, 32, 32), at=["global_pool"])
    images = torch.randn(2, 3, 32, 32)
    assert close(by_prefix(net, images), at_cut(net, images))
    assert (refused.count("cudnn_convolution_relu"), refused.count("cudnn_convolution_add_relu")) == (9, 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_on_a_gpu(name: str, precision: torch.dtype) -> None:
    """As exact as autocast, and the same in a CUDA graph."""
    net = settled(network(name, 32), (2, 3, 32, 32), at=[NETWORKS[name][0]])
    net.to("cuda", memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(64, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    exact = at_cut(copy.deepcopy(net).double(), images.double())
    with torch.autocast("cuda", precision):
        by_hand, ours = at_cut(net, images), by_prefix(net, images)
        for fused, plain, right in zip(ours, by_hand, exact, strict=True):
            error, of_plain = (float((each.double() - right).norm()) for each in (fused, plain))
            assert 0 < error <= 1.1 * of_plain
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = by_prefix(net, images)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(recorded, by_prefix(net, images), strict=True))
    if name.startswith("res"):
        assert "fused" in {way for stage in net._prefix._stages for ways in stage._ways for way in ways.values()}
