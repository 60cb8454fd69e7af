"""Rendezvous of the workers of a run: they join, compare values, and learn why one of them ends.

TensorFlow's MultiWorkerMirroredStrategy waits silently for workers that never start. Therefore they
meet here first: worker 0, the chief, listens on its own port until all others have connected to it;
TensorFlow uses the same port afterwards. A message is a line of JSON, `[kind, content]`:

    join, accepted    a worker introduces itself; the chief's answer
    ready             all workers have joined
    value, values     what a worker contributes to `all_gather`; the contributions of all
    heartbeat         the sender is alive
    failed            why the rendezvous ends: the line that every worker shows

Like TensorFlow's own gRPC this trusts the network: whoever reaches the chief's port while a run
starts can take part in it or end it. Run it where only the workers reach each other.
"""

import contextlib
import errno
import hashlib
import json
import os
import queue
import socket
import threading
import time
import typing
from collections.abc import Sequence

import keras_cifar
from keras_cifar.core.errors import UsageError, UserError, reason

# For workers without a given port: below those that Linux gives to outgoing connections.
PORTS = range(12_000, 32_000)
MAX_MESSAGE_BYTES = 2**28
# What a client may send, and how long it may be silent, until the chief has accepted it.
MAX_JOIN_BYTES, JOIN_SECONDS = 4096, 10.0
CONNECT_SECONDS, RETRY_SECONDS, ACCEPT_SECONDS = 5.0, 0.3, 0.05
MAX_HEARTBEAT_SECONDS = 5.0
CLOSE_SECONDS = 5.0  # how long `close` waits for the others to close too
SETTLE_SECONDS = 1.0  # how long `failure` waits for a message that may be on its way


