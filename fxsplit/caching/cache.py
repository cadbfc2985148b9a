"""The cache of the settled prefix: what it delivers, computed once for each image and read from then on.

    first epoch     images ──► settled partitions ──► values ──► the rest
                                                        └──► rows
    later epochs    rows ──(read ahead by a thread)──► values ──► the rest

A row holds the values of one image, or of one stored view of it, at the cut. Settled partitions never change and treat
each image by itself, so a row stays right whatever batch the image comes in.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from fxsplit.caching.rows import Column, FileRows, MemoryRows
from fxsplit.data.batch import Batch
from fxsplit.data.loader import Loader
from fxsplit.execute.executor import Executor
from fxsplit.execute.forward import Forward

# Floating-point operations that take about as long as reading one byte: from a disk, beside a CPU; over the bus, beside
# a large GPU.
FLOPS_PER_BYTE = {"cpu": 20, "cuda": 4000}
GIB = 2**30

Stamp = tuple[object, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePolicy:
    """Says where caches of the settled prefix are kept and how much they may take.

    Args:
        medium: "ram", "disk" (a nameless file in `folder`, gone with the process) or "auto": disk, where reading costs
            less than computing.
        limit_bytes: what the caches of a phase may take together; None for half of what is free.
        dtype: the type in which floating-point values are kept; None keeps them bit for bit.
        folder: where the file is.
    """

    medium: str
    limit_bytes: int | None = None
    dtype: torch.dtype | None = None
    folder: str = "."

    def open(
        self,
        forward: Forward,
        loader: Loader,
        *,
        epochs: int,
        notice: Callable[[str], None],
        beside: Cache | None = None,
        exact: bool = False,
    ) -> Cache:
        """Open an empty cache for the partitions that are settled now.

        Args:
            forward: runs the settled partitions.
            loader: the images.
            epochs: for how many epochs the cut stays where it is.
            notice: is called with a sentence that says why there are no rows.
            beside: a cache that this one shares the limit with.
            exact: keep values bit for bit, whatever the `dtype`.
        """
        return Cache(self, forward, loader, epochs=epochs, notice=notice, beside=beside, exact=exact)


class Cache:
    """Gives the batches of an epoch at the cut: read from rows where it has them, else computed and kept as rows.

    Where rows cannot be kept it gives images instead and calls `notice` once with the reason. Under "auto" it is silent
    when they would merely not pay, unless the images have views, which were asked for so that rows can be kept. Made by
    `CachePolicy.open`, which describes the arguments.
    """

    def __init__(
        self,
        policy: CachePolicy,
        forward: Forward,
        loader: Loader,
        *,
        epochs: int,
        notice: Callable[[str], None],
        beside: Cache | None,
        exact: bool,
    ) -> None:
        self.cut = forward.executor.window[0]
        self._policy, self._forward, self._loader, self._notice = policy, forward, loader, notice
        self._dtype = None if exact else policy.dtype
        self._beside = beside
        self._given_up = False
        self._weights: Stamp = ()
        self._rows: MemoryRows | FileRows | None = None
        self._columns: list[Column | None] = []
        self._filled = self._none_filled()
        if loader.augment != "none" and loader.views is None:
            self._give_up("images are changed at random, and no views of them are stored", pays=False)
        elif epochs <= (loader.views or 1):
            self._give_up("this phase sees each row only once", pays=False)

    @property
    def has_rows(self) -> bool:
        """Whether it keeps anything."""
        return self._rows is not None

    @property
    def resident_bytes(self) -> int:
        """Bytes of this process's memory that the rows take."""
        return 0 if self._rows is None else self._rows.resident_bytes

    @property
    def file_bytes(self) -> int:
        """Bytes of the disk that the rows take."""
        return 0 if self._rows is None else self._rows.file_bytes

    def close(self) -> None:
        """Free memory and disk. Batches are images from then on."""
        self._drop()
        self._given_up = True

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Give the epoch's batches: the same images as the loader's, in the same order."""
        if not self._given_up and (weights := stamp(self._forward.executor)) != self._weights:
            self._drop()
            self._weights = weights
        view = self._loader.view(epoch)
        first = (view or 0) * len(self._loader.images)
        order = self._loader.order(epoch)
        if self._filled[order + first].all():
            yield from self._read_ahead(torch.split(order, self._loader.batch_size), first)
            return
        for batch in self._loader.batches(epoch, view=view):
            yield batch if self._given_up else self._at_cut(batch, batch.ids.cpu() + first)

    def _at_cut(self, batch: Batch, rows: Tensor) -> Batch:
        if self._rows is not None and self._filled[rows].all():
            values = self._unpacked(self._rows.read(rows))
        else:
            values = self._forward.settle(batch.images)
            if not _are_rows(values, len(batch)):
                # Micro-batches need values that can be divided image by image.
                self._give_up("what crosses the cut is not one row for each image")
                return batch
            self._keep(rows, values, batch.images)
        return Batch(values=tuple(values), cut=self.cut, labels=batch.labels, ids=batch.ids)

    def _read_ahead(self, batches: Sequence[Tensor], first: int) -> Iterator[Batch]:
        assert self._rows is not None
        device = self._loader.device
        with ThreadPoolExecutor(max_workers=1) as reader:
            pending = reader.submit(self._rows.read, batches[0] + first)
            for ids, next_ids in zip(batches, (*batches[1:], None), strict=True):
                values = self._unpacked(pending.result())
                if next_ids is not None:
                    pending = reader.submit(self._rows.read, next_ids + first)
                ids = ids.to(device)
                yield Batch(values=tuple(values), cut=self.cut, labels=self._loader.images.labels[ids], ids=ids)

    def _unpacked(self, packed: Sequence[Tensor]) -> list[Any]:
        kept = iter(packed)
        return [None if column is None else column.unpack(next(kept), self._loader.device) for column in self._columns]

    def _keep(self, rows: Tensor, values: list[Any], images: Tensor) -> None:
        try:
            if self._rows is None and (refusal := self._open(values, images)):
                self._give_up(*refusal)
            if self._rows is not None:
                pairs = zip(self._columns, values, strict=True)
                self._rows.write(rows, [column.pack(value) for column, value in pairs if column is not None])
                self._filled[rows] = True
        except (OSError, MemoryError) as error:
            self._give_up(getattr(error, "strerror", None) or "there is not enough memory")

    def _open(self, values: list[Any], images: Tensor) -> tuple[str, bool] | None:
        """Make room for all rows, or return the reason why not and whether rows would have paid."""
        loader = self._loader
        if not self._repeats(values, images):
            return "the settled partitions do not deliver the same for an image each time", True
        self._columns = [None if value is None else Column.of(value, self._dtype) for value in values]
        columns = [column for column in self._columns if column is not None]
        row_bytes = sum(column.row_bytes for column in columns)
        macs = sum(partition.macs for partition in self._forward.executor.partitions[: self.cut])
        if self._policy.medium == "auto" and not pays(macs, row_bytes, device=loader.device.type):
            return "reading rows would take longer than computing them", False
        size, limit = len(self._filled) * row_bytes, self._limit()
        if size > limit:
            return f"it needs {size / GIB:.3g} GiB and may take {limit / GIB:.3g}", True
        if self._policy.medium == "ram":
            self._rows = MemoryRows(len(self._filled), columns)
        else:
            self._rows = FileRows(len(self._filled), columns, self._policy.folder)
        return None

    def _repeats(self, values: list[Any], images: Tensor) -> bool:
        """Tell whether half of the batch, run again, gives the same, and without random numbers."""
        half = -(-len(images) // 2)
        devices = [images.device] if images.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            before = torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)
            # BatchNorm without running statistics may not take a single image.
            again = self._forward.settle(images[:half] if half > 1 else images[[0, 0]])
            after = torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)
        pairs = [(a[:half], b[:half]) for a, b in zip(again, values, strict=True) if b is not None]
        return all(map(torch.equal, before, after)) and all(_alike(a, b) for a, b in pairs)

    def _limit(self) -> int:
        policy = self._policy
        if policy.limit_bytes is not None:
            taken = self._beside.resident_bytes + self._beside.file_bytes if self._beside else 0
            return policy.limit_bytes - taken
        free = psutil.virtual_memory().available if policy.medium == "ram" else shutil.disk_usage(policy.folder).free
        return int(free // 2)

    def _give_up(self, why: str, pays: bool = True) -> None:
        self._drop()
        self._given_up = True
        if pays or self._policy.medium != "auto" or self._loader.views is not None:
            batch = "batch" if self._loader.training else "test batch"
            self._notice(f"the settled partitions are computed anew for each {batch}, without a cache: {why}")

    def _drop(self) -> None:
        self._weights = ()
        self._rows = None
        self._columns = []
        self._filled = self._none_filled()

    def _none_filled(self) -> Tensor:
        """Make the mask of the rows that are filled, with none of them filled."""
        return torch.zeros(len(self._loader.images) * (self._loader.views or 1), dtype=torch.bool)


def stamp(executor: Executor) -> Stamp:
    """Return what is equal as long as the settled partitions stay the same and their weights are not written into."""
    state = executor.settled_state()
    # With the tensors themselves, so that no new one can get the address of one of them.
    weights = ((_Same(tensor), tensor._version, tensor.data_ptr()) for tensor in state.values())
    return executor.window[0], executor.settled_dtype, *weights


def pays(macs: int, row_bytes: int, *, device: str) -> bool:
    """Tell whether computing a row takes longer than reading it.

    Args:
        macs: multiply-adds of the settled partitions for one image.
        row_bytes: size of the row.
        device: "cpu" or "cuda", which computes.
    """
    return 2 * macs > FLOPS_PER_BYTE[device] * row_bytes


class _Same:
    """Equal to another one if they hold the same tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._tensor is other._tensor


def _are_rows(values: Sequence[Any], count: int) -> bool:
    """Tell whether each value is None or a tensor of `count` rows."""
    return all(value is None or (isinstance(value, Tensor) and value.shape[:1] == (count,)) for value in values)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are equal but for rounding: a kernel may add up otherwise for another batch size."""
    if not one.is_floating_point():
        return torch.equal(one, other)
    bound = 32 * torch.finfo(one.dtype).eps * float(other.abs().max()) if one.numel() else 0.0
    return one.shape == other.shape and torch.allclose(one, other, rtol=0.0, atol=bound)
