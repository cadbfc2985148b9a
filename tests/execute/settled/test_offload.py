"""Settled weights on the host: all that a partition reads is on the device while it runs, and nothing changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import update_bn

from fxsplit.capture.tracing import trace
from fxsplit.errors import UsageError
from fxsplit.execute.executor import Executor
from fxsplit.execute.settled import offload
from fxsplit.objects.snapshot import HOSTED
from fxsplit.plan.cuts import cuts
from fxsplit.plan.partition import partition
from fxsplit.plan.schedule import Phase
from tests.execute.settled.test_prefix import lived, settled
from tests.networks import HAZARDS, SHORTER, Chain, CountsCalls, TiedWeight

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (4, 3, 8, 8)
# To torch another device than "cpu", though the same: what is brought from one to the other is copied.
ELSEWHERE = torch.device("cpu", 0)
NETWORKS = {"resnet18": 32, "vit_tiny_patch16_224": 32, "convnext_atto": 32}
# They ask for numbers, which fake tensors do not have.
ASKING = ("InnerBranchOnData", "MethodOnData", "FunctionOnData", "AssertsOnData")
# One of its tensors is neither a parameter nor a buffer, so that it stays where the user has put it.
UNKNOWN = ("OtherTensors",)


def network(name: str) -> nn.Module:
    if name in HAZARDS:
        return HAZARDS[name]()
    size = {"img_size": NETWORKS[name]} if name.startswith("vit") else {}
    return timm.create_model(name, num_classes=10, **size, **SHORTER.get(name, {}))


def chain(*, offloads: bool) -> Executor:
    torch.manual_seed(1)
    return settled(lived(Chain(), SHAPE), SHAPE, count=3, settled_offload=offloads)


def images(shape: tuple[int, ...] = SHAPE, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def state_of(net: nn.Module) -> dict[str, Tensor]:
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def hosted_of(net: Executor) -> dict[str, torch.device]:
    found: dict[str, torch.device] = vars(net._model).get(HOSTED, {})
    return found


def settled_network(name: str, *, offloads: bool) -> tuple[Executor, tuple[int, ...]]:
    """An executor of up to four partitions, of which the last one trains, and the shape of its inputs."""
    torch.manual_seed(0)
    shape = (2, 3, NETWORKS[name], NETWORKS[name]) if name in NETWORKS else SHAPE
    captured = trace(lived(network(name), shape), (torch.empty(shape),))
    most = 1 + sum(cut.refusal is None for cut in cuts(captured))
    net = Executor(captured, partition(captured, count=min(most, 4)), settled_offload=offloads)
    net.enter(Phase(start=len(net.partitions) - 1, stop=len(net.partitions), epochs=1))
    return net, shape


@pytest.fixture
def unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors cannot be pinned."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partitions run on copies of what is on the host, as on a GPU."""
    monkeypatch.setattr(offload, "device_of", lambda _values: ELSEWHERE)


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """What settles moves to the host, as from a GPU."""
    monkeypatch.setattr(offload, "HOST", ELSEWHERE)


@pytest.mark.usefixtures("unpinned")
@pytest.mark.parametrize("name", [*NETWORKS, *(name for name in HAZARDS if name not in ASKING + UNKNOWN)])
def test_all_that_runs_is_on_the_device_of_the_inputs(name: str) -> None:
    """Fake tensors know their device, and refuse to be computed with those of another."""
    net, shape = settled_network(name, offloads=True)
    before = {key: (id(each), each.data_ptr()) for key, each in state_of(net).items()}
    for mode in (True, False):
        net.train(mode)
        for tracked in (False, True):
            with FakeTensorMode(allow_non_fake_inputs=True):
                values = net.settle(torch.empty(shape, device="cuda", requires_grad=tracked))
            assert {value.device.type for value in values if isinstance(value, Tensor)} == {"cuda"}
    assert {key: (id(each), each.data_ptr()) for key, each in state_of(net).items()} == before


