"""SIGTERM and SIGINT: the first stops the run at the next safe point, the second exits at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from keras_cifar.core.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Signals that ask this process to stop; `received` is the one that arrived, or None."""

    def __init__(self):
        self.received: signal.Signals | None = None
        self._deferred = False

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Makes signals in the body raise StoppedError; does nothing outside of the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """In the body a signal only sets `received`; StoppedError is raised after the body.

        The body must look at `received` and end soon.
        """
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.received:
            raise self._error()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = signal.Signals(number)
        if not self._deferred:
            raise self._error()

    def _error(self) -> StoppedError:
        name = self.received.name
        return StoppedError(self.received, f"stopped by {name}; saved files are intact")
