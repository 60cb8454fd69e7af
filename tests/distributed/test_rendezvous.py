"""Workers are threads of this process, and processes where one is killed or stopped."""

import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import keras_cifar
from keras_cifar.core.errors import UsageError, UserError
from keras_cifar.distributed import rendezvous
from keras_cifar.distributed.rendezvous import Rendezvous


def free_addresses(count: int, host: str = "127.0.0.1") -> list[str]:
    with contextlib.ExitStack() as stack:
        bound = [stack.enter_context(socket.create_server(("", 0))) for _ in range(count)]
        return [f"{host}:{s.getsockname()[1]}" for s in bound]


def in_threads(*functions) -> list:
    """What each of the functions returns or the UserError it raises."""
    results = [None] * len(functions)

    def run(number):
        try:
            results[number] = functions[number]()
        except UserError as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=[i], daemon=True) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a worker hangs"
    return results


def starter(addresses, index, timeout=20.0, peer_timeout=20.0, after=None):
    """A function that starts a worker, after an event if one is given."""

    def start():
        assert after is None or after.wait(20)
        return Rendezvous(addresses, index, timeout, peer_timeout)

    return start


def starters(addresses, **options) -> list:
    return [starter(addresses, index, **options) for index in range(len(addresses))]


def close_all(workers) -> None:
    assert all(isinstance(worker, Rendezvous) for worker in workers), workers
    each(workers, Rendezvous.close)


def each(workers, function) -> list:
    return in_threads(*(functools.partial(function, worker) for worker in workers))


def gather_indices(workers) -> list:
    return each(workers, lambda worker: worker.all_gather(worker.index))


def lines(results) -> list[str]:
    """The messages of UserErrors, each of one line."""
    assert all(isinstance(result, UserError) for result in results), results
    assert all("\n" not in str(result) for result in results)
    return [str(result) for result in results]


def connect(address) -> socket.socket:
    """A connection to an address as soon as somebody listens there."""
    while True:
        try:
            return socket.create_connection(rendezvous.parse_address(address), timeout=20)
        except ConnectionRefusedError:
            time.sleep(0.02)


@pytest.fixture
def joined():
    """Starts a number of workers; closed after the test."""
    with contextlib.ExitStack() as stack:

        def start(count, host="127.0.0.1", **options):
            workers = in_threads(*starters(free_addresses(count, host), **options))
            stack.callback(close_all, workers)
            return workers

        yield start


@pytest.fixture
def admitted(monkeypatch):
    """An event: the chief has heard of a worker."""
    event, admit = threading.Event(), Rendezvous._add

    def admitting(self, *arguments):
        admit(self, *arguments)
        event.set()

    monkeypatch.setattr(Rendezvous, "_add", admitting)
    return event


# ---- Joining


@pytest.mark.parametrize(
    ("count", "host"),
    [(1, "127.0.0.1"), (2, "localhost"), (3, "127.0.0.1"), (3, "[::1]"), (50, "127.0.0.1")],
)
def test_every_worker_gets_the_values_of_all_in_order(joined, count, host):
    if host == "[::1]" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6")
    workers = joined(count, host)
    for turn in range(3):
        values = [{"worker": i, "turn": turn, "list": [None, 1.5, "é"]} for i in range(count)]
        gathered = each(workers, lambda worker, v=values: worker.all_gather(v[worker.index]))
        assert gathered == [values] * count


