"""SIGTERM and SIGINT: the first stops the command at the next safe point, the second exits at once."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from keras_cifar.core.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGINT)

# Seconds after which StoppedError is raised again, until the command ends: a library may have swallowed
# it, or the command may be cleaning up something that hangs.
AGAIN = 5.0
SOON = 0.01  # where it was swallowed for certain


class StopSignals:
    """Signals that ask this process to stop; `received` is the one that arrived, or None."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._is_deferred, self._was_raised, self._is_handled = False, False, False

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Makes signals in the body raise StoppedError wherever the main thread is.

        It is also raised after the body, if a library made another error of it or swallowed it. Does
        nothing in a body of its own, and outside of the main thread, which alone receives signals.
        """
        if self._is_handled or threading.current_thread() is not threading.main_thread():
            yield
            return
        self._was_raised, self._is_handled = False, True
        hook = sys.unraisablehook
        handlers = dict.fromkeys(SIGNALS, self._handle) | {signal.SIGALRM: self._raise}
        before = {number: signal.signal(number, handle) for number, handle in handlers.items()}
        sys.unraisablehook = lambda found: self._unraisable(found, hook)
        try:
            yield
        except Exception:
            if not self._was_raised:
                raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)
            sys.unraisablehook, self._is_handled = hook, False
            error = self._error() if self._was_raised else None
            self.received = None  # A later body starts without it.
        if error:
            raise error

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """In the body a signal only sets `received`; StoppedError is raised after the body.

        The body must look at `received` and end soon.
        """
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        if self.received:
            raise self._error()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = signal.Signals(number)
        if not self._is_deferred:
            self._raise()

    def _raise(self, *_) -> None:
        self._was_raised = True
        signal.setitimer(signal.ITIMER_REAL, AGAIN)
        raise self._error()

    def _unraisable(self, found, hook) -> None:
        """Python cannot raise in finalizers and some callbacks; it calls this with the error.

        That may be another, such as SystemError where TensorFlow's C++ was importing a module.
        """
        if self._was_raised:
            signal.setitimer(signal.ITIMER_REAL, SOON)
        else:
            hook(found)

    def _error(self) -> StoppedError:
        assert self.received is not None
        return StoppedError(
            self.received, f"stopped by {self.received.name}; saved files are intact"
        )


# Those of this process, which has one handler of each signal.
STOP = StopSignals()
