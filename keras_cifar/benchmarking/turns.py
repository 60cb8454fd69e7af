"""The side of the contest that runs in a contender's process. Standard library only.

`contest.Worker` starts the process with its settings as JSON, waits for "ready", and then asks for one
turn after another.
"""

import json
import os
import pathlib
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
        # A worker or replica of a contender in several processes works whenever that one does.
        self._follows = self.settings.get("follows", False)

    def wait(self) -> None:
        """Returns when it is this worker's turn; ends the process when there are no more turns."""
        if self._follows:
            return
        if not self._started:
            self._started = True
            self._send({"ready": True})
        if not sys.stdin.readline():
            os._exit(0)  # Nothing needs to be cleaned up, and threads may still be at work.

    def report(self, rate: float, **more) -> None:
        """Ends a turn with a rate a second, the process's peak memory in bytes, and `more`."""
        if self._follows:
            return
        status = pathlib.Path("/proc/self/status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
        self._send({"rate": rate, "peak_memory": peak} | more)

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

    def _send(self, message: dict) -> None:
        self._out.write(json.dumps(message) + "\n")
