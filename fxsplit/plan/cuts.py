"""Where a model may be cut: every place between two ops, with what passes there and why it may be refused.

train   stem ── conv ── relu ──┊── dropout ── fc   A cut of the train graph and its twin in the eval graph
                               ┊                   divide the ops that both have alike. What is live at
eval    stem ── conv ── relu ──┊───────────── fc   either of the two is passed on in both modes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

from fxsplit.errors import PartitionError
from fxsplit.graph import Graph, Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A place between two ops of the train graph (`index`) and its twin in the eval graph (`eval_index`).

    `path` finds the op after the cut: the outermost module that begins with it, or its own name where none does.
    `boundary` is what must be passed on in either mode, in the order in which training writes it;
    `bytes_per_sample` is its size, shared memory counted once. `refusal` says why the cut is not allowed, or is None.
    """

    index: int
    eval_index: int
    path: str
    boundary: tuple[str, ...]
    bytes_per_sample: int
    refusal: str | None


def cuts(train: Graph, eval_graph: Graph) -> tuple[Cut, ...]:
    """Every cut between two ops of the train graph, with its twin in the eval graph and its refusal, if any.

    A cut is refused when the modes run their common ops in another order around it, when a value of its
    boundary exists in one mode only, when a later op overwrites a value of the boundary, or when ops on both
    sides hold a buffer or parameter that one of them changes. A parameter that is only read on both sides is
    no hindrance. Raises PartitionError when there is no op at all.
    """
    return with_ends(train, eval_graph)[1:-1]


def with_ends(train: Graph, eval_graph: Graph) -> tuple[Cut, ...]:
    """All cuts `0 .. len(train)`: the model's own two ends too, whose refusals mean nothing."""
    if not len(train):
        raise PartitionError("the model has no operations, so there is nothing to partition")
    modes = (train, eval_graph)
    values = {
        **train.values,
        **{name: value for name, value in eval_graph.values.items() if name not in train.values},
    }
    order = {name: rank for rank, name in enumerate(values)}
    paths = [*_paths(train), ""]
    swapped = _swapped(train, eval_graph)
    writes = [_last_writes(graph) for graph in modes]
    moved = [_moved_state(graph) for graph in modes]

    found = []
    for index, eval_index in enumerate(_twins(train, eval_graph)):
        positions = (index, eval_index)
        live = {name for graph, cut in zip(modes, positions, strict=True) for name in graph.boundaries[cut]}
        boundary = tuple(sorted(live, key=order.__getitem__))
        refusal = swapped[index] or _one_sided(boundary, train, eval_graph)
        for graph, cut, last, state in zip(modes, positions, writes, moved, strict=True):
            refusal = refusal or _overwritten(boundary, graph, cut, last) or state[cut]
        found.append(
            Cut(
                index=index,
                eval_index=eval_index,
                path=paths[index],
                boundary=boundary,
                bytes_per_sample=_bytes_per_sample(boundary, values),
                refusal=refusal,
            )
        )
    return tuple(found)


def _twins(train: Graph, eval_graph: Graph) -> list[int]:
    """For every cut `0 .. len(train)` the eval cut that divides the common ops alike; never decreasing.

    Where eval-only ops leave a choice: the first with the same boundary, else the first whose boundary
    training has too, else the first.
    """
    common = train.written_at.keys() & eval_graph.written_at.keys()
    first: dict[int, int] = {}
    shared: dict[int, int] = {}
    alike: dict[tuple[int, frozenset[str]], int] = {}
    for cut, passed in enumerate(_passed(eval_graph, common)):
        boundary = frozenset(eval_graph.boundaries[cut])
        first.setdefault(passed, cut)
        alike.setdefault((passed, boundary), cut)
        if boundary <= common:
            shared.setdefault(passed, cut)

    twins = [0]
    for cut, passed in enumerate(_passed(train, common)[1:-1], start=1):
        same = alike.get((passed, frozenset(train.boundaries[cut])))
        twins.append(max(twins[-1], shared.get(passed, first[passed]) if same is None else same))
    return [*twins, len(eval_graph)]


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


def _one_sided(boundary: tuple[str, ...], train: Graph, eval_graph: Graph) -> str | None:
    for name in boundary:
        if name not in eval_graph.values:
            return f"the value {name!r} exists only in training"
        if name not in train.values:
            return f"the value {name!r} exists only in evaluation"
    return None


def _last_writes(graph: Graph) -> dict[str, tuple[int, str]]:
    """For every storage that is written in place: the last op that does, by index and name."""
    return {
        graph.values[name].storage if name in graph.values else name: (index, op.name)
        for index, op in enumerate(graph.ops)
        for name in op.mutates
    }


def _overwritten(
    boundary: tuple[str, ...], graph: Graph, cut: int, last_writes: Mapping[str, tuple[int, str]]
) -> str | None:
    for name in boundary:
        if name in graph.values:
            index, op = last_writes.get(graph.values[name].storage, (-1, ""))
            if index >= cut:
                return f"op {op!r} writes in place into the value {name!r} after it"
    return None


def _moved_state(graph: Graph) -> list[str | None]:
    """For every cut the refusal naming a parameter or buffer that both sides hold and one of them changes."""
    changed = {name for op in graph.ops for name in op.mutates}
    last = {name: index for index, op in enumerate(graph.ops) for name in op.state if name in changed}
    found: list[str | None] = [None]
    reach, furthest = 0, ""
    for index, op in enumerate(graph.ops):
        for name in op.state:
            if last.get(name, 0) > reach:
                reach, furthest = last[name], name
        both = reach > index
        found.append(f"ops on both sides hold {furthest!r}, and one of them changes it" if both else None)
    return found


def _bytes_per_sample(boundary: tuple[str, ...], values: Mapping[str, Value]) -> int:
    """Views of one storage together count no more than the storage."""
    sizes: dict[str, int] = {}
    for name in boundary:
        sizes[values[name].storage] = sizes.get(values[name].storage, 0) + values[name].bytes_per_sample
    return sum(min(size, values[name].bytes_per_sample) if name in values else size for name, size in sizes.items())


def places_of(train: Graph) -> dict[str, int]:
    """All that `at` may name, and the op that it finds: an op by its name, else the first op in a module."""
    places: dict[str, int] = {}
    for index, op in enumerate(train.ops):
        for path in _prefixes(op.path):
            places.setdefault(path, index)
    places.pop("", None)
    return places | {op.name: index for index, op in enumerate(train.ops)}


def _paths(train: Graph) -> list[str]:
    """For every op the name of the cut before it: the outermost module that begins there, else the op's own name."""
    places = places_of(train)
    return [
        next((path for path in _prefixes(op.path) if places.get(path) == index), op.name)
        for index, op in enumerate(train.ops)
    ]


def _prefixes(path: str) -> Iterator[str]:
    """`a`, `a.b`, `a.b.c`: a module path from the outside in."""
    return accumulate(path.split("."), "{}.{}".format)
