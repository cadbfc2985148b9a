"""Contexts that forward opens hold in the traced ops, wherever the graph is cut."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fxsplit.capture.contexts import contexts_of
from fxsplit.capture.tracing import trace
from fxsplit.errors import GuardError, TraceError
from fxsplit.plan.schedule import Phase
from fxsplit.proving.first_batch import prove
from tests.exact import Linears, assert_exact, executor_of, rows


class NoGrad(Linears):
    def forward(self, x: Any) -> Any:
        with torch.no_grad():
            h = self.a(x)
        return self.c(self.b(h).relu())


class SetGrad(Linears):
    def forward(self, x: Any) -> Any:
        with torch.set_grad_enabled(False):
            h = self.b(self.a(x))
            with torch.enable_grad():
                h = self.b(h)
        return self.c(h.relu())


class SetGradByCall(Linears):
    def forward(self, x: Any) -> Any:
        torch.set_grad_enabled(False)
        h = self.a(x)
        torch.set_grad_enabled(True)
        return self.c(self.b(h).relu())


class Decorated(Linears):
    @torch.no_grad()
    def features(self, x: Any) -> Any:
        return self.b(self.a(x)).relu()

    @torch.autocast("cpu", torch.bfloat16)
    def head(self, x: Any) -> Any:
        return self.c(x)

    def forward(self, x: Any) -> Any:
        return self.head(self.features(x))


class Autocast(Linears):
    def forward(self, x: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            h = self.b(self.a(x))
        return self.c(h.float())


class AutocastOff(Linears):
    def forward(self, x: Any) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            h = self.a(x)
        return self.c(self.b(h).relu())


class Inference(Linears):
    """In evaluation: what is made in inference mode cannot be trained on."""

    def forward(self, x: Any) -> Any:
        with torch.inference_mode(not self.training):
            h = self.b(self.a(x))
        return self.c(h.relu() if self.training else h.clone().relu())


MODELS: list[Callable[[], Linears]] = [NoGrad, SetGrad, SetGradByCall, Decorated, Autocast, AutocastOff, Inference]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("count", [1, 3])
def test_a_region_holds_also_where_a_cut_lies_in_it(make: Callable[[], Linears], count: int) -> None:
    found = assert_exact(make(), rows(), count=count)
    assert not found.opaque
    assert any(contexts_of(node) for node in found.programs[True].nodes)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("make", [Autocast, AutocastOff])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_region_holds_in_autocast_of_the_callers(make: Callable[[], Linears], dtype: torch.dtype) -> None:
    model = make().eval()
    net = executor_of(trace(copy.deepcopy(model), (rows(),))).eval()
    with torch.autocast("cpu", dtype):
        assert torch.equal(net(rows()), model(rows()))


def test_no_grad_of_a_region_holds_in_evaluation_with_gradients() -> None:
    model = NoGrad().eval()
    net = executor_of(trace(copy.deepcopy(model), (rows(),))).eval()
    gradients = []
    for each in (net, model):
        x = rows().requires_grad_()
        each(x).sum().backward()
        gradients.append((x.grad, [parameter.grad is None for parameter in each.parameters()]))
    assert gradients[0] == gradients[1] == (None, [True, True, False, False, False, False])


def test_a_context_that_a_module_was_left_in_does_not_hold_behind_it() -> None:
    """It fails between the two switches when it is looked into, and then becomes one op."""

    class Switches(nn.Module):
        def forward(self, x: Any) -> Any:
            torch.set_grad_enabled(False)
            weight = 2.0 if x.sum() > 0 else 3.0
            torch.set_grad_enabled(True)
            return x * weight

    found = assert_exact(nn.Sequential(nn.Linear(6, 6), Switches(), nn.Linear(6, 3)), rows())
    assert list(found.opaque) == ["1"]
    assert not any(contexts_of(node) for node in found.programs[True].nodes)


def test_what_a_forward_asks_of_the_contexts_around_it_is_guarded() -> None:
    class Asks(Linears):
        def forward(self, x: Any) -> Any:
            y = super().forward(x)
            return y * 2 if torch.is_autocast_enabled("cpu") else y

    model = Asks()
    net = executor_of(trace(model, (rows(),)))
    assert torch.equal(net(rows()), model(rows()))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(GuardError, match="is_autocast_enabled"):
        net(rows())
    with torch.autocast("cpu", torch.bfloat16):
        inside = executor_of(trace(model, (rows(),)))
        assert torch.equal(inside(rows()), model(rows()))
    with pytest.raises(GuardError, match="is_autocast_enabled"):
        inside(rows())


QUESTIONS_TO_AUTOGRAD: dict[str, Callable[[torch.Tensor], bool]] = {
    "requires_grad": lambda value: value.requires_grad,
    "is_leaf": lambda value: value.is_leaf,
    "grad_fn": lambda value: value.grad_fn is not None,
}


@pytest.mark.parametrize("name", QUESTIONS_TO_AUTOGRAD)
def test_what_a_forward_asks_of_autograd_is_guarded(name: str) -> None:
    class Asks(Linears):
        def forward(self, x: Any) -> Any:
            y = super().forward(x)
            with torch.no_grad():
                detached = y * 2
            y = y * 3 if QUESTIONS_TO_AUTOGRAD[name](detached) else y
            return y * 2 if QUESTIONS_TO_AUTOGRAD[name](y) else y

    model = Asks()
    net = executor_of(trace(model, (rows(),)))
    assert torch.equal(net(rows()), model(rows()))
    net.enter(Phase(start=1, stop=2, epochs=1))
    assert net(rows()).requires_grad  # what has settled is evaluated without gradients beside what trains
    net.release()
    with torch.no_grad(), pytest.raises(GuardError, match="with gradients on or off as it was traced"):
        net(rows())
    net.eval()
    model.eval()
    with torch.no_grad():
        assert torch.equal(net(rows()), model(rows()))
    with pytest.raises(GuardError, match="with gradients on or off as it was traced"):
        net(rows())
    assert prove(model, net, (rows(),)).compared


def test_whether_an_input_wants_a_gradient_is_guarded() -> None:
    class Asks(Linears):
        def forward(self, x: Any) -> Any:
            return super().forward(x) * (2 if x.requires_grad else 1)

    net = executor_of(trace(Asks(), (rows(),)))
    net(rows())
    with pytest.raises(GuardError, match="'getattr' was False and is now True"):
        net(rows().requires_grad_())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_moves_the_statistics_of_a_norm_once(use_reentrant: bool) -> None:
    """Where PyTorch recomputes, it moves them twice; the proof looks through the model's checkpoints, too."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

        def forward(self, x: Any) -> Any:
            return self.last(
                checkpoint(lambda given: self.norm(given).relu(), self.first(x), use_reentrant=use_reentrant)
            )

    model = Checkpointed()
    net = executor_of(trace(model, (rows(),)))
    assert prove(model, net, (rows(),)).compared
    net(rows()).sum().backward()
    assert model.norm.num_batches_tracked == 1
    model(rows()).sum().backward()
    assert model.norm.num_batches_tracked == 3


