"""Good and bad requests of all kinds over both protocols while versions come and go.

SOAK_SECONDS=600 makes it run longer.
"""

import base64
import collections
import concurrent.futures
import contextlib
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tensorflow_serving.apis import prediction_service_pb2_grpc

from keras_cifar.core.environment import give_way
from keras_cifar.inference.predictor import Predictor
from tests.conftest import colour_images, encoded
from tests.serving.server import serving
from tests.serving.test_grpc import address, request
from tests.serving.test_robustness import READY, png_header, trickle

pytest.importorskip("grpc_health", reason="the extra `serve` is not installed")

SECONDS = float(os.environ.get("SOAK_SECONDS", "30"))
CLIENTS = 32
BAD = 0.2  # of the requests
PATIENCE = 1  # seconds that the server waits for heads and bodies
LIMIT = 8 * 2**20  # bytes of a request
TOO_LARGE = 2 * LIMIT
READY_MS = 100  # within which readiness is to answer
PREDICT = "/v1/models/model:predict"
VERSION_SECONDS = min(60, SECONDS / 4)  # between new versions
BOMB_SECONDS = 10  # between images that are just below the limit of pixels

PROBE = """
import http.client, json, sys, time
host, port, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
end, taken = time.monotonic() + seconds, []
while time.monotonic() < end:
    start = time.monotonic()
    connection = http.client.HTTPConnection(host, port, timeout=60)
    connection.request("GET", "/v2/health/ready")
    assert connection.getresponse().status == 200
    connection.close()
    taken.append(time.monotonic() - start)
    time.sleep(0.02)
print(json.dumps(taken))
"""


