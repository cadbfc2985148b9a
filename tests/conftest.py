"""Shared by all tests: a run and an inspection made of plain data, so that what shows them is tested without torch."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

from fxsplit.graph import Graph, Op, State, Value
from fxsplit.plan.forecast import forecast
from fxsplit.plan.partition import partition
from fxsplit.plan.schedule import Plan, schedule
from fxsplit.report import EpochRecord, Inspection, RunReport
from tests.pairs import both

# Where several processes run the tests, each has a core; torch reads this when it is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A loaded machine is no reason for a test to fail.
settings.register_profile("fxsplit", deadline=None)
settings.load_profile("fxsplit")


@pytest.fixture
def graph() -> Graph:
    """Six ops in a row, of a million multiply-adds each; their paths look like rich's markup."""
    names = ["x", *(f"op{index}" for index in range(6))]
    ops = tuple(
        Op(
            name=name,
            path=f"[red].{index}",
            kind="module",
            target="Linear",
            reads=(names[index],),
            output=Value(name=name, shape=(2, 8), dtype="float32", bytes_per_sample=2048),
            state=(f"{name}.weight",),
            macs=1_000_000,
            activation_bytes=1500,
        )
        for index, name in enumerate(names[1:])
    )
    return Graph(
        batch_size=2,
        inputs=(Value(name="x", shape=(2, 8), dtype="float32", bytes_per_sample=512),),
        ops=ops,
        outputs=("op5",),
        state=tuple(
            State(name=f"{op.name}.weight", shape=(50, 50), dtype="float32", bytes=10_000, is_parameter=True)
            for op in ops
        ),
    )


@pytest.fixture
def plan(graph: Graph) -> Plan:
    """Three phases over three partitions of two ops each."""
    return schedule("grow", partitions=partition(both(graph), count=3), epochs=6)


@pytest.fixture
def inspection(graph: Graph, plan: Plan) -> Inspection:
    return Inspection(
        model="file[bold].py:make",
        input_shape=(1, 3, 32, 32),
        train=graph,
        eval=graph,
        classes={op.path: "Linear" for op in graph.ops},
        plan=plan,
        tied={"op0.weight": ("head.weight",)},
        opaque={"block.norm": "it has hooks"},
        forecast=forecast(plan, both(graph), batch_size=2, optimizer_slots=2),
    )


@pytest.fixture
def epochs(plan: Plan) -> tuple[EpochRecord, ...]:
    return tuple(
        EpochRecord(
            epoch=epoch + 1,
            phase=plan.phase_index_at(epoch),
            start=plan.phase_at(epoch).start,
            stop=plan.phase_at(epoch).stop,
            cut="",
            lr=0.1,
            train_loss=1.5,
            train_top1=60.0 + epoch,
            eval_loss=1.25,
            eval_top1=50.0 + epoch,
            eval_top5=90.0,
            train_seconds=10.0,
            eval_seconds=1.5,
            images_per_second=1234.0,
            trainable_parameters=5000,
            peak_resident_bytes=1_000_000_000 + epoch,
            energy_joules=600.0,
            train_energy_joules=1234.0 * (epoch + 1),
        )
        for epoch in range(plan.epochs)
    )


@pytest.fixture
def report(plan: Plan, epochs: tuple[EpochRecord, ...]) -> RunReport:
    return RunReport(
        status="finished",
        spec={"model": "paper:cnn"},
        environment={},
        graph_digest="0123456789abcdef",
        plan=plan,
        epochs=epochs,
        setup_seconds=2.5,
        total_seconds=71.5,
        folder="output/train/[red]run",
    )


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def settings_of_the_process() -> dict[str, object]:
    """What numbers and later tests depend on, of torch as far as it is loaded."""
    # Others are set by libraries for themselves.
    own = {name: value for name, value in os.environ.items() if name.startswith(("FXSPLIT_", "MASTER_", "OMP_"))}
    found: dict[str, object] = {"environment": own, "folder": os.getcwd()}
    if (torch := sys.modules.get("torch")) and hasattr(torch, "get_num_threads"):
        found |= {
            "threads": torch.get_num_threads(),
            "dtype": torch.get_default_dtype(),
            "device": torch.get_default_device(),
            "gradients": torch.is_grad_enabled(),
            "autocast": [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")],
            "deterministic": (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            "precision": (
                torch.get_float32_matmul_precision(),
                torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
            ),
            "libraries": (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark),
        }
    return found


@pytest.fixture(autouse=True)
def settings_stay() -> Iterator[None]:
    """A test leaves the settings of its process as it found them."""
    before = settings_of_the_process()
    yield
    after = settings_of_the_process()
    assert {name: after[name] for name in before} == before


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order, whatever the machine has."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
