"""Divides partitions that recompute into segments, whose forward runs again one segment at a time.

During its backward a partition then holds what autograd saves in one segment, and the values at the starts of the
segments before: less memory than all that it saves, for the same time (Chen et al., "Training Deep Nets with Sublinear
Memory Cost").
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from fxsplit.graph import Modes
from fxsplit.plan.cuts import Cut, shared_bytes, with_ends
from fxsplit.plan.partition import Partition, between


def segments(partitions: Sequence[Partition], modes: Modes) -> tuple[tuple[Partition, ...], ...]:
    """Divide each partition at legal cuts into the segments, at most 8, that need the least memory.

    Greedily, the segment that saves most is divided next; of all divisions on the way the best is taken. The last
    partition never recomputes and stays one segment.
    """
    divider = _Divider(modes)
    *earlier, last = partitions
    divided = (between(modes, divider.divide(partition)) for partition in earlier)
    return (*divided, (last,))


# More would save little, since the values at the starts of segments are held too.
MAX_SEGMENTS = 8


class _Divider:
    def __init__(self, modes: Modes) -> None:
        self._every = with_ends(modes)
        self._values = {**modes.eval.values, **modes.train.values}
        self._saved = list(accumulate((op.activation_bytes for op in modes.train.ops), initial=0))

    def divide(self, partition: Partition) -> list[Cut]:
        """Choose the cuts at both ends of the partition and between its segments."""
        ends = [self._every[partition.start], self._every[partition.stop]]
        held = {*partition.reads, *partition.writes}
        found = [ends]
        while len(ends) <= MAX_SEGMENTS:
            first, last = max(pairwise(ends), key=lambda pair: self._saved_between(*pair))
            inner = [cut for cut in self._every[first.index + 1 : last.index] if cut.refusal is None]
            if not inner:
                break
            options = [sorted([*ends, cut], key=lambda cut: cut.index) for cut in inner]
            ends = min(options, key=lambda option: self._need(option, held))
            found.append(ends)
        return min(found, key=lambda ends: self._need(ends, held))

    def _saved_between(self, first: Cut, last: Cut) -> int:
        return self._saved[last.index] - self._saved[first.index]

    def _need(self, ends: Sequence[Cut], held: set[str]) -> int:
        """Sum the bytes that segments between `ends` need for one sample, beyond the values `held` anyway."""
        names = dict.fromkeys(name for cut in ends[1:-1] for name in cut.boundary if name not in held)
        most = max(self._saved_between(first, last) for first, last in pairwise(ends))
        return most + shared_bytes(tuple(names), self._values)
