"""fxsplit: model-agnostic graph partitioning on torch.fx, and layer-to-layer training on top of it.

trace = fxsplit.trace(model, (x,))
parts = fxsplit.partition(trace, count=6)
plan = fxsplit.schedule("settle", partitions=parts, epochs=30)
net = fxsplit.Executor(trace, parts)
net.enter(plan.phase_at(epoch))
y = net(x)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxsplit.api import check, check_forecasts, inspect, trace, train
    from fxsplit.capture.tracing import Trace
    from fxsplit.cuda.graphed import graphed
    from fxsplit.distribute.device_map import device_map
    from fxsplit.distribute.pipeline import to_pipeline_stages
    from fxsplit.errors import FxsplitError, ProofError
    from fxsplit.execute.executor import Executor
    from fxsplit.measuring.op_costs import measure
    from fxsplit.plan.forecast import Forecast, forecast
    from fxsplit.plan.partition import Partition
    from fxsplit.plan.schedule import Phase, Plan, schedule
    from fxsplit.planning import load_plan, partition, save_plan
    from fxsplit.proving.first_batch import Proof, prove
    from fxsplit.report import (
        CheckRecord,
        Evaluation,
        ExportRecord,
        ForecastRecord,
        Inspection,
        Observer,
        Prediction,
        RunReport,
    )
    from fxsplit.spec import RunSpec
    from fxsplit.trained.evaluate import evaluate
    from fxsplit.trained.export import export
    from fxsplit.trained.load import load
    from fxsplit.trained.model import TrainedModel
    from fxsplit.trained.predict import predict

__version__ = "0.1.0"

__all__ = [
    "CheckRecord",
    "Evaluation",
    "Executor",
    "ExportRecord",
    "Forecast",
    "ForecastRecord",
    "FxsplitError",
    "Inspection",
    "Observer",
    "Partition",
    "Phase",
    "Plan",
    "Prediction",
    "Proof",
    "ProofError",
    "RunReport",
    "RunSpec",
    "Trace",
    "TrainedModel",
    "check",
    "check_forecasts",
    "device_map",
    "evaluate",
    "export",
    "forecast",
    "graphed",
    "inspect",
    "load",
    "load_plan",
    "measure",
    "partition",
    "predict",
    "prove",
    "save_plan",
    "schedule",
    "to_pipeline_stages",
    "trace",
    "train",
]

# Resolved on first use (PEP 562): importing fxsplit must not import torch.
_HOMES = {
    "fxsplit.api": ("check", "check_forecasts", "inspect", "trace", "train"),
    "fxsplit.planning": ("load_plan", "partition", "save_plan"),
    "fxsplit.measuring.op_costs": ("measure",),
    "fxsplit.capture.tracing": ("Trace",),
    "fxsplit.errors": ("FxsplitError", "ProofError"),
    "fxsplit.plan.forecast": ("Forecast", "forecast"),
    "fxsplit.plan.partition": ("Partition",),
    "fxsplit.plan.schedule": ("Phase", "Plan", "schedule"),
    "fxsplit.report": (
        "CheckRecord",
        "Evaluation",
        "ExportRecord",
        "ForecastRecord",
        "Inspection",
        "Observer",
        "Prediction",
        "RunReport",
    ),
    "fxsplit.trained.evaluate": ("evaluate",),
    "fxsplit.trained.export": ("export",),
    "fxsplit.trained.load": ("load",),
    "fxsplit.trained.model": ("TrainedModel",),
    "fxsplit.trained.predict": ("predict",),
    "fxsplit.cuda.graphed": ("graphed",),
    "fxsplit.distribute.device_map": ("device_map",),
    "fxsplit.execute.executor": ("Executor",),
    "fxsplit.distribute.pipeline": ("to_pipeline_stages",),
    "fxsplit.proving.first_batch": ("Proof", "prove"),
    "fxsplit.spec": ("RunSpec",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'fxsplit' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
