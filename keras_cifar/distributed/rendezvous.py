"""How the workers of a run meet, agree and learn why one of them ends. Standard library only.

TensorFlow's MultiWorkerMirroredStrategy waits silently for workers that never start. So they meet
here first: worker 0, the chief, listens on its own port and all others connect to it, until
TensorFlow takes the same ports. A message is 4 bytes of length and JSON `[kind, content]`:

    hello, accepted    who connects; the chief's answer
    joined             all are there
    value, values      what one worker gathers; what all of them do
    alive              there is nothing else to say
    failed             why the group ends: the line that every worker shows

Like TensorFlow's own gRPC this trusts the network: whoever reaches the chief's port while a run
starts can take part in it or end it. Run it where only the workers reach each other.
"""

import asyncio
import contextlib
import errno
import hashlib
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Sequence

import keras_cifar
from keras_cifar.core.errors import UsageError, UserError, reason

# What workers are given that were named no port: below those that Linux gives to outgoing connections.
PORTS = range(12_000, 32_000)
PROTOCOL = 1
MESSAGE_BYTES = 2**30
# What those who have not said who they are may make us keep, and how many and how long they may.
HELLO_BYTES, STRANGERS, HELLO_SECONDS = 4096, 1024, 10.0
BEAT_SECONDS = 5.0
# At the end: how long another may take nothing of what it is still to be told.
LINGER_SECONDS = 5.0
CONNECT_SECONDS, RETRY_SECONDS = 5.0, 0.3
# Until the thread has heard what was said while something held Python up.
SETTLE_SECONDS = 1.0


