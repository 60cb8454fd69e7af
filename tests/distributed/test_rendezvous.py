"""Groups of workers as threads of this process; as processes where one is stopped or killed."""

import contextlib
import json
import os
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
        taken = [stack.enter_context(socket.create_server(("", 0))) for _ in range(count)]
        return [f"{host}:{s.getsockname()[1]}" for s in taken]


def together(*works) -> list:
    """What each of the functions returns or the UserError it raises, each in a thread."""
    results = [None] * len(works)

    def run(number):
        try:
            results[number] = works[number]()
        except UserError as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=[i], daemon=True) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a worker hangs"
    return results


def starter(addresses, index, timeout=20.0, silence=20.0, after=None):
    """A function that makes the group of a worker, after an event where one is given."""

    def start():
        assert after is None or after.wait(20)
        return Rendezvous(addresses, index, timeout, silence)

    return start


def knock(address) -> socket.socket:
    """A connection to an address as soon as somebody listens there."""
    while True:
        try:
            return socket.create_connection(rendezvous.split_address(address), timeout=20)
        except ConnectionRefusedError:
            time.sleep(0.02)


@pytest.fixture
def admitted(monkeypatch):
    """An event: some worker has said hello to the chief."""
    event, admit = threading.Event(), Rendezvous._admit

    def admitting(self, *arguments):
        event.set()
        return admit(self, *arguments)

    monkeypatch.setattr(Rendezvous, "_admit", admitting)
    return event


@pytest.fixture
def meet():
    """Makes the groups of so many workers, closed after the test."""
    with contextlib.ExitStack() as stack:

        def make(addresses, **options):
            groups = together(*(starter(addresses, i, **options) for i in range(len(addresses))))
            for one in groups:
                assert isinstance(one, Rendezvous), one
                stack.callback(one.close)
            return groups

        yield make


def lines(results) -> list[str]:
    assert all(isinstance(result, UserError) for result in results), results
    assert all("\n" not in str(result) for result in results)
    return [str(result) for result in results]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_worker_gets_the_values_of_all_in_order(meet, count, host):
    if host == "[::1]" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6")
    groups = meet(free_addresses(count, host))
    for turn in range(3):
        values = [{"worker": i, "turn": turn, "list": [None, 1.5, "é"]} for i in range(count)]
        gathered = together(
            *(lambda i=i, v=v: groups[i].all_gather(v) for i, v in enumerate(values))
        )
        assert gathered == [values] * count


def test_values_of_some_megabytes_and_tuples_are_equal_everywhere(meet):
    groups = meet(free_addresses(3))
    values = [["x" * 4_000_000, i] for i in range(3)]
    assert (
        together(*(lambda i=i: groups[i].all_gather(tuple(values[i])) for i in range(3)))
        == [values] * 3
    )


def test_the_chief_may_start_last(monkeypatch):
    monkeypatch.setattr(rendezvous, "RETRY_SECONDS", 0.1)
    tried, connect = threading.Event(), socket.create_connection

    def connecting(*arguments):
        try:
            return connect(*arguments)
        finally:
            tried.set()

    monkeypatch.setattr(socket, "create_connection", connecting)
    addresses = free_addresses(3)
    chief = starter(addresses, 0, after=tried)
    groups = together(chief, *(starter(addresses, i) for i in (1, 2)))
    assert together(*(lambda i=i: groups[i].all_gather(i) for i in range(3))) == [[0, 1, 2]] * 3
    together(*(one.close for one in groups))