def test_the_chief_may_start_last_and_its_name_become_known_later(monkeypatch):
    addresses = [a.replace("127.0.0.1", "chief.example") for a in free_addresses(3)]
    tries, known = [], threading.Event()

    def resolve(host, *arguments, _real=socket.getaddrinfo, **options):
        if host != "chief.example":
            return _real(host, *arguments, **options)
        tries.append(host)
        if len(tries) < 3:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        known.set()
        return _real("127.0.0.1", *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(rendezvous, "RETRY_SECONDS", 0.1)
    chief, *others = starters(addresses)

    def chief_later():
        assert known.wait(20)
        time.sleep(0.15)  # In this time the connection is refused.
        return chief()

    workers = in_threads(chief_later, *others)
    assert gather_indices(workers) == [[0, 1, 2]] * 3
    close_all(workers)


def test_every_worker_names_the_missing_ones():
    addresses = free_addresses(3)
    chief, worker = lines(in_threads(starter(addresses, 0, timeout=1.0), starter(addresses, 2)))
    assert chief == worker
    assert chief.startswith(f"worker 1 ({addresses[1]}) has not started within 1 s; ")
    assert "--worker_index" in chief
    assert "--startup_timeout" in chief
    many = free_addresses(1) + [f"host{i}:1" for i in range(1, 1024)]
    (line,) = lines(in_threads(starter(many, 0, timeout=0.1)))
    assert "worker 1 (host1:1), worker 2 (host2:1)" in line
    assert "1015 more workers have not started" in line
    assert len(line) < 300


@pytest.mark.parametrize(
    ("chief", "why"), [("127.0.0.1:9", "Connection refused"), ("no.such.invalid:9", "[Nn]ame")]
)
def test_a_missing_chief_is_worker_0(chief, why):
    (line,) = lines(in_threads(starter([chief, *free_addresses(1)], 1, timeout=0.5)))
    assert line.startswith(f"worker 0 ({chief}) has not started within 0.5 s")
    assert re.search(why, line)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("interface", ["", "127.0.0.1", "::"])
def test_a_port_in_use_is_reported_at_once(monkeypatch, index, interface):
    monkeypatch.setattr(rendezvous, "CONNECT_SECONDS", 0.3)  # for the chief, who is not there
    if interface == "::" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6")
    addresses = free_addresses(2)
    family = socket.AF_INET6 if interface == "::" else socket.AF_INET
    _, port = rendezvous.parse_address(addresses[index])
    with socket.create_server((interface, port), family=family):
        (line,) = lines(in_threads(starter(addresses, index, timeout=600)))
    assert line == f"worker {index} cannot use {addresses[index]}: Address already in use"


@pytest.mark.parametrize(("count", "late"), [(3, 2), (2, 0)])
def test_the_chief_tells_all_workers_that_a_port_is_in_use(count, late):
    addresses, event = free_addresses(count), threading.Event()
    threading.Timer(0.6, event.set).start()
    with rendezvous.listen(addresses[-1], count - 1):
        works = [starter(addresses, i, after=event if i == late else None) for i in range(count)]
        results = in_threads(*works)
    line = f"worker {count - 1} cannot use {addresses[-1]}: Address already in use"
    assert lines(results) == [line] * count


@pytest.mark.parametrize("address", ["host", "host:", ":80", "host:0", "host:65536", "host:http"])
def test_an_address_without_host_or_port_is_wrong_usage(address):
    with pytest.raises(UsageError, match="host:port"):
        Rendezvous([address, "other:1"], 0, 1.0, 1.0)


def test_tensorflow_can_use_the_ports_after_all_have_joined(joined):
    for index, address in enumerate(joined(3)[0].addresses):
        rendezvous.listen(address, index).close()


OTHER_LIST = "with other workers than worker 0; give all the same list"


@pytest.mark.parametrize(
    ("index", "common", "more", "problem"),
    [
        (1, 3, 0, "twice; give each worker its own index"),
        (3, 3, 1, OTHER_LIST),
        (2, 2, 1, OTHER_LIST),
    ],
)
def test_a_worker_started_wrongly_is_reported_to_all(admitted, index, common, more, problem):
    addresses = free_addresses(3)
    other = addresses[:common] + free_addresses(more)
    works = [starter(addresses, 0), starter(addresses, 1), starter(other, index, after=admitted)]
    line = f"worker {index} at 127.0.0.1 was started {problem}"
    assert lines(in_threads(*works)) == [line] * 3


def test_another_version_is_reported_to_both(monkeypatch):
    hello = Rendezvous._hello

    def other(self, *arguments):
        return hello(self, *arguments) | ({"version": "9.8.7"} if self.index else {})

    monkeypatch.setattr(Rendezvous, "_hello", other)
    chief, worker = lines(in_threads(*starters(free_addresses(2))))
    assert chief == worker
    assert f"9.8.7, worker 0 runs {keras_cifar.__version__}" in chief


# ---- Other programs on the network

GARBAGE = {
    "http": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "huge": b"[" * 100_000,
    "no json": b"\xff\x00abc\n",
    "deep json": b"[" * 4000 + b"\n",
    "number": b"7\n",
    "other json": rendezvous.encode("join", ["me"]),
    "other kind": rendezvous.encode("failed", "ended by a stranger"),
    "value": rendezvous.encode("value", 1),
}


def test_other_clients_are_dropped_and_do_not_delay_the_workers(monkeypatch):
    monkeypatch.setattr(rendezvous, "JOIN_SECONDS", 1.0)
    addresses, dropped = free_addresses(3), threading.Event()
    with contextlib.ExitStack() as stack:

        def send_garbage():
            silent = [stack.enter_context(connect(addresses[0])) for _ in range(20)]
            silent[0].sendall(b'["jo')  # half a message
            for data in GARBAGE.values():
                with connect(addresses[0]) as client, contextlib.suppress(ConnectionError):
                    client.sendall(data)
                    assert client.recv(10) == b"", data
            connect(addresses[0]).close()
            assert [client.recv(10) for client in silent] == [b""] * 20
            dropped.set()

        late = starter(addresses, 2, after=dropped)
        *workers, _ = in_threads(starter(addresses, 0), starter(addresses, 1), late, send_garbage)
        assert dropped.is_set()
        assert gather_indices(workers) == [[0, 1, 2]] * 3
        close_all(workers)


@pytest.mark.parametrize(
    "reply",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", rendezvous.encode("join", {}), b"[]\n", b""],
    ids=["http", "itself", "json", "nothing"],
)
def test_another_program_at_the_chiefs_address_is_tried_again(monkeypatch, reply):
    monkeypatch.setattr(rendezvous, "RETRY_SECONDS", 0.1)
    addresses, gone = free_addresses(2), threading.Event()
    with rendezvous.listen(addresses[0], 0) as other:

        def answer():
            for _ in range(2):
                client, _ = other.accept()
                with client:
                    client.recv(4)
                    client.sendall(reply)
            other.close()
            gone.set()

        chief = starter(addresses, 0, after=gone)
        *workers, _ = in_threads(chief, starter(addresses, 1), answer)
    close_all(workers)


# ---- Failures


@pytest.mark.parametrize("who", [0, 2])
def test_workers_that_wait_and_that_come_later_learn_why_another_ended(joined, who):
    workers = joined(3)
    waiting, later = workers[2 - who], workers[1]

    def end():
        time.sleep(0.2)
        workers[who].abort("the disk is full")

    first, _ = in_threads(lambda: waiting.all_gather(1), end)
    (second,) = in_threads(lambda: later.all_gather(1))
    line = f"worker {who} ({workers[0].addresses[who]}) ended: the disk is full"
    assert lines([first, second]) == [line] * 2
    assert later.failure() == line
    with pytest.raises(UserError, match="the disk is full"):
        later.all_gather(2)
    workers[who].abort("again")


@pytest.mark.parametrize("first", [0, 1, 2])
def test_closing_after_the_last_gather_fails_nowhere(joined, first):
    for _ in range(3):

        def work(worker):
            time.sleep(0.01 * (worker.index != first))
            gathered = worker.all_gather("x" * 200_000)
            worker.close()
            worker.close()
            return gathered

        assert each(joined(3), work) == [["x" * 200_000] * 3] * 3


@pytest.mark.parametrize("who", [0, 2])
def test_a_worker_that_leaves_early_is_named(joined, who):
    workers = joined(3)
    waiting = [worker for worker in workers if worker.index != who]
    results = in_threads(*(lambda w=w: w.all_gather(1) for w in waiting), workers[who].close)
    name = f"worker {who} ({workers[0].addresses[who]})"
    assert lines(results[:2]) == [f"{name} ended while the others waited for it"] * 2
    with pytest.raises(UserError, match="closed"):
        workers[who].all_gather(1)


def threads_and_files() -> tuple:
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


def test_a_start_that_fails_or_is_interrupted_leaves_nothing(monkeypatch):
    before = threads_and_files()
    lines(in_threads(*(starter(free_addresses(3), i, timeout=0.3) for i in (0, 1))))
    close_all(in_threads(*starters(free_addresses(2))))

    def interrupted(self, deadline):
        raise KeyboardInterrupt

    for method in ("_accept_workers", "_join_chief"):
        monkeypatch.setattr(Rendezvous, method, interrupted)
    for index in range(2):
        with pytest.raises(KeyboardInterrupt):
            Rendezvous(free_addresses(2), index, 20.0, 20.0)
    deadline = time.monotonic() + 5
    while threads_and_files() != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads_and_files() == before


WORKER = """
import contextlib, json, sys, time
from keras_cifar.core.errors import UserError
from keras_cifar.distributed import rendezvous
rendezvous.CLOSE_SECONDS = 0.5
addresses, index, peer_timeout, pause = json.loads(sys.argv[1])
try:
    with contextlib.closing(rendezvous.Rendezvous(addresses, index, 20.0, peer_timeout)) as worker:
        worker.all_gather(0)
        print("joined", flush=True)
        time.sleep(pause)
        print(worker.all_gather(index), flush=True)
except UserError as error:
    print(error, flush=True)
"""


@pytest.fixture
def processes():
    """Starts three processes that join and gather; each pauses before it gathers again."""
    with contextlib.ExitStack() as stack:

        def start(pauses, peer_timeout=20.0):
            addresses, found = free_addresses(3), []
            for index, pause in enumerate(pauses):
                arguments = json.dumps([addresses, index, peer_timeout, pause])
                command = [sys.executable, "-c", WORKER, arguments]
                process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
                found.append(stack.enter_context(process))
                stack.callback(process.kill)
            assert [process.stdout.readline() for process in found] == ["joined\n"] * 3
            return addresses, found

        yield start


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize(
    ("number", "peer_timeout", "why"),
    [
        (signal.SIGKILL, 20.0, "ended while the others waited for it"),
        (signal.SIGSTOP, 1.5, "has been silent for 1.5 s"),
    ],
)
def test_a_killed_or_stopped_worker_is_named(processes, who, number, peer_timeout, why):
    addresses, workers = processes([60.0 * (i == who) for i in range(3)], peer_timeout)
    workers[who].send_signal(number)
    others = [worker.stdout.readline() for i, worker in enumerate(workers) if i != who]
    assert others == [f"worker {who} ({addresses[who]}) {why}\n"] * 2


def test_workers_that_were_all_stopped_resume(processes):
    _, workers = processes([0.5] * 3, peer_timeout=1.0)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for worker in workers:
            worker.send_signal(number)
        time.sleep(1.3)
    assert [worker.stdout.readline() for worker in workers] == ["[0, 1, 2]\n"] * 3


def test_a_worker_that_works_longer_than_the_timeout_is_waited_for(joined):
    def work(worker):
        time.sleep(1.2 * worker.index)
        return worker.all_gather(worker.index)

    assert each(joined(2, peer_timeout=0.7), work) == [[0, 1]] * 2
