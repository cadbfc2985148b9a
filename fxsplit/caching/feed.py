"""The batches of a run, from a cache of the settled prefix where there is one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

from fxsplit.caching.cache import Cache, CachePolicy
from fxsplit.data.batch import Batch
from fxsplit.data.loader import ImageSource, Loader
from fxsplit.data.source import Source, batches_of
from fxsplit.errors import FxsplitError
from fxsplit.execute.forward import Forward


class Feed:
    """Delivers the batches to train on, as a `Source`, and those to test on; opens and closes caches between phases.

    One epoch can be gone through at a time.

    Args:
        forward: runs the settled partitions.
        train_loader: the images to train on.
        test_loader: the images to test on.
        policy: how to cache what the settled partitions deliver; None to compute it for each batch.
        held_out_loader: the training images that are held out, if there are any.

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
    ) -> None:
        if not train_loader.steps_per_epoch:
            raise FxsplitError("there is no batch to train on: BatchNorm needs at least 2 training images")
        self.train_loader, self.test_loader, self._held_out_loader = train_loader, test_loader, held_out_loader
        self._train_images, self._test_images = ImageSource(train_loader), ImageSource(test_loader)
        self._forward, self._policy = forward, policy
        self._cached = False
        self._train_cache: Cache | None = None
        self._test_cache: Cache | None = None
        self._epochs = 0
        # For how many processes images are divided for good; and in an epoch that began with another number of them.
        self._shards = self._shards_now = 1
        self._shards_before: int | None = None

    def enter(self, cut: int, *, epochs: int, notice: Callable[[str], None]) -> None:
        """Keep the caches if they are at `cut`, else open new ones there, where the cut stays for `epochs`.

        `notice` is called with the reason if a cache keeps nothing.
        """
        if self._train_cache is not None and self._train_cache.cut == cut:
            return
        self.close()
        self._epochs = epochs
        if self._policy is not None and cut:
            self._train_cache = self._policy.open(self._forward, self._train_images, epochs=epochs, notice=notice)
            self._test_cache = self._policy.open(
                self._forward,
                self._test_images,
                epochs=epochs,
                notice=notice,
                beside=self._train_cache,
                exact=True,
            )
        ranks, before = self.train_loader.share.ranks, self._shards
        self._shards = ranks if self._train_cache is not None and self._train_cache.is_open else 1
        if self._shards > before:
            notice(f"from here on each of the {ranks} processes has images of its own, so that it can keep their rows")

    def put(self, epoch: int, first: int = 0) -> Iterator[Hashable]:
        """Go from batch to batch of a training epoch, at the cut or as images; those before `first` are left out."""
        self._shards_now = self._shards_before if first and self._shards_before else self._shards
        self._shards_before = None
        self._cached = self._train_cache is not None and self._shards_now == self.train_loader.share.ranks
        if self._train_cache is not None and self._cached:
            return self._train_cache.put(epoch, first)
        # Stored views replace the augmentation of the epoch once anything is settled, whether or not rows are kept.
        settled = self._forward.executor.window[0] > 0
        view = self.train_loader.view(epoch) if settled else None
        return self._train_images.put(epoch, first, view=view, shards=self._shards_now)

    def fetch(self) -> Batch:
        """Return the training batch that was put last."""
        source = self._train_cache if self._train_cache is not None and self._cached else self._train_images
        return source.fetch()

    @property
    def settles(self) -> bool:
        """Whether the settled partitions run for the training batch that was put last: it is not read from a cache."""
        return self._train_cache is None or not self._train_cache.reads

    def training(self, epoch: int) -> Iterator[Batch]:
        """Give the batches of a training epoch."""
        return batches_of(self, epoch)

    def held_out(self) -> Iterator[Batch]:
        """Give the batches of the images that are held out."""
        return iter(()) if self._held_out_loader is None else self._held_out_loader.batches(0)

    @property
    def test_source(self) -> Source:
        """What delivers the test images, all in epoch 0: the cache, where training images come from one."""
        cached = self._test_cache is not None and self._train_cache is not None and self._train_cache.has_rows
        return self._test_cache if self._test_cache is not None and cached else self._test_images

    def state_dict(self) -> dict[str, Any]:
        """Return for how many epochs the caches were opened, and what is in them."""
        caches = {"train": self._train_cache, "test": self._test_cache}
        found = {name: None if cache is None else cache.state_dict() for name, cache in caches.items()}
        divided = {"ranks": self.train_loader.share.ranks, "shards": self._shards_now}
        return {"epochs": self._epochs, **divided, **found}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Fill the caches again, as `state_dict` has told of them; the same phase must have been entered.

        With another number of processes than before, images belong to others: rows are kept as epochs go on, and the
        present epoch ends in the order in which it began.
        """
        if state.get("ranks", 1) != self.train_loader.share.ranks:
            self._shards_before = state["shards"]
            return
        for cache, saved in ((self._train_cache, state["train"]), (self._test_cache, state["test"])):
            if cache is not None and saved is not None:
                cache.load_state_dict(saved)

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
        for cache in self._caches():
            cache.close()
        self._train_cache = self._test_cache = None

    def _caches(self) -> list[Cache]:
        return [cache for cache in (self._train_cache, self._test_cache) if cache is not None]