def test_a_name_that_is_known_later_is_tried_again(monkeypatch):
    addresses = [a.replace("127.0.0.1", "chief.example") for a in free_addresses(2)]
    tries = []

    def resolve(host, *arguments, _real=socket.getaddrinfo, **options):
        if host != "chief.example":
            return _real(host, *arguments, **options)
        tries.append(host)
        if len(tries) < 3:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return _real("127.0.0.1", *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    groups = together(*(starter(addresses, i) for i in range(2)))
    assert len(tries) == 3
    together(*(one.close for one in groups))


def test_a_name_that_stays_unknown_is_said():
    with pytest.raises(
        UserError, match=r"worker 0 \(no\.such\.invalid:9\) .* within 0.5 s \(.*[Nn]ame"
    ):
        Rendezvous(["no.such.invalid:9", *free_addresses(1)], 1, 0.5, 5.0)


def test_missing_workers_are_named_at_all_who_came():
    addresses = free_addresses(3)
    chief, worker = lines(together(starter(addresses, 0, timeout=1.0), starter(addresses, 2)))
    assert chief == worker
    assert chief.startswith(f"worker 1 ({addresses[1]}) has not started within 1 s; ")
    assert "--worker_index=1" in chief
    assert "--startup_timeout" in chief


def test_many_missing_workers_are_abbreviated():
    addresses = [f"host{i}:1" for i in range(1024)]
    addresses[0] = free_addresses(1)[0]
    (line,) = lines(together(starter(addresses, 0, timeout=0.1)))
    assert "worker 1 (host1:1), worker 2 (host2:1)" in line
    assert "and 1015 more have not started" in line
    assert len(line) < 300


def test_the_deadline_of_the_chief_counts_once_it_is_there():
    addresses, later = free_addresses(3), threading.Event()
    threading.Timer(1.6, later.set).start()
    works = [starter(addresses, 1, timeout=1.0), starter(addresses, 2, after=later)]
    groups = together(starter(addresses, 0), *works)
    assert all(isinstance(one, Rendezvous) for one in groups), groups
    together(*(one.close for one in groups))


def test_a_missing_chief_is_worker_0():
    addresses = free_addresses(2)
    (line,) = lines(together(starter(addresses, 1, timeout=0.6)))
    assert line.startswith(f"worker 0 ({addresses[0]}) ")
    assert "Connection refused" in line


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("where", ["", "127.0.0.1", "::"])
def test_a_port_in_use_is_said_at_once(monkeypatch, index, where):
    monkeypatch.setattr(rendezvous, "CONNECT_SECONDS", 0.3)  # for the chief, who is not there
    family = socket.AF_INET6 if where == "::" else socket.AF_INET
    if where == "::" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6")
    addresses = free_addresses(2)
    port = int(addresses[index].split(":")[1])
    began = time.monotonic()
    with socket.create_server((where, port), family=family):
        (line,) = lines(together(starter(addresses, index)))
    assert line == f"worker {index} cannot use {addresses[index]}: Address already in use"
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(("count", "late"), [(3, 2), (2, 0)])
def test_a_port_in_use_is_said_at_all_through_the_chief(count, late):
    addresses, event, began = free_addresses(count), threading.Event(), time.monotonic()
    threading.Timer(0.6, event.set).start()
    with rendezvous.listen(rendezvous.split_address(addresses[-1])[1]):
        after = [event if i == late else None for i in range(count)]
        results = together(*(starter(addresses, i, after=after[i]) for i in range(count)))
    line = f"worker {count - 1} cannot use {addresses[-1]}: Address already in use"
    assert lines(results) == [line] * count
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("address", ["host", "host:", ":80", "host:0", "host:65536", "host:http"])
def test_an_address_without_host_or_port_is_wrong_usage(address):
    with pytest.raises(UsageError, match="host:port"):
        Rendezvous([address, "other:1"], 0, 1.0, 1.0)


def test_ports_are_free_for_tensorflow_when_all_have_met(meet):
    addresses = free_addresses(3)
    groups = meet(addresses)
    for address in addresses:  # while the connections live, the chief's on its own port
        rendezvous.listen(rendezvous.split_address(address)[1]).close()
    for one in groups:
        one.close()
    for address in addresses:
        rendezvous.listen(rendezvous.split_address(address)[1]).close()


def test_an_index_given_twice_is_refused_at_all(admitted):
    addresses = free_addresses(3)
    again = starter(addresses, 1, after=admitted)
    results = lines(together(starter(addresses, 0), starter(addresses, 1), again))
    line = "worker 1 at 127.0.0.1 was started at 127.0.0.1 too; each needs its own index"
    assert results == [line] * 3


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda a: a + free_addresses(1), "4 workers, worker 0 with 3"),
        (lambda a: a[:2] + free_addresses(1), "other addresses than worker 0"),
    ],
    ids=["longer", "changed"],
)
def test_another_list_of_workers_is_refused_at_all(admitted, change, what):
    addresses = free_addresses(3)
    other, index = change(addresses), len(change(addresses)) - 1
    works = [starter(addresses, 0), starter(addresses, 1), starter(other, index, after=admitted)]
    line = f"worker {index} at 127.0.0.1 was started with {what}; give all of them the same list"
    assert lines(together(*works)) == [line] * 3


