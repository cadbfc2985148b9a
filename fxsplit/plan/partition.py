"""Divides a model's two graphs into partitions, as pure data.

A number of partitions is found in two steps: how small the largest can be, by binary search over greedy fills; and
then, among divisions nearly as balanced, the one with the best cuts, by dynamic programming with a sliding minimum.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

from fxsplit.arguments import listed, require, require_whole
from fxsplit.errors import PartitionError, UsageError, nearest
from fxsplit.graph import Graph, Modes, State, cached_by_graphs
from fxsplit.plan.cuts import Cut, cuts, first_ops, unit_borders, with_ends

BALANCES = ("macs", "params", "activations", "seconds")
CUT_KINDS = ("op", "natural", "block")


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """Describes the ops [start, stop) of the train graph and [eval_start, eval_stop) of the eval graph; owns no tensor.

    Args:
        name: path of the cut at which it begins.
        reads: boundary at its start, for the first partition the inputs that are used; `writes` is that at its end, for
            the last partition the outputs of both graphs.
        state: parameters and buffers that it owns: those which it uses and no earlier partition does.
        parameters: numbers in the parameters that it owns; `state_bytes` counts buffers too.
        macs: multiply-adds of forward, for one sample in training.
        activation_bytes: what autograd keeps for backward, for one sample.
        boundary_bytes: size of the boundary at its start, for one sample.

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

    def __str__(self) -> str:
        """Say in a line which partition it is, and how many ops, parameters and multiply-adds it has."""
        ops = self.stop - self.start
        return (
            f"{self.index}: from {self.name}, {ops} op{'s' * (ops > 1)}, {self.parameters:,} parameters, "
            f"{self.macs:,} multiply-adds"
        )

    def span(self, *, training: bool) -> slice:
        """Locate its ops in the train graph or the eval graph."""
        return slice(self.start, self.stop) if training else slice(self.eval_start, self.eval_stop)


def require_partitions(partitions: Sequence[Partition]) -> None:
    """Refuse what is no list of partitions, or an empty one. Raises UsageError."""
    advice = "fxsplit.partition(trace, ...) makes them, and plan.partitions has those of a plan"
    require("partitions", partitions, Sequence, "a list of partitions", advice)
    if not partitions:
        raise UsageError(f"there are no partitions, so nothing could train; {advice}")
    for each in partitions:
        require("one of the partitions", each, Partition, "a Partition", advice)


def partition(
    modes: Modes,
    *,
    count: int | None = None,
    at: str | Sequence[str] = (),
    balance: str = "macs",
    by: str = "op",
    units: Mapping[str, str] | None = None,
) -> tuple[Partition, ...]:
    """Divide a model into partitions: `count` balanced ones, or those between the cuts named by `at`.

    Args:
        modes: the model's two graphs.
        count: number of partitions, at least 1.
        at: dotted paths of modules, or names of ops, or one of them; the model is cut before the first op of each.
        balance: what weighs a partition: multiply-adds ("macs"), bytes of its parameters ("params"), bytes kept for
            backward ("activations") or measured time ("seconds"). Where every op weighs 0, ops are counted.
        by: which cuts `count` may choose from: all legal ones ("op"), the natural ones ("natural") or those between
            units ("block").
        units: for "block", the name of the unit that each module belongs to, by module path.

    Of all divisions whose heaviest partition is at most 5 % above the optimum, the best has the fewest cuts at several
    tensors, then the most natural cuts, then the lightest heaviest partition, then the smallest boundaries in sum. No
    partition weighs 0 unless there are fewer weights than partitions.

    Raises UsageError when not exactly one of `count` and `at` is given, when `count`, `balance` or `by` is no valid
    value, or when ops lack the seconds to balance by; PartitionError, which names all wrong paths at once, when a path
    is unknown or cannot be cut at, and when there are too few allowed cuts or no ops.
    """
    paths = listed(at)
    if (count is None) == (not paths):
        raise UsageError("give either the number of partitions or the paths at which to cut, and not both")
    every = with_ends(modes)
    if count is None:
        if wrong := unusable_paths(modes, paths):
            raise PartitionError("; ".join(wrong))
        op_at = first_ops(modes.train)
        inner = [every[index] for index in sorted({op_at[path] for path in paths})]
    else:
        allowed = _allowed(modes, by, units or {})
        inner = _cuts_by_count(count, allowed, _op_weights(modes, balance), by)
    return between(modes, (every[0], *inner, every[-1]))


