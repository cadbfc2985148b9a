"""Lists the cuts of a model, one between any two ops, with what crosses each and why some are refused.

train   stem ── conv ── relu ──┊── dropout ── fc   A cut of the train graph and its twin in the eval graph
                               ┊                   have the same common ops before them. What is live at
eval    stem ── conv ── relu ──┊───────────── fc   either of the two crosses the cut in both modes.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain

from fxsplit.errors import PartitionError
from fxsplit.graph import Graph, Modes, Op, Value, cached_by_graphs, prefixes
from fxsplit.plan.natural import natural_cuts


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Describes a cut before op `index` of the train graph, and its twin before op `eval_index` of the eval graph.

    Args:
        path: name of the op after the cut: the outermost module that begins with it, or its own name if none does.
        boundary: values that cross in either mode, in the order in which training writes them.
        bytes_per_sample: size of the boundary for one sample, shared memory counted once.
        single: exactly one tensor crosses; plain numbers may cross beside it.
        refusal: why the cut is not allowed, or None.
        natural: a person would cut here, as `fxsplit.plan.natural` defines it.
    """

    index: int
    eval_index: int
    path: str
    boundary: tuple[str, ...]
    bytes_per_sample: int
    single: bool
    refusal: str | None
    natural: bool


def cuts(modes: Modes) -> tuple[Cut, ...]:
    """List every cut between two ops of the train graph, with its twin in the eval graph and its refusal, if any.

    A cut is refused

    - when a common op lies before it in one mode and after it in the other;
    - when an op after it reads a value of the boundary that exists in one mode only;
    - when an op after it overwrites a value of the boundary;
    - when ops on both sides use a parameter or buffer that one of them changes, or that one autocast region inside of
      forward has cast for both;
    - when ops on both sides change buffers of one module.

    A parameter that both sides only read refuses nothing. Raises PartitionError when there is no op at all.
    """
    return with_ends(modes)[1:-1]


@cached_by_graphs
def with_ends(modes: Modes) -> tuple[Cut, ...]:
    """List all cuts `0 .. len(train)`, the model's two ends included, whose refusals mean nothing."""
    train, eval_graph = modes.train, modes.eval
    if not len(train):
        raise PartitionError("the model has no operations, so there is nothing to partition")
    values = {**eval_graph.values, **train.values}
    paths = [*_paths(train), ""]
    twins = _twins(train, eval_graph)
    boundaries = _boundaries(train, eval_graph, twins)
    refusals = _refusals(train, eval_graph, twins, boundaries)
    sizes = _sizes(boundaries, values)
    # A tuple of tensors has bytes but no shape; numbers have neither.
    carriers = {name for name, value in values.items() if value.shape is not None or value.bytes_per_sample}
    tensors = {name for name, value in values.items() if value.shape is not None}
    crossing = [carriers.intersection(boundary) for boundary in boundaries]
    single = [len(names) == 1 and names <= tensors for names in crossing]
    eligible = [alone and refusal is None for alone, refusal in zip(single, refusals, strict=True)]
    natural = natural_cuts(train, sizes, eligible, paths)
    return tuple(
        Cut(
            index=index,
            eval_index=twins[index],
            path=paths[index],
            boundary=boundaries[index],
            bytes_per_sample=sizes[index],
            single=single[index],
            refusal=refusals[index],
            natural=index in natural,
        )
        for index in range(len(train) + 1)
    )


