"""A pipeline over two processes computes what one process computes, micro-batch for micro-batch, bit for bit."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.nn import functional as F

import fxsplit
from fxsplit.distribute.pipeline import SENDS_GRADIENTS_OF_SOME, Boundaries
from fxsplit.errors import GuardError, PartitionError, UsageError
from fxsplit.plan.cuts import cuts
from fxsplit.plan.partition import partition
from tests.distribute.group import together
from tests.networks import HAZARDS, AssignedBuffer, Chain

RANKS = 2
MICRO_BATCH = 3
STEPS = 2


class MaskedTokens(nn.Module):
    """Integers and a mask come in, by keyword; both are still needed in the second half."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.mix(self.embed(tokens)).relu()
        x = x * mask.unsqueeze(-1) + tokens.unsqueeze(-1)
        return self.head(x.masked_fill(~mask.unsqueeze(-1), 0.0).sum(1))


class Residual(Chain):
    """A value made at the start, transposed in memory, is needed again at the end, and passes through the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first = F.dropout(self.norm1(self.conv1(x)).relu(), 0.3, self.training).transpose(2, 3)
        x = self.conv3(self.norm2(self.conv2(first)).relu())
        return self.head((x + first).mean((2, 3)))


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    at: tuple[str, ...]
    schedule: Any
    micro_batches: int

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make()

    def batch(self, step: int) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs by name, and labels."""
        random, count = torch.Generator().manual_seed(step), MICRO_BATCH * self.micro_batches
        labels = torch.randint(5, (count,), generator=random)
        if self.make is MaskedTokens:
            tokens = torch.randint(11, (count, 4), generator=random)
            return {"tokens": tokens, "mask": tokens > 2}, labels
        return {"x": torch.randn(count, 3, 8, 8, generator=random)}, labels

    def example(self) -> dict[str, Tensor]:
        return {name: tensor[:MICRO_BATCH] for name, tensor in self.batch(0)[0].items()}

    def trace(self) -> tuple[fxsplit.Trace, tuple[fxsplit.Partition, ...]]:
        trace = fxsplit.trace(self.model(), (), self.example())
        return trace, partition(trace, at=self.at)


CASES = {
    f"{make.__name__} {schedule.__name__} {micro_batches}": Case(make, at, schedule, micro_batches)
    for make, at, schedules in (
        (Chain, ("conv2",), (ScheduleGPipe, Schedule1F1B)),
        (Residual, ("norm2",), (ScheduleGPipe, Schedule1F1B)),
        (Residual, ("conv2", "norm2", "conv3"), (ScheduleInterleaved1F1B,)),
        (AssignedBuffer, ("norm2",), (Schedule1F1B,)),
        (MaskedTokens, ("mix",), (Schedule1F1B,) if SENDS_GRADIENTS_OF_SOME else ()),
    )
    for schedule in schedules
    for micro_batches in (2, 4)
}


def run(rank: int, folder: str) -> None:
    """One of the processes: all cases one after the other; what it ends with goes to a file."""
    with together(rank, RANKS, f"{folder}/store"):
        torch.save({name: pipelined(case) for name, case in CASES.items()}, f"{folder}/{rank}.pt")


def pipelined(case: Case) -> dict[str, Any]:
    trace, parts = case.trace()
    random_state = torch.get_rng_state()
    stages = fxsplit.to_pipeline_stages(trace, parts, (), case.example(), device="cpu")
    assert torch.equal(torch.get_rng_state(), random_state)
    several = case.schedule is ScheduleInterleaved1F1B
    schedule = case.schedule(stages if several else stages[0], case.micro_batches, loss_fn=F.cross_entropy)
    holds_first, holds_last = (any(getattr(stage, end) for stage in stages) for end in ("is_first", "is_last"))
    optimizer = torch.optim.SGD([p for stage in stages for p in stage.submod.parameters()], lr=0.1, momentum=0.9)

    def step(number: int, call: Callable[..., Tensor | None]) -> tuple[Tensor | None, list[Tensor]]:
        inputs, labels = case.batch(number)
        losses: list[Tensor] = []
        given = {"target": labels, "losses": losses} if holds_last else {}
        return call(**(inputs if holds_first else {}), **given), [loss.detach() for loss in losses]

    losses = []
    torch.manual_seed(1)
    for number in range(STEPS):
        optimizer.zero_grad()
        losses += step(number, schedule.step)[1]
        optimizer.step()
    # Evaluation scales the gradients of the last step once more.
    gradients = {name: p.grad.clone() for stage in stages for name, p in stage.submod.named_parameters()}
    for stage in stages:
        stage.submod.eval()
    output, _ = step(STEPS, schedule.eval)
    state = {name: value for stage in stages for name, value in stage.submod.state_dict().items()}
    owned = [sorted(stage.submod.state_dict()) for stage in stages]
    return {"losses": losses, "gradients": gradients, "output": output, "state": state, "owned": owned}