def with_head(modes: Modes, partitions: Sequence[Partition]) -> tuple[Partition, ...]:
    """Divide the last partition with parameters so that the model's last op with any, its head, begins one of its own.

    Where no legal cut lies between that op and the parameters before it, the partitions stay as they are.
    """
    states = _states(modes)
    owned = [index for name, index in owning_ops(modes).items() if states[name].is_parameter]
    *before, head = sorted(set(owned)) or [0]
    every = with_ends(modes)
    starts = {part.start for part in partitions}
    found = [cut for cut in every[1:-1] if cut.refusal is None and max(before, default=0) < cut.index <= head]
    if not found or any(cut.index in starts for cut in found):
        return tuple(partitions)
    starts.add(min(found, key=lambda cut: (cut.bytes_per_sample, -cut.index)).index)
    return between(modes, (*(every[index] for index in sorted(starts)), every[-1]))


def unusable_paths(modes: Modes, at: Sequence[str]) -> list[str]:
    """Explain in a sentence each path at which the model cannot be cut, and name the nearest at which it can."""
    every = with_ends(modes)
    legal = {cut.index: cut for cut in every[1:-1] if cut.refusal is None}
    op_at = first_ops(modes.train)
    return [fault for path in dict.fromkeys(at) if (fault := _fault_at(path, modes.train, every, legal, op_at))]


def most_partitions(modes: Modes, *, by: str = "op", units: Mapping[str, str] | None = None) -> int:
    """Count the partitions between all cuts that `by` allows, the most that `partition` makes. Raises likewise."""
    return len(_allowed(modes, by, units or {})) + 1


def _allowed(modes: Modes, by: str, units: Mapping[str, str]) -> list[Cut]:
    if by not in CUT_KINDS:
        raise UsageError(f"a model is cut by {', '.join(CUT_KINDS)}, not by {by!r}{nearest(by, CUT_KINDS)}")
    legal = [cut for cut in cuts(modes) if cut.refusal is None]
    if by == "natural":
        return [cut for cut in legal if cut.natural]
    if by == "block":
        borders = unit_borders(modes.train, units)
        return [cut for cut in legal if cut.index in borders]
    return legal


@cached_by_graphs
def owning_ops(modes: Modes) -> Mapping[str, int]:
    """Map each parameter and buffer to the train op whose partition owns it, in the order of their first use.

    Evaluation may use one before training does. It then belongs to the train op whose two cuts have their twins around
    that use.
    """
    train, evaluation = modes.train, modes.eval
    twins = [cut.eval_index for cut in cuts(modes)]
    train_op_of = [bisect_right(twins, index) for index in range(len(evaluation))]
    owners: dict[str, int] = {}
    for graph, train_ops in ((train, range(len(train))), (evaluation, train_op_of)):
        for op, index in zip(graph.ops, train_ops, strict=True):
            for name in op.state:
                owners[name] = min(owners.get(name, index), index)
    return dict(sorted(owners.items(), key=lambda item: item[1]))


def _states(modes: Modes) -> dict[str, State]:
    return {state.name: state for graph in (modes.eval, modes.train) for state in graph.state}


def _op_weights(modes: Modes, balance: str) -> list[int]:
    """Weigh each train op, in the unit of `balance`."""
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
    """Express the measured seconds of each op as whole numbers, so that the optimum can be found by binary search."""
    seconds = {op.name: op.seconds for op in train.ops}
    if missing := [name for name, value in seconds.items() if value is None]:
        raise UsageError(
            f"partitions cannot be balanced by seconds, because {len(missing)} of {len(seconds)} ops, such as "
            f"{missing[0]!r}, have none; time them with fxsplit.measure, or balance by macs"
        )
    return [round(1e9 * value) for value in seconds.values() if value is not None]


def _op_around(path: str, train: Graph) -> int | None:
    """Find the op that a module is a part of, by its state."""
    ops = enumerate(train.ops)
    return next((index for index, op in ops if any(name.startswith(f"{path}.") for name in op.state)), None)


def _fault_at(
    path: str, train: Graph, every: Sequence[Cut], legal: Mapping[int, Cut], op_at: Mapping[str, int]
) -> str | None:
    """Say why the model cannot be cut before `path`, and where near it can; None if it can."""
    if path in op_at:
        if (index := op_at[path]) in legal:
            return None
        reason = every[index].refusal if index else "it holds the first operation of the model"
    elif (around := _op_around(path, train)) is not None:
        index = around
        reason = f"it is a part of {train.ops[index].name!r}, which is one operation"
    else:
        known = [other for other, index in op_at.items() if index in legal]
        hint = nearest(path, known) or _alternatives(known[:3])
        return f"no operation of the model lies in {path!r}{hint}"
    indices = sorted(legal)
    after = bisect_left(indices, index)
    near = [legal[index].path for index in indices[max(0, after - 1) : after + 1]]
    return f"the model cannot be cut before {path!r}: {reason}{_alternatives(near)}"