def _twins(train: Graph, eval_graph: Graph) -> list[int]:
    """Find for every cut `0 .. len(train)` its twin: the eval cut with the same common ops before it.

    Where ops that only evaluation has leave a choice, it is the first with the same boundary, else the first whose
    boundary training can provide, else the first. Twins never decrease from cut to cut.
    """
    # Both modes have the ops a and b; train alone has t, evaluation alone e and f. Numbers are cuts.
    #
    #                a         t         b
    #     train  0 ──●── 1 ────●──── 2 ──●── 3              (1) passed  0  1  1  2
    #
    #     eval   0 ──●── 1 ──●── 2 ──●── 3 ──●── 4          (1) passed  0  1  1  1  2
    #                a       e       f       b
    #
    # (1) How many common ops lie before a cut. Twins have passed as many.
    # (2) Cuts 1 and 2 of train have passed one, and so have 1, 2 and 3 of evaluation: among these is the choice.
    # (3) The best of it is a cut over which the same values cross.
    # (4) Else one after which no value is read that only evaluation has, so that training can provide its boundary.
    # (5) A twin never lies before the twin of an earlier cut, or partitions would overlap.
    common = train.written_at.keys() & eval_graph.written_at.keys()
    choices: dict[int, list[int]] = {}
    for cut, passed in enumerate(_passed(eval_graph, common)):  # (1)
        choices.setdefault(passed, []).append(cut)

    def is_provided(twin: int, name: str) -> bool:
        return name in common or eval_graph.read_until.get(name, -1) < twin

    def choose(cut: int, among: list[int]) -> int:
        if len(among) == 1:
            return among[0]
        boundary = set(train.boundaries[cut])
        same = (twin for twin in among if boundary == set(eval_graph.boundaries[twin]))  # (3)
        shared = (twin for twin in among if all(map(partial(is_provided, twin), eval_graph.boundaries[twin])))  # (4)
        return max(twins[-1], next(chain(same, shared, among)))  # (5)

    twins = [0]
    for cut, passed in enumerate(_passed(train, common)[1:-1], start=1):
        twins.append(choose(cut, choices[passed]))  # (2)
    return [*twins, len(eval_graph)]


def _boundaries(train: Graph, eval_graph: Graph, twins: Sequence[int]) -> list[tuple[str, ...]]:
    """List what is live at each train cut or its twin, in the order in which training, then evaluation, writes it."""
    order = {name: rank for rank, name in enumerate(dict.fromkeys((*train.values, *eval_graph.values)))}
    pairs = zip(train.boundaries, (eval_graph.boundaries[twin] for twin in twins), strict=True)
    return [
        in_train if in_train == in_eval else tuple(sorted({*in_train, *in_eval}, key=order.__getitem__))
        for in_train, in_eval in pairs
    ]


def _refusals(
    train: Graph, eval_graph: Graph, twins: Sequence[int], boundaries: Sequence[tuple[str, ...]]
) -> list[str | None]:
    """Say why each cut is not allowed, or None."""
    swapped = _swapped(train, eval_graph)
    one_sided = train.values.keys() ^ eval_graph.values.keys()
    modes = [
        (cut_at, _last_writes(graph), _divided_state(graph))
        for graph, cut_at in ((train, range(len(train) + 1)), (eval_graph, twins))
    ]
    found = []
    for index, boundary in enumerate(boundaries):
        refusal = swapped[index]
        if not refusal and not one_sided.isdisjoint(boundary):
            refusal = _one_sided(boundary, (index, twins[index]), (train, eval_graph))
        for cut_at, written, divided in modes:
            cut = cut_at[index]
            if not refusal and not written.keys().isdisjoint(boundary):
                refusal = _overwritten(boundary, cut, written)
            refusal = refusal or divided[cut]
        found.append(refusal)
    return found


def _passed(graph: Graph, common: Iterable[str]) -> list[int]:
    """Count the common ops before each cut."""
    return list(accumulate((op.name in common for op in graph.ops), initial=0))


def _swapped(train: Graph, eval_graph: Graph) -> list[str | None]:
    """Name for every train cut a common op that runs before it in training and after it in evaluation, or None."""
    common = (op.name for op in eval_graph.ops if op.name in train.written_at)
    rank = {name: rank for rank, name in enumerate(common)}
    found: list[str | None] = [None]
    passed, latest = 0, ""
    for op in train.ops:
        if op.name in rank:
            passed += 1
            latest = max(latest, op.name, key=lambda name: rank.get(name, -1))
        late = rank.get(latest, -1) >= passed
        found.append(f"op {latest!r} runs before it in training, after it in evaluation" if late else None)
    return found


def _one_sided(boundary: tuple[str, ...], cut: tuple[int, int], graphs: tuple[Graph, Graph]) -> str | None:
    """Refuse a cut over which a value crosses that exists in one mode only, if an op after the cut reads it.

    If none reads it and it is only returned, as that of an auxiliary head, the other mode passes None in its place.
    """
    for index, graph, other, mode in zip(cut, graphs, reversed(graphs), ("training", "evaluation"), strict=True):
        for name in boundary:
            if name not in other.values and graph.read_until.get(name, -1) >= index:
                return f"the value {name!r} exists only in {mode}"
    return None