@pytest.mark.parametrize("key", ["version", "protocol"])
def test_another_version_is_refused_at_both(monkeypatch, key):
    addresses = free_addresses(2)
    hello = Rendezvous._hello

    def other(self):
        return hello(self) | ({key: "9.8.7"} if self.index else {})

    monkeypatch.setattr(Rendezvous, "_hello", other)
    chief, worker = lines(together(*(starter(addresses, i) for i in range(2))))
    assert chief == worker
    assert "9.8.7" in chief
    assert keras_cifar.__version__ in chief


STRANGERS = {
    "http": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "huge": (2**31).to_bytes(4) + b"[" * 100_000,
    "no json": (5).to_bytes(4) + b"\xff\x00abc",
    "deep json": (4000).to_bytes(4) + b"[" * 4000,
    "number": (1).to_bytes(4) + b"7",
    "other json": rendezvous.encode("hello", ["me"]),
    "no worker": rendezvous.encode("hello", {"protocol": 1, "version": "1", "worker": []}),
    "other kind": rendezvous.encode("failed", {"worker": 1, "version": "1"}),
    "value": rendezvous.encode("value", 1),
    "failed": rendezvous.encode("failed", "ended by a stranger"),
    "closes": b"",
}


def test_strangers_are_dropped_quietly_and_do_not_stall(monkeypatch, caplog):
    monkeypatch.setattr(rendezvous, "HELLO_SECONDS", 100.0)
    addresses, dropped = free_addresses(3), threading.Event()
    with contextlib.ExitStack() as stack:

        def strange():
            clients = [stack.enter_context(knock(addresses[0])) for _ in STRANGERS]
            silent = [stack.enter_context(knock(addresses[0])) for _ in range(20)]
            silent[0].sendall((100).to_bytes(4) + b"ha")
            for client, data in zip(clients, STRANGERS.values(), strict=True):
                client.sendall(data)
                if data:
                    with contextlib.suppress(ConnectionResetError):
                        assert client.recv(10) == b"", data
            dropped.set()

        workers = [starter(addresses, 1), starter(addresses, 2, after=dropped)]
        *groups, _ = together(starter(addresses, 0), *workers, strange)
        assert all(isinstance(one, Rendezvous) for one in groups), groups
        assert together(*(lambda i=i: groups[i].all_gather(i) for i in range(3))) == [[0, 1, 2]] * 3
        together(*(one.close for one in groups))
    assert not caplog.records


def test_half_a_hello_does_not_keep_a_stranger(monkeypatch):
    monkeypatch.setattr(rendezvous, "HELLO_SECONDS", 0.3)
    addresses, dropped = free_addresses(2), threading.Event()

    def strange():
        with knock(addresses[0]) as client:
            client.sendall((100).to_bytes(4) + b"ha")
            assert client.recv(1) == b""
        dropped.set()

    *groups, _ = together(starter(addresses, 0), starter(addresses, 1, after=dropped), strange)
    together(*(one.close for one in groups))


def test_of_many_strangers_the_oldest_are_dropped(monkeypatch):
    monkeypatch.setattr(rendezvous, "HELLO_SECONDS", 100.0)
    monkeypatch.setattr(rendezvous, "STRANGERS", 5)
    addresses, listen = free_addresses(2), rendezvous.listen
    knocked, dropped = threading.Event(), threading.Event()
    with contextlib.ExitStack() as stack:
        clients = []

        def crowded(port):
            listener = listen(port)
            if not clients:  # the chief, to whom all of them come at the same moment
                clients.extend(stack.enter_context(knock(addresses[0])) for _ in range(9))
                knocked.set()
            return listener

        def strange():
            assert knocked.wait(20)
            assert [client.recv(1) for client in clients[:4]] == [b""] * 4
            dropped.set()

        monkeypatch.setattr(rendezvous, "listen", crowded)
        *groups, _ = together(starter(addresses, 0), starter(addresses, 1, after=dropped), strange)
        together(*(one.close for one in groups))


