"""The results of a run, a check and a comparison of plans, as tables on stdout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from statistics import mean, median
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from fxsplit.comparison import BUDGETS, Comparison
from fxsplit.pages.figures import human, millijoules, spread, trains
from fxsplit.plan.plandiff import Change
from fxsplit.plan.schedule import Phase, Plan
from fxsplit.report import CheckRecord, Evaluation, ExportRecord, ForecastRecord, Prediction, RunReport

from .terminal import Terminal, print_whole, visible

# Narrower than WIDE, tables leave out what other columns imply or what is no result; narrower than MIDDLING, more.
WIDE, MIDDLING = 80, 50
# How many of a model's differences are listed.
LISTED = 3


def report(result: RunReport) -> None:
    """Print a row for each phase of a run; below it the accuracy and what the run cost."""
    console = Terminal()
    is_wide, is_middling = console.width >= WIDE, console.width >= MIDDLING
    has_energy = is_wide and any(record.joules_per_image is not None for record in result.epochs)
    rows = Rows(
        {
            "phase" if is_middling else "": True,
            "trains": True,
            "cut": is_middling,
            ">epochs": is_wide,
            ">seconds": True,
            ">energy an image": has_energy,
            ">test accuracy": True,
        }
    )
    for index, group in groupby(result.epochs, key=lambda record: record.phase):
        records = list(group)
        seconds = sum(record.train_seconds + record.eval_seconds for record in records)
        joules = [record.joules_per_image for record in records if record.joules_per_image is not None]
        trained, cut = where(result.plan.phases[index], result.plan)
        figures = (str(len(records)), f"{seconds:.1f}", millijoules(mean(joules) if joules else None))
        rows.add(str(index + 1), trained, cut, *figures, f"{records[-1].eval_top1:.2f} %")
    console.print(rows.table, "")

    def measured(name: str) -> list[Any]:
        return [value for record in result.epochs if (value := getattr(record, name)) is not None]

    def most(name: str) -> str | None:
        figures = measured(name)
        return human(max(figures), "B") if figures else None

    joules = measured("energy_joules")
    facts = Table.grid(padding=(0, 2))
    for name, fact in {
        "test accuracy": f"{result.accuracy_pct:.2f} % (last epoch)" if result.epochs else human(None),
        "test accuracy, snapshot ensemble": None if result.ensemble_pct is None else f"{result.ensemble_pct:.2f} %",
        "total time": f"{result.total_seconds:.1f} s after imports, of which setup {result.setup_seconds:.1f} s",
        "peak memory: process resident": most("peak_resident_bytes"),
        "peak memory: CUDA allocated": most("peak_allocated_bytes"),
        "peak memory: CUDA reserved": most("peak_reserved_bytes"),
        "peak memory: device (NVML)": most("device_bytes"),
        "cache: in memory": most("cache_resident_bytes"),
        "cache: in a file": most("cache_file_bytes"),
        "energy (NVML)": human(sum(joules), "J") if joules else None,
    }.items():
        if fact is not None:
            facts.add_row(name, Text(fact, "bold" if name == "test accuracy" else ""))
    console.print(facts)
    if result.folder:
        print_whole(console, f"\nrun folder: {result.folder}")


def checks(records: Sequence[CheckRecord]) -> None:
    """Print a row for each model; below it what failed and what was kept whole, with the reasons."""
    console = Terminal(highlight=False)
    names = ["ops", "opaque", "guards", "cuts", "partitions"] if console.width >= WIDE else []
    table = new_table("model", "verdict", *(f">{name}" for name in names), ">seconds")
    for record in records:
        style = "green" if record.passed else "red"
        counts = (record.ops, len(record.opaque), record.guards, record.cuts, record.partitions)
        figures = ["-" if record.refusal else str(count) for count in counts] if names else []
        table.add_row(Text(record.model), Text(record.verdict, style), *figures, f"{record.seconds:.1f}")
    console.print(table)
    for record in records:
        for line in _findings(record):
            print_whole(console, f"{record.model}{line}")
    passed = sum(record.passed for record in records)
    console.print(f"{passed} of {len(records)} passed")


def _findings(record: CheckRecord) -> list[str]:
    """What is to be said of a model beside its row; each line goes on where its name ends."""
    lines = [f": {record.refusal}"] if record.refusal else []
    for found, aside in ((record.differences, ""), (record.own_differences, ", and so do two plain models")):
        if found:
            more = len(found) - LISTED
            lines.append(f" differs{aside}: {'; '.join(found[:LISTED])}{f'; and {more} more' if more > 0 else ''}")
    alike: dict[str, list[str]] = {}
    for path, reason in record.opaque.items():
        alike.setdefault(reason, []).append(path)
    for reason, (first, *others) in alike.items():
        also = f" and {len(others)} more" if others else ""
        lines.append(f": kept whole: {first}{also}, because {reason}")
    return lines


def forecasts(records: Sequence[ForecastRecord]) -> None:
    """Print a row for each phase of each model, forecast beside measurement; below it by how much they differ."""
    console = Terminal(highlight=False)
    table = new_table("model", "trains", ">time", ">was", ">activations", ">were", ">peak", ">was")
    for record in records:
        for phase in record.phases:
            ahead, real = phase.forecast, phase.measured
            table.add_row(
                Text(record.model),
                trains(phase.start, phase.stop, record.partitions),
                *(f"{cost:.2f}" for cost in (ahead.step_cost, real.step_cost)),
                *(human(size, "B") for size in (ahead.activation_bytes, real.activation_bytes)),
                *(human(size, "B") for size in (ahead.peak_bytes, real.peak_bytes)),
            )
    console.print(table)
    print_whole(console, "Time is of a step, relative to one in which everything trains.\n")
    errors = [phase.errors for record in records for phase in record.phases]
    for name, noun in (("step_cost", "time"), ("activation_bytes", "activations"), ("peak_bytes", "peak")):
        if off := [abs(each[name]) for each in errors]:
            print_whole(console, f"{noun:12} off by {median(off):.1%} (median), {max(off):.1%} (worst)")
    for record in records:
        if record.refusal:
            print_whole(console, f"{record.model}: {record.refusal}")
    console.print(f"{sum(record.passed for record in records)} of {len(records)} passed")


def evaluation(found: Evaluation) -> None:
    """Print a row for each class; below it what is confused most, and the figures of the whole."""
    console = Terminal(highlight=False)
    table = new_table("class", ">images", ">precision", ">recall")
    for each in found.classes:
        table.add_row(
            Text(visible(each.name)),
            str(each.count),
            *(_per_cent(share) for share in (each.precision_pct, each.recall_pct)),
        )
    console.print(table, "")
    for truth, predicted, count in found.confused()[:LISTED]:
        print_whole(console, f"{count} of {truth} taken for {predicted}")
    facts = Table.grid(padding=(0, 2))
    for name, fact in {
        "accuracy": _per_cent(found.top1_pct),
        "accuracy, top-5": _per_cent(found.top5_pct),
        "loss": f"{found.loss:.4f}",
        "images": str(found.images),
    }.items():
        facts.add_row(name, Text(fact, "bold" if name == "accuracy" else ""))
    console.print("", facts)


def _per_cent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2f} %"


def prediction(found: Prediction) -> None:
    """Print an image's classes with their probabilities, one a line."""
    console = Terminal(highlight=False)
    print_whole(console, found.file)
    names = [visible(name) for name, _ in found.classes]
    width = max(map(cell_len, names))
    for name, (_, share) in zip(names, found.classes, strict=True):
        print_whole(console, f"  {name}{' ' * (width - cell_len(name))}  {100 * share:6.2f} %")


