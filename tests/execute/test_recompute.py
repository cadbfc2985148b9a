"""Recomputing changes what is kept for backward, and nothing else: bit for bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxsplit.capture.tracing import trace
from fxsplit.execute.executor import Executor
from fxsplit.plan.partition import partition
from fxsplit.plan.schedule import Phase
from tests.execute.test_executor import MODELS, _executor, _images, _loss, _train
from tests.networks import Chain


def recomputing(net: Executor, *, start: int = 0, segmented: bool = False) -> Executor:
    """All that trains but the last partition."""
    count = len(net.partitions)
    recompute = count - 1 if count - start > 1 else 0
    net.enter(Phase(start=start, stop=count, epochs=1, recompute=recompute, segmented=segmented))
    return net


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_training_is_the_same_bit_for_bit(name: str, segmented: bool) -> None:
    make, size = MODELS[name]
    torch.manual_seed(0)
    kept = _executor(make(), size)
    torch.manual_seed(0)
    again = recomputing(_executor(make(), size), segmented=segmented)
    assert all(torch.equal(*pair) for pair in zip(_train(kept, size), _train(again, size), strict=True))
    for key, value in kept.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def saved_bytes(net: nn.Module, images: Tensor, labels: Tensor) -> int:
    """What autograd itself keeps, each storage once."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Any:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _loss(net(images), labels)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_only_the_rest_keeps_activations() -> None:
    images, labels = _images(0, 32)
    kept = saved_bytes(_executor(Chain(), 32, 4).train(), images, labels)
    again = saved_bytes(recomputing(_executor(Chain(), 32, 4)).train(), images, labels)
    assert 0 < again < 0.6 * kept


def test_after_settled_partitions_and_in_evaluation() -> None:
    images, labels = _images(0, 8)
    torch.manual_seed(0)
    nets = [_executor(Chain(), 8, 4) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    nets[0].enter(Phase(start=1, stop=4, epochs=1))
    recomputing(nets[1], start=1)
    for net in nets:
        net.train()
        _loss(net(images), labels).backward()
    for first, second in zip(*(net.parameters() for net in nets), strict=True):
        assert (first.grad is None) == (second.grad is None)
        if first.grad is not None and second.grad is not None:
            assert torch.equal(first.grad, second.grad)
    before = {name: value.clone() for name, value in nets[1].state_dict().items()}
    assert torch.equal(nets[0].eval()(images), nets[1].eval()(images))
    assert all(torch.equal(value, nets[1].state_dict()[name]) for name, value in before.items())


def test_a_recomputation_that_fails_leaves_the_buffers() -> None:
    net = recomputing(_executor(Chain(), 8, 4)).train()
    images, labels = _images(0, 8)
    buffers = dict(net.named_buffers())
    loss = _loss(net(images), labels)
    inner = net.get_submodule("conv2")
    inner.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no more")))
    with pytest.raises(RuntimeError, match="no more"):
        loss.backward()
    assert all(buffers[name] is buffer for name, buffer in net.named_buffers())


class WritesItsInput(Chain):
    """Writes into its input before anything else."""

    def __init__(self, write: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        self.write(x)
        return super().forward(x)


class BeginsInPlace(Chain):
    """Its first module works in place."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.first(x))


WRITERS: dict[str, Callable[[], nn.Module]] = {
    "two methods": lambda: WritesItsInput(lambda x: x.sub_(0.5).div_(0.25)),
    "a view": lambda: WritesItsInput(lambda x: x[:, 1:].mul_(2)),
    "without autograd": lambda: WritesItsInput(lambda x: x.detach().exp_()),
    "ReLU": lambda: BeginsInPlace(nn.ReLU(inplace=True)),
    "Hardtanh": lambda: BeginsInPlace(nn.Hardtanh(inplace=True)),
    "SiLU": lambda: BeginsInPlace(nn.SiLU(inplace=True)),
    "dropout": lambda: BeginsInPlace(nn.Dropout(0.4, inplace=True)),
}


@pytest.mark.parametrize("given", ["data", "leaf", "made", "with gaps"])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_an_input_that_is_written_into_is_kept_as_it_was(name: str, segmented: bool, given: str) -> None:
    torch.manual_seed(0)
    plain = WRITERS[name]()
    captured = trace(copy.deepcopy(plain), (torch.empty(2, 3, 8, 8),))
    # The first partition writes into the input, and saves it.
    parts = partition(captured, at=["norm1", "head"])
    net = recomputing(Executor(captured, parts), segmented=segmented)
    images, labels = _images(0, 8)
    if given == "with gaps":
        images = torch.stack([images, images], -1)[..., 0]

    def left(model: nn.Module) -> list[Tensor] | str:
        """All that a step leaves behind; backward a second time changes nothing but the gradients."""
        torch.manual_seed(1)
        source = images.clone() if given != "with gaps" else images.detach()
        before = source.clone()
        source.requires_grad_(given in ("leaf", "made"))
        x = source * 1 if given == "made" else source
        try:
            loss = _loss(model.train()(x), labels)
            loss.backward(retain_graph=True)
            loss.backward()
        except RuntimeError as error:
            return str(error)
        found = [loss, x.clone(), *(p.grad for p in model.parameters()), torch.get_rng_state()]
        if source.grad is not None:
            found.append(source.grad)
        source.detach().copy_(before)
        return [tensor for tensor in found if tensor is not None]

    expected, ours = left(plain), left(net)
    if isinstance(expected, str) or isinstance(ours, str):
        assert ours == expected
    else:
        assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))
        assert given == "leaf" or not torch.equal(expected[1], images)


class DrawsNumbers(nn.Module):
    """Numbers of Python's and numpy's generators, in forward itself and in a module that stays one op."""

    def forward(self, x: Tensor) -> Tensor:
        return x * float(np.random.rand()) * float(random.random())


def test_numbers_of_python_and_numpy_are_drawn_again() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), DrawsNumbers(), nn.LayerNorm(6), nn.Linear(6, 4))
    captured = trace(model, (torch.zeros(4, 6),))
    net = recomputing(Executor(captured, partition(captured, at=["3"])))
    x = torch.randn(4, 6)
    found = []
    for each in (model, net):
        random.seed(0)
        np.random.seed(0)
        model.zero_grad()
        (each(x) ** 2).sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
        found[-1] += [torch.tensor([random.random(), np.random.rand()])]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


class DrawsOfItsOwn(nn.Module):
    """Numbers of a generator that the model holds, in an op of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(6, generator=self.generator)


class FunctionalRReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rrelu(x, training=self.training)


class WholeRReLU(FunctionalRReLU):
    """In a module that stays one op, since it branches on data."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() < 1e9 else x


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("make", [DrawsOfItsOwn, nn.RReLU, FunctionalRReLU, WholeRReLU])
def test_what_ops_draw_in_training_is_drawn_again(make: Callable[[], nn.Module], segmented: bool) -> None:
    torch.manual_seed(0)
    inner = make()
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), inner, nn.Linear(6, 4))
    captured = trace(model, (torch.zeros(4, 6),))
    net = recomputing(Executor(captured, partition(captured, at=["1", "3"])), segmented=segmented)
    x = torch.randn(4, 6)
    found = []
    for each in (model, net):
        torch.manual_seed(1)
        if isinstance(inner, DrawsOfItsOwn):
            inner.generator.manual_seed(1)
        for _ in range(2):
            model.zero_grad()
            (each(x) ** 2).sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