@pytest.mark.usefixtures("unpinned")
def test_what_is_left_on_the_host_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the test above can fail."""
    net = chain(offloads=True).eval()
    monkeypatch.setattr(offload.Offload, "arrange", lambda *_: None)
    net.train().eval()
    assert net._offload is not None
    net._offload._kept = []
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match="same device"):
        net.settle(torch.empty(SHAPE, device="cuda"))


@pytest.mark.usefixtures("copied")
@pytest.mark.parametrize("name", [*NETWORKS, *HAZARDS])
def test_results_and_what_is_written_are_those_without(name: str) -> None:
    (plain, shape), (ours, _) = (settled_network(name, offloads=offloads) for offloads in (False, True))
    for mode in (True, False):
        plain.train(mode)
        ours.train(mode)
        for seed in (3, 4):
            found = []
            for net in (plain, ours):
                torch.manual_seed(seed)
                found.append([each for each in net.settle(images(shape, seed)) if isinstance(each, Tensor)])
            assert all(map(torch.equal, *found))
            assert len(found[0]) == len(found[1]) > 0
    theirs, own = state_of(plain), state_of(ours)
    assert theirs.keys() == own.keys()
    assert all(torch.equal(own[key], theirs[key]) for key in theirs)


@pytest.mark.usefixtures("copied")
@pytest.mark.parametrize("inference", [False, True])
def test_statistics_and_counters_that_run_on_the_device_last(inference: bool) -> None:
    nets = []
    for offloads in (False, True):
        torch.manual_seed(1)
        nets.append(settled(lived(CountsCalls(), SHAPE), SHAPE, count=3, settled_offload=offloads))
    batches = [images(seed=seed) for seed in (5, 6)]
    # By call, whether the norm has its own weight, or a copy.
    own_weight: list[bool] = []
    norm = nets[1].get_submodule("norm1")
    weight = norm.weight
    norm.register_forward_pre_hook(lambda module, _: own_weight.append(module.weight is weight))
    for net in nets:
        update_bn(batches, net.train())
        with torch.inference_mode(inference), torch.set_grad_enabled(False):
            net.eval()(batches[0])
    theirs, own = map(state_of, nets)
    assert all(torch.equal(own[key], theirs[key]) for key in theirs)
    assert not any(each.is_inference() for each in own.values())
    assert own_weight == [False, False, False]


@pytest.mark.usefixtures("copied")
def test_folded_weights_follow_what_is_written_into_the_host() -> None:
    nets = [chain(offloads=offloads).train() for offloads in (False, True)]
    for _ in range(2):
        plain, ours = ([each for each in net.settle(images()) if isinstance(each, Tensor)] for net in nets)
        assert all(map(torch.equal, plain, ours))
        for net in nets:
            with torch.no_grad():
                next(net.parameters()).mul_(2)


@pytest.mark.usefixtures("moved")
def test_what_settles_moves_and_comes_back_as_the_same_objects() -> None:
    model = lived(Chain(), SHAPE)
    captured = trace(model, (torch.empty(SHAPE),))
    net = Executor(captured, partition(captured, count=3), settled_offload=True)
    # What lies there is kept alive, so that no other tensor can take its place.
    before = {key: (each, each.detach(), each.detach().clone()) for key, each in state_of(net).items()}
    for start in (1, 2, 1, 0):
        net.enter(Phase(start=start, stop=3, epochs=1))
        settled = {name for part in net.partitions[:start] for name in part.state}
        now = state_of(net)
        assert hosted_of(net) == dict.fromkeys(settled, torch.device("cpu"))
        for key, (each, _, value) in before.items():
            assert now[key] is each
            assert torch.equal(each, value)
            assert each.requires_grad == (isinstance(each, nn.Parameter) and key not in settled)
        assert all(before[key][1].data_ptr() != now[key].data_ptr() for key in settled)
    net.enter(Phase(start=2, stop=3, epochs=1))
    net.release()
    assert hosted_of(net) == {}


class Weight:
    """Stands for a tensor on some device; those called "large" find no room elsewhere."""

    def __init__(self, name: str, device: str) -> None:
        self.name, self.data, self._device = name, self, torch.device(device)

    @property
    def device(self) -> torch.device:
        return self.data._device

    def to(self, device: torch.device) -> Weight:
        if self.name == "large":
            raise torch.OutOfMemoryError
        return Weight(self.name, str(device))


def test_weights_come_back_to_their_device_or_to_that_of_the_others() -> None:
    for others, expected in (("cuda:1", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")):
        tensors: dict[str, Any] = {"a": Weight("a", "cpu"), "stays": Weight("b", "cpu"), "trains": Weight("c", others)}
        hosted = dict.fromkeys(("a", "gone", "stays"), torch.device("cuda:1"))
        offload._move_back(tensors, hosted, ["a", "gone"])
        assert str(tensors["a"].data.device) == expected
        assert tensors["stays"].data is tensors["stays"]
        assert list(hosted) == ["stays"]


def test_what_finds_no_room_on_its_device_comes_back_later() -> None:
    tensors: dict[str, Any] = {name: Weight(name, "cpu") for name in ("a", "large", "c")}
    hosted = dict.fromkeys(tensors, torch.device("cuda:0"))
    with pytest.raises(torch.OutOfMemoryError):
        offload._move_back(tensors, hosted, list(tensors))
    assert list(hosted) == ["large", "c"]
    assert tensors["a"].data.device.type == "cuda"
    tensors["large"].name = "small"
    offload._move_back(tensors, hosted, list(hosted))
    assert {each.data.device.type for each in tensors.values()} == {"cuda"}
    assert not hosted


@pytest.mark.usefixtures("copied")
def test_where_a_copy_finds_no_room_the_model_has_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    net, made = chain(offloads=True).eval(), 0
    before, make = state_of(net), offload._copy

    def copy_of(original: Tensor, device: torch.device) -> Tensor:
        nonlocal made
        made += 1
        if made == 2:
            raise torch.OutOfMemoryError
        return make(original, device)

    monkeypatch.setattr(offload, "_copy", copy_of)
    with pytest.raises(torch.OutOfMemoryError):
        net.settle(images())
    assert made == 2
    assert all(each is before[name] for name, each in state_of(net).items())


@pytest.mark.usefixtures("moved")
@pytest.mark.parametrize("again", [lambda model: model, copy.deepcopy])
@pytest.mark.parametrize("offloads", [False, True])
def test_another_executor_brings_back_what_one_that_is_gone_has_moved(
    again: Callable[[nn.Module], nn.Module], offloads: bool
) -> None:
    net = chain(offloads=True)
    model = again(net._model)
    assert hosted_of(net)
    del net
    captured = trace(model, (torch.empty(SHAPE),))
    new = Executor(captured, partition(captured, count=3), settled_offload=offloads)
    assert hosted_of(new) == {}
    assert all(each.requires_grad for each in new.parameters())


class Recurrent(nn.Module):
    """Its weights are kept twice: under their names, and in a list of torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.flatten(1, 2))[0].mean(1))


