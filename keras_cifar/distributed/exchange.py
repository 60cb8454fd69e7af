"""Sums over all replicas, where TensorFlow's own collectives are slow: on CPUs.

Between CPU devices of one process, collectives pass messages, 0.3 ms each; addition does not.

Between workers they take 3 ms, however small they are, as each is several calls of gRPC, and batch
normalization by the statistics of the whole batch waits for two per layer and step. `Exchange` takes
the time of two messages over sockets of its own: worker 0 adds up what the others send, in their order,
and answers, so that all get the same bits. Gradients, which are large and wanted later, go through
TensorFlow's.
"""

import contextlib
import functools
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
HELLO_SECONDS = 1.0  # for which a client that connects may keep the others waiting
KEEPALIVE_SECONDS = 30  # between packets, so that no firewall forgets a connection in validation
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

_exchanges: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # by strategy


def all_reduce(values):
    """Sums each tensor of a structure over all replicas; call it on each of them. Differentiable."""
    context = tf.distribute.get_replica_context()
    if not _shares_memory(context.strategy):
        return context.all_reduce("SUM", values)

    @tf.custom_gradient
    def add(part):
        # The parts of replicas must not be one tensor, which would be taken for one part.
        return context.merge_call(_add_parts, (tf.identity(part),)), all_reduce

    # Each by itself, so that none waits for the others.
    return tf.nest.map_structure(add, values)


def all_reduce_small(values: tf.Tensor) -> tf.Tensor:
    """`all_reduce` of a small vector that the replicas wait for."""
    exchange = _exchanges.get(tf.distribute.get_strategy())
    return exchange.sum(values) if exchange else all_reduce(values)


def _shares_memory(strategy: tf.distribute.Strategy) -> bool:
    """Whether all replicas are CPU devices of this process."""
    devices = strategy.extended.worker_devices
    alone = len(devices) == strategy.num_replicas_in_sync
    return alone and all(tf.DeviceSpec.from_string(d).device_type == "CPU" for d in devices)


def _add_parts(strategy: tf.distribute.Strategy, parts) -> tf.Tensor:
    with tf.device(strategy.extended.worker_devices[0]):
        return tf.add_n(strategy.experimental_local_results(parts))


class Exchange:
    """Connections of this worker: to all others at worker 0, to worker 0 at the others.

    Args:
        timeout: seconds for which a worker may keep the others waiting for a sum.
        check: called with the worker that is waited for, now and then; raises an OpError if it is lost.

    Attributes:
        connections: by worker, in ascending order.
        failure: TensorFlow's error for the worker that was lost; None while there is none.
    """

    def __init__(
        self, connections: dict[int, socket.socket], timeout: float, check: Check = lambda _: None
    ):
        self.connections, self._is_hub = connections, 0 not in connections
        self._timeout, self._check = timeout, check
        self._number = max(FAILURES)  # of the last sum
        self.failure: tf.errors.OpError | None = None
        for connection in connections.values():
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
                connection.setsockopt(socket.IPPROTO_TCP, option, KEEPALIVE_SECONDS)

    def serve(self, strategy: tf.distribute.Strategy) -> None:
        """Makes `all_reduce` use this in replicas of the strategy."""
        _exchanges[strategy] = self

    def close(self) -> None:
        """Ends the connections, from which the others learn that this worker ended."""
        for connection in self.connections.values():
            connection.close()
        for strategy in [key for key, value in _exchanges.items() if value is self]:
            del _exchanges[strategy]

    def look(self) -> None:
        """Notices, and tells the others, which worker was lost where TensorFlow noticed it first."""
        for worker, connection in self.connections.items():
            connection.setblocking(False)
            try:
                data = connection.recv(HEADER.size, socket.MSG_PEEK)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            with contextlib.suppress(tf.errors.OpError):
                if not data:
                    self._fail(worker, LOST)
                if len(data) == HEADER.size:
                    self._check_number(*HEADER.unpack(data))

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
        for worker in self.connections:
            total += self._receive(worker, values)
        for worker in self.connections:
            self._send(worker, self._number, total.nbytes, total.tobytes())
        return total

    def _send(self, worker: int, number: int, size: int, data: bytes = b"") -> None:
        with self._noticing_loss(worker):
            self.connections[worker].settimeout(self._timeout)
            self.connections[worker].sendall(HEADER.pack(number, size) + data)

    def _receive(self, worker: int, like: np.ndarray) -> np.ndarray:
        with self._noticing_loss(worker):
            number, size = HEADER.unpack(self._read(worker, HEADER.size))
            self._check_number(number, size)
            if (number, size) != (self._number, like.nbytes):
                raise RuntimeError(f"worker {worker} computes another sum: {number}, {size} bytes")
            data = self._read(worker, size)
        return np.frombuffer(data, like.dtype).reshape(like.shape)

    def _read(self, worker: int, size: int) -> bytearray:
        connection, check = self.connections[worker], functools.partial(self._check, worker)
        return _read(connection, size, self._timeout, check)

    def _check_number(self, number: int, worker: int) -> None:
        if number in FAILURES:
            self._fail(worker, number)

    @contextlib.contextmanager
    def _noticing_loss(self, worker: int):
        try:
            yield
        except TimeoutError:
            self._fail(worker, LATE)
        except (OSError, tf.errors.OpError):
            self._fail(worker, LOST)

    def _fail(self, worker: int, number: int) -> None:
        """Keeps which worker was lost, tells the others if nobody else can, and raises."""
        if self.failure is None:
            kind, why = FAILURES[number]
            self.failure = kind(None, None, f"/job:worker/task:{worker} {why}")
            for other in set(self.connections) - {worker} if self._is_hub else ():
                with contextlib.suppress(OSError):
                    self.connections[other].sendall(HEADER.pack(number, worker))
        raise self.failure