def exported(record: ExportRecord) -> None:
    """Print where an exported model is, what it takes, and how it was checked."""
    console = Terminal()
    *others, last = map(str, record.batch_sizes)
    equal = "bit for bit" if not record.difference else f"within {record.difference:.0e} of the largest"
    for name, fact in {
        "exported": record.path,
        "takes": record.takes,
        "size": human(record.bytes, "B"),
        "checked": f"loaded again, its scores equal the model's {equal}, on {', '.join(others)} and {last} images",
    }.items():
        print_whole(console, f"{name:9} {fact}")


def comparison(found: Comparison, files: str) -> None:
    """Print a row for each arm of each table; below it the verdicts, and what is not equal."""
    console = Terminal(highlight=False)
    is_wide, is_middling = console.width >= WIDE, console.width >= MIDDLING
    headers = {
        "arm": True, ">epochs": is_wide, ">seeds": is_wide, ">test accuracy, %": True, f">{found.time}": is_middling,
        ">memory": is_wide,
    }  # fmt: skip
    for each in found.tables:
        print_whole(console, f"{each.model}, {BUDGETS[each.match]}")
        rows = Rows(headers)
        for arm in each.arms:
            figures = (spread(arm.accuracy, 2), spread(arm.time, 1), human(arm.memory.mean, "B"))
            rows.add(Text(arm.arm), str(arm.epochs), str(len(arm.runs)), *figures)
        console.print(rows.table)
        for difference in each.differences:
            print_whole(console, difference.sentence)
        for sentence in each.unequal:
            console.print(Text(f"not equal: {sentence}", "red"), soft_wrap=True)
        console.print("")
    print_whole(console, f"written: {files}.json, .csv, .md and .html")