def _last_writes(graph: Graph) -> dict[str, tuple[int, str]]:
    """Find for every value whose storage is written in place the index and name of the last op that does."""
    written = {
        graph.values[name].storage: (index, op.name)
        for index, op in enumerate(graph.ops)
        for name in op.mutates
        if name in graph.values
    }
    return {name: written[value.storage] for name, value in graph.values.items() if value.storage in written}


def _overwritten(boundary: tuple[str, ...], cut: int, last_writes: Mapping[str, tuple[int, str]]) -> str | None:
    for name in boundary:
        index, op = last_writes.get(name, (-1, ""))
        if index >= cut:
            return f"op {op!r} writes in place into the value {name!r} after it"
    return None


def _divided_state(graph: Graph) -> list[str | None]:
    """Refuse every cut between two ops that must stay together because of the state which they share."""
    changed = {name for op in graph.ops for name in op.mutates}
    bonds = [list(_bonds(op, changed, graph.values)) for op in graph.ops]
    last = {key: index for index, bonds_of_op in enumerate(bonds) for key, _ in bonds_of_op}
    found: list[str | None] = [None]
    reach, furthest = 0, ""
    for index, bonds_of_op in enumerate(bonds):
        for key, reason in bonds_of_op:
            if last[key] > reach:
                reach, furthest = last[key], reason
        found.append(furthest if reach > index else None)
    return found


def _bonds(op: Op, changed: Container[str], values: Container[str]) -> Iterator[tuple[object, str]]:
    """Yield keys that an op has in common with all others of its partition-to-be, and why they must stay together.

    Buffers of one module are such a key: a BatchNorm whose forward is traced through counts batches in one op and moves
    its statistics in another, and both must settle at the same time, as they do when the module itself is frozen.
    """
    for name in op.state:
        if name in changed:
            yield name, f"ops on both sides hold {name!r}, and one of them changes it"
        if op.autocast is not None:
            # Its gradients add up in the lower precision of that one cast; two casts would add them in full.
            yield (op.autocast, name), f"ops on both sides use {name!r} as one autocast region has cast it"
    for name in op.mutates:
        if name not in values:
            owner = name.rpartition(".")[0]
            of = repr(owner) if owner else "the model itself"
            yield ("buffers", owner), f"ops on both sides change buffers of {of}"


def _sizes(boundaries: Sequence[tuple[str, ...]], values: Mapping[str, Value]) -> list[int]:
    """Measure each boundary in bytes for one sample, as `shared_bytes` does."""
    views = {name for name, value in values.items() if value.storage != name}
    alone = {name: value.bytes_per_sample for name, value in values.items()}
    return [
        sum(map(alone.__getitem__, boundary)) if views.isdisjoint(boundary) else shared_bytes(boundary, values)
        for boundary in boundaries
    ]


def shared_bytes(boundary: tuple[str, ...], values: Mapping[str, Value]) -> int:
    """Sum the bytes of values for one sample; views of one storage together count no more than the storage."""
    sizes: dict[str, int] = {}
    for name in boundary:
        sizes[values[name].storage] = sizes.get(values[name].storage, 0) + values[name].bytes_per_sample
    return sum(min(size, values[name].bytes_per_sample) if name in values else size for name, size in sizes.items())


def unit_borders(train: Graph, units: Mapping[str, str]) -> set[int]:
    """Find the cuts at which one unit ends and another begins; `units` maps module paths to units.

    An op belongs to the unit of the innermost module in `units` that it lies in, or else to that of the op before it.
    """
    borders: set[int] = set()
    current: str | None = None
    for index, op in enumerate(train.ops):
        enclosing = [units[path] for path in prefixes(op.path) if path in units]
        if enclosing and enclosing[-1] != current:
            # What lies before the first unit belongs to it.
            borders |= {index} if current is not None else set()
            current = enclosing[-1]
    return borders


def first_ops(train: Graph) -> dict[str, int]:
    """Map every path that `at` may hold to the op before which it cuts: an op by its name, else a module's first op."""
    op_at: dict[str, int] = {}
    for index, op in enumerate(train.ops):
        for path in prefixes(op.path)[1:]:
            op_at.setdefault(path, index)
    return op_at | {op.name: index for index, op in enumerate(train.ops)}


def _paths(train: Graph) -> list[str]:
    """Name the cut before every op: by the outermost module that begins there, else by the op itself."""
    op_at = first_ops(train)
    return [
        next((path for path in prefixes(op.path) if op_at.get(path) == index), op.name)
        for index, op in enumerate(train.ops)
    ]