class Rendezvous:
    """Connects the workers of a run through the first of them, the chief, until training starts.

    Args:
        addresses: "host:port" of every worker, the same list in all of them.
        index: the position of this process in the list.
        startup_timeout: seconds to wait for all workers to start.
        peer_timeout: seconds without a message after which a worker counts as lost.

    Raises:
        UserError: a worker has not started or belongs to another run, or a port is in use.
    """

    def __init__(
        self, addresses: Sequence[str], index: int, startup_timeout: float, peer_timeout: float
    ):
        self.addresses, self.index = list(addresses), index
        self._startup_timeout, self._peer_timeout = startup_timeout, peer_timeout
        self._chief_address = parse_address(self.addresses[0])
        self._changed = threading.Condition()  # Whoever holds it may change the state, and send.
        # To all others at the chief, to the chief at the others; when each last sent something.
        self._connections: dict[int, socket.socket] = {}
        self._heard: dict[int, float] = {}
        self._values: dict[int, typing.Any] = {}
        self._results: queue.SimpleQueue[tuple] = queue.SimpleQueue()  # of (content, failure)
        self._line: str | None = None
        self._ended = threading.Event()
        deadline = time.monotonic() + startup_timeout
        try:
            _start_thread(self._watch)
            if index == 0:
                self._accept_workers(deadline)
            else:
                self._join_chief(deadline)
            self._next_result()
        except BaseException:
            self.close()
            raise

    def all_gather(self, value) -> list:
        """Waits until every worker has given a JSON value; returns all of them in worker order.

        Raises:
            UserError: a worker ended, or was silent for too long.
        """
        value = json.loads(json.dumps(value))  # as the others will receive it
        if self.index == 0:
            self._collect(0, value)
        else:
            self._send_to_all("value", value)
        return self._next_result()

    def failure(self) -> str | None:
        """Why the rendezvous failed, for a caller that waited elsewhere; None if it did not."""
        self._ended.wait(SETTLE_SECONDS)
        return self._line

    def abort(self, why: str) -> None:
        """Tells the others why this worker ends, and closes."""
        self._end(f"{self._name(self.index)} ended: {why}")
        self.close()

    def close(self) -> None:
        """Leaves the rendezvous.

        Waits for the others: to close first would discard messages that are still on their way.
        """
        self._end()
        with self._changed:
            self._changed.wait_for(lambda: not self._connections, CLOSE_SECONDS)
            self._shutdown(socket.SHUT_RDWR)

    # ---- Joining

    def _accept_workers(self, deadline: float) -> None:
        with listen(self.addresses[0], 0) as listener:
            listener.settimeout(ACCEPT_SECONDS)
            while self._missing() and not self._ended.is_set():
                if time.monotonic() > deadline:
                    self._end(self._not_started(self._missing()))
                with contextlib.suppress(OSError):
                    connection, (host, *_) = listener.accept()
                    _start_thread(self._admit, connection, host.removeprefix("::ffff:"))
        self._send_to_all("ready")
        self._results.put((None, None))

    def _admit(self, connection: socket.socket, host: str) -> None:
        """Accepts a client that joins as a worker of this run, and drops any other."""
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            file = stack.enter_context(stack.enter_context(connection).makefile("rb"))
            connection.settimeout(JOIN_SECONDS)
            kind, hello = receive(file, MAX_JOIN_BYTES)
            if kind != "join" or not isinstance(hello, dict):
                return
            with self._changed:
                problem = self._line or self._problem(hello, host)
                connection.sendall(encode("failed" if problem else "accepted", problem))
                if problem:
                    return self._end(problem)
                self._add(hello["worker"], connection)
            self._read(hello["worker"], file, stack.pop_all())

    def _problem(self, hello: dict, host: str) -> str | None:
        own, worker = self._hello(), hello.get("worker")
        who = f"worker {worker} at {host}"
        if hello.get("version") != own["version"]:
            versions = f"{hello.get('version')}, worker 0 runs {own['version']}"
            return f"{who} runs keras_cifar {versions}; install the same version on all"
        if hello.get("workers") != own["workers"]:
            return f"{who} was started with other workers than worker 0; give all the same list"
        if worker not in self._missing():
            return f"{who} was started twice; give each worker its own index"
        return hello.get("error")

    def _hello(self, error: str | None = None) -> dict:
        """How a worker introduces itself; `error` is why it cannot take part."""
        workers = hashlib.sha256(json.dumps(self.addresses).encode()).hexdigest()
        version = keras_cifar.__version__
        return {"worker": self.index, "version": version, "workers": workers, "error": error}

    def _join_chief(self, deadline: float) -> None:
        error = None
        try:
            listen(self.addresses[self.index], self.index).close()  # TensorFlow will listen there.
        except UserError as in_use:
            error = str(in_use)  # The chief tells all workers.
            deadline = time.monotonic() + min(CONNECT_SECONDS, self._startup_timeout)
        while True:
            try:
                return self._connect(self._hello(error))
            except (OSError, UnicodeError) as problem:  # The chief's name may not be known yet.
                if time.monotonic() + RETRY_SECONDS > deadline:
                    line = error or self._not_started([0], f" ({reason(problem)})")
                    raise UserError(line) from None
                time.sleep(RETRY_SECONDS)

    def _connect(self, hello: dict) -> None:
        with contextlib.ExitStack() as stack:
            connection = socket.create_connection(self._chief_address, CONNECT_SECONDS)
            file = stack.enter_context(stack.enter_context(connection).makefile("rb"))
            connection.settimeout(self._peer_timeout)
            connection.sendall(encode("join", hello))
            kind, content = receive(file, MAX_JOIN_BYTES)
            if kind == "failed":
                raise UserError(content)
            if kind != "accepted":
                raise ConnectionError("another program answers there")
            self._add(0, connection)
            _start_thread(self._read, 0, file, stack.pop_all())

    def _add(self, worker: int, connection: socket.socket) -> None:
        connection.settimeout(None)
        # To send to a worker that is stopped must not block forever.
        milliseconds = int(1000 * self._peer_timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        with self._changed:
            self._connections[worker], self._heard[worker] = connection, time.monotonic()

    # ---- Messages

    def _read(self, worker: int, file: typing.BinaryIO, resources: contextlib.ExitStack) -> None:
        with contextlib.suppress(OSError), resources:
            while True:
                kind, content = receive(file, MAX_MESSAGE_BYTES)
                self._heard[worker] = time.monotonic()
                if kind == "failed":
                    self._end(content)
                elif kind == "value":
                    self._collect(worker, content)
                elif kind in ("ready", "values"):
                    self._results.put((content, None))
        self._end(f"{self._name(worker)} ended while the others waited for it")
        with self._changed:
            del self._connections[worker]
            self._changed.notify_all()

    def _collect(self, worker: int, value) -> None:
        """As the chief, distributes the values as soon as all workers have given theirs."""
        with self._changed:
            self._values[worker] = value
            if len(self._values) == len(self.addresses):
                values = [self._values.pop(i) for i in range(len(self.addresses))]
                self._send_to_all("values", values)
                self._results.put((values, None))

    def _watch(self) -> None:
        """Sends heartbeats, and ends the rendezvous when a worker sends none."""
        interval = min(MAX_HEARTBEAT_SECONDS, self._peer_timeout / 10)
        last = time.monotonic()
        while not self._ended.wait(interval):
            now = time.monotonic()
            # This process was stopped itself, or TensorFlow did not let Python run.
            late, last = now - last > self._peer_timeout / 2, now
            with self._changed:
                for worker in self._connections:
                    if late:
                        self._heard[worker] = now
                    if now - self._heard[worker] > self._peer_timeout:
                        name = self._name(worker)
                        self._end(f"{name} has been silent for {self._peer_timeout:g} s")
            self._send_to_all("heartbeat")

    def _send_to_all(self, kind: str, content=None) -> None:
        with self._changed:
            for connection in self._connections.values() if not self._ended.is_set() else ():
                with contextlib.suppress(OSError):  # Its reader notices.
                    connection.sendall(encode(kind, content))

    def _shutdown(self, how: int) -> None:
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.shutdown(how)

    def _next_result(self):
        content, failure = self._results.get()
        if failure is None:
            return content
        self._results.put((None, failure))  # for later calls
        raise UserError(failure)

    def _end(self, failure: str | None = None) -> None:
        """Ends the rendezvous, once: tells the others why, and sends nothing more."""
        with self._changed:
            if self._ended.is_set():
                return
            if failure:
                self._send_to_all("failed", failure)
            self._line = failure
            self._ended.set()
            self._shutdown(socket.SHUT_WR)
        # After the others have been told, as the caller may end the process.
        self._results.put((None, failure or "the rendezvous is closed"))

    def _name(self, worker: int) -> str:
        return f"worker {worker} ({self.addresses[worker]})"

    def _missing(self) -> list[int]:
        return [i for i in range(1, len(self.addresses)) if i not in self._connections]

    def _not_started(self, workers: list[int], why: str = "") -> str:
        names = [self._name(worker) for worker in workers[:8]]
        names += [f"{len(workers) - 8} more workers"] if len(workers) > 8 else []
        return (
            f"{', '.join(names)} {'has' if len(workers) == 1 else 'have'} not started within "
            f"{self._startup_timeout:g} s{why}; start each with its --worker_index, or raise "
            "--startup_timeout"
        )


def _start_thread(function: typing.Callable, *arguments) -> None:
    threading.Thread(target=function, args=arguments, daemon=True).start()


def encode(kind: str, content=None) -> bytes:
    return json.dumps([kind, content]).encode() + b"\n"


def receive(file: typing.BinaryIO, limit: int) -> tuple:
    """(kind, content) of the next message.

    Raises:
        OSError: the connection is closed, or another program is at its other end.
    """
    line = file.readline(limit)
    if not line:
        raise ConnectionError("the connection was closed")
    try:
        kind, content = json.loads(line)
    except (ValueError, TypeError, RecursionError):
        raise ConnectionError("another program answers there") from None
    return kind, content


def parse_address(address: str, source: str = "") -> tuple[str, int]:
    """(host, port) of "host:port" or "[::1]:port"; `source` begins the message of the UsageError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"{source}{address!r} is not of the form host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def listen(address: str, worker: int) -> socket.socket:
    """Listens on a worker's port on all interfaces, also those of IPv6 if the machine has it.

    Raises:
        UserError: the port cannot be used.
    """
    try:
        return open_port(parse_address(address)[1])
    except OSError as error:
        problem = os.strerror(error.errno or 0)
        raise UserError(f"worker {worker} cannot use {address}: {problem}") from None


def open_port(port: int, backlog: int | None = None) -> socket.socket:
    """Listens on a port of all interfaces (0: a free one), also those of IPv6 if there are any."""
    try:
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog
        )
    except (OSError, ValueError) as error:  # IPv6 may be missing or disabled.
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise
        return socket.create_server(("", port), backlog=backlog)
