"""Functions that are recorded after a few calls and replayed from then on, or that stay as they are and say why."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, Generic, TypeVar

import torch

from fxsplit.cuda.recorder import Recorder, Recording
from fxsplit.cuda.watch import Watch

T = TypeVar("T")

# Calls before the recording: kernels are chosen, and memory, gradients and optimizer states are made.
WARM_UP = 3


class Replayed(Generic[T]):
    """Calls a function WARM_UP times, then records it and replays the recording.

    The last of these calls is watched. Where a replay would do something else, or recording fails, the function is
    called every time.

    Args:
        function: does the same work on the same tensors in each call; only their numbers differ.
        recorder: of the device.
        device: where the function computes.
        held: what it uses, to be watched: modules, optimizers, other objects.
        refused: is called once with the reason, the end of a sentence, if the function cannot be recorded.
    """

    def __init__(
        self,
        function: Callable[[], T],
        recorder: Recorder,
        device: torch.device,
        *,
        held: Iterable[object] = (),
        refused: Callable[[str], None],
    ) -> None:
        self._function, self._recorder, self._device = function, recorder, device
        self._held, self._refused = tuple(held), refused
        self._calls = 0
        self._is_refused = False
        self._recording: Recording[T] | None = None

    def __call__(self) -> T:
        """Do the function's work, and return what it returns; tensors in it are written again by the next replay."""
        if self._recording is not None and self._recording.is_gone:
            self._recording, self._calls = None, 0
        if self._recording is None and not self._is_refused:
            if self._calls < WARM_UP:
                return self._warm_up()
            self._record()
        elif self._recording is not None:
            self._recording.replay()
        return self._function() if self._recording is None else self._recording.result

    def _warm_up(self) -> T:
        self._calls += 1
        if self._calls < WARM_UP:
            return self._recorder.warm_up(self._function)
        with Watch(self._held, self._device) as watch:
            result = self._recorder.warm_up(self._function)
        if watch.hindrance is not None:
            self._refuse(watch.hindrance)
        return result

    def _record(self) -> None:
        """Record the function, and do its work by a first replay, for which memory may be missing, too."""
        try:
            recording = self._recorder.record(self._function)
            recording.replay()
        except Exception as error:
            reason = in_words(error)
        else:
            self._recording = recording
            return
        # Not inside `except`: there the traceback still holds the tensors of the failed recording.
        self._refuse(reason)

    def _refuse(self, reason: str) -> None:
        self._is_refused = True
        self._refused(reason)


def in_words(error: Exception) -> str:
    """Name an error and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


class Recordings:
    """Records the steps of a run: one recording of each kind at a time; all are gone before another of a kind is made.

    Args:
        recorder: of the device.
        device: where steps compute.
        held: what all steps use, as for `Replayed`.
        notice: is called with a sentence when steps cannot be recorded; once for each reason.
    """

    def __init__(
        self,
        recorder: Recorder,
        device: torch.device,
        *,
        held: Iterable[object] = (),
        notice: Callable[[str], None],
    ) -> None:
        self.recorder, self.device = recorder, device
        self._held, self._notice = tuple(held), notice
        self._reasons: set[str] = set()
        self._is_given_up = False
        self._by_kind: dict[str, tuple[Hashable, Replayed[Any]]] = {}

    def forget(self) -> None:
        """Drop all recordings: the next steps run on other modules, tensors or numbers."""
        self._by_kind.clear()

    def make_room(self) -> None:
        """Drop the recordings where memory does not hold the same work beside them."""
        if self._by_kind and not self.recorder.has_room():
            self.forget()

    def run(self, kind: str, key: Hashable, function: Callable[[], T], *, held: Iterable[object] = ()) -> T:
        """Run a step, or replay the recording of an earlier one of its kind with an equal key.

        Args:
            kind: such as "train" or "test".
            key: says what the step does and on which tensors; None runs it as it is, beside the recordings.
            function: the step.
            held: what it uses besides.
        """
        if key is None:
            self.make_room()
        if key is None or self._is_given_up:
            return function()
        if kind in self._by_kind and self._by_kind[kind][0] != key:
            # All of them, since their memory, which the next steps need, is that of all.
            self.forget()
        if kind not in self._by_kind:
            all_held = (*self._held, *held)
            replayed = Replayed(function, self.recorder, self.device, held=all_held, refused=self.refuse)
            self._by_kind[kind] = key, replayed
        result: T = self._by_kind[kind][1]()
        return result

    def give_up(self, reason: str) -> None:
        """Run all further steps as they are, and say why."""
        self.forget()
        self._is_given_up = True
        self.refuse(reason)

    def refuse(self, reason: str) -> None:
        """Say that steps run without a recording, and why, unless it was said before."""
        if reason not in self._reasons:
            self._reasons.add(reason)
            self._notice(f"steps run eagerly where they cannot be recorded as a CUDA graph: {reason}")
