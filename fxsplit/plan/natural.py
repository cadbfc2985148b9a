"""Finds the natural cuts, which a person would choose: those between blocks, where few bytes cross.

bytes     ▂▂▂▂▂▂▂▂                       ▂▂▂▂
        ▂▂██████████          ▂▂▂▂▂▂▂▂▂▂▂████          █ crosses the cut
        ████████████▂▂▂▂▂▂▂▂▂▂██████████████████▂▂
        ██████████████████████████████████████████
            block   ┊ rest ┊       block       ┊
                       ▲                       ▲       natural cuts

A *rest* is a run of cuts between which nothing is multiplied: normalizations, activations, poolings, additions. It is
there that a network can be divided, and each rest has one best cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from fxsplit.graph import Graph

# Sizes that differ by at most a tenth count as equal: a class token or a small gate changes no shape of the network.
TOLERANCE = 1.1


def natural_cuts(train: Graph, sizes: Sequence[int], eligible: Sequence[bool], paths: Sequence[str]) -> set[int]:
    """Find the natural cuts among `0 .. len(train)`.

    Args:
        train: the train graph. Where it knows no multiply-adds, every op counts as one that multiplies.
        sizes: bytes that cross each cut.
        eligible: whether each cut is legal and a single tensor crosses it. That rules out the inside of residual and
            dense blocks, where two cross.
        paths: path of the op after each cut.

    A cut between two ops of one module that both add or join tensors, as between attention and MLP of a transformer
    block, is ruled out too. Of each rest the smallest cut is the candidate; of several equal ones the one before the
    outermost module, and of those the last. No candidate lies behind a dropout of its rest: dropout stays with the
    later partitions, the teacher, which it goes on to regularise once the earlier ones have settled.

    A candidate is natural

    - when it is a local minimum: in both directions a larger cut, or the model's end, comes before a smaller candidate.
      Of several candidates in a row of equal size, those before the outermost modules count;
    - or when it is smaller than the first cut of its rest, as after a pooling.
    """
    inside = _inside_blocks(train)
    rests = list(_rests(train))
    best = [
        _best([cut for cut in _before_dropout(rest, train) if eligible[cut] and not inside[cut]], sizes, paths)
        for rest in rests
    ]
    minima = _local_minima([cut for cut in best if cut is not None], sizes, paths)
    return {
        cut
        for rest, cut in zip(rests, best, strict=True)
        if cut is not None and (cut in minima or sizes[rest[0]] > TOLERANCE * sizes[cut])
    }


def _rests(train: Graph) -> Iterator[range]:
    """Yield the rests: the cuts between two neighbouring ops that multiply."""
    work = [index for index, op in enumerate(train.ops) if op.macs] or range(len(train))
    return (range(before + 1, after + 1) for before, after in pairwise(work))


def _before_dropout(rest: range, train: Graph) -> range:
    dropouts = (cut for cut in rest if train.ops[cut].is_dropout)
    return range(rest.start, next(dropouts, rest.stop - 1) + 1)


def _best(cuts: Sequence[int], sizes: Sequence[int], paths: Sequence[str]) -> int | None:
    smallest = min((sizes[cut] for cut in cuts), default=0)
    outermost = _outermost([cut for cut in cuts if sizes[cut] <= TOLERANCE * smallest], paths)
    return outermost[-1] if outermost else None


def _outermost(cuts: Sequence[int], paths: Sequence[str]) -> list[int]:
    """Keep those of `cuts` whose paths are least deep; an op in a module is deeper than the module."""
    depths = [paths[cut].count(".") + paths[cut].count(":") for cut in cuts]
    return [cut for cut, depth in zip(cuts, depths, strict=True) if depth == min(depths)]


def _local_minima(cuts: Sequence[int], sizes: Sequence[int], paths: Sequence[str]) -> set[int]:
    """Keep the local minima of `cuts`. A plateau, several in a row of equal size, keeps its outermost."""
    plateaus: list[list[int]] = []
    for cut in cuts:
        if plateaus and _highest(sizes, plateaus[-1][-1], cut) <= TOLERANCE * min(sizes[plateaus[-1][-1]], sizes[cut]):
            plateaus[-1].append(cut)
        else:
            plateaus.append([cut])
    falls = [_highest(sizes, a[-1], b[0]) > TOLERANCE * sizes[b[0]] for a, b in pairwise(plateaus)]
    rises = [_highest(sizes, a[-1], b[0]) > TOLERANCE * sizes[a[-1]] for a, b in pairwise(plateaus)]
    # The model's own ends count as larger.
    ends = zip(plateaus, [True, *falls], [*rises, True], strict=bool(plateaus))
    return {cut for plateau, fell, rose in ends if fell and rose for cut in _outermost(plateau, paths)}


def _highest(sizes: Sequence[int], first: int, last: int) -> int:
    return max(sizes[first : last + 1])


def _inside_blocks(train: Graph) -> list[bool]:
    """Say for every cut whether some module other than the model itself joins tensors both before and after it."""
    spans: dict[str, tuple[int, int]] = {}
    for index, op in enumerate(train.ops):
        if op.kind != "module" and op.path and sum(train.values[name].shape is not None for name in op.reads) > 1:
            spans[op.path] = (spans.get(op.path, (index, index))[0], index)
    inside = [False] * (len(train) + 1)
    for first, last in spans.values():
        inside[first + 1 : last + 1] = [True] * (last - first)
    return inside
