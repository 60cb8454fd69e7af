"""One measurement that lives in a process of its own and works when it is its turn.

The command starts it with its settings as JSON, waits for a line "ready", and then asks for one turn
after another, so that what is compared is measured in the same minutes. Standard library only.
"""

import json
import os
import pathlib
import resource
import sys
import time
from collections.abc import Callable


class Turns:
    """The worker's side: `settings`, then `wait` and `report` for each turn."""

    def __init__(self):
        self.settings = json.loads(sys.argv[1])
        # What libraries print must not mix with what is reported.
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._started = False

    def wait(self) -> None:
        """Returns when it is this worker's turn; the process ends when there are no more."""
        if not self._started:
            self._started = True
            self._send({"ready": True})
        if not sys.stdin.readline():
            os._exit(0)  # Nothing is worth cleaning up, and threads may still be at work.

    def report(self, rate: float, **more) -> None:
        """Ends a turn with a rate a second and other figures."""
        self._send({"rate": rate, "peak_memory": peak_memory()} | more)

    def repeat(self, once: Callable[[], None], amount: float) -> None:
        """Reports the rate of `once`, which does `amount` of work, in turn after turn."""
        for _ in range(self.settings["warm_up"]):
            once()
        while True:
            self.wait()
            done, start = 0, time.perf_counter()
            while (seconds := time.perf_counter() - start) < self.settings["seconds"] or not done:
                once()
                done += 1
            self.report(done * amount / seconds)

    def fail(self, reason: str) -> None:
        """Says why this measurement cannot be had, and ends the process."""
        self._send({"error": reason})
        sys.exit(0)

    def _send(self, message: dict) -> None:
        self._out.write(json.dumps(message) + "\n")


def peak_memory() -> int:
    """The most bytes of memory that this process has held."""
    try:
        status = pathlib.Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        # Elsewhere than on Linux. (There, this would count what the parent held when it forked.)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
