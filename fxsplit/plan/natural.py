"""Which cuts a person would choose: those at which the network itself comes together, between its blocks.

bytes     ▂▂▂▂▂▂▂▂                       ▂▂▂▂
        ▂▂██████████          ▂▂▂▂▂▂▂▂▂▂▂████          █ crosses the cut
        ████████████▂▂▂▂▂▂▂▂▂▂██████████████████▂▂
        ██████████████████████████████████████████
            block   ┊ rest ┊       block       ┊
                       ▲                       ▲       natural cuts

A *rest* is a run of cuts between which nothing is multiplied: normalizations, activations, poolings, additions. It is
there that a network can be divided, and each rest has one best place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from fxsplit.graph import Graph

# Sizes that differ by no more than a tenth are taken for the same: an added class token, or a gate of a few numbers.
TENTH = 1.1


def natural_cuts(train: Graph, sizes: Sequence[int], eligible: Sequence[bool], paths: Sequence[str]) -> set[int]:
    """The natural ones of the cuts `0 .. len(train)`, of which each has a size in bytes and the path of its next op.

    `eligible` are the legal cuts at a single tensor. That alone rules out the inside of a residual or dense block,
    over whose cuts a second tensor passes; a cut inside a module that adds or joins tensors both before and after it,
    such as that between the two halves of a transformer block, is ruled out too. Of each rest between two ops that
    multiply, the smallest cut is a candidate; of several, one before an outer module, and the last of those. None lies
    behind a dropout: that stays with the teacher, which it goes on to regularise when the student has settled.

    A candidate is natural

    - when it is a local minimum: both ways a larger cut comes before a smaller one, or no smaller one comes; of
      several in a row of the same size those before the outermost modules;
    - or when it is smaller than the cut with which its rest began, as after a pooling.

    Without known multiply-adds every op counts as one that multiplies.
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
        if cut is not None and (cut in minima or sizes[rest[0]] > TENTH * sizes[cut])
    }


def _rests(train: Graph) -> Iterator[range]:
    """The runs of cuts between two ops that multiply, without what lies before the first and after the last of them."""
    work = [index for index, op in enumerate(train.ops) if op.macs] or range(len(train))
    return (range(before + 1, after + 1) for before, after in pairwise(work))


def _before_dropout(rest: range, train: Graph) -> range:
    dropouts = (cut for cut in rest if train.ops[cut].is_dropout)
    return range(rest.start, next(dropouts, rest.stop - 1) + 1)


def _best(cuts: Sequence[int], sizes: Sequence[int], paths: Sequence[str]) -> int | None:
    smallest = min((sizes[cut] for cut in cuts), default=0)
    outermost = _outermost([cut for cut in cuts if sizes[cut] <= TENTH * smallest], paths)
    return outermost[-1] if outermost else None


def _outermost(cuts: Sequence[int], paths: Sequence[str]) -> list[int]:
    """Those of `cuts` whose paths are least deep; an op in a module is deeper than the module."""
    depths = [paths[cut].count(".") + paths[cut].count(":") for cut in cuts]
    return [cut for cut, depth in zip(cuts, depths, strict=True) if depth == min(depths)]


def _local_minima(cuts: Sequence[int], sizes: Sequence[int], paths: Sequence[str]) -> set[int]:
    """Those of `cuts` from which, both ways, a larger cut comes before a smaller one; of a plateau the outermost."""
    plateaus: list[list[int]] = []
    for cut in cuts:
        if plateaus and _highest(sizes, plateaus[-1][-1], cut) <= TENTH * min(sizes[plateaus[-1][-1]], sizes[cut]):
            plateaus[-1].append(cut)
        else:
            plateaus.append([cut])
    falls = [_highest(sizes, a[-1], b[0]) > TENTH * sizes[b[0]] for a, b in pairwise(plateaus)]
    rises = [_highest(sizes, a[-1], b[0]) > TENTH * sizes[a[-1]] for a, b in pairwise(plateaus)]
    # The model's own ends count as larger.
    ends = zip(plateaus, [True, *falls], [*rises, True], strict=bool(plateaus))
    return {cut for plateau, fell, rose in ends if fell and rose for cut in _outermost(plateau, paths)}


def _highest(sizes: Sequence[int], first: int, last: int) -> int:
    return max(sizes[first : last + 1])


def _inside_blocks(train: Graph) -> list[bool]:
    """For every cut whether some module other than the model itself joins tensors both before and after it."""
    spans: dict[str, tuple[int, int]] = {}
    for index, op in enumerate(train.ops):
        if op.kind != "module" and op.path and sum(train.values[name].shape is not None for name in op.reads) > 1:
            spans[op.path] = (spans.get(op.path, (index, index))[0], index)
    inside = [False] * (len(train) + 1)
    for first, last in spans.values():
        inside[first + 1 : last + 1] = [True] * (last - first)
    return inside
