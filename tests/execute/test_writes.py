"""Parameters and buffers that forward itself writes, in every way of writing: settled, recomputed, and cut."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from fxsplit.capture.tracing import trace
from fxsplit.execute.executor import Executor
from fxsplit.plan.partition import partition
from fxsplit.plan.schedule import Phase
from tests.exact import assert_same_state

Pairs = Iterable[tuple[Tensor, Tensor]]


def in_place(pairs: Pairs) -> None:
    for follower, leader in pairs:
        follower.mul_(0.5).add_(leader, alpha=0.5)


def through_data(pairs: Pairs) -> None:
    for follower, leader in pairs:
        follower.data.mul_(0.5).add_(leader.data, alpha=0.5)


def through_a_view_of_data(pairs: Pairs) -> None:
    for follower, leader in pairs:
        follower.data.view(-1).lerp_(leader.data.view(-1), 0.5)


def other_data(pairs: Pairs) -> None:
    for follower, leader in pairs:
        follower.data = follower.data * 0.5 + leader.data * 0.5


def many_at_once(pairs: Pairs) -> None:
    followers, leaders = zip(*pairs, strict=True)
    torch._foreach_mul_(list(followers), 0.5)
    torch._foreach_add_(list(followers), list(leaders), alpha=0.5)


def copied(pairs: Pairs) -> None:
    for follower, leader in pairs:
        follower.copy_(follower * 0.5 + leader * 0.5)


WAYS = (in_place, through_data, through_a_view_of_data, other_data, many_at_once, copied)


def encoder() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6))


class MomentumEncoder(nn.Module):
    """Two encoders, of which one follows the other in each forward (He et al., 2020), and a head on both."""

    def __init__(self, write: Callable[[Pairs], None]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.write = write
        self.leader, self.follower = encoder(), encoder().requires_grad_(False)
        assert isinstance(self.follower[1], nn.BatchNorm1d)
        nn.init.constant_(self.follower[1].weight, 3.0)
        self.head = nn.Linear(12, 4)

    def follow(self) -> None:
        self.write(zip(self.follower.parameters(), self.leader.parameters(), strict=True))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.follow()
            followed = self.follower(x)
        return self.head(torch.cat([self.leader(x), followed], 1))  # type: ignore[no-any-return]


def executor_of(model: nn.Module, x: Tensor) -> Executor:
    captured = trace(model, (x,))
    return Executor(captured, partition(captured, at=["head"]))


@pytest.mark.parametrize("write", WAYS)
def test_folded_weights_follow_what_forward_writes(write: Callable[[Pairs], None]) -> None:
    model, x = MomentumEncoder(write), torch.randn(8, 6)
    plain = copy.deepcopy(model)
    net = executor_of(model, x)
    net.enter(Phase(start=1, stop=2, epochs=1))
    net.train()
    plain.train()
    plain.leader.eval()
    plain.follower.eval()
    for _ in range(3):
        torch.testing.assert_close(net(x), plain(x), rtol=1e-5, atol=1e-6)
    assert_same_state(model, plain)


@pytest.mark.parametrize("write", WAYS)
def test_recomputing_writes_once(write: Callable[[Pairs], None]) -> None:
    model, x = MomentumEncoder(write), torch.randn(8, 6)
    plain = copy.deepcopy(model)
    net = executor_of(model, x)
    net.enter(Phase(start=0, stop=2, epochs=1, recompute=1))
    net.train()
    for each in (net, plain):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(3):
            each.zero_grad()
            each(x).square().sum().backward()
            optimizer.step()
    assert_same_state(model, plain)


class Codebook(nn.Module):
    """Replaces its own parameter in training, so that it stays one op (van den Oord et al., 2017, appendix A.1)."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x, self.codes).argmin(1)
        if self.training:
            taken = nn.functional.one_hot(nearest, 5).float()
            moved = taken.T @ x.detach() / (1 + taken.sum(0)[:, None])
            self.codes = nn.Parameter(0.9 * self.codes.detach() + 0.1 * moved)
        return x + self.codes[nearest].detach()


def test_recomputing_replaces_a_parameter_once() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(encoder(), Codebook(), nn.Linear(6, 4)), torch.randn(8, 6)
    plain = copy.deepcopy(model)
    captured = trace(model, (x,))
    assert set(captured.opaque) == {"1"}
    net = Executor(captured, partition(captured, at=["2"]))
    net.enter(Phase(start=0, stop=2, epochs=1, recompute=1))
    net.train()
    for each in (net, plain):
        for _ in range(3):
            each(x).square().sum().backward()
    assert_same_state(model, plain)
    for (name, one), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        assert one.grad is None or torch.equal(one.grad, other.grad), name


class CountsInTwoPlaces(nn.Module):
    """Writes a buffer before its first layer and reads it after the second."""

    def __init__(self, write: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.write = write
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.write(self.count)
        return self.second(self.first(x)) + self.count  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "write",
    [lambda count: count.add_(1), lambda count: count.data.add_(1), lambda count: torch._foreach_add_([count], 1)],
)
def test_no_cut_divides_what_is_written_from_what_reads_it(write: Callable[[Tensor], object]) -> None:
    captured = trace(CountsInTwoPlaces(write), (torch.randn(3, 4),))
    (writing,) = [op for op in captured.train.ops if "count" in op.mutates]
    assert writing.mutates
    assert partition(captured, count=1)
    with pytest.raises(Exception, match="'count'"):
        partition(captured, at=["second"])