@pytest.mark.parametrize(
    "reply",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0\0\0\2[]", rendezvous.encode("hello", {}), b""],
    ids=["http", "json", "itself", "nothing"],
)
def test_something_else_in_the_place_of_the_chief_is_tried_again(monkeypatch, reply):
    monkeypatch.setattr(rendezvous, "RETRY_SECONDS", 0.1)
    addresses, gone = free_addresses(2), threading.Event()
    with rendezvous.listen(int(addresses[0].split(":")[1])) as other:

        def answer():
            for _ in range(2):
                client, _ = other.accept()
                with client:
                    client.recv(4)
                    client.sendall(reply)
            other.close()
            gone.set()

        works = [starter(addresses, 0, after=gone), starter(addresses, 1), answer]
        *groups, _ = together(*works)
    assert all(isinstance(one, Rendezvous) for one in groups), groups
    together(*(one.close for one in groups))


@pytest.mark.parametrize("who", [0, 2])
def test_why_a_worker_ends_is_said_to_those_who_wait_and_who_come_later(meet, who):
    groups = meet(free_addresses(3))
    later = 1

    def other():
        return groups[2 - who].all_gather(1)

    def ends():
        time.sleep(0.2)
        groups[who].abort("the disk is full")

    def comes():
        time.sleep(0.5)
        return groups[later].all_gather(1)

    waiting, _, coming = together(other, ends, comes)
    line = f"worker {who} ({groups[0].addresses[who]}) ended: the disk is full"
    assert lines([waiting, coming]) == [line] * 2
    with pytest.raises(UserError, match="the disk is full"):
        groups[later].all_gather(2)
    groups[who].abort("again")


def test_a_large_value_under_way_does_not_hide_why(meet):
    groups = meet(free_addresses(2))

    def value():
        return groups[1].all_gather("x" * 50_000_000)

    def ends():
        time.sleep(0.05)
        groups[0].abort("no")

    result, _ = together(value, ends)
    assert lines([result]) == [f"worker 0 ({groups[0].addresses[0]}) ended: no"]


@pytest.mark.parametrize("first", [0, 1, 2])
def test_closing_after_the_last_gather_raises_nowhere(meet, first):
    for _ in range(3):
        groups = meet(free_addresses(3))
        values = ["x" * 2_000_000] * 3

        def work(i, groups=groups, values=values):
            if i != first:
                time.sleep(0.01)
            got = groups[i].all_gather(values[i])
            groups[i].close()
            groups[i].close()
            return got

        assert together(*(lambda i=i: work(i) for i in range(3))) == [values] * 3


@pytest.mark.parametrize("who", [0, 2])
def test_a_worker_that_leaves_early_is_named(meet, who):
    groups = meet(free_addresses(3))
    waiting = [i for i in range(3) if i != who]
    results = together(*(lambda i=i: groups[i].all_gather(i) for i in waiting), groups[who].close)
    name = f"worker {who} ({groups[0].addresses[who]})"
    assert lines(results[:2]) == [f"{name} ended while the others waited for it"] * 2
    with pytest.raises(UserError, match="closed"):
        groups[who].all_gather(1)


def test_the_others_are_told_before_an_error_is_raised(monkeypatch, meet):
    groups, end = meet(free_addresses(3)), Rendezvous._end

    def slowly(self, *arguments):
        time.sleep(0.3)
        end(self, *arguments)

    def chief():
        try:
            groups[0].all_gather(0)
        except UserError:
            return groups[0]._thread.is_alive()

    monkeypatch.setattr(Rendezvous, "_end", slowly)
    assert together(chief, lambda: groups[1].abort("no"))[0] is False


def test_who_does_not_hang_up_is_left_quietly(monkeypatch, caplog):
    monkeypatch.setattr(rendezvous, "LINGER_SECONDS", 0.2)
    addresses = free_addresses(2)
    alone = Rendezvous(addresses[:1], 0, 1.0, 1.0)
    alone.addresses, alone.index = addresses, 1

    def stubborn():
        client = knock(addresses[0])
        client.sendall(rendezvous.encode("hello", alone._hello()))
        return client

    chief, client = together(starter(addresses, 0), stubborn)
    with client:
        chief.close()
    assert not caplog.records


