"""SIGTERM and SIGINT as requests: the first is granted at the next good moment, the second at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from keras_cifar.core.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """What was asked of this process.

    Attributes:
        requested: the signal that came and was not granted yet.
    """

    def __init__(self):
        self.requested: signal.Signals | None = None
        self._can_wait = False

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Takes the signals for the body, in the main thread; elsewhere there are none.

        Raises:
            StoppedError: a signal came outside of `deferred`.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """For the body a signal only sets `requested`, and it is the body's to end soon."""
        self._can_wait = True
        try:
            yield
        finally:
            self._can_wait = False
        if self.requested:
            raise self._error()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = signal.Signals(number)
        if not self._can_wait:
            raise self._error()

    def _error(self) -> StoppedError:
        number = self.requested
        return StoppedError(number, f"stopped by {number.name}; what was saved stays")
