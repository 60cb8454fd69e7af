"""Contenders in processes of their own that take turns, so that all share the same minutes."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from keras_cifar.benchmarking.options import BenchmarkOptions
from keras_cifar.core import environment

WORKERS = pathlib.Path(__file__).parent
WARM_UP = 3  # calls before the first that is timed


class Worker:
    """A contender: a script of this folder in a process of its own, or in several."""

    def __init__(
        self,
        script: str,
        settings: dict,
        variables: dict[str, str | None],
        followers: Sequence[dict] = (),
    ):
        """Starts the process and waits until it is ready.

        "ours" gets the switches of `core.environment`, the peers do not. `variables` are of the
        process's environment, to set or (None) to remove. Each of `followers` are the settings of a
        further process, which works together with the first.
        """
        if script == "ours":
            env = environment.package_environment()
            command = ["-m", "keras_cifar.benchmarking.ours"]
        else:
            env = {k: v for k, v in os.environ.items() if k not in environment.changed}
            command = [str(WORKERS / f"{script}.py")]
        env = {k: v for k, v in (env | variables).items() if v is not None}
        command = [sys.executable, *command]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  `close` closes it.
        start = functools.partial(subprocess.Popen, stderr=self._errors, text=True, env=env)
        silent = {"stdin": subprocess.DEVNULL, "stdout": self._errors}
        self._followers = [
            start([*command, json.dumps(settings | other | {"follows": True})], **silent)
            for other in followers
        ]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = start([*command, json.dumps(settings)], **pipes)
        self.turns = []
        self.error = self._read().get("error")

    def turn(self) -> dict:
        """Lets the process work for one turn and returns what it reports."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        report = self._read()
        self.error = report.get("error")
        if not self.error:
            self.turns.append(report)
        return report

    def close(self) -> None:
        with self._errors, self._process:
            for process in (self._process, *self._followers):
                process.kill()
            for process in self._followers:
                process.wait()

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return {"error": f"failed: {lines[-1] if lines else 'without a message'}"}

    def measurements(self) -> dict[str, float]:
        """Median, lowest and highest rate of the turns, and the peak memory in bytes."""
        peak = max(turn["peak_memory"] for turn in self.turns)
        return spread([turn["rate"] for turn in self.turns]) | {"peak_memory": peak}


class Contest(contextlib.ExitStack):
    """The contenders of one table."""

    def __init__(self, options: BenchmarkOptions):
        super().__init__()
        self.options, self.workers = options, {}

    def add(
        self,
        name: str,
        script: str,
        variables: dict | None = None,
        followers: Sequence[dict] = (),
        **settings,
    ) -> Worker:
        """Starts a contender; one that cannot start is reported and left out."""
        show(f"starting {name}")
        common = dataclasses.asdict(self.options) | {"warm_up": WARM_UP}
        worker = self.workers[name] = Worker(script, common | settings, variables or {}, followers)
        self.callback(worker.close)
        if worker.error:
            show(f"{name} {worker.error}\n")
        return worker

    def kernel_shares(self, **settings) -> dict[str, float]:
        """The share of each kind of kernel in the time of all, in what "ours" does."""
        return self.add("profile", "ours", what="profile", **settings).turn().get("shares", {})

    def take_turns(self) -> dict[str, dict]:
        """Runs all rounds and returns the measurements of each contender that did not fail."""
        for number in range(self.options.rounds):
            for name, worker in self.workers.items():
                if not worker.error:
                    show(f"round {number + 1} of {self.options.rounds}: {name}")
                    worker.turn()
                    if worker.error:
                        show(f"{name} {worker.error}\n")
        show("")
        return {name: w.measurements() for name, w in self.workers.items() if not w.error}


def run_python(*arguments: str) -> None:
    """Runs Python in a new process; raises RuntimeError with its stderr if that fails."""
    command = [sys.executable, *arguments]
    env = environment.package_environment()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest of the rounds."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def columns(row: dict[str, float], digits: int = 0) -> str:
    """A row's `spread` as three columns of a table."""
    return "".join(f"{row[key]:>10,.{digits}f}" for key in ("median", "low", "high"))


def percentages(shares: dict[str, float]) -> str:
    """`Contest.kernel_shares` as text."""
    return ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())


def print_table(first: str, second: str, width: int, measurements: dict[str, dict]) -> None:
    """Prints a row for each contender; `first` and `second` head its name and its median."""
    print(f"{first:<{width}}{second:>10}{'low':>10}{'high':>10}{'peak memory':>14}")
    for name, row in measurements.items():
        print(f"{name:<{width}}{columns(row)}{row['peak_memory'] / 2**20:>10,.0f} MiB")


def show(progress: str) -> None:
    """Shows progress on one line of a terminal; elsewhere only what ends with a line break."""
    if sys.stderr.isatty():
        print(f"\r\033[K{progress}", end="", file=sys.stderr, flush=True)
    elif progress.endswith("\n"):
        print(progress, end="", file=sys.stderr, flush=True)
