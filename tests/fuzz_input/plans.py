"""Plan files: JSON, from which a plan of a traced model is made or not."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch

import fxsplit
from fxsplit.assembly import forecast
from fxsplit.capture.tracing import Trace
from fxsplit.errors import PartitionError, UsageError
from fxsplit.models import registry
from fxsplit.plan import planfile
from fxsplit.plan.planfile import PlanFile
from tests.fuzz_input.mutate import damaged, structure
from tests.fuzz_input.outcome import Outcome, crashed, refused

KNOWN = (
    *("schema", "model", "graph", "torch", "preset", "schedule", "cuts", "phases", "derived"),
    *("from", "up_to", "epochs", "fresh_optimizer", "recompute_up_to", "segmented", "micro_batches"),
)


@cache
def trace() -> Trace:
    torch.manual_seed(0)
    model = registry.build("paper:cnn", num_classes=10, img_size=16)
    return fxsplit.trace(model, (torch.randn(2, 3, 16, 16),))


@cache
def plans() -> tuple[str, ...]:
    """Valid files: of every schedule, with and without what follows from the cuts."""
    found = []
    for name, count in (("standard", 1), ("settle", 4), ("grow", 3), ("window", 4), ("settle-far", 6)):
        partitions = fxsplit.partition(trace(), count=count)
        plan = fxsplit.schedule(name, partitions=partitions, epochs=12, epochs_total=12 if name == "window" else None)
        file = PlanFile.of(plan, model="paper:cnn", graph=trace().train.digest(), torch=torch.__version__)
        data = file.to_dict()
        found += [json.dumps(data), json.dumps({key: value for key, value in data.items() if key != "derived"})]
    return tuple(found)


def text(draw: random.Random) -> bytes:
    data: Any = json.loads(draw.choice(plans()))
    for _ in range(draw.choice((0, 1, 1, 2, 3))):
        data = structure(draw, data, KNOWN)
    return damaged(draw, json.dumps(data).encode(), draw.choice((0, 0, 0, 1, 3)))


def run(seed: int, folder: Path) -> Outcome:
    """Read a plan file, with and without the model, and do with a plan what `inspect` does."""
    path = folder / "plan.json"
    path.write_bytes(text(random.Random(seed)))
    try:
        planfile.read_options(str(path))
        plan = fxsplit.load_plan(str(path), trace())
        spec = fxsplit.RunSpec(model="paper:cnn", plan=str(path), batch_size=8)
        forecast(spec, plan, trace(), measured=False)
        assert len(str(plan)) > 0
        file = PlanFile.of(plan)
        assert planfile.read(file.to_json(), origin="again").plan(trace()) == plan, "it reads back otherwise"
        assert plan.lasting(max(len(plan.phases), 20)).epochs == max(len(plan.phases), 20)
    except (UsageError, PartitionError) as error:
        return refused(error, (UsageError, PartitionError))
    except Exception as error:
        return crashed(error)
    return Outcome("done")