class Rendezvous:
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
        self._line: str | None = None
        self._unfit: str | None = None
        self._failure = self._thread = None
        self._chief, *_ = [split_address(address) for address in self.addresses]
        if len(self.addresses) == 1:
            return
        listener = None
        try:
            listener = self._listen()
        except UserError as error:
            if index == 0:
                raise
            self._unfit = str(error)  # The chief is to hear it, and from it the others.
        # The thread owns the connections; this one only takes its answers, of which the last is
        # why there will be no more.
        self._answers = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._over = asyncio.Event()
        self._peers, self._strangers, self._values = [], {}, {}
        self._joined = False
        self._thread = threading.Thread(target=self._talk, args=[listener], daemon=True)
        self._thread.start()
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def all_gather(self, value) -> list:
        """The JSON value of every worker, in their order; waits until each has given one.

        Raises:
            UserError: a worker has ended or is silent.
        """
        value = json.loads(json.dumps(value))  # what the others will see
        if len(self.addresses) == 1:
            return [value]
        self._call(self._give, value)
        return self._answer()

    def failure(self) -> str | None:
        """The line on which the group ended, where it did; for a caller who waited elsewhere."""
        if self._thread:
            self._thread.join(SETTLE_SECONDS)
        return self._line

    def abort(self, why: str) -> None:
        """Tells the others, as well as it can, why this worker ends, and closes."""
        self._call(self._end, f"{self._name(self.index)} ended: {why}")
        self.close()

    def close(self) -> None:
        """Leaves the group, which has done its work; what the others are still to get is sent."""
        self._call(self._end)
        if self._thread:
            self._thread.join()

    def _call(self, function, *arguments) -> None:
        """Has the thread call a function."""
        if self._thread:
            with contextlib.suppress(RuntimeError):  # the thread has ended
                self._loop.call_soon_threadsafe(function, *arguments)

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
            return listen(split_address(address)[1])
        except OSError as error:
            why = os.strerror(error.errno)
            raise UserError(f"worker {self.index} cannot use {address}: {why}") from None

    # What follows runs in the thread.

    def _talk(self, listener: socket.socket | None) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            try:
                runner.run(self._meet(listener))
            finally:
                self._answers.put(("failed", "the group of workers is closed"))

    async def _meet(self, listener: socket.socket | None) -> None:
        deadline = time.monotonic() + (CONNECT_SECONDS if self._unfit else self._timeout)
        if self.index == 0:
            self._server = await asyncio.start_server(self._welcome, sock=listener, backlog=1024)
        else:
            if listener:
                # It was only to see whether the port is free: TensorFlow is to listen there.
                listener.close()
            await self._connect(deadline)
        await self._watch(deadline)
        if self.index == 0:
            self._server.close()
        await asyncio.gather(*(self._linger(peer) for peer in self._peers))

    async def _connect(self, deadline: float) -> None:
        """Tries until the chief answers; its name may not be known yet."""
        while not self._over.is_set():
            left = deadline - time.monotonic()
            try:
                return await self._greet(max(left, RETRY_SECONDS))
            except (OSError, UnicodeError) as error:
                if left > RETRY_SECONDS:
                    await asyncio.sleep(RETRY_SECONDS)
                    continue
                self._fail(self._unfit or self._not_started([0], f" ({reason(error)})"))

    async def _greet(self, left: float) -> None:
        """Connects to the chief and says who this is."""
        connected = socket.create_connection(self._chief, min(left, CONNECT_SECONDS))
        peer = _Peer(*await asyncio.open_connection(sock=connected))
        try:
            if connected.getsockname() == connected.getpeername():
                # Linux connects a socket to itself where its own port is by chance the one asked.
                raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
            peer.writer.write(encode("hello", self._hello()))
            async with asyncio.timeout(min(left, self._silence)):
                kind, content = await peer.receive(HELLO_BYTES)
            if kind not in ("accepted", "failed"):
                raise ConnectionError("something else answers there")
        except BaseException:
            peer.writer.transport.abort()
            raise
        peer.worker, peer.task = 0, asyncio.create_task(self._converse(peer))
        self._peers.append(peer)
        if kind == "failed":
            self._fail(content)

    def _hello(self) -> dict:
        return {
            "worker": self.index,
            "protocol": PROTOCOL,
            "version": keras_cifar.__version__,
            "workers": len(self.addresses),
            "digest": hashlib.sha256(json.dumps(self.addresses).encode()).hexdigest(),
            "unfit": self._unfit,
        }

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Lets in who says hello as a worker of this run, and drops strangers."""
        peer = _Peer(reader, writer)
        if len(self._strangers) >= STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.writer.transport.abort()
        self._strangers[peer] = None
        try:
            try:
                async with asyncio.timeout(HELLO_SECONDS):
                    kind, hello = await peer.receive(HELLO_BYTES)
            finally:
                self._strangers.pop(peer, None)
            known = kind == "hello" and isinstance(hello, dict)
            if known and isinstance(hello.get("worker"), int) and not self._over.is_set():
                await self._admit(peer, hello)
        except (OSError, asyncio.CancelledError):
            pass  # a stranger, or one who does not hang up at the end
        finally:
            writer.transport.abort()

    async def _admit(self, peer: "_Peer", hello: dict) -> None:
        refusal = self._refusal(peer, hello)
        peer.worker, peer.task = hello["worker"], asyncio.current_task()
        self._peers.append(peer)
        if refusal:
            self._fail(refusal)
        else:
            peer.writer.write(encode("accepted"))
            if not self._missing():
                self._server.close()  # TensorFlow is to listen there
                self._joined = True
                self._broadcast("joined")
                self._answers.put(("joined", None))
        await self._converse(peer)

    def _refusal(self, peer: "_Peer", hello: dict) -> str | None:
        """Why a worker cannot be of this run."""
        worker, mine = hello["worker"], self._hello()
        who = f"worker {worker} at {peer.host()}"
        if any(hello.get(key) != mine[key] for key in ("protocol", "version")):
            return (
                f"{who} runs keras_cifar {hello.get('version')} (protocol {hello.get('protocol')}), "
                f"worker 0 runs {mine['version']} (protocol {PROTOCOL}); install the same at all"
            )
        if any(hello.get(key) != mine[key] for key in ("workers", "digest")):
            theirs, ours = hello.get("workers"), mine["workers"]
            what = "other addresses than worker 0"
            if theirs != ours:
                what = f"{theirs} workers, worker 0 with {ours}"
            return f"{who} was started with {what}; give all of them the same list"
        for other in self._peers:
            if other.worker == worker:
                return f"{who} was started at {other.host()} too; each needs its own index"
        return hello.get("unfit")

    async def _converse(self, peer: "_Peer") -> None:
        """Acts on what another says until it hangs up."""
        try:
            while True:
                kind, content = await peer.receive(MESSAGE_BYTES)
                if self._over.is_set():
                    continue
                if kind == "failed":
                    self._fail(content)
                elif kind == "value":
                    self._collect(peer.worker, content)
                elif kind in ("joined", "values"):
                    self._answers.put((kind, content))
        except OSError:
            if not self._over.is_set():
                self._fail(f"{self._name(peer.worker)} ended while the others waited for it")
        finally:
            peer.writer.transport.abort()

    def _give(self, value) -> None:
        if self.index == 0:
            self._collect(0, value)
        else:
            self._broadcast("value", value)

    def _collect(self, worker: int, value) -> None:
        self._values[worker] = value
        if len(self._values) == len(self.addresses):
            values = [self._values[i] for i in range(len(self.addresses))]
            self._values = {}
            self._broadcast("values", values)
            self._answers.put(("values", values))

    def _broadcast(self, kind: str, content=None) -> None:
        data = encode(kind, content)
        for peer in self._peers:
            if not self._over.is_set():
                peer.writer.write(data)

    def _fail(self, line: str) -> None:
        if not self._over.is_set():
            self._line = line
            self._answers.put(("failed", line))
            self._end(line)

    def _end(self, line: str | None = None) -> None:
        """Says the last words. The others hang up when they have heard them."""
        if line:
            self._broadcast("failed", line)
        if not self._over.is_set():
            self._over.set()
            for peer in self._peers:
                with contextlib.suppress(OSError):  # it may be gone
                    peer.writer.write_eof()

    async def _linger(self, peer: "_Peer") -> None:
        """Waits until another has hung up, as long as it takes what it is still to get.

        Closing first would throw away what is under way where it has sent something unread.
        """
        stopped = time.monotonic() - peer.heard > self._silence
        left = peer.unsent() if stopped else None
        while not peer.task.done() and left != peer.unsent():
            left = peer.unsent()
            await asyncio.wait([peer.task], timeout=LINGER_SECONDS)

    async def _watch(self, deadline: float) -> None:
        """Sends heartbeats and looks at the clock until the group ends."""
        tick = min(0.5, self._silence / 10)
        watched, beat = time.monotonic(), 0.0
        while not self._over.is_set():
            now = time.monotonic()
            for peer in self._peers:
                if now - watched > self._silence / 2:
                    # This process was stopped itself and has not yet read what the others said.
                    peer.heard = now
                if now - peer.heard > self._silence:
                    self._fail(f"{self._name(peer.worker)} has been silent for {self._silence:g} s")
            if now >= beat:
                beat = now + min(BEAT_SECONDS, self._silence / 4)
                self._broadcast("alive")
            if self.index == 0 and not self._joined and now >= deadline:
                self._fail(self._not_started(self._missing()))
            watched = now
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), tick)

    def _missing(self) -> list[int]:
        there = {peer.worker for peer in self._peers}
        return [i for i in range(1, len(self.addresses)) if i not in there]

    def _not_started(self, workers: list[int], why: str = "") -> str:
        names, others = ", ".join(map(self._name, workers[:8])), len(workers) - 8
        if others > 0:
            names += f" and {others} more"
        one = len(workers) == 1
        return (
            f"{names} {'has' if one else 'have'} not started within {self._timeout:g} s{why}; start "
            f"{f'it with --worker_index={workers[0]}' if one else 'each with its --worker_index'} "
            "or raise --startup_timeout"
        )


class _Peer:
    """A connection to another worker."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer
        self.worker = self.task = None
        self.heard = time.monotonic()

    def host(self) -> str:
        return self.writer.get_extra_info("peername")[0].removeprefix("::ffff:")

    def unsent(self) -> int:
        return self.writer.transport.get_write_buffer_size()

    async def receive(self, limit: int) -> tuple:
        """(kind, content) of the next message; an OSError where there is none of ours."""
        size = int.from_bytes(await self._read(4))
        if size > limit:
            raise ConnectionError("something else answers there")
        data = await self._read(size)
        try:
            kind, content = json.loads(data)
        except (ValueError, TypeError, RecursionError):
            raise ConnectionError("something else answers there") from None
        return kind, content

    async def _read(self, size: int) -> bytearray:
        data = bytearray()
        while len(data) < size:
            part = await self.reader.read(size - len(data))
            if not part:
                raise ConnectionError("the connection was closed")
            self.heard = time.monotonic()
            data += part
        return data


def encode(kind: str, content=None) -> bytes:
    """A message as it is sent."""
    data = json.dumps([kind, content]).encode()
    return len(data).to_bytes(4) + data


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of "host:port" or "[::1]:port"."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"{address!r} is not the host:port of a worker")
    return host.removeprefix("[").removesuffix("]"), int(port)


def listen(port: int) -> socket.socket:
    """A socket that listens on all interfaces, of IPv6 too where there is that."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
    return socket.create_server(("", port))
