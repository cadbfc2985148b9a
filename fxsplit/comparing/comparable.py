"""Whether runs can be compared: what is not equal in their records though it should be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from fxsplit.errors import CheckError
from fxsplit.options import key
from fxsplit.report import RunReport
from fxsplit.spec import RunSpec

# Groups of options by which arms are meant to differ.
OF_ARMS = ("Layer-to-layer", "Regularisation", "Settled partitions", "Memory", "Run")
ELSEWHERE = ("epochs", "epochs_total", "data", "data_dir", "workers")
EQUAL = (
    *(
        key(item.name)
        for item in fields(RunSpec)
        if item.metadata["group"] not in OF_ARMS and item.name not in ELSEWHERE
    ),
    "deterministic",
)
SURROUNDINGS = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "fxsplit",
    "git_commit",
    "python",
    "os",
    "cpu",
    "cpu_capability",
    "torch_threads",
)
OF_GPUS = ("name", "driver", "cuda", "cudnn", "cudnn_benchmark", "tf32")
# What makes other data, and the test images another metric, in words.
DATA = {
    "classes": "classes",
    "test": "images to test on",
    "train": "images to train on",
    "img_size": "pixels of a side",
    "channels": "channels",
    "labels": "labels",
    "pixels": "pixels",
}

Runs = Mapping[str, Mapping[int, RunReport]]


def refuse_other_data(runs: Runs) -> None:
    """Raise CheckError when runs with the same seed were trained or tested on other data than each other's.

    Another test set would make another metric of their accuracies.

    Args:
        runs: by arm and seed.
    """
    first: dict[int, tuple[str, RunReport]] = {}
    for arm, by_seed in runs.items():
        for seed, report in by_seed.items():
            other, beside = first.setdefault(seed, (arm, report))
            for name, noun in DATA.items():
                one, two = beside.data.get(name), report.data.get(name)
                if one != two:
                    shown = f": {_short(one)} and {_short(two)}" if name not in ("labels", "pixels") else ""
                    raise CheckError(
                        f"{other} and {arm} were trained and tested on other data than each other's, so they cannot be "
                        f"compared: the {noun} differ with seed {seed}{shown} ({beside.folder}, {report.folder})"
                    )


def unequal(runs: Runs, updates: Mapping[str, int], *, match: str) -> Iterator[str]:
    """Say what is not the same in all runs though it should be, a sentence each.

    Args:
        runs: by arm and seed.
        updates: optimizer steps, by arm.
        match: the budget; updates are equal where epochs are.
    """
    yield from _differing(runs, {name: (lambda report, name=name: report.spec.get(name)) for name in EQUAL})
    yield from _differing(
        runs, {name: (lambda report, name=name: report.environment.get(name)) for name in SURROUNDINGS}
    )
    yield from _differing(runs, {f"GPU {name}": (lambda report, name=name: _gpu(report).get(name)) for name in OF_GPUS})
    if match == "epochs" and len(set(updates.values())) > 1:
        yield "updates: " + "; ".join(f"{arm} {count}" for arm, count in updates.items())


def _differing(runs: Runs, readers: Mapping[str, Any]) -> Iterator[str]:
    for name, read in readers.items():
        found = {arm: sorted({_short(read(report)) for report in by_seed.values()}) for arm, by_seed in runs.items()}
        if len({value for values in found.values() for value in values}) > 1:
            yield f"{name}: " + "; ".join(f"{arm} {' and '.join(values)}" for arm, values in found.items())


def _gpu(report: RunReport) -> Mapping[str, Any]:
    return report.environment.get("gpu") or {}


def _short(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"{len(value)}" if len(value) > 8 else ",".join(map(str, value))
    return "none" if value is None else str(value)
