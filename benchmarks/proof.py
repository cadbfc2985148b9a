"""The whole proof: every kind of model through `fxsplit check`, as a table, in pieces that can be resumed.

    python benchmarks/proof.py proof.jsonl                      # go on where the file ends, then print the table
    python benchmarks/proof.py proof.jsonl --seconds 900        # for so long, then print what there is
    python benchmarks/proof.py proof.jsonl --only hf: --show    # print alone

The models are the smallest of each family of timm, those of torchvision up to 60 M parameters and all types of `hf:*`.
Two families of timm have none that fits into 24 GB four times, with activations and gradients: they are left out.
A line of the file is the record of a model; a model that is in it is not checked again. Images have 128 pixels a side
where the model takes them, otherwise its own size.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Set
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torchvision
import typer

from fxsplit.errors import FxsplitError
from fxsplit.models import registry
from fxsplit.models.libraries.timm import families
from fxsplit.models.libraries.torchvision import module_of
from fxsplit.proving.checking import check_model
from fxsplit.proving.workers import call_each
from fxsplit.records import json_line
from fxsplit.report import CheckRecord

LARGEST = 60_000_000
TOO_LARGE = ("timm:deepseek_vit_412m", "timm:gemma4_vit_167m")
PIXELS = 128
# Models in one pool of processes.
PIECE = 8
GROUPS = {
    "classification": "torchvision, classification",
    "quantization": "torchvision, quantizable",
    "segmentation": "torchvision, segmentation",
    "video": "torchvision, video",
    "detection": "torchvision, detection",
    "optical_flow": "torchvision, optical flow",
}


def wanted(done: Set[str], only: str) -> Iterator[str]:
    """The models of the proof that are not done yet."""
    for members in families().values():
        # To find the smallest means to build them all.
        if "timm:".startswith(only[:5]) and done.isdisjoint(members) and not set(TOO_LARGE) & set(members):
            yield registry.smallest(members)
    for name in (*registry.expand("torchvision:*"), *registry.expand("hf:*")):
        if name not in done and (name.startswith("hf:") or _parameters(name) <= LARGEST):
            yield name


def _parameters(name: str) -> int:
    """Of a model of torchvision, as its weights tell."""
    weights = torchvision.models.get_model_weights(name.partition(":")[2])
    return int(next(iter(weights)).meta["num_params"])


def group_of(name: str) -> str:
    """The row of the table that a model counts in."""
    source, _, own = name.partition(":")
    if source == "timm":
        return "timm, the smallest model of each family"
    if source == "hf":
        return "Hugging Face, every type that builds small"
    return GROUPS.get(module_of(own).partition(".")[0], GROUPS["classification"])


def check(name: str, *, parts: int) -> CheckRecord:
    """At 128 pixels, or at the model's own size where it cannot be built or called at that."""
    record = check_model(name, structure_only=False, parts=parts, img_size=PIXELS)
    if record.refusal is not None and registry.native_size(name) != PIXELS:
        record = check_model(name, structure_only=False, parts=parts, img_size=None)
    return record


def died(name: str) -> CheckRecord:
    return CheckRecord(model=name, refusal="the process that checked it died")


def table(records: list[dict[str, Any]]) -> str:
    """What was proved, a row for each kind of model; below it all that is not equal."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[group_of(record["model"])].append(record)
    lines = [
        "| what | models | captured | equal | random by itself | differs | refused | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for group, members in groups.items():
        verdicts = [member["verdict"] for member in members]
        counts = [verdicts.count(verdict) for verdict in ("equal", "not deterministic", "differs", "refused")]
        captured, seconds = len(members) - counts[-1], sum(member["seconds"] for member in members)
        lines.append(f"| {' | '.join(map(str, (group, len(members), captured, *counts)))} | {seconds:.0f} |")
    lines.append("")
    for record in sorted(records, key=lambda record: str(record["verdict"])):
        if record["verdict"] != "equal":
            found = record["refusal"] or "; ".join([*record["differences"], *record["own_differences"]][:3])
            lines.append(f"- `{record['model']}`: {record['verdict']}: {found}")
    return "\n".join(lines)


def main(
    file: Path,
    only: Annotated[str, typer.Option(help="Models whose names begin so.")] = "",
    seconds: Annotated[float, typer.Option(help="Begin no further models after this time.")] = float("inf"),
    parts: int = 4,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Models at a time.")] = 2,
    again: Annotated[bool, typer.Option("--again", help="Check what was not equal once more.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the table of what there is, and no more.")] = False,
) -> None:
    began = time.monotonic()
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    # Of a model that was checked twice, the later record counts.
    found = {record["model"]: record for record in map(json.loads, lines)}
    done = {name for name, record in found.items() if not again or record["verdict"] == "equal"}
    left = (name for name in wanted(done, only) if name.startswith(only))
    while not show and time.monotonic() - began < seconds and (names := list(islice(left, PIECE))):
        for record in call_each(partial(check, parts=parts), names, jobs=jobs, died=died):
            found[record.model] = record.to_dict()
            with file.open("a", encoding="utf-8") as out:
                out.write(json_line(found[record.model]) + "\n")
            print(f"{record.model}: {record.verdict}, {record.seconds:.1f} s", flush=True)
    print(table([record for name, record in found.items() if name.startswith(only)]))


if __name__ == "__main__":
    try:
        typer.run(main)
    except FxsplitError as error:
        raise SystemExit(f"fxsplit: {error}") from error
