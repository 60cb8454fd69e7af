"""Sums of small vectors over workers on CPUs, through sockets of their own.

Batch normalization by the statistics of the whole batch waits for two sums per layer and step.
TensorFlow's collectives take 3 ms for each between CPUs, however small it is, as each is several calls
of gRPC; these take the time of two messages. Worker 0 adds up what the others send, in their order, and
answers: all get the same bits. Gradients, which are large and wanted later, go through TensorFlow's.
"""

import contextlib
import hmac
import secrets
import socket
import struct
import time
import weakref
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from keras_cifar.distributed.rendezvous import CONNECT_SECONDS, Rendezvous, open_port, parse_address

SUMS = "keras_cifar sums"  # the collection of a graph that has those that it computes
CHECK_SECONDS = 3.0  # of silence, after which the worker that is waited for is checked
STRANGERS = 8  # connections of others that may wait beside those of the workers
TOKEN_BYTES = 16
# The number of a sum and of the bytes that follow, or one of FAILURES and a worker.
HEADER = struct.Struct("<QQ")
LOST, LATE = 0, 1
FAILURES = {
    LOST: (tf.errors.UnavailableError, "ended"),
    LATE: (tf.errors.DeadlineExceededError, "timed out"),
}
HELLO = struct.Struct(f"<I{TOKEN_BYTES}s")  # the worker and the token of this run

Check = Callable[[int], None]
# What a check raises.
CHECKED = (
    tf.errors.UnavailableError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
)

_exchanges: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # by strategy


def all_reduce(values: tf.Tensor) -> tf.Tensor:
    """Sums a small vector over all replicas; call it on each of them. Differentiable."""
    context = tf.distribute.get_replica_context()
    exchange = _exchanges.get(context.strategy)
    return exchange.sum(values) if exchange else context.all_reduce("SUM", values)


class Exchange:
    """Connections of this worker: to all others at worker 0, to worker 0 at the others.

    Args:
        connections: by worker, in ascending order.
        timeout: seconds for which a worker may keep the others waiting for a sum.
        check: called with the worker that is waited for, now and then; raises an OpError if it is lost.

    Attributes:
        failure: TensorFlow's error for the worker that was lost; None while there is none.
    """

    def __init__(
        self, connections: dict[int, socket.socket], timeout: float, check: Check = lambda _: None
    ):
        self._connections, self._is_hub = connections, 0 not in connections
        self._timeout, self._check = timeout, check
        self._number = max(FAILURES)  # of the last sum
        self.failure: tf.errors.OpError | None = None
        for connection in connections.values():
            connection.settimeout(min(CHECK_SECONDS, timeout))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def serve(self, strategy: tf.distribute.Strategy) -> None:
        """Makes `all_reduce` use this in replicas of the strategy."""
        _exchanges[strategy] = self

    def close(self) -> None:
        """Ends the connections, from which the others learn that this worker ended."""
        for connection in self._connections.values():
            connection.close()

    def sum(self, values: tf.Tensor) -> tf.Tensor:
        """The sum of a tensor over all workers, in their order; differentiable.

        All workers trace the same sums, and compute them in the order in which they are traced.
        """

        @tf.custom_gradient
        def add(values):
            return self._in_order(values), self.sum

        return add(values)

    def _in_order(self, values: tf.Tensor) -> tf.Tensor:
        # Otherwise workers could wait for different sums, each with the only thread that it has.
        graph = tf.compat.v1.get_default_graph()
        before = [x for x in graph.get_collection(SUMS)[-1:] if x.graph is graph]
        with tf.control_dependencies(before):
            total = tf.numpy_function(self._sum, [values], values.dtype)
        if not tf.executing_eagerly():
            graph.add_to_collection(SUMS, total)
        return tf.ensure_shape(total, values.shape)

    def _sum(self, values: np.ndarray) -> np.ndarray:
        self._number += 1
        if not self._is_hub:
            self._send(0, self._number, values.nbytes, values.tobytes())
            return self._receive(0, values)
        total = values.copy()
        for worker in self._connections:
            total += self._receive(worker, values)
        for worker in self._connections:
            self._send(worker, self._number, total.nbytes, total.tobytes())
        return total

    def _send(self, worker: int, number: int, size: int, data: bytes = b"") -> None:
        with self._noticing_loss(worker):
            self._connections[worker].sendall(HEADER.pack(number, size) + data)

    def _receive(self, worker: int, like: np.ndarray) -> np.ndarray:
        with self._noticing_loss(worker):
            number, size = HEADER.unpack(self._read(worker, HEADER.size))
            if number in FAILURES:
                self._fail(size, number)
            if (number, size) != (self._number, like.nbytes):
                raise RuntimeError(f"worker {worker} computes another sum: {number}, {size} bytes")
            data = self._read(worker, size)
        return np.frombuffer(data, like.dtype).reshape(like.shape)

    def _read(self, worker: int, size: int) -> bytearray:
        deadline = time.monotonic() + self._timeout

        def wait_on():
            if time.monotonic() > deadline:
                raise TimeoutError
            self._check(worker)

        return _read(self._connections[worker], size, wait_on)

    @contextlib.contextmanager
    def _noticing_loss(self, worker: int):
        try:
            yield
        except TimeoutError:
            self._fail(worker, LATE)
        except (OSError, *CHECKED):
            self._fail(worker, LOST)

    def _fail(self, worker: int, number: int) -> None:
        """Keeps which worker was lost, tells the others if nobody else can, and raises."""
        if self.failure is None:
            kind, why = FAILURES[number]
            self.failure = kind(None, None, f"/job:worker/task:{worker} {why}")
            for other in self._connections if self._is_hub else ():
                with contextlib.suppress(OSError):
                    self._connections[other].sendall(HEADER.pack(number, worker))
        raise self.failure


