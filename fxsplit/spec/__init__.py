"""RunSpec: everything that a run can be asked for, as plain values, and the strict reading of it.

Later ones win: defaults < preset < recipe file < `FXSPLIT_*` environment < command line. The field `batch_size` is the
key `batch-size` of a recipe, the variable `FXSPLIT_BATCH_SIZE` and the option `--batch-size`.
"""

from fxsplit.spec.conflicts import PLANNED, beside_plan
from fxsplit.spec.fields import DEFAULTS, PIPELINE, PIPELINED, PIPELINES
from fxsplit.spec.reading import ENVIRONMENT_PREFIX, from_text, read_environment, read_recipe, read_values, resolve
from fxsplit.spec.run_spec import RunSpec

__all__ = [
    "DEFAULTS",
    "ENVIRONMENT_PREFIX",
    "PIPELINE",
    "PIPELINED",
    "PIPELINES",
    "PLANNED",
    "RunSpec",
    "beside_plan",
    "from_text",
    "read_environment",
    "read_recipe",
    "read_values",
    "resolve",
]
