"""Which part of every batch one of several processes takes.

    batch of 8      0 1 2 │ 3 4 5 │ 6 7      three processes: the first two take three images each
    last batch      0 1   │ 2 3   │ 3*       of four: none takes one alone, and the third shows an image again,
                                             so that it takes as many steps as the others; it counts for nothing

Images may also belong to a process for good, so that what it keeps of them serves every epoch: then a batch has as many
from each process as before, and only the order of an epoch is another one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Share:
    """The part of every batch that process `rank` of `ranks` takes; by itself the whole batch."""

    rank: int = 0
    ranks: int = 1


WHOLE = Share()


def sizes(samples: int, parts: int, *, least: int = 1) -> list[int]:
    """Divide samples into parts as equal as can be, larger ones first; what has fewer than `least` is empty instead."""
    filled = max(1, min(parts, samples // least))
    size, more = divmod(samples, filled)
    return [size + (index < more) for index in range(filled)] + [0] * (parts - filled)


def taken(order: Tensor, share: Share, *, batch_size: int, least: int) -> Tensor:
    """Return what one process takes of the `order` of an epoch, int64 (M,), batch by batch.

    Of a last batch in which it has no part, it takes `least` images that it has had before.
    """
    full, rest = divmod(len(order), batch_size)
    whole = order[: full * batch_size].view(full, batch_size)
    own = whole[:, _columns(sizes(batch_size, share.ranks), share.rank)].flatten()
    if not rest:
        return own
    last = order[full * batch_size :]
    part = last[_columns(sizes(rest, share.ranks, least=least), share.rank)]
    return torch.cat((own, part if len(part) else (own if len(own) else last)[:least]))


def owners(images: int, ranks: int, *, batch_size: int, least: int) -> Tensor:
    """Say to which process each of so many images belongs, int64 (N,), so that all run out in the same batch."""
    full, rest = divmod(images, batch_size)
    of_batch, of_last = (
        torch.repeat_interleave(torch.arange(ranks), torch.tensor(each))
        for each in (sizes(batch_size, ranks), sizes(rest, ranks, least=least))
    )
    return torch.cat((of_batch.repeat(full), of_last))


def by_owner(order: Tensor, ranks: int, *, count: int, batch_size: int, least: int) -> Tensor:
    """Rearrange the `order` of all images, int64 (N,), so that `taken` gives each process its own, in that order.

    Returns the first `count` of them, (M,).
    """
    owner = owners(len(order), ranks, batch_size=batch_size, least=least)[order]
    own = [order[owner == rank] for rank in range(ranks)]
    full, rest = divmod(count, batch_size)
    per_batch, of_last = sizes(batch_size, ranks), sizes(rest, ranks, least=least)
    whole = [each[: full * size].view(full, size) for each, size in zip(own, per_batch, strict=True)]
    ends = [each[full * size : full * size + last] for each, size, last in zip(own, per_batch, of_last, strict=True)]
    return torch.cat((torch.cat(whole, dim=1).flatten(), *ends))


def _columns(parts: list[int], rank: int) -> slice:
    ends = [0, *accumulate(parts)]
    return slice(ends[rank], ends[rank + 1])
