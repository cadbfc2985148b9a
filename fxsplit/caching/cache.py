"""The cache of the settled prefix: what it delivers, computed once for each image and read from then on.

    first epoch     images ──► settled partitions ──► values ──► the rest
                                                        └──► rows
    later epochs    rows ──► values ──► the rest

A row holds the values of one image, or of one stored view of it, at the cut. Settled partitions never change and treat
each image by itself, so a row stays right whatever batch the image comes in. It is written once, and what is delivered
for its image is that row from then on. When the cut moves on, the rows at the new one are computed from those at the
old one, without images:

                    rows at the old cut ──► partitions that settle now ──► rows at the new cut

Rows in memory of the device are written
and gathered by the step itself; others are read ahead by a thread, and brought to the device beside the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fxsplit.caching.media import (
    AUTO,
    DEVICE,
    MACS_PER_SECOND,
    READ_BYTES_PER_SECOND,
    Offer,
    Refusal,
    Timed,
    available,
    choose,
    open_rows,
    reading_seconds,
)
from fxsplit.caching.repeats import repeats
from fxsplit.caching.rows import Column, Rows
from fxsplit.data.batch import Batch
from fxsplit.data.loader import ImageSource, Loader
from fxsplit.data.order import EpochOrder
from fxsplit.data.staging import Staging, read_ahead
from fxsplit.execute.executor import Executor
from fxsplit.execute.forward import Forward

Stamp = tuple[object, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePolicy:
    """Says where caches of the settled prefix are kept and how much they may take.

    Args:
        medium: "device" (memory of the device that trains), "ram" (of the host), "disk" (a nameless file in `folder`,
            gone with the process) or "auto": the first of these that has room, where reading takes less time than
            computing, as measured; beside a CPU disk alone.
        limit_bytes: what the caches of a phase may take together, of all processes; None for half of what is free.
        dtype: the type in which floating-point values are kept; None keeps them bit for bit, in the type in which the
            settled partitions deliver them.
        folder: where the file is.
        peak_bytes: what training is forecast to need of the memory of a GPU, where rows may then not be.
        measured: whether "auto" measures seconds; else it works them out from bytes and multiply-adds, and so chooses
            the same each time.
        share: of the memory of the host and of the disk, the part that is for this process, 0 to 1.
    """

    medium: str
    limit_bytes: int | None = None
    dtype: torch.dtype | None = None
    folder: str = "."
    peak_bytes: int = 0
    measured: bool = True
    share: float = 1.0

    def open(
        self,
        forward: Forward,
        images: ImageSource,
        *,
        cut: int | None = None,
        epochs: int,
        notice: Callable[[str], None],
        name: str = "batch",
        beside: Sequence[Cache] = (),
        below: Cache | None = None,
        exact: bool = False,
    ) -> Cache:
        """Open an empty cache for the partitions that are settled now.

        Args:
            forward: runs the settled partitions.
            images: the images, by a source that nothing else reads meanwhile.
            cut: where rows are kept; None for the end of what is settled.
            epochs: for how many epochs the partitions before the cut stay settled.
            notice: is called with a sentence that says why there are no rows.
            name: the word for a batch of these images in the sentence.
            beside: caches of other images that this one shares the limit with, and a medium.
            below: the cache of the same images at an earlier cut, whose rows are read where these are missing.
            exact: keep values bit for bit, whatever the `dtype`.
        """
        at = forward.executor.window[0] if cut is None else cut
        return Cache(
            self,
            forward,
            images,
            cut=at,
            epochs=epochs,
            notice=notice,
            name=name,
            beside=beside,
            below=below,
            exact=exact,
        )


class Cache:
    """Delivers the batches of an epoch at the cut, as a `Source`: from rows where it has them, else computed and kept.

    Where rows cannot be kept it delivers images instead, or rows at an earlier cut, and calls `notice` once with the
    reason. Under "auto" it is
    silent when they would merely not pay, unless the images have views, which were asked for so that rows can be kept.
    Made by `CachePolicy.open`, which describes the arguments.
    """

    def __init__(
        self,
        policy: CachePolicy,
        forward: Forward,
        images: ImageSource,
        *,
        cut: int,
        epochs: int,
        notice: Callable[[str], None],
        name: str,
        beside: Sequence[Cache],
        below: Cache | None,
        exact: bool,
    ) -> None:
        self.cut, self.below = cut, below
        self._policy, self._forward, self._images, self._notice = policy, forward, images, notice
        self._loader = loader = images.loader
        self._dtype = None if exact else policy.dtype
        self._name, self._beside = name, tuple(beside)
        # Whether the cut will come back here, after it was farther on.
        self.is_wanted_later = False
        self._given_up = self._is_spent = False
        # Seconds in which a batch of rows is read, as far as they were measured.
        self._read_seconds = 0.0
        self._order = EpochOrder(loader.own_images_per_epoch, loader.own_batch_size, loader.device)
        # The images that have rows, in order; ids on the device, for the step.
        self._images_kept = loader.own()
        self._ids = self._images_kept.to(loader.device)
        self._weight = 1.0
        self._source: ImageSource | Cache = images
        self._fetch: Callable[[], Batch] = images.fetch
        self._reads = False
        self._weights: Stamp = ()
        self._rows: Rows | None = None
        self.medium: str | None = None
        # The medium of an earlier process that this one goes on from.
        self._chosen: str | None = None
        # The batches that were computed and kept, in order: whether in training, epoch, first and last + 1.
        self._fills: list[tuple[bool, int, int, int]] = []
        self._columns: list[Column | None] = []
        self._filled = self._none_filled()
        self._staging = Staging(loader.device, loader.own_batch_size)
        if why := why_no_rows(loader, epochs):
            self._give_up(why, pays=False)

    @property
    def has_rows(self) -> bool:
        """Whether it keeps anything."""
        return self._rows is not None

    @property
    def has_given_up(self) -> bool:
        """Whether there will be no rows."""
        return self._given_up

    @property
    def settled_from(self) -> int:
        """The cut from which the settled partitions run for the batch that was put last: this one if rows are read."""
        if self._reads:
            return self.cut
        return self._source.settled_from if isinstance(self._source, Cache) else 0

    @property
    def resident_bytes(self) -> int:
        """Bytes of memory, of the device or of this process, that the rows take."""
        return 0 if self._rows is None else self._rows.resident_bytes

    @property
    def file_bytes(self) -> int:
        """Bytes of the disk that the rows take."""
        return 0 if self._rows is None else self._rows.file_bytes

    def close(self) -> None:
        """Free memory and disk. Batches are images from then on."""
        self._drop()
        self._given_up = True

    def release(self) -> None:
        """Free memory and disk when the next cache has all of its rows, unless these are wanted later.

        What has been computed is still known, so that an interrupted run can compute it again.
        """
        if self._rows is not None and not self.is_wanted_later:
            self._rows, self._is_spent = None, True
            self._filled = self._none_filled()
            self._staging = Staging(self._loader.device, self._loader.own_batch_size)

    def put(self, epoch: int, first: int = 0) -> Iterator[Hashable]:
        """Go from batch to batch of an epoch: the same images as the loader's, in the same order, from `first` on."""
        if self._is_spent:
            self._drop()  # the cut has come back
        if not self._given_up and (weights := stamp(self._forward.executor, self.cut)) != self._weights:
            self._drop()
            self._weights = weights
        view, count = self._loader.view(epoch), len(self._images_kept)
        start = (view or 0) * count
        ids = self._loader.order(epoch, shards=self._loader.share.ranks)
        order = torch.searchsorted(self._images_kept, ids) + start
        filled = self._filled_now()
        if self._rows is not None and filled[order].all():
            if self.below is not None and filled.all():
                self.below.release()
            return self._put_rows(self._rows, order, first)
        # Recording the steps that fill a few missing rows would cost more than it saves.
        is_new = not filled[start : start + count].any()
        if self.below is None or self.below._is_spent:
            self._source = self._images
            batches = self._images.put(epoch, first, view=view, shards=self._loader.share.ranks)
        else:
            self._source, batches = self.below, self.below.put(epoch, first)
        return self._put_computed(batches, epoch, order, first, filled, is_new=is_new)

    def _filled_now(self) -> Tensor:
        """Read which rows are filled, bool (N,) on the CPU. For this a GPU is waited for, between epochs."""
        return self._filled.cpu()

    def fetch(self) -> Batch:
        """Return the batch that was put last: values at the cut, or images where no rows are kept."""
        return self._fetch()

    def _put_rows(self, rows: Rows, order: Tensor, first: int) -> Iterator[Hashable]:
        size, self._reads = self._loader.own_batch_size, True
        if self.medium == DEVICE:
            for number, numbers in enumerate(self._order.batches(order, first), first):
                self._weight = self._loader.weight(number)
                self._fetch = partial(self._read, rows, numbers)
                yield (self._order, rows) if len(numbers) == size else None
            return
        self._fetch = self._staged
        read = read_ahead(rows.read, torch.split(order, size)[first:])
        for number, (numbers, packed) in enumerate(zip(self._order.batches(order, first), read, strict=True), first):
            self._weight = self._loader.weight(number)
            self._staging.put(packed)
            yield (self._order, self._staging) if self._staging.is_static and len(numbers) == size else None

    def _staged(self) -> Batch:
        return self._at_cut(self._staging.taken())

    def _read(self, rows: Rows, numbers: Tensor) -> Batch:
        return self._at_cut([packed.to(self._loader.device) for packed in rows.read(self._where_rows_are(numbers))])

    def _at_cut(self, packed: Sequence[Tensor]) -> Batch:
        """Make the present batch from its packed values, on the device."""
        kept, images, rows = iter(packed), self._loader.images, self._order.ids()
        if self._loader.views is not None:
            rows = rows.remainder(len(self._ids))
        # All images have rows in most runs, and then rows are ids.
        ids = rows if len(self._ids) == len(images) else self._ids.index_select(0, rows)
        values = tuple(None if column is None else column.unpack(next(kept)) for column in self._columns)
        labels = images.labels.index_select(0, ids)
        return Batch(values=values, cut=self.cut, labels=labels, ids=ids, weight=self._weight)

    def _where_rows_are(self, numbers: Tensor) -> Tensor:
        """Return the row numbers of the present batch, given on the CPU, on the device if rows are kept there.

        They are not copied there: a recorded step must find those of each batch.
        """
        return self._order.ids() if self.medium == DEVICE else numbers

    def _put_computed(
        self,
        given: Iterator[Hashable],
        epoch: int,
        order: Tensor,
        first: int,
        filled: Tensor,
        *,
        is_new: bool,
    ) -> Iterator[Hashable]:
        """Go from batch to batch of the source, and compute those whose rows are missing."""
        batches = zip(self._order.batches(order, first), given, strict=True)
        for number, (numbers, key) in enumerate(batches, first):
            self._weight = self._loader.weight(number)
            rows, can_be_recorded = self._rows, self.medium == DEVICE and key is not None
            there = filled[numbers]
            self._reads = not self._given_up and rows is not None and bool(there.all())
            if self._given_up:
                self._fetch = self._source.fetch
                yield key
            elif rows is None or not there.all():
                self._note(epoch, number)
                self._fetch = partial(self._computed, numbers, there if there.any() else None)
                yield (key, rows) if can_be_recorded and is_new else None
            else:
                self._fetch = partial(self._read, rows, numbers)
                yield (self._order, rows) if can_be_recorded else None

    def _computed(self, numbers: Tensor, there: Tensor | None) -> Batch:
        """Compute a batch, and keep it as the rows `numbers`, int64 (B,) on the CPU.

        Those that are `there`, bool (B,), are left as they are; None if there are none.
        """
        batch = self._source.fetch()
        values = self._forward.settle(batch, self.cut)
        if not _are_rows(values, len(batch)):
            # Micro-batches need values that can be divided image by image.
            self._give_up("what crosses the cut is not one row for each image")
            return batch
        try:
            if self._rows is None and (refusal := self._open(values, batch)):
                self._give_up(*refusal)
            if self._rows is not None and there is not None:
                new = (~there).to(self._loader.device)
                self._keep(self._rows, numbers[~there], [None if each is None else each[new] for each in values])
                return self._read(self._rows, numbers)
            if self._rows is not None:
                values = self._keep(self._rows, numbers, values)
        except (OSError, MemoryError, torch.OutOfMemoryError) as error:
            self._give_up(getattr(error, "strerror", None) or "there is not enough memory")
        return replace(batch, values=tuple(values), cut=self.cut)

    def _keep(self, rows: Rows, numbers: Tensor, values: Sequence[Any]) -> list[Any]:
        """Write rows, and return the values as they would be read."""
        where = self._where_rows_are(numbers) if len(numbers) == self._order.size else numbers.to(rows.device)
        pairs = list(zip(self._columns, values, strict=True))
        packed = [None if column is None else column.pack(value, rows.device) for column, value in pairs]
        rows.write(where, [each for each in packed if each is not None])
        self._filled.index_fill_(0, where, True)
        return [
            value
            if column is None or each is None or column.kept is column.dtype
            else column.unpack(each.to(value.device))
            for (column, value), each in zip(pairs, packed, strict=True)
        ]

    def _note(self, epoch: int, number: int) -> None:
        """Note that a batch is computed and kept, here on the host: a replayed step runs no Python."""
        training, last = self._forward.executor.training, self._fills[-1] if self._fills else None
        if last is not None and last[:2] == (training, epoch) and last[3] == number:
            self._fills[-1] = (training, epoch, last[2], number + 1)
        else:
            self._fills.append((training, epoch, number, number + 1))

    def state_dict(self) -> dict[str, Any]:
        """Return at which cut which batches were computed and kept, and where. The rows themselves are left out."""
        return {
            "cut": self.cut,
            "medium": self.medium,
            "given_up": self._given_up,
            "spent": self._is_spent,
            "read_seconds": self._read_seconds,
            "fills": list(self._fills),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compute the rows again of which `state_dict` has told; the same phase must have been entered.

        Those of the cache `below` must be there. An image computed in other company differs by rounding, so each batch
        is computed as it was, in the same order.
        """
        self._given_up, self._chosen = state["given_up"], state["medium"]
        self._read_seconds = state["read_seconds"]
        executor = self._forward.executor
        mode = executor.training
        for training, epoch, first, stop in state["fills"]:
            executor.train(training)
            with torch.no_grad():
                for _ in islice(self.put(epoch, first), stop - first):
                    self.fetch()
        executor.train(mode)
        self._chosen = None

    def _open(self, values: list[Any], batch: Batch) -> Refusal | None:
        """Make room for all rows, or return the reason why not."""
        policy, device, executor = self._policy, self._loader.device, self._forward.executor
        settle = Timed(lambda given: self._forward.settle(replace(batch, values=tuple(given)), self.cut), device)
        precisions = [dtype for dtype in (self._forward.amp_dtype, executor.settled_dtype) if dtype is not None]
        if not repeats(settle, batch.values, values, precisions=precisions):
            return Refusal("the settled partitions do not deliver the same for an image each time")
        kept = self._types_to_keep(values, batch)
        self._columns = [
            None if value is None else Column.of(value, dtype) for value, dtype in zip(values, kept, strict=True)
        ]
        given = [(column, value) for column, value in zip(self._columns, values, strict=True) if column is not None]
        count, columns = len(self._filled), [column for column, _ in given]
        size = count * sum(column.row_bytes for column in columns)
        offers = self._offers(
            (lambda medium: reading_seconds(medium, given, device, policy.folder, size=size))
            if policy.measured
            else (lambda medium: size / count * len(batch) / READ_BYTES_PER_SECOND[medium])
        )
        seconds = settle.seconds if policy.measured else self._settle_seconds(len(batch), batch.cut)
        if batch.cut and self.below is not None:
            # Without rows at this cut, those at the earlier one would be read each time.
            seconds += self.below._read_seconds
        medium = self._chosen or choose(offers, size=size, compute_seconds=seconds)
        if isinstance(medium, Refusal):
            return medium
        self._rows, self.medium = open_rows(medium, count, columns, device, policy.folder), medium
        self._filled = self._filled.to(self._rows.device)
        return None

    def _types_to_keep(self, values: Sequence[Any], batch: Batch) -> Sequence[torch.dtype | None]:
        """Return for each value the type in which floats are kept; None for its own.

        Without autocast, values that were computed in the precision of settled partitions are float32 again. They are
        the same numbers in that precision, which autocast leaves them in.
        """
        executor = self._forward.executor
        dtype = executor.settled_dtype if executor.training and self._forward.amp_dtype is None else None
        if self._dtype is not None or dtype is None:
            return [self._dtype] * len(values)
        found = self._forward.settle(batch, self.cut, amp_dtype=dtype)
        return [None if value is None else value.dtype for value in found]

    def _settle_seconds(self, images: int, cut: int) -> float:
        """Work out how long the settled partitions from `cut` on take for a batch, without a clock."""
        settled = self._forward.executor.partitions[cut : self.cut]
        return (
            images
            * sum(each.macs for each in settled)
            / MACS_PER_SECOND.get(self._loader.device.type, MACS_PER_SECOND["cpu"])
        )

    def _offers(self, seconds: Callable[[str], float]) -> Iterator[Offer]:
        """Give the media that may be used; only where several may, `seconds` measures reading."""
        media = AUTO.get(self._loader.device.type, AUTO["cpu"])
        asked = self._policy.medium
        before = next((each.medium for each in reversed(self._beside) if each.medium is not None), None)
        if before is not None and asked == "auto":
            # Reading pays for the images beside, so it does for these: in the same medium, or where there is room.
            media = media[media.index(before) :]
            yield from (Offer(medium, 0.0, self._limit(medium)) for medium in media)
        elif asked == "auto":
            for medium in media:
                self._read_seconds = seconds(medium)
                yield Offer(medium, self._read_seconds, self._limit(medium))
        else:
            yield Offer(asked, 0.0, self._limit(asked))

    def _limit(self, medium: str) -> int:
        policy = self._policy
        others = [each for first in (self, *self._beside) for each in first.chain()]
        if policy.limit_bytes is not None:
            taken = sum(each.resident_bytes + each.file_bytes for each in others)
            return int(policy.limit_bytes * policy.share) - taken
        device = self._loader.device
        peak_bytes = policy.peak_bytes + sum(each.resident_bytes for each in others if each.medium == DEVICE)
        found = available(medium, device, policy.folder, peak_bytes=peak_bytes)
        return found if medium == DEVICE and device.type == "cuda" else int(found * policy.share)

    def _give_up(self, why: str, pays: bool = True) -> None:
        self._drop()
        self._given_up = True
        if pays or self._policy.medium != "auto" or self._loader.views is not None:
            self._notice(f"the settled partitions are computed anew for each {self._name}, without a cache: {why}")

    def chain(self) -> Iterator[Cache]:
        """Give this cache, and those at earlier cuts whose rows it reads."""
        cache: Cache | None = self
        while cache is not None:
            yield cache
            cache = cache.below

    def _drop(self) -> None:
        self._weights = ()
        self._is_spent = False
        self._rows = self.medium = None
        self._fills = []
        self._columns = []
        self._filled = self._none_filled()
        self._staging = Staging(self._loader.device, self._loader.own_batch_size)

    def _none_filled(self) -> Tensor:
        """Make the mask of the rows that are filled, with none of them filled."""
        return torch.zeros(len(self._images_kept) * (self._loader.views or 1), dtype=torch.bool)


def why_no_rows(loader: Loader, epochs: int) -> str:
    """Say why rows of a loader's images could not be kept, or not pay, in so many epochs; else nothing."""
    if loader.changes.mixes:
        return "images are mixed with others of their batch"
    if loader.is_random and loader.views is None:
        return "images are changed at random, and no views of them are stored"
    return "each row would be seen only once" if epochs <= (loader.views or 1) else ""


def stamp(executor: Executor, cut: int) -> Stamp:
    """Return what stays equal while the partitions before `cut` do, and their weights are not written into."""
    state = executor.settled_state(cut)
    # With the tensors themselves, so that no new one can get the address of one of them.
    weights = ((_Same(tensor), tensor._version, tensor.data_ptr()) for tensor in state.values())
    return cut, executor.settled_dtype, *weights


class _Same:
    """Equal to another one if they hold the same tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._tensor is other._tensor


def _are_rows(values: Sequence[Any], count: int) -> bool:
    """Tell whether each value is None or a tensor of `count` rows."""
    return all(value is None or (isinstance(value, Tensor) and value.shape[:1] == (count,)) for value in values)
