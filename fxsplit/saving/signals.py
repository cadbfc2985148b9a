"""SIGINT and SIGTERM while a run goes on: held back until what is done can be saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from time import monotonic
from types import FrameType, TracebackType
from typing import Any, NoReturn

from fxsplit.errors import Terminated

HELD = (signal.SIGINT, signal.SIGTERM)
# torch raises an error from here when a data worker ends, which SIGTERM to a whole process group makes them do first.
SIGCHLD = getattr(signal, "SIGCHLD", None)

# So soon after another one, a signal is not somebody's wish.
ECHO_SECONDS = 0.5

Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None


class Signals:
    """Holds signals back while it is entered, in the main thread.

        first     is remembered, and `pending` from then on: the run ends where its state is whole
        second    ends it at once, by an exception; while something is saved, saving goes on
        third     ends the process, as the system does by itself

    One that comes within ECHO_SECONDS of the last that counted does not count: shells and schedulers send a signal to a
    process and to its group, or several times. A signal that is ignored stays ignored.
    """

    def __init__(self) -> None:
        self._count = 0
        self._counted = -inf
        self._last: int | None = None
        self._saving = 0
        self._before: dict[int, Handler] = {}

    @property
    def pending(self) -> bool:
        """Whether a signal has asked the run to end."""
        return self._last is not None

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in HELD:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._last = number
        if monotonic() - self._counted < ECHO_SECONDS:
            return
        self._count, self._counted = self._count + 1, monotonic()
        if self._count > 2:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self._count > 1 and not self._saving:
            self.end()

    def end(self, message: str = "") -> NoReturn:
        """Raise the exception of the signal that came last, with a message; what follows is the saving."""
        self._saving += 1
        raise Terminated(message) if self._last == signal.SIGTERM else KeyboardInterrupt(message)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Inside, neither a signal nor the end of a child process raises an exception."""
        self._saving += 1
        is_main = threading.current_thread() is threading.main_thread()
        children = signal.signal(SIGCHLD, signal.SIG_DFL) if SIGCHLD is not None and is_main else None
        try:
            yield
        finally:
            if children is not None and SIGCHLD is not None:
                signal.signal(SIGCHLD, children)
            self._saving -= 1