@contextlib.contextmanager
def idle_server(folder: pathlib.Path):
    """The port of a server that answers readiness alone: as long do probes wait for a processor."""
    (folder / READY.lstrip("/")).parent.mkdir(parents=True)
    (folder / READY.lstrip("/")).write_text("{}")
    command = [
        sys.executable,
        "-um",
        "http.server",
        "0",
        "--bind=127.0.0.1",
        f"--directory={folder}",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as process:
        try:
            yield int(re.search(r"port (\d+)", process.stdout.readline())[1])
        finally:
            process.terminate()


def probing(host: str, port: int) -> subprocess.Popen:
    command = [sys.executable, "-c", PROBE, host, str(port), str(SECONDS)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def answers(prober: subprocess.Popen) -> np.ndarray:
    """Milliseconds of each answer."""
    return 1e3 * np.array(json.loads(prober.communicate(timeout=60)[0]))


def spread(taken: np.ndarray) -> str:
    parts = np.median(taken), np.percentile(taken, 99), taken.max(), (taken >= READY_MS).sum()
    return "median {:.1f}, 99 % {:.1f}, at most {:.1f} ms, {} late".format(*parts)


NOT_JSON = b"{'instances'"
WRONG_SHAPE = {"instances": [[[[1, 2, 3]]]]}
NOT_AN_IMAGE = {"signature_name": "serving_bytes", "inputs": [{"b64": "AAAA"}]}


def refused(server) -> None:
    for body in (NOT_JSON, WRONG_SHAPE, NOT_AN_IMAGE):
        status, response = server.predict(body)
        assert (status, list(response)) == (400, ["error"])


def connect(server, length: int, end: bytes = b"\r\n") -> socket.socket:
    connection = socket.create_connection((server.host, server.port), 30)
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n"
    connection.sendall(head.encode() + end)
    return connection


def too_large(server) -> None:
    with contextlib.closing(connect(server, TOO_LARGE)) as connection:
        # The server may close while this still sends.
        with contextlib.suppress(OSError):
            for _ in range(TOO_LARGE // 2**20):
                connection.sendall(bytes(2**20))
        with contextlib.suppress(ConnectionError):
            assert connection.recv(12) in (b"HTTP/1.1 413", b"")


def slow(server) -> None:
    with contextlib.closing(connect(server, 1000)) as connection:
        end = time.monotonic() + PATIENCE + 1
        with contextlib.suppress(OSError):
            while time.monotonic() < end:
                connection.sendall(b" ")
                time.sleep(0.1)
        with contextlib.suppress(ConnectionError):
            assert connection.recv(12) == b"HTTP/1.1 408"


def dropped(server) -> None:
    body = json.dumps({"instances": np.zeros((8, 16, 16, 3), int).tolist()}).encode()
    for sent in (body[:-1], body):  # before the request is whole, and before the response
        connection = connect(server, len(body))
        connection.sendall(sent)
        connection.close()


class Client:
    """Sends requests to a server, and checks the responses.

    Attributes:
        counts: requests that were answered as they should be, by kind.
    """

    def __init__(self, server, predictor: Predictor):
        self.server, self.counts = server, collections.Counter()
        self.channel = grpc.insecure_channel(address(server))
        self.stub = prediction_service_pb2_grpc.PredictionServiceStub(self.channel)
        self.images = colour_images(1000, 16, 3, seed=1)[0]
        sides = np.linspace(8, 500, 16).astype(int)
        large = [
            Image.fromarray(i).resize((s, s)) for i, s in zip(self.images, sides, strict=False)
        ]
        self.files = list(map(encoded, large))
        by_file = predictor.signatures["serving_bytes"](image_bytes=tf.constant(self.files))
        self.expected = predictor.classify(self.images), by_file["probabilities"].numpy()
        self.bomb = encoded(Image.new("1", (13_000, 13_000)))
        self.turn, self.bombed = itertools.count(), 0.0
        self.good = [self.rest_images, self.rest_files, self.grpc_tensors, self.grpc_files]
        kinds = [lambda f=f: f(server) for f in (refused, too_large, slow, dropped)]
        self.bad = [*kinds, self.slow_head, self.bombs, self.grpc_refused]
        # Bodies are written once: clients and server share the processors.
        self.bodies = {n: self._body(self.images[:n].tolist()) for n in (1, 10, 1000)}

    @staticmethod
    def _body(values: list, signature: str = "serving_default") -> bytes:
        return json.dumps({"signature_name": signature, "inputs": values}).encode()

    def check(self, found, expected: np.ndarray) -> None:
        np.testing.assert_allclose(found, expected, atol=1e-5)

    def rest_images(self) -> None:
        count = (1, 10, 1, 10, 1000)[next(self.turn) % 5]
        status, response = self.server.predict(self.bodies[count])
        assert status == 200, response
        self.check(response["outputs"]["probabilities"], self.expected[0][:count])

    def rest_files(self) -> None:
        row = next(self.turn) % len(self.files)
        values = [{"b64": base64.b64encode(self.files[row]).decode()}]
        status, response = self.server.predict(self._body(values, "serving_bytes"))
        assert status == 200, response
        self.check(response["outputs"]["probabilities"], self.expected[1][row : row + 1])

    def grpc_tensors(self) -> None:
        turn = next(self.turn) % 50
        images = self.images[turn : turn + 1] if turn else np.tile(self.images, (10, 1, 1, 1))
        response = self.stub.Predict(request(images), timeout=60)
        expected = self.expected[0][turn : turn + 1] if turn else np.tile(self.expected[0], (10, 1))
        self.check(tf.make_ndarray(response.outputs["probabilities"]), expected)

    def grpc_files(self) -> None:
        message = request(self.files, "serving_bytes", "image_bytes")
        response = self.stub.Predict(message, timeout=60)
        self.check(tf.make_ndarray(response.outputs["probabilities"]), self.expected[1])

    def slow_head(self) -> None:
        with contextlib.closing(connect(self.server, 0, end=b"")) as connection:
            assert trickle(connection, b"X: " + b"x" * 500).startswith(b"HTTP/1.1 408")

    def bombs(self) -> None:
        values = [png_header(20_000, 20_000)] * 50
        if time.monotonic() > self.bombed + BOMB_SECONDS:
            self.bombed = time.monotonic()
            values = [self.bomb] * 2
        message = request(values, "serving_bytes", "image_bytes")
        if values[0] == self.bomb:
            assert len(self.stub.Predict(message, timeout=60).outputs) == 3
        else:
            self.grpc_fails(message, grpc.StatusCode.INVALID_ARGUMENT)

    def grpc_refused(self) -> None:
        images = self.images[:1]
        self.grpc_fails(request(images, model="other"), grpc.StatusCode.NOT_FOUND)
        self.grpc_fails(request(images.astype(float)), grpc.StatusCode.INVALID_ARGUMENT)
        large = np.zeros((LIMIT // 768 + 1, 16, 16, 3), np.uint8)
        self.grpc_fails(request(large), grpc.StatusCode.RESOURCE_EXHAUSTED)

    def grpc_fails(self, message, code: grpc.StatusCode) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            self.stub.Predict(message, timeout=60)
        assert caught.value.code() is code, caught.value

    def work(self, seed: int, end: float) -> None:
        random = np.random.default_rng(seed)
        while time.monotonic() < end:
            kinds = self.bad if random.random() < BAD else self.good
            number = random.integers(len(kinds))
            kinds[number]()
            self.counts[("bad" if kinds is self.bad else "good", int(number))] += 1


def change_versions(base: pathlib.Path, end: float, stopped: threading.Event) -> int:
    """Adds a version every VERSION_SECONDS and removes the newest once; returns how often."""
    changes = 0
    while not stopped.wait(min(VERSION_SECONDS, max(0, end - time.monotonic()))):
        if time.monotonic() >= end:
            break
        newest = max(int(path.name) for path in base.iterdir() if path.name.isdecimal())
        if changes == 1:
            shutil.rmtree(base / str(newest))
        else:
            shutil.copytree(base / "1", base / ".writing")
            os.rename(base / ".writing", base / str(newest + 1))
        changes += 1
    return changes


@pytest.mark.slow
def test_good_requests_succeed_whatever_else_comes(trained_run, tmp_path):
    base = shutil.copytree(trained_run.path / "export", tmp_path / "base")
    flags = ["--grpc_port=0", f"--timeout={PATIENCE}", f"--max_request_mb={LIMIT / 2**20}"]
    with serving(base, *flags) as server:
        client, memory, stopped = Client(server, Predictor(str(base))), [], threading.Event()
        end = time.monotonic() + SECONDS
        with (
            idle_server(tmp_path / "idle") as idle_port,
            probing(server.host, server.port) as prober,
            probing("127.0.0.1", idle_port) as idle_prober,
            concurrent.futures.ThreadPoolExecutor(CLIENTS + 1, "client", give_way) as pool,
        ):
            # Clients on other machines would not take the server's cores either.
            tasks = [pool.submit(client.work, seed, end) for seed in range(CLIENTS)]
            versions = pool.submit(change_versions, base, end, stopped)
            try:
                while time.monotonic() < end and not any(t.done() and t.exception() for t in tasks):
                    memory.append(server.memory())
                    time.sleep(0.5)
            finally:
                stopped.set()
            for task in tasks:
                task.result()
            taken, idle = answers(prober), answers(idle_prober)
        assert server.request("GET", READY) == (200, {"ready": True})
        server.process.send_signal(signal.SIGTERM)
        _, errors = server.process.communicate(timeout=60)
    third = len(memory) // 3
    before, after = np.median(memory[third : 2 * third]), np.median(memory[2 * third :])
    print(dict(client.counts), f"versions changed {versions.result()} times")
    print(f"memory, MiB: {before / 2**20:.0f}, then {after / 2**20:.0f}; at most", end=" ")
    print(f"{max(memory) / 2**20:.0f}")
    print(f"readiness: {spread(taken)}; of a server without work: {spread(idle)}")
    assert {kind for kind, _ in client.counts} == {"good", "bad"}
    assert versions.result() >= 3
    assert "Traceback" not in errors
    assert np.median(taken) < READY_MS
    assert np.percentile(taken, 99) < 10 * READY_MS
    assert after < 1.1 * before + 50 * 2**20
