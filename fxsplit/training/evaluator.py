"""Tests a model between the steps of its training, on test images and on training images that are held out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from fxsplit.caching.feed import Feed
from fxsplit.cuda.replay import Recordings
from fxsplit.distribute.processes import ALONE, Processes
from fxsplit.execute.forward import Forward
from fxsplit.training.accuracy import Accuracy, Confusion, Score, Snapshots, first_choices
from fxsplit.training.regularisers.endings import WeightEma
from fxsplit.training.telemetry import Work


def no_pause() -> None:
    """Go on."""


class Evaluator:
    """Tests a model, with averaged weights where there are any.

    Args:
        forward: runs batches through the executor.
        feed: gives the batches to test on.
        ema: averages weights; None for the weights as they are.
        snapshots: keeps what the network says at the end of each phase; None for no such ensemble.
        work: counts the multiply-adds for held-out images, which are a part of training; None counts none.
        recordings: records the test of a batch and replays it; None runs each eagerly.
        processes: those that test the model together, each on its share of the images.
    """

    def __init__(
        self,
        forward: Forward,
        feed: Feed,
        *,
        ema: WeightEma | None = None,
        snapshots: Snapshots | None = None,
        work: Work | None = None,
        recordings: Recordings | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self._forward, self._feed, self._ema = forward, feed, ema
        self._snapshots, self._work, self._recordings = snapshots, work, recordings
        self._accuracy = Accuracy(forward.device, processes)
        # Of the last test.
        self.confusion = Confusion(processes)

    @torch.no_grad()
    def score(
        self, *, pause: Callable[[], None] = no_pause, predictions: list[tuple[Tensor, Tensor]] | None = None
    ) -> Score:
        """Return the score on the test images.

        The loss is cross-entropy without label smoothing.

        Args:
            pause: is called after each batch, with the model as it trains.
            predictions: gets the class probabilities (B, classes) and labels (B,) of each batch.
        """
        if self._recordings is not None:
            self._recordings.make_room()
        self._forward.executor.eval()
        source, accuracy, recordings = self._feed.test_source, self._accuracy, self._recordings
        accuracy.reset()
        self.confusion.reset()

        def test() -> tuple[Tensor, Tensor, int]:
            batch = source.fetch()
            with self._forward.autocast():
                logits = self._forward.logits(batch)
                if batch.counted:
                    accuracy.update(F.cross_entropy(logits, batch.labels), logits, batch.labels)
            return logits, batch.labels, batch.counted

        for key in source.put(0):
            with self._averaged():
                logits, labels, counted = test() if recordings is None else recordings.run("test", key, test)
            accuracy.count(counted)
            if counted:
                self.confusion.add(logits, labels)
            if predictions is not None:
                # A replay writes into the same tensors again.
                predictions.append((logits.float().softmax(dim=1), labels.clone()))
            pause()
        return accuracy.read()

    def score_of_snapshot(self, phase: int, *, pause: Callable[[], None] = no_pause) -> tuple[Score, float | None]:
        """Return the score at the end of a phase and, in per cent, the accuracy of the ensemble of snapshots so far."""
        if self._snapshots is None:
            return self.score(pause=pause), None
        predictions: list[tuple[Tensor, Tensor]] = []
        score = self.score(pause=pause, predictions=predictions)
        probabilities, labels = (torch.cat(parts) for parts in zip(*predictions, strict=True))
        self._snapshots.keep(phase, probabilities)
        return score, self._snapshots.top1_pct(labels)

    @torch.no_grad()
    def held_out(self) -> Tensor:
        """Return which of the held-out images are right: bool (N,), on the CPU."""
        executor = self._forward.executor
        executor.eval()
        right = []
        for batch, settled_from in self._feed.held_out():
            if self._work is not None:
                self._work.forward(len(batch), start=settled_from, stop=len(executor.partitions))
            with self._averaged(), self._forward.autocast():
                right.append(first_choices(self._forward.logits(batch)) == batch.labels)
        return torch.cat(right).cpu()

    def _averaged(self) -> AbstractContextManager[None]:
        """Make the context in which the model has averaged weights, where there are any."""
        return nullcontext() if self._ema is None else self._ema.applied()