def connect(rendezvous: Rendezvous, timeout: float, check: Check) -> Exchange | None:
    """Connects the workers of a rendezvous; None where one cannot reach worker 0 on another port.

    `timeout` and `check` are those of the Exchange.
    """
    workers = range(1, len(rendezvous.addresses))
    connections: dict[int, socket.socket] = {}
    if rendezvous.index == 0:
        with open_port(0, backlog=len(workers) + STRANGERS) as listener:
            token = secrets.token_bytes(TOKEN_BYTES)
            rendezvous.all_gather([listener.getsockname()[1], token.hex()])
            connections = _accept(listener, len(workers), token)
    else:
        port, token = rendezvous.all_gather(None)[0]
        host, _ = parse_address(rendezvous.addresses[0])
        with contextlib.suppress(OSError):
            connections[0] = socket.create_connection((host, port), CONNECT_SECONDS)
            connections[0].sendall(HELLO.pack(rendezvous.index, bytes.fromhex(token)))
    exchange = Exchange(
        {worker: connections[worker] for worker in sorted(connections)}, timeout, check
    )
    if all(rendezvous.all_gather(list(connections) in ([0], sorted(workers)))):
        return exchange
    exchange.close()
    return None


def _accept(listener: socket.socket, count: int, token: bytes) -> dict[int, socket.socket]:
    """The connections that show the token, by worker; fewer than `count` if some do not come."""
    found: dict[int, socket.socket] = {}
    deadline = time.monotonic() + 2 * CONNECT_SECONDS  # the others' tries take half of it
    with contextlib.suppress(TimeoutError):
        while len(found) < count:
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            connection, _ = listener.accept()
            with contextlib.suppress(OSError):
                connection.settimeout(CONNECT_SECONDS)
                worker, shown = HELLO.unpack(_read(connection, HELLO.size))
                if hmac.compare_digest(shown, token):
                    found[worker] = connection
                    continue
            connection.close()
    return dict(sorted(found.items()))


def _read(
    connection: socket.socket, size: int, wait_on: Callable[[], None] | None = None
) -> bytearray:
    """Reads so many bytes.

    Args:
        wait_on: called where the connection's timeout passes, to wait once more if it does not raise.

    Raises:
        OSError: the connection ends before, or is silent for its timeout.
    """
    data = bytearray(size)
    view = memoryview(data)
    while view:
        try:
            received = connection.recv_into(view)
        except TimeoutError:
            if wait_on is None:
                raise
            wait_on()
            continue
        if not received:
            raise ConnectionError("the connection was closed")
        view = view[received:]
    return data
