"""An inspection in every format: for people in a terminal (`table`, `tree`), for others to read on (the rest)."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from fxsplit.errors import UsageError, printable, reason, shown_path
from fxsplit.pages.figures import duration, epochs_of, human, in_words, shape
from fxsplit.pages.outline import Block, Costs, outline
from fxsplit.plan.forecast import Forecast
from fxsplit.plan.scaling import ScaleForecast
from fxsplit.records import json_text
from fxsplit.report import Inspection

from .tables import MIDDLING, WIDE, Rows, where
from .terminal import WIDEST, Terminal, draw, legend, print_sentence, print_whole, visible, write

CSV_COLUMNS = (
    *("partition", "op", "path", "class", "kind", "target", "shape", "dtype", "bytes_per_sample"),
    *("parameters", "macs", "uncounted", "backward_macs", "activation_bytes", "seconds", "reads", "state", "mutates"),
)
FORECAST = ("time", "activations", "peak")
SCALING = (
    "* the fastest of those that fit. Means over the epochs of the plan: of a step, of the share of it that a device "
    "waits, and of what it sends; memory at its largest. Ops are taken to need time in proportion to their samples, "
    "and messages in proportion to their bytes. A pipeline has no more devices than there are partitions."
)


# For people in a terminal


def table(inspection: Inspection, console: Console) -> None:
    """Print the partitions, and the phases of the plan with their forecast."""
    plan, ahead, width = inspection.plan, inspection.forecast, console.width
    print_whole(console, f"{inspection.model}, input {shape(inspection.input_shape)}\n")
    console.print(_partitions(inspection, width))
    print_sentence(console, "MACs (multiply-adds) and bytes are of one sample; boundary is what is read.\n")
    print_sentence(console, f"{plan.title}, epochs in all: {plan.epochs}\n")
    console.print(_phases(inspection, width))
    if width >= WIDE:
        console.print(legend())
    if ahead:
        print_sentence(console, f"{in_words(ahead)} A phase's time is that of a step.")
    if inspection.scaling:
        console.print(_scaling(inspection.scaling, width))
        print_sentence(console, SCALING)
    for note in inspection.notes:
        print_sentence(console, note)


def _partitions(inspection: Inspection, width: int) -> Table:
    ops, totals = inspection.train.ops, _totals(inspection)
    rows = Rows(
        {
            "#": True,
            "from": True,
            "to": width >= WIDE,
            ">ops": width >= MIDDLING,
            ">params": True,
            ">MACs": True,
            ">activations": width >= MIDDLING,
            ">boundary": width >= MIDDLING,
        }
    )
    for part in inspection.partitions:
        end = ops[part.stop - 1]
        rows.add(
            str(part.index),
            Text(part.name),
            Text(end.path or end.name),
            str(part.stop - part.start),
            human(part.parameters),
            human(part.macs),
            human(part.activation_bytes, "B"),
            human(part.boundary_bytes, "B"),
        )
    rows.table.add_section()
    counts = (str(totals["ops"]), human(totals["parameters"]), human(totals["macs"]))
    rows.add("", "total", "", *counts, human(totals["activation_bytes"], "B"), "")
    return rows.table


def _phases(inspection: Inspection, width: int) -> Table:
    plan, ahead = inspection.plan, inspection.forecast
    count = len(plan.partitions)
    rows = Rows(
        {
            "phase" if width >= MIDDLING else "": True,
            " ": width >= WIDE,
            "trains": True,
            "cut": width >= WIDE,
            ">epochs": True,
            ">time": ahead is not None,
            ">activations": ahead is not None and width >= MIDDLING,
            ">peak": ahead is not None,
        }
    )
    for index, phase in enumerate(plan.phases):
        drawing = draw(phase, count, min(3 * count, 30))
        figures = _phase_figures(ahead, index) if ahead else ("", "", "")
        rows.add(str(index + 1), drawing, *where(phase, plan), str(phase.epochs), *figures)
    return rows.table


def _scaling(found: Sequence[ScaleForecast], width: int) -> Table:
    rows = Rows(
        {
            ">devices": True,
            "way": True,
            ">step": True,
            ">speed-up": width >= MIDDLING,
            ">waiting": width >= WIDE,
            ">sent": width >= WIDE,
            ">memory": True,
        }
    )
    alone = found[0].step_seconds
    for each in found:
        rows.add(
            str(each.devices),
            f"{each.way} *" if each.is_fastest else each.way,
            duration(each.step_seconds),
            f"{alone / each.step_seconds:.2f}",
            f"{each.idle_share:.0%}",
            human(each.traffic_bytes, "B"),
            human(each.peak_bytes, "B"),
        )
    return rows.table


def tree(inspection: Inspection, console: Console) -> None:
    """Print the modules of each partition with costs on every level; bars are shares of the level above."""
    found, width = outline(inspection), min(console.width, WIDEST)
    model = Tree(_branch(Text(inspection.model, "bold"), found.costs, found.costs, width), guide_style="bright_black")
    for index, block in enumerate(found.partitions):
        name = Text.assemble((f"{index} ", "bold"), (block.name, "bold"))
        _grow(model.add(_branch(name, block.costs, found.costs, width)), block, width)
    console.print(model, width=width)
    columns = ("MACs", "parameters", "activations")[: 3 if width >= MIDDLING else 1]
    bars = "; bars: share of the level above" if width >= WIDE else ""
    print_sentence(console, f"\n{', '.join(columns)}{bars}.")
    print_sentence(console, "Ops without cost are left out.")
    for note in inspection.notes:
        print_sentence(console, note)


def _grow(node: Tree, block: Block, width: int) -> None:
    """Add the blocks inside of a block: not those without costs, and of equal ones the first."""
    for inner in block.blocks[:1] if block.count > 1 else block.blocks:
        if inner.costs.macs or inner.costs.parameters or inner.costs.activation_bytes:
            # What is too long is cut off at its end.
            name = Text(f"{inner.count} x " if inner.count > 1 else "", "bold cyan")
            name.append(inner.name, "default not bold")
            name.append(f" {inner.what}" if inner.what != inner.name else "", "bright_black")
            _grow(node.add(_branch(name, inner.costs, block.costs, width)), inner, width)


def _branch(name: Text, costs: Costs, whole: Costs, width: int) -> Table:
    """Make a line of the tree, with as many figures and bars as a terminal of this width has room for."""
    grid = Table.grid(expand=True, padding=(0, 1, 0, 0))
    grid.add_column(ratio=1, no_wrap=True)
    cells: list[Text | Bar] = [name]
    figures = (
        ("blue", "", costs.macs, whole.macs),
        ("magenta", "", costs.parameters, whole.parameters),
        ("yellow", "B", costs.activation_bytes, whole.activation_bytes),
    )
    for style, unit, part, total in figures[: 3 if width >= MIDDLING else 1]:
        grid.add_column(width=8, justify="right", no_wrap=True)
        cells.append(Text(human(part, unit) if part else ""))
        if width >= WIDE:
            grid.add_column(width=5)
            cells.append(Bar(total or 1, 0, part, width=5, color=style))
    grid.add_row(*cells)
    return grid


def _phase_figures(forecast: Forecast, index: int) -> tuple[str, ...]:
    """Under the headers FORECAST."""
    phase = forecast.phases[index]
    return f"{phase.step_cost:.2f}", human(phase.activation_bytes, "B"), human(phase.peak_bytes, "B")


# For others to read on


def to_dict(inspection: Inspection) -> dict[str, Any]:
    """Make plain data for JSON.

    `model`, `input_shape`, `graph_digest`; `plan`, which is a plan file; `totals` of ops, parameters and, for one
    sample, macs and activation_bytes; `forecast` of each phase, of `standard` and of the whole beside it; `scaling`, on
    several devices, if that was asked for; `uncounted` ops, whose macs are not among the totals; `tied` parameters with
    their other names; `opaque` modules with the reason why each is kept whole.
    """
    return {
        "model": inspection.model,
        "input_shape": list(inspection.input_shape),
        "graph_digest": inspection.train.digest(),
        "plan": inspection.plan_file.to_dict(),
        "totals": _totals(inspection),
        "forecast": asdict(inspection.forecast) if inspection.forecast else None,
        "scaling": [asdict(each) for each in inspection.scaling],
        "uncounted": [op.name for op in inspection.train.ops if op.uncounted],
        "tied": {name: list(others) for name, others in inspection.tied.items()},
        "opaque": dict(inspection.opaque),
    }


def to_csv(inspection: Inspection) -> str:
    """Write a row for each op, in order; names in one cell are separated by spaces."""
    parameters = outline(inspection).parameters
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for part in inspection.partitions:
        for op in inspection.train.ops[part.start : part.stop]:
            called = inspection.classes.get(op.path, "") if op.kind == "module" else ""
            sizes = "" if op.output.shape is None else "x".join(map(str, op.output.shape))
            what = (part.index, op.name, op.path, called, op.kind, op.target, sizes, op.output.dtype)
            costs = (parameters[op.name], op.macs, op.uncounted, op.backward_macs, op.activation_bytes, op.seconds)
            names = (" ".join(op.reads), " ".join(op.state), " ".join(op.mutates))
            row = (*what, op.output.bytes_per_sample, *costs, *names)
            writer.writerow(printable(cell) if isinstance(cell, str) else cell for cell in row)
    return text.getvalue()


def to_markdown(inspection: Inspection) -> str:
    """Write the partitions and the phases as two tables."""
    plan, ahead = inspection.plan, inspection.forecast
    partitions = [
        (
            *(str(part.index), _code(part.name), str(part.stop - part.start), human(part.parameters), human(part.macs)),
            *(human(part.activation_bytes, "B"), human(part.boundary_bytes, "B")),
        )
        for part in inspection.partitions
    ]
    phases = []
    for index, phase in enumerate(plan.phases):
        trains, cut = (words.plain for words in where(phase, plan))
        row = (str(index + 1), epochs_of(index, plan).split(" ", 1)[1], trains, "-" if cut == "-" else _code(cut))
        phases.append((*row, *(_phase_figures(ahead, index) if ahead else ())))
    lines = [
        f"## {_code(inspection.model)}, input {shape(inspection.input_shape)}",
        "",
        *_rows(("#", "from", ">ops", ">params", ">MACs", ">activations", ">boundary"), partitions),
        "",
        f"{_escaped(plan.title)}, {plan.epochs} epochs",
        "",
        *_rows(("phase", "epochs", "trains", "cut", *(f">{header}" for header in FORECAST if ahead)), phases),
        *(("", in_words(ahead)) if ahead else ()),
        "",
        *(f"- {_escaped(line)}" for line in inspection.notes),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _rows(headers: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(header.lstrip('>') for header in headers)} |"
    yield f"|{'|'.join('--:' if header.startswith('>') else '---' for header in headers)}|"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _code(text: str) -> str:
    """A name as code, in which no mark-up acts."""
    return "`" + printable(text).replace("`", "'").replace("|", "\\|") + "`"


def _escaped(text: str) -> str:
    return "".join(f"\\{character}" if character in "\\`*_[]<>#|" else character for character in printable(text))


def to_dot(inspection: Inspection) -> str:
    """Write for Graphviz: partitions as clusters of their blocks, on each edge the bytes of one sample it carries."""
    graph = inspection.train
    lines = ["digraph {", '  graph [labeljust=l, fontname="sans-serif"];']
    lines += ['  node [shape=box, fontname="sans-serif"];', '  edge [fontname="sans-serif"];']
    # The node in which each value is made.
    nodes = {value.name: f"input {value.name}" for value in graph.inputs}
    lines += [f"  {_quoted(node)} [shape=ellipse];" for node in nodes.values()]
    for index, partition in enumerate(outline(inspection).partitions):
        lines += [f"  subgraph cluster_{index} {{", f"    label={_quoted(f'{index}: {partition.name}')};"]
        for number, block in enumerate(_opened(partition)):
            node = f"{index}.{number}"
            nodes |= dict.fromkeys(_ops(block), node)
            lines.append(f"    {_quoted(node)} [label={_quoted(_label(block))}];")
        lines.append("  }")
    lines.append('  "output" [shape=ellipse];')
    reads = [(nodes[name], nodes[op.name], name) for op in graph.ops for name in op.reads]
    reads += [(nodes[name], "output", name) for name in graph.outputs]
    for source, target, name in dict.fromkeys(reads):
        if source != target:
            carried = human(graph.values[name].bytes_per_sample, "B")
            lines.append(f"  {_quoted(source)} -> {_quoted(target)} [label={_quoted(carried)}];")
    return "\n".join([*lines, "}"]) + "\n"


def _opened(partition: Block) -> tuple[Block, ...]:
    """Its blocks; those of the module, if one module is all it has."""
    only = partition.blocks[0]
    is_one_module = len(partition.blocks) == 1 and only.count == 1 and only.blocks
    return only.blocks if is_one_module else partition.blocks


def _ops(block: Block) -> Iterator[str]:
    if block.op:
        yield block.op.name
    for inner in block.blocks:
        yield from _ops(inner)


def _label(block: Block) -> str:
    name = f"{block.name} x {block.count}" if block.count > 1 else block.name
    macs = f"{human(block.costs.macs)} MACs" if block.costs.macs else ""
    parameters = f"{human(block.costs.parameters)} parameters" if block.costs.parameters else ""
    return "\n".join(filter(None, (name, block.what, macs, parameters)))


def _quoted(text: str) -> str:
    escaped = visible(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def to_html(inspection: Inspection) -> str:
    """Write one file, to be opened in a browser."""
    from fxsplit.pages.page import inspection_page

    return inspection_page(inspection)


def _totals(inspection: Inspection) -> dict[str, int]:
    names = ("parameters", "macs", "activation_bytes")
    sums = {name: sum(getattr(part, name) for part in inspection.partitions) for name in names}
    return {"ops": len(inspection.train), **sums}


DRAWN: Mapping[str, Callable[[Inspection, Console], None]] = {"table": table, "tree": tree}
WRITTEN: Mapping[str, Callable[[Inspection], str]] = {
    "json": lambda inspection: json_text(to_dict(inspection)),
    "csv": to_csv,
    "md": to_markdown,
    "dot": to_dot,
    "html": to_html,
}
FORMATS = (*DRAWN, *WRITTEN)


def show(inspection: Inspection, name: str, path: str | None) -> None:
    """Write the format called `name` to stdout, or to a file. Raises UsageError when that cannot be written."""
    if path is None:
        if name in DRAWN:
            DRAWN[name](inspection, Terminal())
        else:
            write(WRITTEN[name](inspection))
        return
    if name in DRAWN:
        drawing = io.StringIO()
        DRAWN[name](inspection, Terminal(file=drawing, width=WIDEST))
        text = drawing.getvalue()
    else:
        text = WRITTEN[name](inspection)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:  # a null character in the path, say
        why = getattr(error, "strerror", None) or reason(error)
        raise UsageError(f"the file {shown_path(path)} cannot be written: {why}; choose another --output") from error
