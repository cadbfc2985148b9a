"""Where a model may be cut: every place between two ops, with what passes there and why it may be refused.

train   stem ── conv ── relu ──┊── dropout ── fc   A cut of the train graph and its twin in the eval graph
                               ┊                   divide the ops that both have alike. What is live at
eval    stem ── conv ── relu ──┊───────────── fc   either of the two is passed on in both modes.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain

from fxsplit.errors import PartitionError
from fxsplit.graph import Graph, Modes, Op, Value, once_a_pair, prefixes
from fxsplit.plan.natural import natural_cuts


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A place between two ops of the train graph (`index`) and its twin in the eval graph (`eval_index`).

    `path` finds the op after the cut: the outermost module that begins with it, or its own name where none does.
    `boundary` is what must be passed on in either mode, in the order in which training writes it;
    `bytes_per_sample` is its size, shared memory counted once. `single` says whether one tensor crosses, be it with
    numbers beside it. `refusal` says why the cut is not allowed, or is None. `natural` says whether a person would cut
    here, as `fxsplit.plan.natural` defines it.
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
    """Every cut between two ops of the train graph, with its twin in the eval graph and its refusal, if any.

    A cut is refused when the modes run their common ops in another order around it, when an op needs a value of
    its boundary that exists in one mode only, when a later op overwrites a value of the boundary, when ops on both
    sides hold a buffer or parameter that one of them changes, or that one autocast region of forward's own has cast for
    both, or when ops on both sides change buffers of one module. A parameter that is only read on both sides is no
    hindrance. Raises PartitionError when there is no op at all.
    """
    return with_ends(modes)[1:-1]


@once_a_pair
def with_ends(modes: Modes) -> tuple[Cut, ...]:
    """All cuts `0 .. len(train)`: the model's own two ends too, whose refusals mean nothing."""
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
    """For every cut `0 .. len(train)` the eval cut that divides the common ops alike; never decreasing.

    Where eval-only ops leave a choice: the first with the same boundary, else the first at which training has all
    that later ops need, else the first.
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
    # (4) Else one that needs of the eval-only values none that train would lack: they are read before it.
    # (5) A twin never lies before the twin of an earlier cut, or partitions would overlap.
    common = train.written_at.keys() & eval_graph.written_at.keys()
    choices: dict[int, list[int]] = {}
    for cut, passed in enumerate(_passed(eval_graph, common)):  # (1)
        choices.setdefault(passed, []).append(cut)

    def fits(twin: int, name: str) -> bool:
        return name in common or eval_graph.read_until.get(name, -1) < twin

    def choose(cut: int, among: list[int]) -> int:
        if len(among) == 1:
            return among[0]
        boundary = set(train.boundaries[cut])
        same = (twin for twin in among if boundary == set(eval_graph.boundaries[twin]))  # (3)
        shared = (twin for twin in among if all(map(partial(fits, twin), eval_graph.boundaries[twin])))  # (4)
        return max(twins[-1], next(chain(same, shared, among)))  # (5)

    twins = [0]
    for cut, passed in enumerate(_passed(train, common)[1:-1], start=1):
        twins.append(choose(cut, choices[passed]))  # (2)
    return [*twins, len(eval_graph)]


def _boundaries(train: Graph, eval_graph: Graph, twins: Sequence[int]) -> list[tuple[str, ...]]:
    """What is live at each train cut or its twin, in the order in which training writes it, then evaluation."""
    order = {name: rank for rank, name in enumerate(dict.fromkeys((*train.values, *eval_graph.values)))}
    pairs = zip(train.boundaries, (eval_graph.boundaries[twin] for twin in twins), strict=True)
    return [mine if mine == other else tuple(sorted({*mine, *other}, key=order.__getitem__)) for mine, other in pairs]


def _refusals(
    train: Graph, eval_graph: Graph, twins: Sequence[int], boundaries: Sequence[tuple[str, ...]]
) -> list[str | None]:
    """Why each cut is not allowed, or None."""
    swapped = _swapped(train, eval_graph)
    one_sided = train.values.keys() ^ eval_graph.values.keys()
    modes = [
        (places, _last_writes(graph), _moved_state(graph))
        for graph, places in ((train, range(len(train) + 1)), (eval_graph, twins))
    ]
    found = []
    for index, boundary in enumerate(boundaries):
        refusal = swapped[index]
        if not refusal and not one_sided.isdisjoint(boundary):
            refusal = _one_sided(boundary, (index, twins[index]), (train, eval_graph))
        for places, written, moved in modes:
            cut = places[index]
            if not refusal and not written.keys().isdisjoint(boundary):
                refusal = _overwritten(boundary, cut, written)
            refusal = refusal or moved[cut]
        found.append(refusal)
    return found


def _passed(graph: Graph, common: Iterable[str]) -> list[int]:
    """How many of the common ops lie before each cut."""
    return list(accumulate((op.name in common for op in graph.ops), initial=0))


def _swapped(train: Graph, eval_graph: Graph) -> list[str | None]:
    """For every train cut the refusal naming a common op on its other side in evaluation."""
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
    """A value of one mode that a later op reads. One that only waits to be returned, such as that of an auxiliary
    head, is passed on as None in the other mode.
    """
    for index, graph, other, mode in zip(cut, graphs, reversed(graphs), ("training", "evaluation"), strict=True):
        for name in boundary:
            if name not in other.values and graph.read_until.get(name, -1) >= index:
                return f"the value {name!r} exists only in {mode}"
    return None


def _last_writes(graph: Graph) -> dict[str, tuple[int, str]]:
    """For every value whose storage is written in place: the last op that does, by index and name."""
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


def _moved_state(graph: Graph) -> list[str | None]:
    """For every cut the refusal naming state that it would divide, although it changes or is cast once for all."""
    changed = {name for op in graph.ops for name in op.mutates}
    bonds = [list(_bonds(op, changed, graph.values)) for op in graph.ops]
    last = {key: index for index, mine in enumerate(bonds) for key, _ in mine}
    found: list[str | None] = [None]
    reach, furthest = 0, ""
    for index, mine in enumerate(bonds):
        for key, reason in mine:
            if last[key] > reach:
                reach, furthest = last[key], reason
        found.append(furthest if reach > index else None)
    return found


def _bonds(op: Op, changed: Container[str], values: Container[str]) -> Iterator[tuple[object, str]]:
    """What an op shares with all others that it must stay together with, and why it must.

    A norm that is traced through counts its batches in one op and moves its statistics in another. They have one owner,
    so that they settle together, as they do when the module itself is frozen.
    """
    for name in op.state:
        if name in changed:
            yield name, f"ops on both sides hold {name!r}, and one of them changes it"
        if op.autocast is not None:
            # Gradients of one cast add up in its lower precision.
            yield (op.autocast, name), f"ops on both sides use {name!r} as one autocast region has cast it"
    for name in op.mutates:
        if name not in values:
            owner = name.rpartition(".")[0]
            of = repr(owner) if owner else "the model itself"
            yield ("buffers", owner), f"ops on both sides change buffers of {of}"


def _sizes(boundaries: Sequence[tuple[str, ...]], values: Mapping[str, Value]) -> list[int]:
    """The bytes of each boundary for one sample; views of one storage together count no more than the storage."""
    views = {name for name, value in values.items() if value.storage != name}
    alone = {name: value.bytes_per_sample for name, value in values.items()}
    return [
        sum(map(alone.__getitem__, boundary)) if views.isdisjoint(boundary) else shared_bytes(boundary, values)
        for boundary in boundaries
    ]


def shared_bytes(boundary: tuple[str, ...], values: Mapping[str, Value]) -> int:
    """The bytes of values for one sample; views of one storage together count no more than the storage."""
    sizes: dict[str, int] = {}
    for name in boundary:
        sizes[values[name].storage] = sizes.get(values[name].storage, 0) + values[name].bytes_per_sample
    return sum(min(size, values[name].bytes_per_sample) if name in values else size for name, size in sizes.items())


def unit_borders(train: Graph, units: Mapping[str, str]) -> set[int]:
    """The cuts at which one unit ends and another begins; `units` says which modules belong to which, by path.

    An op belongs to the unit of the innermost such module that it lies in, or else to that of the op before it.
    """
    borders: set[int] = set()
    current: str | None = None
    for index, op in enumerate(train.ops):
        mine = [units[path] for path in prefixes(op.path) if path in units]
        if mine and mine[-1] != current:
            # What lies before the first unit belongs to it.
            borders |= {index} if current is not None else set()
            current = mine[-1]
    return borders


def places_of(train: Graph) -> dict[str, int]:
    """All that `at` may name, and the op that it finds: an op by its name, else the first op in a module."""
    places: dict[str, int] = {}
    for index, op in enumerate(train.ops):
        for path in prefixes(op.path)[1:]:
            places.setdefault(path, index)
    return places | {op.name: index for index, op in enumerate(train.ops)}


def _paths(train: Graph) -> list[str]:
    """For every op the name of the cut before it: the outermost module that begins there, else the op's own name."""
    places = places_of(train)
    return [
        next((path for path in prefixes(op.path) if places.get(path) == index), op.name)
        for index, op in enumerate(train.ops)
    ]
