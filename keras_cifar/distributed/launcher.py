"""Runs several worker processes on this machine: their output, their signals, their end."""

import contextlib
import io
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from keras_cifar.core.errors import UsageError, UserError
from keras_cifar.distributed.rendezvous import PORTS

GRACE_SECONDS = 10.0  # that workers have to end after SIGTERM
OUTPUT_SECONDS = 5.0  # within which the last output of ended workers must have been written

# Runs before a worker's command: Linux then kills the worker when the launcher dies, however it dies.
# Popen's preexec_fn could do the same, but may deadlock in a process with threads.
DIE_WITH_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
if os.getppid() == int(sys.argv[1]):  # else the launcher died before the line above
    os.execv(sys.argv[2], sys.argv[2:])
"""


class EndedError(UserError):
    """A worker failed, or a signal came, before all workers had finished."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def free_ports(count: int) -> list[int]:
    """Different ports that nothing listens on; all stay bound until the last one is found."""
    ports: list[int] = []
    with contextlib.ExitStack() as stack:
        for port in random.sample(PORTS, len(PORTS)):
            if len(ports) == count:
                break
            holder = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):  # in use
                holder.bind(("", port))  # on all interfaces, as TensorFlow will
                ports.append(port)
    return ports


def run_with_restarts(
    commands: Callable[[], list[list[str]]], environments: list[dict[str, str]], restarts: int
) -> None:
    """Runs the workers until all have succeeded; starts all again, so many times, when one fails.

    Wrong usage and signals that end a run are not retried: they would end it again.

    Args:
        commands: makes the commands of a start, each time with ports that are free.

    Raises:
        EndedError: the last failure.
    """
    for number in range(restarts + 1):
        try:
            return run_workers(commands(), environments)
        except EndedError as error:
            if number == restarts or error.status == UsageError.status or error.status > 128:
                raise
            count = f"restart {number + 1} of at most {restarts}"
            print(f"{error}; starting all workers again ({count})", file=sys.stderr, flush=True)


def run_workers(
    commands: list[list[str]], environments: list[dict[str, str]], grace: float = GRACE_SECONDS
) -> None:
    """Runs the commands in parallel until all have succeeded; terminates all when one fails.

    Call it from the main thread: only that one receives signals, and Linux kills a worker when the
    thread that started it ends.

    Raises:
        EndedError: the first worker that failed, or SIGINT or SIGTERM.
        OSError: the output cannot be written.
    """
    # Each thread puts None when it is done; what goes wrong, and signals, put the error to raise.
    events: queue.SimpleQueue = queue.SimpleQueue()  # unlike Queue, signal handlers may put into it
    handlers = {
        signal.SIGINT: lambda *_: events.put(EndedError("interrupted", 130)),
        signal.SIGTERM: lambda *_: events.put(EndedError("terminated", 143)),
    }
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    workers, waiting, copying, lock = [], [], [], threading.Lock()
    prefix = [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid())]
    try:
        for index, (command, env) in enumerate(zip(commands, environments, strict=True)):
            worker = subprocess.Popen(
                [*prefix, *command],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                process_group=0,  # its own: signalled as a whole, and not by the terminal
            )
            workers.append(worker)
            waiting.append(_start(_wait, index, worker.pid, events))
            for pipe, target in ((worker.stdout, 1), (worker.stderr, 2)):
                copying.append(_start(_copy, index, pipe, target, lock, events))
        for _ in waiting + copying:
            if error := events.get():
                raise error
    finally:
        _signal(workers, signal.SIGTERM)
        _join(waiting, grace)
        _signal(workers, signal.SIGKILL)
        for thread in waiting:
            thread.join()
        for worker in workers:
            worker.wait()
        _join(copying, OUTPUT_SECONDS)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _start(function: Callable, *arguments) -> threading.Thread:
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread


def _join(threads: list[threading.Thread], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def _signal(workers: list[subprocess.Popen], number: int) -> None:
    """Signals the process groups, which exist until their workers have been reaped."""
    for worker in workers:
        os.killpg(worker.pid, number)


def _wait(index: int, pid: int, events: queue.SimpleQueue) -> None:
    """Waits for the end of a worker but does not reap it, so that its id is not given away."""
    end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert end is not None  # without WNOHANG
    error = None
    if end.si_code != os.CLD_EXITED:
        names = {number.value: number.name for number in signal.Signals}
        name = names.get(end.si_status, f"signal {end.si_status}")
        error = EndedError(f"worker {index} was killed by {name}", 1)
    elif end.si_status:
        error = EndedError(f"worker {index} failed with status {end.si_status}", end.si_status)
    events.put(error)


def _copy(
    index: int, pipe: io.BufferedReader, target: int, lock, events: queue.SimpleQueue
) -> None:
    """Writes each line of a worker's pipe to a file descriptor as soon as it is complete.

    Of a line with carriage returns only what a terminal shows: the text after the last one.
    """
    with pipe:
        try:
            for line in pipe:
                shown = line.rstrip(b"\r\n").rpartition(b"\r")[2]
                if not shown.strip() and not line.endswith(b"\n"):
                    continue  # a progress bar that was erased
                text = b"[%d] %s\n" % (index, shown)
                with lock:
                    while text:
                        text = text[os.write(target, text) :]
            events.put(None)
        except OSError as error:
            events.put(error)