def test_an_interrupted_start_leaves_nothing(monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Rendezvous, "_answer", interrupted)
    before, addresses = threading.active_count(), free_addresses(2)
    for index in range(2):
        with pytest.raises(KeyboardInterrupt):
            Rendezvous(addresses, index, 20.0, 20.0)
    assert threading.active_count() == before


def test_nothing_is_left_when_a_start_fails_or_ends():
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    lines(together(*(starter(free_addresses(3), i, timeout=0.3) for i in (0, 1))))
    addresses = free_addresses(2)
    groups = together(*(starter(addresses, i) for i in range(2)))
    for one in groups:
        one.close()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


MEMBER = """
import contextlib, json, sys, time
from keras_cifar.core.errors import UserError
from keras_cifar.distributed import rendezvous
rendezvous.LINGER_SECONDS = 0.5
addresses, index, silence, pause = json.loads(sys.argv[1])
try:
    with contextlib.closing(rendezvous.Rendezvous(addresses, index, 20.0, silence)) as one:
        one.all_gather(0)
        print("met", flush=True)
        time.sleep(pause)
        print(one.all_gather(index), flush=True)
except UserError as error:
    print(error, flush=True)
"""


@pytest.fixture
def member():
    """Starts processes that meet, wait so long and gather."""
    with contextlib.ExitStack() as stack:

        def start(addresses, index, silence=20.0, pause=0.0):
            arguments = json.dumps([addresses, index, silence, pause])
            command = [sys.executable, "-c", MEMBER, arguments]
            process = stack.enter_context(
                subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            )
            stack.callback(process.kill)
            return process

        yield start


@pytest.mark.parametrize("who", [0, 1])
def test_a_killed_worker_is_named_at_once(member, who):
    addresses = free_addresses(3)
    members = [member(addresses, i, pause=60.0 * (i == who)) for i in range(3)]
    assert [one.stdout.readline() for one in members] == ["met\n"] * 3
    members[who].kill()
    began = time.monotonic()
    said = [one.stdout.readline() for i, one in enumerate(members) if i != who]
    line = f"worker {who} ({addresses[who]}) ended while the others waited for it\n"
    assert said == [line] * 2
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("who", [0, 1])
def test_a_stopped_worker_is_named_when_it_was_silent_too_long(member, who):
    addresses = free_addresses(3)
    members = [member(addresses, i, silence=2.0, pause=0.1) for i in range(3)]
    assert [one.stdout.readline() for one in members[:1]] == ["met\n"]
    members[who].send_signal(signal.SIGSTOP)
    rest = [one for i, one in enumerate(members) if i != who]
    said = [one.stdout.readlines()[-1] for one in rest]
    line = f"worker {who} ({addresses[who]}) has been silent for 2 s\n"
    assert said == [line] * 2
    members[who].send_signal(signal.SIGCONT)
    assert members[who].stdout.readlines()[-1] == line


def test_workers_that_were_all_stopped_go_on(member):
    addresses = free_addresses(3)
    members = [member(addresses, i, silence=2.0, pause=0.5) for i in range(3)]
    assert [one.stdout.readline() for one in members] == ["met\n"] * 3
    for one in members:
        one.send_signal(signal.SIGSTOP)
    time.sleep(2.2)
    for one in members:
        one.send_signal(signal.SIGCONT)
    assert [one.stdout.readline() for one in members] == ["[0, 1, 2]\n"] * 3


def test_a_worker_that_works_longer_than_the_silence_is_waited_for(meet):
    groups = meet(free_addresses(3), silence=1.0)

    def work(i):
        time.sleep(1.6 * (i == 1))
        return groups[i].all_gather(i)

    assert together(*(lambda i=i: work(i) for i in range(3))) == [[0, 1, 2]] * 3


def test_a_hundred_workers_meet(meet):
    groups = meet(free_addresses(100), timeout=20.0)
    results = together(*(lambda i=i: groups[i].all_gather(i) for i in range(100)))
    assert results == [list(range(100))] * 100
    together(*(one.close for one in groups))