class CheckpointedFirst(Linears):
    """The first block's input is the model's own, the second's wants a gradient."""

    def forward(self, x: Any) -> Any:
        h = checkpoint(lambda given: self.a(given).relu(), x, use_reentrant=True)
        return checkpoint(self.c, self.b(h), use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("training", [True, False])
def test_the_older_checkpoint_gives_no_gradient_where_its_input_wants_none(training: bool) -> None:
    model = CheckpointedFirst()
    found = trace(model, (rows(),))
    plain, net = copy.deepcopy(model).train(training), executor_of(found).train(training)
    given = []
    for each in (plain, net):
        each(rows()).sum().backward()
        given.append([None if parameter.grad is None else parameter.grad.tolist() for parameter in each.parameters()])
    assert given[0] == given[1]
    assert [grad is None for grad in given[0]] == [True, True, False, False, False, False]
    with pytest.raises(GuardError, match="an input wants a gradient"):
        net(rows().requires_grad_())
    with torch.no_grad():
        assert torch.equal(net(rows().requires_grad_()), plain(rows()))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_are_looked_into(reentrant: bool) -> None:
    class Checkpointed(Linears):
        def forward(self, x: Any) -> Any:
            h = checkpoint(self.a, x, use_reentrant=reentrant) if reentrant is False else self.a(x)
            return self.c(checkpoint(lambda given: self.b(given).relu(), h, use_reentrant=reentrant))

    found = assert_exact(Checkpointed(), rows(), count=3)
    assert not found.opaque
    assert found.checkpoints


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_the_older_checkpoint_of_an_input_gives_no_gradient_as_in_the_plain_model() -> None:
    class Checkpointed(Linears):
        def forward(self, x: Any) -> Any:
            return self.c(self.b(checkpoint(self.a, x, use_reentrant=True)).relu())

    found = assert_exact(Checkpointed(), rows(), count=3)
    net = executor_of(found).train()
    net(rows()).sum().backward()
    assert [parameter.grad is None for parameter in net.parameters()] == [True, True] + [False] * 4


def test_dropout_in_a_checkpoint_is_drawn_alike() -> None:
    class Checkpointed(Linears):
        def forward(self, x: Any) -> Any:
            h = checkpoint(
                lambda given: nn.functional.dropout(self.a(given), 0.5, self.training), x, use_reentrant=False
            )
            return self.c(self.b(h).relu())

    assert_exact(Checkpointed(), rows())


def test_what_is_asked_of_the_contexts_is_asked_again_at_each_call() -> None:
    class Asks(Linears):
        def forward(self, x: Any) -> Any:
            return super().forward(x * 2 if self.training and torch.is_grad_enabled() else x)

    found = assert_exact(Asks(), rows())
    net = executor_of(found).train()
    net(rows())
    with torch.no_grad(), pytest.raises(GuardError, match="'is_grad_enabled' was True and is now False"):
        net(rows())


class UsedAtTimes(nn.Module):
    """Stays one op, whose result wants a gradient in some calls alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Any) -> Any:
        return self.linear(x) if torch.rand(()).item() < 0.5 else x


class CheckpointedAfter(Linears):
    """Checkpoints, by the older kind, after a module that may not use its weights, or after weights behind it."""

    def __init__(self, before: str) -> None:
        super().__init__()
        self.at_times, self.before = UsedAtTimes(), before

    def forward(self, x: Any) -> Any:
        x = self.at_times(x)
        if self.before == "weights":
            return self.c(checkpoint(self.b, self.a(x), use_reentrant=True))
        return self.c(self.b(checkpoint(self.a, x, use_reentrant=True)))


def test_the_older_checkpoint_of_what_wants_a_gradient_at_times_is_refused() -> None:
    with pytest.raises(TraceError, match=r"in some calls alone.*use_reentrant=False"):
        trace(CheckpointedAfter("nothing"), (rows(),))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_the_older_checkpoint_behind_weights_is_looked_into() -> None:
    found = assert_exact(CheckpointedAfter("weights"), rows(), count=3)
    assert list(found.opaque) == ["at_times"]


def test_the_older_checkpoint_adds_up_gradients_inside_before_those_from_outside() -> None:
    """Of three numbers the order of addition is seen in the last bit."""

    class Squares(Linears):
        def forward(self, x: Any) -> Any:
            h = self.a(x)
            return self.c(self.b(h + checkpoint(lambda given: given * given, h, use_reentrant=True)))

    torch.manual_seed(0)
    model = Squares()
    plain, net = copy.deepcopy(model).train(), executor_of(trace(model, (rows(),))).train()
    given = 0.1 * torch.randn(64, 6)
    for each in (plain, net):
        each(given).square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), model.parameters(), strict=True))  # type: ignore[arg-type]
