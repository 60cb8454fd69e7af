"""How the workers of a run meet, agree and learn why one of them ends. Standard library only.

TensorFlow's MultiWorkerMirroredStrategy waits silently for workers that never start. So they meet
here first: worker 0, the chief, listens on its own port and all others connect to it, until
TensorFlow takes the same ports. A message is 4 bytes of length and JSON `[kind, content]`:

    hello, accepted    who connects; the chief's answer
    joined             all are there
    value, values      what one worker gathers; what all of them do
    alive              nothing else was to be said
    failed             why the group ends, the line that every worker shows

Like TensorFlow's own gRPC this trusts the network: whoever reaches the chief's port while a run
starts can take part in it or end it. Run it where only the workers reach each other.
"""

import collections
import contextlib
import errno
import functools
import hashlib
import json
import os
import queue
import selectors
import socket
import threading
import time
from collections.abc import Iterator, Sequence

import keras_cifar
from keras_cifar.errors import UsageError, UserError, reason

PROTOCOL = 1
# What somebody who has not said hello may make us keep, and for how long.
HELLO_BYTES = 4096
HELLO_SECONDS = 10.0
STRANGERS = 1024
MESSAGE_BYTES = 2**30
BEAT_SECONDS = 5.0
# At the end: how long a peer may take nothing of what it is still to be told.
LINGER_SECONDS = 2.0
RETRY_SECONDS = 0.3
LISTED = 8