@pytest.mark.usefixtures("copied")
def test_lists_of_weights_are_as_before() -> None:
    torch.manual_seed(0)
    model = Recurrent()
    plain = settled(copy.deepcopy(model), SHAPE, at=["head"])
    net = settled(model, SHAPE, at=["head"], settled_offload=True)
    for mode in (True, False):
        assert torch.equal(net.train(mode)(images()), plain.train(mode)(images()))
        own = {id(each) for each in model.lstm.parameters()}
        assert {id(each) for each in model.lstm._flat_weights} == own


@pytest.mark.usefixtures("moved")
def test_what_trains_as_well_stays_on_its_device() -> None:
    model = TiedWeight()
    captured = trace(model, (torch.empty(SHAPE),))
    most = 1 + sum(cut.refusal is None for cut in cuts(captured))
    net = Executor(captured, partition(captured, count=most), settled_offload=True)
    (start,) = (part.index for part in net.partitions if part.name == "second")
    before = {key: each.detach() for key, each in state_of(net).items()}
    net.enter(Phase(start=start, stop=most, epochs=1))
    moved = {key for key, each in state_of(net).items() if each.data_ptr() != before[key].data_ptr()}
    assert moved == {"first.bias"}


@pytest.mark.usefixtures("copied")
@pytest.mark.parametrize("again", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_places_what_is_its_own(again: Callable[[Executor], Executor]) -> None:
    net = chain(offloads=True).train()
    twin = again(net)
    with torch.no_grad():
        for each in net.parameters():
            each.zero_()
    expected = chain(offloads=False).train().settle(images())
    found = twin.settle(images())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True) if isinstance(a, Tensor))


@pytest.mark.usefixtures("unpinned")
def test_a_stage_that_runs_itself_has_all_that_it_reads() -> None:
    """One with a hook in it that was given after tracing is not folded."""
    net, called = chain(offloads=True).train(), []
    net.get_submodule("conv1").register_forward_hook(lambda *_: called.append(1))
    with FakeTensorMode(allow_non_fake_inputs=True):
        net.settle(torch.empty(SHAPE, device="cuda"))
    assert called


def test_what_is_new_since_tracing_stays_where_it_is() -> None:
    nets = [chain(offloads=offloads) for offloads in (False, True)]
    for net in nets:
        parametrizations.weight_norm(net.get_submodule("conv1"))
    plain, ours = (net.train().settle(images()) for net in nets)
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True) if isinstance(a, Tensor))


def test_nothing_is_compiled_and_offloaded() -> None:
    captured = trace(Chain(), (torch.empty(SHAPE),))
    options: dict[str, Any] = {"backend": "eager", "settled_offload": True}
    with pytest.raises(UsageError, match="leave out the backend or settled_offload"):
        Executor(captured, partition(captured, count=3), **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_settled_weights_are_pinned_on_the_host() -> None:
    nets = []
    for offloads in (False, True):
        torch.manual_seed(1)
        captured = trace(lived(Chain(), SHAPE).cuda(), (torch.empty(SHAPE, device="cuda"),))
        net = Executor(captured, partition(captured, count=3), settled_offload=offloads)
        net.enter(Phase(start=2, stop=3, epochs=1))
        nets.append(net.train())
    plain, ours = nets
    hosted = [state_of(ours)[name] for part in ours.partitions[:2] for name in part.state]
    assert all(each.is_pinned() for each in hosted)
    values = [net.settle(images().cuda()) for net in nets]
    for found, expected in zip(*values, strict=True):
        torch.testing.assert_close(found, expected)
    ours.release()
    assert all(each.device.type == "cuda" for each in state_of(ours).values())
    assert all(map(torch.equal, state_of(ours).values(), state_of(plain).values()))
