"""Partitions and plan files of a traced model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import fxsplit.plan.partition
from fxsplit.arguments import require
from fxsplit.capture.tracing import Trace, require_trace
from fxsplit.execute.stages import refuse_foreign
from fxsplit.models.units import units_of
from fxsplit.plan.partition import Partition
from fxsplit.plan.planfile import PlanFile, from_dict, read_file, write_file
from fxsplit.plan.schedule import Plan
from fxsplit.report import Observer


def partition(
    trace: Trace, count: int | None = None, *, at: str | Sequence[str] = (), balance: str = "macs", by: str = "op"
) -> tuple[Partition, ...]:
    """Divide a traced model into partitions; returns them in order.

    Args:
        trace: the captured model.
        count: how many partitions, of about equal weight; give this or `at`.
        at: dotted paths of the modules before which to cut, or one of them.
        balance: the weight: multiply-adds ("macs"), parameters ("params"), bytes kept for backward ("activations"), or
            measured time ("seconds").
        by: where `count` may cut: anywhere ("op"), where the blocks of the graph meet ("natural"), or where the units
            meet that timm or Hugging Face names ("block").

    Raises UsageError and PartitionError as `fxsplit.plan.partition.partition` does, which has the details.
    """
    require_trace(trace)
    return fxsplit.plan.partition.partition(trace, count=count, at=at, balance=balance, by=by, units=units(trace, by))


def save_plan(plan: Plan, trace: Trace, path: str) -> None:
    """Write a plan of a traced model as a file that people can read and edit, and that `load_plan` reads.

    Raises PartitionError when the plan is of another model, and UsageError when the file cannot be written.
    """
    require("plan", plan, Plan, "a Plan", "fxsplit.schedule(...) makes one")
    refuse_foreign(trace, plan.partitions)
    name = type(trace.model).__name__
    write_file(PlanFile.of(plan, model=name, graph=trace.train.digest(), torch=torch.__version__), path)


def load_plan(path: str, trace: Trace, observer: Observer | None = None) -> Plan:
    """Read a plan from a file, for a traced model. It may be made for another model, as long as its cuts fit.

    Raises UsageError when the file cannot be read or is no plan, PartitionError when it does not fit the model; both
    name all faults at once.
    """
    require_trace(trace)
    file = read_file(path, modes=trace)
    if observer and file.graph not in ("", trace.train.digest()):
        observer.notice(f"the plan {path!r} was made for another model, but fits this one")
    return file.plan(trace)


def saved_plan(file: PlanFile, trace: Trace, observer: Observer) -> Plan:
    """Make the plan of a run that goes on. Raises PartitionError when it does not fit the model."""
    if file.graph != trace.train.digest():
        observer.notice("the model's operations are others than when the run began, and it goes on with those of now")
    return from_dict(file.to_dict(), origin="of the run", modes=trace).plan(trace)


def units(trace: Trace, by: str) -> dict[str, str]:
    """Return the unit of each module by its path, if partitions are cut `by` "block"; else nothing."""
    return units_of(trace.model) if by == "block" else {}