def _alternatives(paths: Sequence[str]) -> str:
    return f"; it can be cut before {' or '.join(map(repr, paths))}" if paths else "; none of its cuts is legal"


def _cuts_by_count(count: int, allowed: Sequence[Cut], op_weights: Sequence[int], by: str) -> list[Cut]:
    require_whole(1, count=count)
    if len(allowed) < count - 1:
        kind = {"op": "legal ones", "natural": "natural ones", "block": "at the borders of its blocks"}[by]
        advice = "" if by == "op" else ", or cut by op"
        raise PartitionError(
            f"{count} partitions need {count - 1} cuts and the model has {len(allowed)} {kind}; "
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


# For the sake of better cuts the heaviest partition may weigh this fraction more than the optimum: a twentieth.
TOLERANCE = 20


def _divide(before: Sequence[int], flaws: Sequence[int], sizes: Sequence[int], count: int) -> list[int]:
    """Choose the `count - 1` inner points that divide a line of weights into the best parts.

    `before` is the weight left of each point, from 0 at the first point to the total at the last. Of the divisions
    whose heaviest part is within the tolerance of the optimum, the best have the least sum of `flaws`, then the
    lightest heaviest part, then the least sum of `sizes`. A part weighs 0 only where more parts are wanted than there
    are weights between points.
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
    """Choose the cheapest point between every two weights, so that no weight is divided; then the cheapest others."""
    inner = sorted(range(1, len(before) - 1), key=costs.__getitem__)
    needed = {before[point]: point for point in reversed(inner) if 0 < before[point] < before[-1]}
    first = [*needed.values()]
    others = [point for point in inner if point not in first]
    return sorted([*first, *others][: count - 1])


def _cheapest(before: Sequence[int], costs: Sequence[int], count: int, limit: int) -> list[int]:
    """Choose the `count - 1` inner points of least cost between which parts weigh more than 0 and at most `limit`."""
    # Part by part, the cheapest way to each point at which that part can end.
    #
    #     0 ────── a ── b ───── c ──── point ─────────── n      a, b, c: ends of the part before
    #                   ├──── limit ────┤
    #
    # (1) A part can end only where the parts up to it can reach and those after it can still cover the rest.
    # (2) Its start is the cheapest end of the part before that lies within `limit` to the left and leaves some weight
    #     between. As `point` moves right, ends join this queue at its right and leave it at its left. An end that is
    #     dearer than one to its right is never needed again, so the costs in the queue rise from left to right, and
    #     its first is the cheapest: linear, not quadratic.
    # (3) The starts that were chosen lead back from n.
    total = before[-1]
    ends = [(0, 0)]
    starts: list[dict[int, int]] = []
    for part in range(1, count + 1):
        coming, ends = deque(ends), []
        queue: deque[tuple[int, int]] = deque()
        start_of: dict[int, int] = {}
        low = bisect_left(before, total - (count - part) * limit)  # (1)
        high = bisect_right(before, part * limit)
        for point in range(low, high):
            while coming and before[coming[0][0]] < before[point]:  # (2)
                end = coming.popleft()
                while queue and queue[-1][1] > end[1]:
                    queue.pop()
                queue.append(end)
            while queue and before[queue[0][0]] < before[point] - limit:
                queue.popleft()
            if queue:
                start_of[point], cost = queue[0]
                ends.append((point, cost + costs[point]))
        starts.append(start_of)
    points = [len(before) - 1]
    for start_of in reversed(starts):  # (3)
        points.append(start_of[points[-1]])
    return points[-2:0:-1]


def _fits(before: Sequence[int], count: int, limit: int) -> bool:
    """Whether `count` parts, or fewer, of at most `limit` each cover the line: further cuts add no weight."""
    reach = 0
    for _ in range(count):
        reach = bisect_right(before, before[reach] + limit) - 1
    return reach == len(before) - 1


def between(modes: Modes, chosen: Sequence[Cut]) -> tuple[Partition, ...]:
    """Make the partitions between neighbouring cuts in `chosen`, which begins and ends with the model's two ends."""
    states, owners = _states(modes), owning_ops(modes)
    partitions = []
    for index, (first, last) in enumerate(pairwise(chosen)):
        ops = modes.train.ops[first.index : last.index]
        owned = [states[name] for name, op_index in owners.items() if first.index <= op_index < last.index]
        partitions.append(
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
    return tuple(partitions)
