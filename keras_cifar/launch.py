"""Trains with several worker processes on this machine, each with its share of GPUs and CPU threads.

python -m keras_cifar.launch --workers 2 -- --model resnet32 --data cifar10

What follows -- are flags of keras_cifar.train. Each line of a worker begins with its number; of a
progress bar only its last state is shown. When one worker fails the others are ended.
"""

import contextlib
import dataclasses
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import typing

from keras_cifar.core import cli, environment
from keras_cifar.core.config import TrainConfig
from keras_cifar.core.errors import UsageError, UserError
from keras_cifar.core.options import check, option
from keras_cifar.core.run_directory import default_run_dir
from keras_cifar.distributed.rendezvous import PORTS

GRACE = 10.0  # seconds that workers have to end after SIGTERM
OUTPUT_WAIT = 5.0  # seconds that the last output of ended workers has to be written

# What a worker's process runs before its command: from then on Linux kills it when the launcher
# dies, however it dies. Popen's preexec_fn could do the same but may deadlock beside threads.
TIED = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
if os.getppid() == int(sys.argv[1]):  # else the launcher died before the line above
    os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclasses.dataclass(frozen=True)
class LaunchOptions:
    """The command's flags."""

    workers: int = option(0, "how many processes to start, at least 1", "Workers")

    def __post_init__(self):
        check(self.workers > 0, f"--workers={self.workers} must be at least 1")


class EndedError(UserError):
    """A worker failed, or a signal came, before all workers were done."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def main(options: LaunchOptions, train_flags: list[str]) -> None:
    """Runs the command."""
    commands = train_commands(options.workers, train_flags)
    run_workers(commands, environment.shares(options.workers))


def train_commands(count: int, train_flags: list[str]) -> list[list[str]]:
    """The command line of each worker.

    Raises:
        UsageError: a flag that keras_cifar.train would refuse, or that the launcher sets itself.
    """
    config, rest = cli.parse(TrainConfig, train_flags)
    if rest or "--" in train_flags:
        raise UsageError(f"unexpected argument {(rest or ['--'])[0]!r}; flags begin with --")
    for name in ("workers", "worker_index"):
        check(
            getattr(config.devices, name) is None,
            f"--{name} after -- is set by the launcher itself",
        )
    check(
        config.devices.strategy in ("auto", "multiworker"),
        f"--strategy={config.devices.strategy} after --: several workers need --strategy=multiworker",
    )
    # The default contains the time, and all must have the same.
    run_dir = config.output.run_dir or default_run_dir(config)
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(count))
    common = [sys.executable, "-u", "-m", "keras_cifar.train", *train_flags]
    common += [f"--run_dir={run_dir}", "--strategy=multiworker", f"--workers={addresses}"]
    return [[*common, f"--worker_index={index}"] for index in range(count)]


def free_ports(count: int) -> list[int]:
    """Different ports that nothing listens on; they are held until the last of them is found."""
    ports = []
    with contextlib.ExitStack() as stack:
        for port in random.sample(PORTS, len(PORTS)):
            if len(ports) == count:
                break
            holder = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):  # in use
                holder.bind(("", port))  # all interfaces, as TensorFlow will
                ports.append(port)
    return ports


def run_workers(
    commands: list[list[str]], environments: list[dict[str, str]], grace: float = GRACE
) -> None:
    """Runs the commands at the same time until all are done; ends them all when one fails.

    Call it from the main thread: that is where signals arrive, and the end of the thread that
    started a worker is what ends the worker.

    Raises:
        EndedError: the first worker that failed, or SIGINT or SIGTERM.
        OSError: the output cannot be written.
    """
    # Threads and signals put what ends the run, or None for a thread that is well done.
    events = queue.SimpleQueue()  # unlike Queue, signal handlers may put into it
    handlers = {
        signal.SIGINT: lambda *_: events.put(EndedError("interrupted", 130)),
        signal.SIGTERM: lambda *_: events.put(EndedError("terminated", 143)),
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    workers, waiting, copying, lock = [], [], [], threading.Lock()
    tie = [sys.executable, "-I", "-S", "-c", TIED, str(os.getpid())]
    try:
        for index, (command, env) in enumerate(zip(commands, environments, strict=True)):
            worker = subprocess.Popen(
                [*tie, *command],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                process_group=0,  # of its own: signalled as a whole, and not by the terminal
            )
            workers.append(worker)
            waiting.append(_thread(_wait, index, worker.pid, events))
            for pipe, target in ((worker.stdout, 1), (worker.stderr, 2)):
                copying.append(_thread(_copy, index, pipe, target, lock, events))
        for _ in waiting + copying:
            if problem := events.get():
                raise problem
    finally:
        _signal(workers, signal.SIGTERM)
        _join(waiting, grace)
        _signal(workers, signal.SIGKILL)
        for thread in waiting:
            thread.join()
        for worker in workers:
            worker.wait()
        _join(copying, OUTPUT_WAIT)
        for number, handler in before.items():
            signal.signal(number, handler)


def _thread(function: typing.Callable, *arguments) -> threading.Thread:
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread


def _join(threads: list[threading.Thread], seconds: float) -> None:
    """Waits until all threads have ended, or the time is over."""
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def _signal(workers: list[subprocess.Popen], number: int) -> None:
    """Signals the process groups. They exist until the worker has been reaped, dead or not."""
    for worker in workers:
        os.killpg(worker.pid, number)


def _wait(index: int, pid: int, events: queue.SimpleQueue) -> None:
    """Waits for the end of a worker and leaves it unreaped: its id must not be given to another."""
    end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    problem = None
    if end.si_code != os.CLD_EXITED:
        names = {number.value: number.name for number in signal.Signals}
        name = names.get(end.si_status, f"signal {end.si_status}")
        problem = EndedError(f"worker {index} was killed by {name}", 1)
    elif end.si_status:
        problem = EndedError(f"worker {index} failed with status {end.si_status}", end.si_status)
    events.put(problem)


def _copy(index: int, pipe: typing.BinaryIO, target: int, lock, events: queue.SimpleQueue) -> None:
    """Writes the lines of a worker's pipe to a file descriptor as they come."""
    with pipe:
        try:
            for line in _lines(pipe):
                text = b"[%d] %s\n" % (index, line)
                with lock:
                    while text:
                        text = text[os.write(target, text) :]
            events.put(None)
        except OSError as error:
            events.put(error)


def _lines(pipe: typing.BinaryIO) -> typing.Iterator[bytes]:
    rest = b""
    while chunk := pipe.read1(1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (_shown(line).rstrip(b"\r") for line in lines)
        rest = _shown(rest)
    if rest.strip():
        yield rest.rstrip(b"\r")


def _shown(line: bytes) -> bytes:
    """What a terminal shows in the end of a line that is begun anew at each carriage return."""
    return line[line.rstrip(b"\r").rfind(b"\r") + 1 :]


if __name__ == "__main__":
    cli.run("launch", main, LaunchOptions, __doc__, "[-- TRAIN FLAGS]", tensorflow=False)
