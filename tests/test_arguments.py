"""What functions of the library are given: one name for a list of one, and mistakes that are told in one sentence."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxsplit
from fxsplit.errors import PartitionError, UsageError
from tests.networks import Chain, LongSkip

X = torch.ones(2, 3, 8, 8)


@dataclass
class Given:
    """What is right: each mistake puts something else in the place of one of these."""

    model: nn.Module
    trace: fxsplit.Trace
    parts: tuple[fxsplit.Partition, ...]
    plan: fxsplit.Plan
    net: fxsplit.Executor


@pytest.fixture
def given() -> Given:
    model = Chain()
    trace = fxsplit.trace(model, (X,))
    parts = fxsplit.partition(trace, count=3)
    plan = fxsplit.schedule("settle", partitions=parts, epochs=10)
    return Given(model, trace, parts, plan, fxsplit.Executor(trace, parts))


def whole(leaves: Any) -> str:
    return str(fxsplit.trace(nn.Sequential(OrderedDict(body=Chain())), (X,), leaves=leaves))


@pytest.mark.parametrize(
    ("call", "one"),
    [
        (lambda given, one: fxsplit.partition(given.trace, at=one), "conv2"),
        (lambda _, one: whole(one), "body"),
        (lambda _, one: whole(one), Chain),
        (lambda given, one: fxsplit.device_map(given.trace, fxsplit.partition(given.trace, count=1), one), "cpu"),
        (lambda _, one: [each.model for each in fxsplit.check(one, structure_only=True, img_size=16)], "paper:cnn"),
    ],
    ids=["at", "leaves", "class", "devices", "check"],
)
def test_one_stands_for_a_list_of_one(given: Given, call: Callable[..., Any], one: Any) -> None:
    assert call(given, one) == call(given, [one])


schedule = partial(fxsplit.schedule, epochs=10)
first = fxsplit.Phase(start=0, stop=1, epochs=1)

MISTAKES: dict[str, tuple[Callable[[Given], object], str]] = {
    # The trace and its model.
    "a tensor": (lambda it: fxsplit.trace(it.model, X), r"args is of type Tensor, .* write \(x,\) for a single x"),
    "one sample": (lambda it: fxsplit.trace(it.model, X[:1]), "args is of type Tensor"),
    "keywords": (lambda it: fxsplit.trace(it.model, (), [X]), "kwargs is of type list, but must be keyword arguments"),
    "a class": (lambda _: fxsplit.trace(Chain, (X,)), "model is the class Chain, but must be an nn.Module; a class mu"),
    "a function": (lambda _: fxsplit.trace(len, (X,)), "model is of type builtin_function_or_method, but must be an"),
    "no trace to cut": (lambda it: fxsplit.partition(it.model, count=2), "trace is of type Chain, but must be a Trace"),
    "no trace to run": (lambda it: fxsplit.Executor(it.model, it.parts), "trace is of type Chain, but must be a Trace"),
    "no trace to map": (lambda it: fxsplit.device_map(it.model, it.parts, "cpu"), "trace is of type Chain"),
    "no trace to save": (lambda it: fxsplit.save_plan(it.plan, it.model, "no.json"), "trace is of type Chain"),
    "no trace to load": (lambda it: fxsplit.load_plan("no.json", it.model), "trace is of type Chain"),
    "a count": (lambda it: fxsplit.partition(it.trace, count="3"), "count is '3', but must be a whole number"),
    # Partitions, phases and the executor.
    "a plan": (lambda it: fxsplit.Executor(it.trace, it.plan), "partitions is of type Plan, .* plan.partitions has th"),
    "phases": (lambda it: fxsplit.Executor(it.trace, it.plan.phases), "one of the partitions is of type Phase, but mu"),
    "a name of a dtype": (
        lambda it: fxsplit.Executor(it.trace, it.parts, settled_dtype="bfloat16"),
        r"settled_dtype is 'bfloat16', but must be a dtype .* such as torch.bfloat16",
    ),
    "int8": (lambda it: fxsplit.Executor(it.trace, it.parts, settled_dtype=torch.int8), "settled_dtype is torch.int8"),
    "a tuple": (lambda it: it.net.enter((0, 3)), r"phase is of type tuple, but must be a Phase; .*phase_at\(epoch\)"),
    "parameters": (
        lambda it: it.net.enter(first, it.net.parameters()), "optimizer is of type generator, but must be an Optimizer"
    ),
    # Plans and what they cost.
    "half an epoch": (lambda _: fxsplit.Phase(start=0, stop=1, epochs=1.5), "epochs is 1.5, but must be a whole numbe"),
    "yes": (lambda _: fxsplit.Phase(start=0, stop=1, epochs=True), "epochs is True, but must be a whole number"),
    "half epochs": (lambda it: fxsplit.schedule("settle", partitions=it.parts, epochs=2.5), "epochs is 2.5, but must"),
    "nothing": (lambda _: schedule("settle", partitions=[]), "there are no partitions, so nothing could train"),
    "start": (lambda it: schedule("grow", partitions=it.parts, start=0.3), "start can be given only to the schedule s"),
    "thaw": (lambda it: schedule("grow", partitions=it.parts, thaw=0.5), "thaw can be given only .* is 'grow'"),
    "share": (lambda it: schedule("standard", partitions=it.parts, share=0.5), "share can be given only .* is 'standa"),
    "front": (lambda it: schedule("settle", partitions=it.parts, front=0.5), "front can be given only .*e finetune, a"),
    "9": (lambda it: schedule("settle-far", partitions=it.parts, share=9.0), "share is 9.0, but must be a number from"),
    "a": (lambda it: schedule("settle-far", partitions=it.parts, start="a"), "start is 'a', but must be a number from"),
    "no images": (lambda it: fxsplit.forecast(it.plan, it.trace, batch_size=0), "batch_size is 0, .* at least 1"),
    "less than none": (
        lambda it: fxsplit.forecast(it.plan, it.trace, batch_size=8, optimizer_slots=-1), "slots is -1, .* at least 0"
    ),
    "no plan": (lambda it: fxsplit.forecast(it.parts, it.trace, batch_size=8), "plan is of type tuple, but must be a "),
    "no steps": (lambda it: fxsplit.measure(it.trace, (X,), steps=0), "steps is 0, but must be a whole number, at lea"),
    "no device": (lambda it: fxsplit.measure(it.trace, (X,), device="cpus"), "device is 'cpus', which torch cannot us"),
    "a tensor to measure on": (lambda it: fxsplit.measure(it.trace, X), "args is of type Tensor"),
    "a tensor to prove on": (lambda it: fxsplit.prove(it.model, it.net, X), "args is of type Tensor"),
    "a trace to prove": (lambda it: fxsplit.prove(it.model, it.trace, (X,)), "net is of type Trace, but must be an Ex"),
    # Whole runs.
    "a dict": (lambda _: fxsplit.train({"model": "paper:cnn"}), "spec is of type dict, but must be a RunSpec; write f"),
    "a name": (lambda _: fxsplit.inspect("paper:cnn"), "spec is 'paper:cnn', but must be a RunSpec"),
    "a run": (lambda _: fxsplit.compare(fxsplit.RunSpec(model="paper:cnn")), "spec is of type RunSpec, but must be a "),
    "a report": (lambda it: fxsplit.load(it.plan), "run is of type Plan, but must be a path; .* report.folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_changes_nothing(name: str, given: Given) -> None:
    mistake, said = MISTAKES[name]
    with pytest.raises(UsageError, match=said) as caught:
        mistake(given)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 320
    assert all(parameter.requires_grad for parameter in given.model.parameters())
    assert given.net.window == (0, 3)


def test_numbers_of_other_libraries_are_numbers(given: Given) -> None:
    plan = fxsplit.schedule("settle", partitions=given.parts, epochs=np.int64(10), share=np.float32(0.5))
    assert plan == fxsplit.schedule("settle", partitions=given.parts, epochs=10, share=0.5)


def test_a_plan_is_saved_with_its_own_trace_alone(given: Given, tmp_path: Any) -> None:
    with pytest.raises(PartitionError, match="made from another trace"):
        fxsplit.save_plan(given.plan, fxsplit.trace(LongSkip(), (X,)), tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())
