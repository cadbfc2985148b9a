"""The partitions between chosen cuts: pure data, from a model's two graphs.

`count` partitions are found in two steps: how small the largest of them can be, by binary search over greedy fills,
and then, among divisions that are nearly as good, the one with the best cuts, by dynamic programming with a sliding
minimum.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

from fxsplit.errors import PartitionError, UsageError, nearest
from fxsplit.graph import Graph, Modes, State, once_a_pair
from fxsplit.plan.cuts import Cut, cuts, places_of, unit_borders, with_ends

BALANCES = ("macs", "params", "activations", "seconds")
PLACES = ("op", "natural", "block")


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """The ops [start, stop) of the train graph and [eval_start, eval_stop) of the eval graph. Owns no tensor.

    `name` is the path of its starting cut. It `reads` and `writes` the boundaries at its two ends: the first
    reads the live inputs, the last writes the outputs of both graphs. `state` are the parameters and buffers
    that it owns, those which no earlier partition uses, of `parameters` elements and `state_bytes` bytes,
    buffers included. `macs`, `activation_bytes` (kept for backward) and `boundary_bytes` (at its start) are
    for one sample in training.

    Raises ValueError when it holds no op of the train graph.
    """

    index: int
    name: str
    start: int
    stop: int
    eval_start: int
    eval_stop: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    state: tuple[str, ...]
    parameters: int
    state_bytes: int
    macs: int
    activation_bytes: int
    boundary_bytes: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop or not 0 <= self.eval_start <= self.eval_stop:
            raise ValueError(
                f"partition {self.name!r} holds no operation: [{self.start}, {self.stop}) in training, "
                f"[{self.eval_start}, {self.eval_stop}) in evaluation"
            )

    def span(self, *, training: bool) -> slice:
        """Its ops in the graph of that mode."""
        return slice(self.start, self.stop) if training else slice(self.eval_start, self.eval_stop)


def partition(
    modes: Modes,
    *,
    count: int | None = None,
    at: Sequence[str] = (),
    balance: str = "macs",
    by: str = "op",
    units: Mapping[str, str] | None = None,
) -> tuple[Partition, ...]:
    """Divide a model into partitions, either `count` of them or one more than there are places in `at`.

    `at` names modules by dotted path, or single ops; the cut is before the first op of each.

    The cuts allowed to `count` are all legal ones (`by` "op"), the natural ones ("natural") or those at the borders of
    units ("block"), of which `units` says by module path what belongs together. The optimum is the smallest largest
    partition that they allow, in multiply-adds (`balance` "macs"), bytes of owned parameters ("params"), bytes kept
    for backward ("activations") or measured time ("seconds"). Of all divisions whose largest partition is within 5 %
    of it, the best is the one with the fewest cuts at several tensors, then with the most natural cuts, then with the
    smallest largest partition, then with the smallest boundaries in sum. None has a partition that weighs 0 unless all
    have. A model for which every weight is 0 is balanced by the number of ops.

    Raises UsageError when not exactly one of `count` and `at` is given, when `count`, `balance` or `by` is none
    that exists, or when seconds are wanted that nobody measured; PartitionError, which names every wrong place at
    once, when a path is unknown or refused, and when there are too few allowed cuts or no ops.
    """
    if (count is None) == (not at):
        raise UsageError("give either the number of partitions or the paths at which to cut, and not both")
    every = with_ends(modes)
    if count is None:
        if wrong := wrong_places(modes, at):
            raise PartitionError("; ".join(wrong))
        places = places_of(modes.train)
        inner = [every[index] for index in sorted({places[place] for place in at})]
    else:
        allowed = _allowed(modes, by, units or {})
        inner = _cuts_by_count(count, allowed, _op_weights(modes, balance), by)
    return between(modes, (every[0], *inner, every[-1]))


def wrong_places(modes: Modes, at: Sequence[str]) -> list[str]:
    """A sentence about each of the places that gives no cut, and where near it there is one."""
    every = with_ends(modes)
    legal = {cut.index: cut for cut in every[1:-1] if cut.refusal is None}
    places = places_of(modes.train)
    return [fault for place in dict.fromkeys(at) if (fault := _fault_at(place, every, legal, places))]


def most_partitions(modes: Modes, *, by: str = "op", units: Mapping[str, str] | None = None) -> int:
    """The largest `count` for which there is a division. Raises as `partition` does."""
    return len(_allowed(modes, by, units or {})) + 1


def _allowed(modes: Modes, by: str, units: Mapping[str, str]) -> list[Cut]:
    if by not in PLACES:
        raise UsageError(f"a model is cut by {', '.join(PLACES)}, not by {by!r}{nearest(by, PLACES)}")
    legal = [cut for cut in cuts(modes) if cut.refusal is None]
    if by == "natural":
        return [cut for cut in legal if cut.natural]
    if by == "block":
        borders = unit_borders(modes.train, units)
        return [cut for cut in legal if cut.index in borders]
    return legal


@once_a_pair
def owning_ops(modes: Modes) -> Mapping[str, int]:
    """Parameters and buffers, by first use, and the train op whose partition owns each.

    A name that evaluation uses earlier than training belongs to the train op between whose cuts' twins that
    use lies.
    """
    train, evaluation = modes.train, modes.eval
    twins = [cut.eval_index for cut in cuts(modes)]
    eval_places = [bisect_right(twins, index) for index in range(len(evaluation))]
    owners: dict[str, int] = {}
    for graph, places in ((train, range(len(train))), (evaluation, eval_places)):
        for op, place in zip(graph.ops, places, strict=True):
            for name in op.state:
                owners[name] = min(owners.get(name, place), place)
    return dict(sorted(owners.items(), key=lambda item: item[1]))


def _states(modes: Modes) -> dict[str, State]:
    return {state.name: state for graph in (modes.eval, modes.train) for state in graph.state}


def _op_weights(modes: Modes, balance: str) -> list[int]:
    """What each train op adds to the weight of its partition."""
    if balance not in BALANCES:
        hint = nearest(balance, BALANCES)
        raise UsageError(f"partitions are balanced by {', '.join(BALANCES)}, not by {balance!r}{hint}")
    train = modes.train
    if balance == "macs":
        weights = [op.macs for op in train.ops]
    elif balance == "seconds":
        weights = _nanoseconds(train)
    elif balance == "activations":
        weights = [op.activation_bytes for op in train.ops]
    else:
        states = _states(modes)
        weights = [0] * len(train)
        for name, index in owning_ops(modes).items():
            weights[index] += states[name].bytes if states[name].is_parameter else 0
    return weights if any(weights) else [1] * len(train)


def _nanoseconds(train: Graph) -> list[int]:
    """Whole numbers, among which the smallest bottleneck can be searched for."""
    seconds = {op.name: op.seconds for op in train.ops}
    if missing := [name for name, value in seconds.items() if value is None]:
        raise UsageError(
            f"partitions cannot be balanced by seconds, because {len(missing)} of {len(seconds)} ops, such as "
            f"{missing[0]!r}, have none; time them with fxsplit.measure, or balance by macs"
        )
    return [round(1e9 * value) for value in seconds.values() if value is not None]


def _fault_at(place: str, every: Sequence[Cut], legal: Mapping[int, Cut], places: Mapping[str, int]) -> str | None:
    """Why the model cannot be cut at a place, and where near it can, or None."""
    if place not in places:
        known = [path for path, index in places.items() if index in legal]
        hint = nearest(place, known) or _alternatives(known[:3])
        return f"no operation of the model lies in {place!r}{hint}"
    index = places[place]
    if index in legal:
        return None
    reason = every[index].refusal if index else "it holds the first operation of the model"
    indices = sorted(legal)
    after = bisect_left(indices, index)
    near = [legal[index].path for index in indices[max(0, after - 1) : after + 1]]
    return f"the model cannot be cut before {place!r}: {reason}{_alternatives(near)}"


def _alternatives(paths: Sequence[str]) -> str:
    return f"; it can be cut before {' or '.join(map(repr, paths))}" if paths else "; none of its cuts is legal"


def _cuts_by_count(count: int, allowed: Sequence[Cut], op_weights: Sequence[int], by: str) -> list[Cut]:
    if count < 1:
        raise UsageError(f"the number of partitions must be at least 1, not {count}")
    if len(allowed) < count - 1:
        ones = {"op": "legal ones", "natural": "natural ones", "block": "at the borders of its blocks"}[by]
        advice = "" if by == "op" else ", or cut by op"
        raise PartitionError(
            f"{count} partitions need {count - 1} cuts and the model has {len(allowed)} {ones}; "
            f"ask for at most {len(allowed) + 1} partitions{advice}"
        )
    before = list(accumulate(op_weights, initial=0))
    chosen = _divide(
        [0, *(before[cut.index] for cut in allowed), before[-1]],
        # Fewer cuts at several tensors count more than any number of natural ones.
        [0, *((not cut.single) * count + (not cut.natural) for cut in allowed), 0],
        [0, *(cut.bytes_per_sample for cut in allowed), 0],
        count,
    )
    return [allowed[point - 1] for point in chosen]


# The share of the optimum, a twentieth, that a division may weigh more for the sake of better cuts.
TOLERANCE = 20


def _divide(before: Sequence[int], flaws: Sequence[int], sizes: Sequence[int], count: int) -> list[int]:
    """The `count - 1` inner points that divide a line best.

    `before` is the weight left of each point, from 0 at the first point to the total at the last. Of the divisions
    whose heaviest part is within the tolerance of the optimum, the best have the least sum of `flaws`, then the
    lightest heaviest part, then the least sum of `sizes`. A part weighs nothing only where more parts are wanted than
    there are weights between points.
    """
    scale = sum(sizes) + 1
    costs = [flaw * scale + size for flaw, size in zip(flaws, sizes, strict=True)]
    if count > len(set(before)) - 1:
        return _at_every_weight(before, costs, count)
    optimum = bisect_left(range(before[-1]), True, key=lambda limit: _fits(before, count, limit))
    cheapest = partial(_cheapest, before, costs, count)
    points = cheapest(optimum + optimum // TOLERANCE)

    def flaws_of(points: Sequence[int]) -> int:
        return sum(flaws[point] for point in points)

    fewest = flaws_of(points)
    heaviest = max(before[b] - before[a] for a, b in pairwise([0, *points, -1]))
    limits = range(optimum, heaviest)
    return cheapest(optimum + bisect_left(limits, True, key=lambda limit: flaws_of(cheapest(limit)) == fewest))


def _at_every_weight(before: Sequence[int], costs: Sequence[int], count: int) -> list[int]:
    """The cheapest point between every two weights, and then the cheapest others."""
    inner = sorted(range(1, len(before) - 1), key=costs.__getitem__)
    needed = {before[point]: point for point in reversed(inner) if 0 < before[point] < before[-1]}
    first = [*needed.values()]
    others = [point for point in inner if point not in first]
    return sorted([*first, *others][: count - 1])


def _cheapest(before: Sequence[int], costs: Sequence[int], count: int, limit: int) -> list[int]:
    """The `count - 1` inner points of the least sum of costs between which no part weighs nothing or over `limit`."""
    # Part by part, the cheapest way to each point at which that part can end.
    #
    #     0 ────── a ── b ───── c ──── point ─────────── n      a, b, c: ends of the part before
    #                   ├──── limit ────┤
    #
    # (1) A part can end only where the parts up to it can reach and those after it can still cover the rest.
    # (2) Its start is the cheapest end of the part before that lies within `limit` to the left and leaves some weight
    #     between. As `point` moves right, ends come in at the right of this window and drop out at its left. An end
    #     that is dearer than one to its right is never needed again, so the costs in the window rise from left to
    #     right, and its first is the cheapest: linear, not quadratic.
    # (3) The starts that were chosen lead back from n.
    total = before[-1]
    ends = [(0, 0)]
    starts: list[dict[int, int]] = []
    for part in range(1, count + 1):
        coming, ends = deque(ends), []
        window: deque[tuple[int, int]] = deque()
        start_of: dict[int, int] = {}
        low = bisect_left(before, total - (count - part) * limit)  # (1)
        high = bisect_right(before, part * limit)
        for point in range(low, high):
            while coming and before[coming[0][0]] < before[point]:  # (2)
                end = coming.popleft()
                while window and window[-1][1] > end[1]:
                    window.pop()
                window.append(end)
            while window and before[window[0][0]] < before[point] - limit:
                window.popleft()
            if window:
                start_of[point], cost = window[0]
                ends.append((point, cost + costs[point]))
        starts.append(start_of)
    points = [len(before) - 1]
    for start_of in reversed(starts):  # (3)
        points.append(start_of[points[-1]])
    return points[-2:0:-1]


def _fits(before: Sequence[int], count: int, limit: int) -> bool:
    """Whether `count` parts of at most `limit` each cover the line, or fewer: cutting on adds no weight."""
    reach = 0
    for _ in range(count):
        reach = bisect_right(before, before[reach] + limit) - 1
    return reach == len(before) - 1


def between(modes: Modes, chosen: Sequence[Cut]) -> tuple[Partition, ...]:
    """The partitions between neighbours in `chosen`."""
    states, owners = _states(modes), owning_ops(modes)
    made = []
    for index, (first, last) in enumerate(pairwise(chosen)):
        ops = modes.train.ops[first.index : last.index]
        owned = [states[name] for name, op_index in owners.items() if first.index <= op_index < last.index]
        made.append(
            Partition(
                index=index,
                name=first.path,
                start=first.index,
                stop=last.index,
                eval_start=first.eval_index,
                eval_stop=last.eval_index,
                reads=first.boundary,
                writes=last.boundary,
                state=tuple(state.name for state in owned),
                parameters=sum(state.elements for state in owned if state.is_parameter),
                state_bytes=sum(state.bytes for state in owned),
                macs=sum(op.macs for op in ops),
                activation_bytes=sum(op.activation_bytes for op in ops),
                boundary_bytes=first.bytes_per_sample,
            )
        )
    return tuple(made)