def diff(before: str, after: str, changes: Sequence[Change], *, stale: Sequence[str]) -> None:
    """Print what differs between two plan files; `stale` are those whose figures belong to other cuts."""
    console = Terminal()
    table = new_table("", "before", "after")
    for change in changes:
        table.add_row(Text(change.what), _side(change.before), _side(change.after))
    print_whole(console, f"{before} -> {after}\n")
    if changes:
        console.print(table)
    else:
        print_whole(console, "The plans are the same.")
    for path in stale:
        print_whole(
            console,
            f"Partitions are not compared: the figures in {path} are not those of its cuts; "
            f"fxsplit inspect MODEL --plan {path} --save-plan {path} works them out",
        )


def _side(value: str | int | Mapping[str, int] | None) -> Text:
    """One side of a change; figures one a line."""
    if isinstance(value, Mapping):
        return Text("\n".join(_figure(name, figure) for name, figure in value.items()))
    return Text("-" if value is None else str(value))


def _figure(name: str, value: int) -> str:
    noun = {"macs": "MACs", "activation_bytes": "activations", "boundary_bytes": "boundary"}.get(name, name)
    return f"{human(value, 'B' * name.endswith('_bytes'))} {noun}"


def where(phase: Phase, plan: Plan) -> tuple[Text, Text]:
    """Say which partitions train, and before which module the cut is."""
    count = len(plan.partitions)
    cut = phase.cut(count)
    return Text(trains(phase.start, phase.stop, count)), Text("-" if cut is None else plan.partitions[cut].name)


class Rows:
    """A table that has some of its columns: those of `headers` that are true."""

    def __init__(self, headers: Mapping[str, bool]) -> None:
        self._is_shown = tuple(headers.values())
        self.table = new_table(*(header for header, is_shown in headers.items() if is_shown))

    def add(self, *cells: str | Text) -> None:
        """Add a row, of which there is a cell for every column."""
        pairs = zip(cells, self._is_shown, strict=True)
        self.table.add_row(*(cell for cell, is_shown in pairs if is_shown))


def new_table(*headers: str) -> Table:
    """Make a table in which the columns of `>headers` are flush right."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for header in headers:
        right = header.startswith(">")
        kept = right or header == "arm"
        table.add_column(header.lstrip(">"), justify="right" if right else "left", no_wrap=kept, overflow="fold")
    return table