class Group:
    """The workers of a run, who talk through the first of them (the chief) until training starts.

    Args:
        addresses: "host:port" of every worker, the same list at all of them.
        index: which of them this process is.
        timeout: seconds to wait for all workers to start.
        silence: seconds after which a worker that says nothing at all is given up.

    Raises:
        UserError: a worker has not started or is not of this run, or a port is in use.
    """

    def __init__(self, addresses: Sequence[str], index: int, timeout: float, silence: float):
        self.addresses, self.index = list(addresses), index
        self._timeout, self._silence = timeout, silence
        self._deadline = time.monotonic() + timeout
        self._failure = self._thread = None
        if len(self.addresses) == 1:
            return
        # From here on one thread owns the sockets. It takes commands from the caller and puts
        # answers, the last of which is why there will be no more.
        self._commands, self._answers = queue.SimpleQueue(), queue.SimpleQueue()
        self._connections: list[_Connection] = []
        self._values = {}
        self._joined = self._ending = False
        self._next_beat = 0.0
        self._watched = time.monotonic()
        self._listener = self._listen()
        first = None
        if index > 0:
            # Only a look whether the port is free: TensorFlow is to listen there.
            self._listener.close()
            first = self._connect()
        self._selector = selectors.DefaultSelector()
        self._woken, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._run, args=[first], daemon=True)
        self._thread.start()
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def gather(self, value) -> list:
        """The JSON value of every worker, in their order; waits until each has given one.

        Raises:
            UserError: a worker has ended or is silent.
        """
        value = json.loads(json.dumps(value))  # what the others will see
        if len(self.addresses) == 1:
            return [value]
        self._command("value", value)
        return self._answer()

    def abort(self, why: str) -> None:
        """Tells the others, as well as it can, why this worker ends, and closes."""
        self._command("failed", f"{self._name(self.index)} ended: {why}")
        self.close()

    def close(self) -> None:
        """Leaves the group, which has done its work; what others are still to be told is sent."""
        self._command("close", None)
        if self._thread:
            self._thread.join()

    def _command(self, kind: str, content) -> None:
        if self._thread:
            self._commands.put((kind, content))
            with contextlib.suppress(OSError):  # the thread may have ended
                self._waker.send(b"!")

    def _answer(self):
        if self._failure is None:
            kind, content = self._answers.get()
            if kind != "failed":
                return content
            self._failure = content
        # The process may end on this error: the others are told before.
        self._thread.join()
        raise UserError(self._failure)

    def _name(self, worker: int) -> str:
        return f"worker {worker} ({self.addresses[worker]})"

    def _listen(self) -> socket.socket:
        address = self.addresses[self.index]
        try:
            return listen(split(address)[1])
        except OSError as error:
            why = os.strerror(error.errno)
            raise UserError(f"worker {self.index} cannot use {address}: {why}") from None

    def _hello(self) -> dict:
        return {
            "protocol": PROTOCOL,
            "version": keras_cifar.__version__,
            "worker": self.index,
            "workers": len(self.addresses),
            "digest": hashlib.sha256(json.dumps(self.addresses).encode()).hexdigest(),
        }

    def _connect(self) -> "_Connection":
        """The connection to the chief, who has accepted it. Tries until the deadline."""
        while True:
            try:
                connection = self._try_connect()
            except (OSError, UnicodeError) as error:  # also that the host's name is not known yet
                if time.monotonic() + RETRY_SECONDS > self._deadline:
                    raise UserError(
                        f"{self._name(0)} has not been reached within {self._timeout:g} s: "
                        f"{reason(error)}; start it with --worker_index=0 or raise "
                        "--startup_timeout"
                    ) from None
                time.sleep(RETRY_SECONDS)
                continue
            if connection:
                return connection

    def _try_connect(self) -> "_Connection":
        left = max(self._deadline - time.monotonic(), RETRY_SECONDS)
        connected = socket.create_connection(split(self.addresses[0]), timeout=min(left, 5.0))
        with contextlib.ExitStack() as stack:
            stack.enter_context(connected)
            if connected.getsockname() == connected.getpeername():
                # Linux connects a socket to itself where its own port is by chance the one asked.
                raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
            connected.settimeout(min(left, self._silence))
            connected.sendall(encode("hello", self._hello()))
            connection = _Connection(connected)
            while not (message := next(connection.messages(), None)):
                connection.fill()
            kind, content = message
            if kind == "failed":
                raise UserError(content)
            if kind != "accepted":
                raise ConnectionError("something else answers there")
            connection.worker = 0
            stack.pop_all()
            return connection

    def _run(self, first: "_Connection | None") -> None:
        """The thread: waits for sockets and for the clock."""
        try:
            self._selector.register(self._woken, selectors.EVENT_READ, self._obey)
            if first:
                self._add(first)
                self._take(first)  # what came behind the first message
            else:
                self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
            while self._connections or not self._ending:
                for key, events in self._selector.select(min(0.5, self._silence / 10)):
                    key.data(events)
                self._watch(time.monotonic())
        finally:
            for closing in (*self._connections, self._listener, self._woken, self._waker):
                closing.close()
            self._selector.close()
            self._answers.put(("failed", "the group of workers is closed"))

    def _obey(self, _) -> None:
        """Does what the caller's thread wants."""
        self._woken.recv(4096)
        while not self._commands.empty():
            kind, content = self._commands.get()
            if self._ending:
                continue
            if kind in ("close", "failed"):
                self._end(content)
            elif self.index == 0:
                self._collect(0, content)
            else:
                self._broadcast("value", content)

    def _accept(self, _) -> None:
        try:
            accepted, (host, *_) = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._fail(f"{self._name(0)} cannot accept all workers: {reason(error)}")
            return
        strangers = [c for c in self._connections if c.worker is None]
        if len(strangers) >= STRANGERS:
            self._drop(strangers[0])
        self._add(_Connection(accepted, host.removeprefix("::ffff:")))

    def _add(self, connection: "_Connection") -> None:
        connection.socket.setblocking(False)
        self._connections.append(connection)
        serve = functools.partial(self._serve, connection)
        self._selector.register(connection.socket, selectors.EVENT_READ, serve)

    def _drop(self, connection: "_Connection") -> None:
        self._connections.remove(connection)
        self._selector.unregister(connection.socket)
        connection.close()

    def _serve(self, connection: "_Connection", events: int) -> None:
        """Writes and reads what a connection is ready for."""
        if connection not in self._connections:
            return
        if events & selectors.EVENT_WRITE:
            self._flush(connection)
        if events & selectors.EVENT_READ:
            try:
                connection.fill()
            except BlockingIOError:
                return
            except OSError:
                self._lose(connection)
                return
            self._take(connection)

    def _take(self, connection: "_Connection") -> None:
        """Acts on the messages that have come."""
        try:
            for kind, content in connection.messages():
                if self._ending:
                    continue
                if connection.worker is None:
                    self._admit(connection, kind, content)
                elif kind == "failed":
                    self._fail(content)
                elif kind == "value":
                    self._collect(connection.worker, content)
                elif kind in ("joined", "values"):
                    self._joined = True
                    self._answers.put((kind, content))
        except ConnectionError:
            self._lose(connection)

    def _admit(self, connection: "_Connection", kind: str, hello) -> None:
        """Lets a worker in that says hello, ends the group where it is of another run."""
        mine = self._hello()
        if (
            kind != "hello"
            or not isinstance(hello, dict)
            or not isinstance(hello.get("worker"), int)
        ):
            raise ConnectionError("a stranger")
        worker = connection.worker = hello["worker"]
        who = f"the worker at {connection.host} with index {worker}"
        others = [c for c in self._connections if c.worker == worker and c is not connection]
        if any(hello.get(key) != mine[key] for key in ("protocol", "version")):
            self._fail(
                f"{who} runs keras_cifar {hello.get('version')} (protocol {hello.get('protocol')}), "
                f"worker 0 runs {mine['version']} (protocol {PROTOCOL}); install the same at all"
            )
        elif any(hello[key] != mine[key] for key in ("workers", "digest")):
            self._fail(
                f"{who} was started with another list of {hello['workers']} workers than worker 0, "
                f"which has {mine['workers']}; give all of them the same"
            )
        elif others:
            self._fail(
                f"{self._name(worker)} was started twice, at {others[0].host} and {connection.host}; "
                "each needs its own index"
            )
        else:
            self._send(connection, encode("accepted", None))
            if not self._missing():
                self._join()

    def _missing(self) -> list[int]:
        there = {connection.worker for connection in self._connections}
        return [worker for worker in range(1, len(self.addresses)) if worker not in there]

    def _join(self) -> None:
        """All are there: TensorFlow may listen where the chief did."""
        self._close_door()
        self._joined = True
        self._broadcast("joined", None)
        self._answers.put(("joined", None))

    def _close_door(self) -> None:
        if self._listener in (key.fileobj for key in self._selector.get_map().values()):
            self._selector.unregister(self._listener)
            self._listener.close()
        for connection in [c for c in self._connections if c.worker is None]:
            self._drop(connection)

    def _collect(self, worker: int, value) -> None:
        self._values[worker] = value
        if len(self._values) == len(self.addresses):
            values = [self._values[i] for i in range(len(self.addresses))]
            self._values = {}
            self._broadcast("values", values)
            self._answers.put(("values", values))

    def _lose(self, connection: "_Connection") -> None:
        self._drop(connection)
        if connection.worker is not None:
            self._fail(f"{self._name(connection.worker)} ended while the others waited for it")

    def _fail(self, line: str) -> None:
        if not self._ending:
            self._answers.put(("failed", line))
            self._end(line)

    def _end(self, line: str | None) -> None:
        """Says the last words; the thread ends when the others have heard them and hung up."""
        if self._ending:
            return
        self._close_door()
        self._ending = True
        if line is not None:
            self._broadcast("failed", line)
        for connection in self._connections:
            self._flush(connection)

    def _broadcast(self, kind: str, content) -> None:
        data = encode(kind, content)
        for connection in self._connections:
            if connection.worker is not None:
                self._send(connection, data)

    def _send(self, connection: "_Connection", data: bytes) -> None:
        connection.outgoing.append(memoryview(data))
        self._flush(connection)

    def _flush(self, connection: "_Connection") -> None:
        connection.flush()
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.outgoing else 0)
        serve = self._selector.get_key(connection.socket).data
        self._selector.modify(connection.socket, events, serve)
        if self._ending and not connection.outgoing:
            # Closing here would throw away what is under way when the peer has sent something
            # unread. So the peer closes first.
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_WR)

    def _watch(self, now: float) -> None:
        """Does what is due by the clock."""
        slept = now - self._watched > self._silence / 2
        self._watched = now
        for connection in list(self._connections):
            if slept:  # this process was stopped; it has not listened to the others
                connection.heard = now
            if self._ending:
                if now - connection.moved > LINGER_SECONDS:
                    self._drop(connection)
            elif connection.worker is None:
                if now - connection.opened > HELLO_SECONDS:
                    self._drop(connection)
            elif now - connection.heard > self._silence:
                self._fail(
                    f"{self._name(connection.worker)} has been silent for {self._silence:g} s"
                )
        if self._ending:
            return
        if now >= self._next_beat:
            self._next_beat = now + min(BEAT_SECONDS, self._silence / 4)
            self._broadcast("alive", None)
        if self.index == 0 and not self._joined and now >= self._deadline:
            self._fail(self._missing_line())

    def _missing_line(self) -> str:
        missing = self._missing()
        names = ", ".join(f"{worker} ({self.addresses[worker]})" for worker in missing[:LISTED])
        if len(missing) > LISTED:
            names += f" and {len(missing) - LISTED} more"
        if len(missing) == 1:
            return (
                f"worker {names} has not started within {self._timeout:g} s; start it with "
                f"--worker_index={missing[0]} or raise --startup_timeout"
            )
        return (
            f"workers {names} have not started within {self._timeout:g} s; start each with its "
            "--worker_index or raise --startup_timeout"
        )


