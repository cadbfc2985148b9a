"""Makes the parts of a run from its RunSpec: data, model, plan, executor, trainer. Nothing else reads its fields."""

from fxsplit.assembly.devices import choose_device, determinism, seed_apart
from fxsplit.assembly.folders import recorder
from fxsplit.assembly.images import Kind, data, in_layout, kind, loaders, random_images
from fxsplit.assembly.models import example_inputs, model, trace, with_preprocessing
from fxsplit.assembly.names import check_names
from fxsplit.assembly.plans import DEFAULT_PARTS, forecast, inspection, paying_plan, plan, scaling
from fxsplit.assembly.proofs import prove_first_batch
from fxsplit.assembly.recovery import recovery
from fxsplit.assembly.starting import check_alike, check_data, restore, start
from fxsplit.assembly.training import executor, passes, recordings, trainer

__all__ = [
    "DEFAULT_PARTS",
    "Kind",
    "check_alike",
    "check_data",
    "check_names",
    "choose_device",
    "data",
    "determinism",
    "example_inputs",
    "executor",
    "forecast",
    "in_layout",
    "inspection",
    "kind",
    "loaders",
    "model",
    "passes",
    "paying_plan",
    "plan",
    "prove_first_batch",
    "random_images",
    "recorder",
    "recordings",
    "recovery",
    "restore",
    "scaling",
    "seed_apart",
    "start",
    "trace",
    "trainer",
    "with_preprocessing",
]
