"""Plans of a traced model: its partitions, and the files that hold its plans."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import fxsplit.plan.partition
from fxsplit.capture.tracing import Trace
from fxsplit.models.units import units_of
from fxsplit.plan.partition import Partition
from fxsplit.plan.planfile import PlanFile, read_file, write_file
from fxsplit.plan.schedule import Plan
from fxsplit.report import Observer


def partition(
    trace: Trace, *, count: int | None = None, at: Sequence[str] = (), balance: str = "macs", by: str = "op"
) -> tuple[Partition, ...]:
    """Divide a traced model into `count` partitions of equal weight, or before the modules named in `at`.

    See `fxsplit.plan.partition.partition`.
    """
    return fxsplit.plan.partition.partition(trace, count=count, at=at, balance=balance, by=by, units=units(trace, by))


def save_plan(plan: Plan, trace: Trace, path: str) -> None:
    """Write a plan of a traced model as a file that people can read and edit, and that `load_plan` reads."""
    name = type(trace.model).__name__
    write_file(PlanFile.of(plan, model=name, graph=trace.train.digest(), torch=torch.__version__), path)


def load_plan(path: str, trace: Trace, observer: Observer | None = None) -> Plan:
    """The plan in a file, for a traced model. It need not be the one for which the file was made, if its cuts fit.

    Raises UsageError when the file cannot be read or is no plan, PartitionError when it does not fit the model; both
    tell all that is wrong at once.
    """
    file = read_file(path, modes=trace)
    if observer and file.graph not in ("", trace.train.digest()):
        observer.notice(f"the plan {path!r} was made for another model, but fits this one")
    return file.plan(trace)


def units(trace: Trace, by: str) -> dict[str, str]:
    """The unit of each module, where partitions are to be cut between units."""
    return units_of(trace.model) if by == "block" else {}