class _Connection:
    """A socket and what has come and is to go."""

    def __init__(self, connected: socket.socket, host: str = ""):
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.host = connected, host
        self.worker: int | None = None  # who has not said so yet
        self.opened = self.heard = self.moved = time.monotonic()
        self.incoming, self.outgoing = bytearray(), collections.deque()

    def fill(self) -> None:
        """Reads some; an OSError when there will be no more."""
        data = self.socket.recv(2**18)
        if not data:
            raise ConnectionError("the connection was closed")
        self.heard = self.moved = time.monotonic()
        self.incoming += data

    def messages(self) -> Iterator[tuple]:
        """The messages that are complete; a ConnectionError where they are none of ours."""
        while len(self.incoming) >= 4:
            size = int.from_bytes(self.incoming[:4])
            if size > (HELLO_BYTES if self.worker is None else MESSAGE_BYTES):
                raise ConnectionError("something else answers there")
            if len(self.incoming) < 4 + size:
                return
            try:
                kind, content = json.loads(self.incoming[4 : 4 + size])
            except (ValueError, TypeError, RecursionError):
                raise ConnectionError("something else answers there") from None
            del self.incoming[: 4 + size]
            yield kind, content

    def flush(self) -> None:
        """Writes as much as is taken. That the peer is gone, reading will tell, and perhaps why."""
        try:
            while self.outgoing:
                sent = self.socket.send(self.outgoing[0])
                self.moved = time.monotonic()
                self.outgoing[0] = self.outgoing[0][sent:]
                if not self.outgoing[0]:
                    self.outgoing.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self.outgoing.clear()

    def close(self) -> None:
        self.socket.close()


def encode(kind: str, content) -> bytes:
    """A message as it is sent."""
    data = json.dumps([kind, content]).encode()
    return len(data).to_bytes(4) + data


def split(address: str) -> tuple[str, int]:
    """(host, port) of "host:port" or "[::1]:port"."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"{address!r} is not the host:port of a worker")
    return host.removeprefix("[").removesuffix("]"), int(port)


def listen(port: int) -> socket.socket:
    """A socket that listens on all interfaces, of IPv6 too where there is that."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
    return socket.create_server(("", port), backlog=1024)
