"""Workers are threads of this process; test_strategies.py and test_workers.py have processes."""

import contextlib
import functools
import socket
import threading

import numpy as np
import pytest
import tensorflow as tf

from keras_cifar.distributed import exchange
from tests.distributed.test_rendezvous import (
    close_all,
    each,
    free_addresses,
    in_threads,
    starters,
)


@pytest.fixture
def connected():
    """Connects a number of workers, whose exchanges are closed after the test."""
    with contextlib.ExitStack() as stack:

        def start(count, timeout=20.0, check=lambda worker: None):
            workers = in_threads(*starters(free_addresses(count)))
            stack.callback(close_all, workers)
            found = each(workers, lambda worker: exchange.connect(worker, timeout, check))
            for one in filter(None, found):
                stack.callback(one.close)
            return found

        yield start


def sums(exchanges, values) -> list:
    """What each worker gets for its value, or the error that it raises."""

    def attempt(one, value):
        try:
            return one.sum(tf.constant(value)).numpy()
        except (tf.errors.OpError, RuntimeError) as error:
            return error

    return in_threads(
        *(functools.partial(attempt, *x) for x in zip(exchanges, values, strict=True))
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_have_the_same_bits_in_all_workers(connected, dtype):
    values = np.random.default_rng(0).normal(size=(3, 2, 5)).astype(dtype)
    for found in sums(connected(3), values):
        np.testing.assert_array_equal(found, (values[0] + values[1]) + values[2])


@pytest.mark.parametrize("add", [exchange.all_reduce, exchange.all_reduce_small])
def test_replicas_of_one_process_need_no_collectives(add):
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    one = tf.constant(1.0)  # the same tensor in both replicas

    @tf.function
    def run():
        return strategy.run(on_replica)

    def on_replica():
        scale = 1.0 + 9.0 * tf.cast(
            tf.distribute.get_replica_context().replica_id_in_sync_group, tf.float32
        )
        x = tf.stack([scale, 2.0])
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = add(x)
            loss = scale * tf.reduce_sum(total**2)
        return total, tape.gradient(loss, x), add(one)

    results = zip(*map(strategy.experimental_local_results, run()), strict=True)
    for total, gradient, twice in results:
        np.testing.assert_allclose(total, [11.0, 4.0])
        # Each loss has twice the sum as its gradient, times its scale.
        np.testing.assert_allclose(gradient, [11 * 22.0, 11 * 8.0])
        assert twice == 2.0
    operations = {o.type for o in run.get_concrete_function().graph.get_operations()}
    assert "AddN" in operations
    assert not {o for o in operations if "Collective" in o}


def test_gradient_is_the_sum_of_the_gradients(connected):
    def differentiate(pair):
        one, scale = pair
        x = tf.constant([1.0, 2.0])
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = scale * tf.reduce_sum(one.sum(x) ** 2)
        return tape.gradient(loss, x).numpy()

    # Each loss has twice the gradient of the sum, [2, 4], times its scale.
    for found in each(list(zip(connected(2), (1.0, 10.0), strict=True)), differentiate):
        np.testing.assert_allclose(found, [44.0, 88.0])


def test_sums_of_a_graph_are_computed_in_the_order_of_tracing(monkeypatch):
    alone, order = exchange.Exchange({}, 1.0), []
    add = exchange.Exchange._sum
    monkeypatch.setattr(
        exchange.Exchange, "_sum", lambda self, x: (order.append(int(x[0])), add(self, x))[1]
    )

    @tf.function
    def many(x):
        return [alone.sum(x + i) for i in range(100)]

    many(tf.zeros([1]))
    assert order == list(range(100))


def test_all_others_learn_which_worker_ended(connected):
    workers = connected(3)
    workers[2].close()
    for one, found in zip(workers, sums(workers[:2], [[1.0], [2.0]]), strict=False):
        assert isinstance(found, tf.errors.OpError)
        assert isinstance(one.failure, tf.errors.UnavailableError)
        assert "/task:2 ended" in one.failure.message


def test_what_tensorflow_notices_first_is_told_to_the_others(connected):
    """As where a worker is lost in the all-reduce of gradients: no sum is waited for."""
    first, second, third = connected(3)
    third.close()
    first.look()
    first.close()
    second.look()
    for one in (first, second):
        assert "/task:2 ended" in one.failure.message


def test_nothing_is_noticed_where_all_are_alive(connected):
    first, second = connected(2)
    for one in (first, second):
        one.look()
        assert one.failure is None
    assert sums((first, second), [[1.0], [2.0]]) == [3.0, 3.0]


def test_a_late_worker_is_not_told_that_another_is(connected):
    first, second = connected(2, timeout=0.5)
    sums([first], [[1.0]])
    first.close()
    sums([second], [[1.0]])
    assert "/task:1 timed out" in first.failure.message
    assert "/task:0 ended" in second.failure.message


def test_all_others_learn_which_worker_is_late(connected):
    workers = connected(3, timeout=0.5)
    sums(workers[:2], [[1.0], [2.0]])
    assert isinstance(workers[0].failure, tf.errors.DeadlineExceededError)
    assert "/task:2 timed out" in workers[0].failure.message
    assert isinstance(workers[1].failure, tf.errors.DeadlineExceededError)


@pytest.mark.parametrize("error", [tf.errors.DeadlineExceededError, tf.errors.UnknownError])
def test_a_silent_worker_is_checked(connected, monkeypatch, error):
    def check(worker):
        raise error(None, None, f"no answer of {worker}")

    monkeypatch.setattr(exchange, "CHECK_SECONDS", 0.1)
    workers = connected(2, check=check)
    sums(workers[:1], [[1.0]])
    assert isinstance(workers[0].failure, tf.errors.UnavailableError)
    assert "/task:1 ended" in workers[0].failure.message


def test_a_worker_that_answers_is_waited_for(connected, monkeypatch):
    checked, go_on = [], threading.Event()

    def check(worker):
        checked.append(worker)
        go_on.set()

    monkeypatch.setattr(exchange, "CHECK_SECONDS", 0.1)
    first, second = connected(2, check=check)
    found = in_threads(
        lambda: first.sum(tf.constant([1.0])).numpy(),
        lambda: go_on.wait(20) and second.sum(tf.constant([2.0])).numpy(),
    )
    assert found == [3.0, 3.0]
    assert 1 in checked


def test_workers_with_different_sums_fail(connected):
    found = sums(connected(2, timeout=0.5), [[1.0, 2.0], [3.0]])
    assert "worker 1 computes another sum" in str(found[0])


def test_none_where_a_worker_cannot_reach_the_port(connected, monkeypatch):
    connect = socket.create_connection

    def refusing(address, *arguments):
        if threading.current_thread().name == "refused":
            raise ConnectionRefusedError
        return connect(address, *arguments)

    def start(worker, *arguments):
        if worker.index == 2:
            threading.current_thread().name = "refused"
        return original(worker, *arguments)

    original = exchange.connect
    monkeypatch.setattr(exchange, "CONNECT_SECONDS", 0.2)
    monkeypatch.setattr(socket, "create_connection", refusing)
    monkeypatch.setattr(exchange, "connect", start)
    assert connected(3) == [None, None, None]


def test_strangers_are_dropped(monkeypatch):
    listener = socket.create_server(("127.0.0.1", 0))
    address, token = listener.getsockname(), b"t" * exchange.TOKEN_BYTES
    monkeypatch.setattr(exchange, "HELLO_SECONDS", 0.3)
    with listener, contextlib.ExitStack() as stack:

        def connect(hello):
            client = stack.enter_context(socket.create_connection(address))
            client.sendall(hello)
            return client

        stranger = connect(exchange.HELLO.pack(1, b"x" * exchange.TOKEN_BYTES))
        connect(b"slow")
        worker = connect(exchange.HELLO.pack(1, token))
        found = exchange._accept(listener, 1, token)
        stack.callback(found[1].close)
        found[1].sendall(b"yes")
        assert worker.recv(3) == b"yes"
        assert stranger.recv(1) == b""
