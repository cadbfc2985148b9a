"""The batches of a run, from a cache of the settled prefix where there is one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from fxsplit.caching.cache import Cache, CachePolicy, why_no_rows
from fxsplit.data.batch import Batch
from fxsplit.data.loader import ImageSource, LabelSource, Loader
from fxsplit.data.source import Source, batches_of
from fxsplit.errors import FxsplitError
from fxsplit.execute.forward import Forward
from fxsplit.plan.schedule import Phase

TRAIN, TEST, HELD_OUT = "train", "test", "held_out"
# What a notice calls their batches.
BATCHES = {TRAIN: "batch", TEST: "test batch", HELD_OUT: "held-out batch"}
# More epochs than any run has.
MANY = 10**9


class Feed:
    """Delivers the batches to train on, as a `Source`, and those to test on; opens and closes caches between phases.

    One epoch can be gone through at a time.

    Args:
        forward: runs the settled partitions.
        train_loader: the images to train on.
        test_loader: the images to test on.
        policy: how to cache what the settled partitions deliver; None to compute it for each batch.
        held_out_loader: the training images that are held out, if there are any.
        leads: whether batches to train on enter the model here. In a pipeline they do so in the first process, which
            keeps rows for all; the others have labels alone.

    Raises FxsplitError when there is nothing to train on.
    """

    def __init__(
        self,
        forward: Forward,
        train_loader: Loader,
        test_loader: Loader,
        *,
        policy: CachePolicy | None = None,
        held_out_loader: Loader | None = None,
        leads: bool = True,
    ) -> None:
        if not train_loader.steps_per_epoch:
            raise FxsplitError("there is no batch to train on: BatchNorm needs at least 2 training images")
        self.train_loader, self.test_loader = train_loader, test_loader
        self._leads = leads
        has_images = leads or train_loader.changes.mixes
        self._training = ImageSource(train_loader) if has_images else LabelSource(train_loader)
        self._tested = {TEST: ImageSource(test_loader)}
        if held_out_loader is not None:
            self._tested[HELD_OUT] = ImageSource(held_out_loader)
        self._forward, self._policy = forward, policy
        # The later a cut, the later in the list; only the last one is read from when all rows are there.
        self._levels: list[_Level] = []
        self._is_cached = False
        self._epochs = 0
        # For how many processes images are divided for good; and in an epoch that began with another number of them.
        self._shards = self._shards_now = 1
        self._shards_before: int | None = None

    def enter(self, cut: int, *, epochs: int, notice: Callable[[str], None], later: Sequence[Phase] = ()) -> None:
        """Keep the caches if they are at `cut`, else open new ones there, which are filled from those before.

        Where a later phase goes back to an earlier cut, rows are kept at that one, too.

        Args:
            cut: after what is settled.
            epochs: for how many epochs the cut stays there.
            notice: is called with the reason if a cache keeps nothing.
            later: the phases that follow.
        """
        self._epochs = epochs
        for level in reversed(self._levels):
            if level.cut > cut or (level.cut < cut and level.train.has_given_up):
                self._levels.remove(level)
                level.close()
        # Up to where everything trains again, after which rows are of no use.
        earliest = min((phase.start for phase in takewhile(lambda phase: phase.start, later)), default=cut)
        for each in sorted({min(earliest, cut), cut} - {0}) if self._policy is not None else ():
            if not self._levels or self._levels[-1].cut < each:
                self._open(each, epochs=epochs + _epochs_settled(each, later), notice=notice)
        for level in self._levels:
            for cache in level.caches.values():
                cache.is_wanted_later = level.cut == earliest < cut
        ranks, before = self.train_loader.share.ranks, self._shards
        # Each process may find by itself that it cannot keep rows: what is divided stays divided.
        keep_rows = before > 1 or any(not level.train.has_given_up for level in self._levels)
        self._shards = ranks if self._levels and keep_rows else 1
        if self._shards > before:
            notice(f"from here on each of the {ranks} parts of a batch has images of its own, so that rows can be kept")

    def _open(self, cut: int, *, epochs: int, notice: Callable[[str], None]) -> None:
        """Open caches after those that there are."""
        policy, last = self._policy, self._levels[-1] if self._levels else None
        assert policy is not None

        caches: dict[str, Cache] = {}
        images_of = dict(self._tested)
        if self._leads:
            assert isinstance(self._training, ImageSource)
            images_of = {TRAIN: self._training, **images_of}
        for name, images in images_of.items():
            caches[name] = policy.open(
                self._forward,
                images,
                cut=cut,
                epochs=epochs,
                notice=notice,
                name=BATCHES[name],
                beside=tuple(caches.values()),
                below=None if last is None else last.caches[name],
                exact=name != TRAIN,
            )
        train = caches[TRAIN] if self._leads else _Followed(self._training, epochs)
        self._levels.append(_Level(cut, train, caches))

    def put(self, epoch: int, first: int = 0) -> Iterator[Hashable]:
        """Go from batch to batch of a training epoch, at the cut or as images; those before `first` are left out."""
        self._shards_now = self._shards_before if first and self._shards_before else self._shards
        self._shards_before = None
        self._is_cached = bool(self._levels) and self._shards_now == self.train_loader.share.ranks
        if self._is_cached:
            return self._levels[-1].train.put(epoch, first)
        # Stored views replace the augmentation of the epoch once anything is settled, whether or not rows are kept.
        settled = self._forward.executor.window[0] > 0
        view = self.train_loader.view(epoch) if settled else None
        return self._training.put(epoch, first, view=view, shards=self._shards_now)

    def fetch(self) -> Batch:
        """Return the training batch that was put last."""
        return self._levels[-1].train.fetch() if self._is_cached else self._training.fetch()

    @property
    def settled_from(self) -> int:
        """The cut from which the settled partitions run for the training batch that was put last.

        It is 0 for images, and the cut after all of them if the batch is read from a cache there.
        """
        return self._levels[-1].train.settled_from if self._is_cached else 0

    @property
    def cut(self) -> int:
        """The last cut for which rows are kept, or will be, in the phase that was entered; 0 without."""
        return max((level.cut for level in self._levels if not level.train.has_given_up), default=0)

    def training(self, epoch: int) -> Iterator[Batch]:
        """Give the batches of a training epoch."""
        return batches_of(self, epoch)

    @property
    def test_source(self) -> Source:
        """What delivers the test images, all in epoch 0: the cache, where training images come from one."""
        return self._source(TEST)

    def held_out(self) -> Iterator[tuple[Batch, int]]:
        """Give the batches of the images that are held out, from a cache as those of `test_source`.

        With each comes the cut from which the settled partitions run for it, as `settled_from` says of others.
        """
        if HELD_OUT in self._tested:
            source = self._source(HELD_OUT)
            for batch in batches_of(source, 0):
                yield batch, source.settled_from if isinstance(source, Cache) else 0

    def _source(self, name: str) -> Cache | ImageSource:
        """Return what delivers images that are not trained on: the cache, where training images come from one."""
        cached = any(level.train.has_rows for level in self._levels)
        return self._levels[-1].caches[name] if cached else self._tested[name]

    def state_dict(self) -> dict[str, Any]:
        """Return for how many epochs the last caches were opened, what is in all of them, and who has which images."""
        levels = [{name: cache.state_dict() for name, cache in level.caches.items()} for level in self._levels]
        divided = {"ranks": self.train_loader.share.ranks, "shards": self._shards_now, "later_shards": self._shards}
        return {"epochs": self._epochs, **divided, "levels": levels}

    def load_state_dict(self, state: Mapping[str, Any], notice: Callable[[str], None]) -> None:
        """Fill the caches again, as `state_dict` has told of them; the same phase must have been entered.

        With another number of processes than before, images belong to others: rows are kept as epochs go on. In any
        case the present epoch ends in the order in which it began.
        """
        self._shards_before = state["shards"]
        if state["ranks"] != self.train_loader.share.ranks:
            return
        self._shards = state["later_shards"]
        if self._policy is None:
            return
        entered, self._levels = {level.cut: level for level in self._levels}, []
        for saved in state["levels"]:
            cut = saved[TEST]["cut"]
            if cut in entered:
                level = entered[cut]
                if self._levels:
                    for name, cache in level.caches.items():
                        cache.below = self._levels[-1].caches[name]
                self._levels.append(level)
            else:
                # It was there before this phase began, and gave nothing up.
                self._open(cut, epochs=MANY, notice=notice)
            for name, cache in self._levels[-1].caches.items():
                cache.load_state_dict(saved[name])
        for level, saved in zip(self._levels, state["levels"], strict=True):
            for name, cache in level.caches.items():
                if saved[name]["spent"]:
                    cache.release()

    @property
    def resident_bytes(self) -> int | None:
        """Bytes of memory, of the device or of this process, that the caches take; None without caches."""
        caches = self._caches()
        return sum(cache.resident_bytes for cache in caches) if caches else None

    @property
    def file_bytes(self) -> int | None:
        """Bytes of the disk that the caches take; None without caches."""
        caches = self._caches()
        return sum(cache.file_bytes for cache in caches) if caches else None

    def close(self) -> None:
        """Close the caches, which frees memory and disk."""
        for level in self._levels:
            level.close()
        self._levels, self._is_cached = [], False

    def _caches(self) -> list[Cache]:
        return [cache for level in self._levels for cache in level.caches.values()]


class _Followed:
    """Stands for the cache of images to train on that the first process of the pipeline has: it delivers labels."""

    def __init__(self, labels: ImageSource | LabelSource, epochs: int) -> None:
        self.settled_from = 0
        self.has_given_up = bool(why_no_rows(labels.loader, epochs))
        self._labels = labels

    @property
    def has_rows(self) -> bool:
        return not self.has_given_up

    def put(self, epoch: int, first: int = 0) -> Iterator[Hashable]:
        return self._labels.put(epoch, first, shards=self._labels.loader.share.ranks)

    def fetch(self) -> Batch:
        return self._labels.fetch()


class _Level(NamedTuple):
    """The caches at a cut: that of the images to train on, and those that are here, by whose images they keep."""

    cut: int
    train: Cache | _Followed
    caches: Mapping[str, Cache]

    def close(self) -> None:
        for cache in self.caches.values():
            cache.close()


def _epochs_settled(cut: int, phases: Sequence[Phase]) -> int:
    """Return how many epochs it takes until what lies before `cut` trains again."""
    return sum(phase.epochs for phase in takewhile(lambda phase: phase.start >= cut, phases))