def alone(case: Case) -> dict[str, Any]:
    """The plain model in this process."""
    model = case.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    torch.manual_seed(1)
    for number in range(STEPS):
        optimizer.zero_grad()
        inputs, labels = case.batch(number)
        for part in range(case.micro_batches):
            chosen = slice(part * MICRO_BATCH, (part + 1) * MICRO_BATCH)
            loss = F.cross_entropy(model(**{name: x[chosen] for name, x in inputs.items()}), labels[chosen])
            loss.backward()
            losses.append(loss.detach())
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad /= case.micro_batches
        optimizer.step()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.eval()
    with torch.no_grad():
        parts = zip(*(x.split(MICRO_BATCH) for x in case.batch(STEPS)[0].values()), strict=True)
        output = torch.cat([model(*part) for part in parts])
    return {"losses": losses, "gradients": gradients, "output": output, "state": model.state_dict()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.start_processes(run, (str(folder),), nprocs=RANKS, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


pytestmark = pytest.mark.usefixtures("one_thread")


def same(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> bool:
    return ours.keys() == plain.keys() and all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_compute_what_one_computes_bit_for_bit(name: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank[name] for rank in ranks)
    plain = alone(CASES[name])
    losses = first["losses"] + second["losses"]
    assert torch.equal(torch.stack(losses), torch.stack(plain["losses"]))
    outputs = [rank["output"] for rank in (first, second) if rank["output"] is not None]
    assert len(outputs) == 1
    assert torch.equal(outputs[0], plain["output"])
    for what in ("gradients", "state"):
        assert first[what].keys().isdisjoint(second[what])
        assert same(first[what] | second[what], plain[what])
    _, parts = CASES[name].trace()
    assert [first["owned"], second["owned"]] == [[sorted(part.state) for part in parts[rank::RANKS]] for rank in (0, 1)]


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def modules(trace: fxsplit.Trace, at: list[str]) -> list[nn.Module]:
    """Those of all stages, in one process."""
    example = torch.empty(MICRO_BATCH, 3, 8, 8, device="meta")
    stages = fxsplit.to_pipeline_stages(trace, partition(trace, at=at), (example,), device="cpu")
    assert [stage.stage_index for stage in stages] == list(range(len(at) + 1))
    return [stage.submod for stage in stages]


def traced(make: Callable[[], nn.Module]) -> fxsplit.Trace:
    torch.manual_seed(0)
    return fxsplit.trace(make(), (torch.empty(2, 3, 8, 8),))


class Joined(nn.Module):
    """All stages, one after the other."""

    def __init__(self, stages: list[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> Any:
        values: Any = (x,)
        for stage in self.stages:
            values = stage(*values)
        return values


def footprint(model: nn.Module) -> dict[str, Tensor]:
    """All that a step of training and one of evaluation leave behind."""
    torch.manual_seed(1)
    x = torch.randn(MICRO_BATCH, 3, 8, 8)
    output = model.train()(x)
    output.sum().backward()
    left = {"training": output, "evaluation": model.eval()(x), "random state": torch.get_rng_state()}
    left |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {re.sub(r"stages\.\d\.", "", name): value for name, value in {**left, **model.state_dict()}.items()}


# Their output, their method or a size that they keep to the end forbids any cut.
NEVER = {"AuxiliaryHead", "DataclassOutput", "MethodOnData", "OnlyInEvaluation", "SeveralOutputs"}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", HAZARDS)
def test_the_stages_of_every_hazard_compute_what_the_model_does_or_are_refused(name: str) -> None:
    trace = traced(HAZARDS[name])
    allowed = [cut for cut in cuts(trace) if cut.refusal is None]
    used = {each for op in (*trace.train.ops, *trace.eval.ops) for each in op.state}
    done = 0
    for cut in allowed:
        own = dataclasses.replace(trace, model=copy.deepcopy(trace.model))
        try:
            stages = modules(own, [cut.path])
        except PartitionError:
            continue
        plain = footprint(copy.deepcopy(trace.model))
        ours = footprint(Joined(stages))
        assert same(ours, {name: value for name, value in plain.items() if name in ours})
        assert used.isdisjoint(plain.keys() - ours.keys())
        done += 1
    assert (done > 1) != (name in NEVER)


class Sizes(Chain):
    """A value has another size in training."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)[:, :, : 4 if self.training else 8]
        return self.head(self.conv2(x).mean((2, 3)))


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("make", "at", "sentence"),
    [
        (HAZARDS["TiedWeight"], "second", "'first.weight' is used by partitions 0 and 1, which would need a copy each"),
        (HAZARDS["OtherTensors"], "conv2", "'last' is used by partitions 0 and 1"),
        (HAZARDS["MethodOnData"], "conv2", "own method 'pick' stays one op .* move the method into a module"),
        (HAZARDS["BranchOnShape"], "conv2", "the cut at 'conv2' .* its value 'getitem' is no tensor but of type int"),
        (Sizes, "conv2", r"is float32 \(3, 6, 4, 8\) in training and float32 \(3, 6, 8, 8\) in evaluation"),
        (HAZARDS["SeveralOutputs"], "conv2", "a value of type dict, .* return_dict=False"),
        (HAZARDS["DataclassOutput"], "conv2", "a value of type Answer"),
    ],
)
def test_what_a_pipeline_cannot_do_is_refused_in_one_sentence(
    make: Callable[[], nn.Module], at: str, sentence: str
) -> None:
    with pytest.raises(PartitionError, match=sentence) as caught:
        modules(traced(make), [at])
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("one_rank")
def test_partitions_are_dealt_evenly_and_belong_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(2, 3, 8, 8)
    trace = traced(Chain)
    with pytest.raises(PartitionError, match="from another trace"):
        fxsplit.to_pipeline_stages(trace, fxsplit.partition(traced(Residual), count=2), (x,), device="cpu")
    monkeypatch.setattr("torch.distributed.get_world_size", lambda _: 2)
    with pytest.raises(PartitionError, match="3 partitions cannot be dealt evenly to 2 ranks"):
        fxsplit.to_pipeline_stages(trace, fxsplit.partition(trace, count=3), (x,), device="cpu")


@pytest.mark.usefixtures("one_rank")
def test_where_every_value_needs_a_gradient_an_integer_cannot_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxsplit.distribute.pipeline.SENDS_GRADIENTS_OF_SOME", False)
    case = Case(MaskedTokens, ("mix",), Schedule1F1B, 2)
    with pytest.raises(PartitionError, match=r"its value 'tokens' is int64 \(3, 4\), for which torch"):
        fxsplit.to_pipeline_stages(*case.trace(), (), case.example(), device="cpu")


@pytest.mark.usefixtures("one_rank")
def test_the_first_stage_refuses_an_input_that_takes_another_path() -> None:
    first, _ = modules(traced(HAZARDS["BranchOnShape"]), ["head"])
    with pytest.raises(GuardError, match="takes another path"):
        first(torch.randn(MICRO_BATCH, 3, 4, 4))


def test_a_process_without_a_rank_is_told_to_get_one() -> None:
    trace = traced(Chain)
    with pytest.raises(UsageError, match="start it with torchrun"):
        fxsplit.to_pipeline_stages(trace, fxsplit.partition(trace, count=2), (torch.empty(2, 3, 8, 8),), device="cpu")


@pytest.mark.usefixtures("one_rank")
def test_a_stage_shares_the_models_parameters_and_takes_weights_by_its_names() -> None:
    trace = traced(Residual)
    first, second = modules(trace, ["norm2"])
    shared = {**dict(first.named_parameters()), **dict(second.named_parameters())}
    assert all(shared[name] is parameter for name, parameter in trace.model.named_parameters())
    with torch.device("meta"):
        empty = traced(Residual)
    for given, stage in zip(modules(empty, ["norm2"]), (first, second), strict=True):
        assert all(tensor.is_meta for tensor in given.state_dict().values())
        given.to_empty(device="cpu").load_state_dict(stage.state_dict())
        assert same(given.state_dict(), stage.state_dict())


@pytest.mark.usefixtures("one_rank")
def test_only_values_on_the_way_to_a_parameter_ask_for_a_gradient() -> None:
    model = Residual()
    model.conv1.requires_grad_(False)
    model.norm1.requires_grad_(False)
    trace = fxsplit.trace(model, (torch.empty(2, 3, 8, 8),))
    parts = partition(trace, at=["conv2", "conv3"])
    boundaries = Boundaries(trace, (torch.empty(MICRO_BATCH, 3, 8, 8),), {}, torch.device("cpu"))
    inner = map(boundaries.at, parts[1:])
    assert [[(value.shape[0], value.requires_grad) for value in boundary] for boundary in inner] == [
        [(MICRO_BATCH, False)], [(MICRO_BATCH, False), (MICRO_BATCH, True)],
    ]  # fmt: skip