def connect(rendezvous: Rendezvous, timeout: float, check: Check) -> Exchange | None:
    """Connects the workers of a rendezvous; None where one cannot reach worker 0 on another port.

    `timeout` and `check` are those of the Exchange.
    """
    workers = range(1, len(rendezvous.addresses))
    connections: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        if rendezvous.index == 0:
            listener = stack.enter_context(open_port(0, backlog=len(workers) + STRANGERS))
            token = secrets.token_bytes(TOKEN_BYTES)
            rendezvous.all_gather([listener.getsockname()[1], token.hex()])
        else:
            port, secret = rendezvous.all_gather(None)[0]
            host, _ = parse_address(rendezvous.addresses[0])
            with contextlib.suppress(OSError):
                connections[0] = socket.create_connection((host, port), CONNECT_SECONDS)
                connections[0].sendall(HELLO.pack(rendezvous.index, bytes.fromhex(secret)))
        # A connection is open before it is accepted.
        are_open = all(rendezvous.all_gather(rendezvous.index == 0 or bool(connections)))
        if are_open and rendezvous.index == 0:
            connections = _accept(listener, len(workers), token)
    exchange = Exchange(
        {worker: connections[worker] for worker in sorted(connections)}, timeout, check
    )
    complete = are_open and list(exchange.connections) in ([0], list(workers))
    if all(rendezvous.all_gather(complete)):
        return exchange
    exchange.close()
    return None


def _accept(listener: socket.socket, count: int, token: bytes) -> dict[int, socket.socket]:
    """The connections that show the token, by worker; fewer than `count` if others delay them."""
    found: dict[int, socket.socket] = {}
    deadline = time.monotonic() + CONNECT_SECONDS
    while len(found) < count and (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            connection = stack.enter_context(listener.accept()[0])
            worker, shown = HELLO.unpack(_read(connection, HELLO.size, HELLO_SECONDS))
            if hmac.compare_digest(shown, token):
                found[worker] = connection
                stack.pop_all()
    return found


def _read(
    connection: socket.socket,
    size: int,
    seconds: float,
    check: Callable[[], None] = lambda: None,
) -> bytearray:
    """Reads so many bytes within some seconds, and calls `check` while there are none.

    Raises:
        OSError: the connection ends before, or is too slow.
    """
    data, deadline = bytearray(size), time.monotonic() + seconds
    view = memoryview(data)
    while view:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(min(left, CHECK_SECONDS))
        try:
            received = connection.recv_into(view)
        except TimeoutError:
            check()
            continue
        if not received:
            raise ConnectionError("the connection was closed")
        view = view[received:]
    return data
