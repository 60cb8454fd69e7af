"""A minute of real images and bad requests at the same time; needs CIFAR-10's images."""

import base64
import concurrent.futures
import contextlib
import itertools
import json
import os
import pathlib
import shutil
import socket
import threading
import time

import numpy as np
import pytest

from keras_cifar.core.config import TrainConfig
from keras_cifar.core.run_directory import Run
from keras_cifar.inference.predictions import classify_files
from keras_cifar.inference.predictor import Predictor
from keras_cifar.training import trainer
from tests.serving.server import serving

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

PREDICT = "/v1/models/model:predict"
CLIENTS = 16
SECONDS = 60
PATIENCE = 1  # seconds that the server waits for a body
TOO_LARGE = 50 * 2**20  # bytes of the request that is too large


@pytest.fixture(scope="module")
def images() -> list[pathlib.Path]:
    """A thousand test images, a hundred a class."""
    root = pathlib.Path(os.environ["CIFAR10_FOLDER"]) / "test"
    return [path for folder in sorted(root.iterdir()) for path in sorted(folder.iterdir())[:100]]


@pytest.fixture(scope="module")
def run(tmp_path_factory, images) -> Run:
    """A briefly trained network: its probabilities are close together."""
    data, source = tmp_path_factory.mktemp("data"), images[0].parents[2]
    for split, count in (("train", 200), ("test", 5)):
        for folder in sorted((source / split).iterdir()):
            (data / split / folder.name).mkdir(parents=True)
            for path in sorted(folder.iterdir())[:count]:
                shutil.copy(path, data / split / folder.name)
    run = Run(tmp_path_factory.mktemp("runs") / "run")
    config = TrainConfig.from_flags(
        model="resnet20", data=f"folder:{data}", epochs=2, batch_size=64, run_dir=str(run.path)
    )
    trainer.train(config, run)
    return run


@pytest.fixture(scope="module")
def expected(run, images) -> list[str]:
    """The labels by local prediction."""
    rows, _ = classify_files(Predictor(str(run.path)), list(map(str, images)), 1)
    return [row["top"][0]["label"] for row in rows]


@pytest.fixture
def server(run):
    with serving(run.path, f"--timeout={PATIENCE}") as server:
        yield server


def label(server, path) -> str:
    """The predicted label of an image file, which is sent unchanged."""
    encoded = {"b64": base64.b64encode(path.read_bytes()).decode()}
    request = {"signature_name": "serving_bytes", "instances": [encoded]}
    status, response = server.predict(request)
    assert status == 200, response
    return response["predictions"][0]["label"]


@pytest.mark.cifar
def test_a_thousand_real_images_have_the_labels_of_local_prediction(server, images, expected):
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(lambda path: label(server, path), images))
    assert len(found) == 1000
    assert len(set(found)) > 3
    assert found == expected
    batches = server.metric("keras_cifar_batch_rows_count")
    assert server.metric("keras_cifar_batch_rows_sum") / batches > 2  # an image each would be 1


NOT_JSON = b"{'instances'"
WRONG_SHAPE = {"instances": [[[[1, 2, 3]]]]}
NOT_AN_IMAGE = {"signature_name": "serving_bytes", "inputs": [{"b64": "AAAA"}]}


def refused(server) -> None:
    for body in (NOT_JSON, WRONG_SHAPE, NOT_AN_IMAGE):
        status, response = server.predict(body)
        assert (status, list(response)) == (400, ["error"])


def connect(server, length: int) -> socket.socket:
    connection = socket.create_connection((server.host, server.port), 30)
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
    connection.sendall(head.encode())
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
    body = json.dumps({"instances": np.zeros((8, 32, 32, 3), int).tolist()}).encode()
    for sent in (body[:-1], body):  # before the request is whole, and before the response
        connection = connect(server, len(body))
        connection.sendall(sent)
        connection.close()


@pytest.mark.cifar
@pytest.mark.slow
def test_for_a_minute_bad_requests_fail_alone_and_memory_stays(server, images, expected):
    kinds = (refused, too_large, slow, dropped)
    counts, memory = dict.fromkeys(["good", *(f.__name__ for f in kinds)], 0), []
    turns, lock = itertools.cycle(range(len(images))), threading.Lock()
    end = time.monotonic() + SECONDS

    def good() -> None:
        while time.monotonic() < end:
            with lock:
                number = next(turns)
            assert label(server, images[number]) == expected[number]
            with lock:
                counts["good"] += 1

    def bad(kind) -> None:
        while time.monotonic() < end:
            kind(server)
            counts[kind.__name__] += 1
            time.sleep(0.05)

    def watch() -> None:
        while time.monotonic() < end:
            memory.append(server.memory())
            time.sleep(0.5)

    with concurrent.futures.ThreadPoolExecutor(CLIENTS + len(kinds) + 1) as pool:
        tasks = [pool.submit(good) for _ in range(CLIENTS)]
        tasks += [pool.submit(bad, kind) for kind in kinds] + [pool.submit(watch)]
        for task in tasks:
            task.result()
    third = len(memory) // 3
    before, after = np.median(memory[third : 2 * third]), np.median(memory[2 * third :])
    print(counts, f"memory, MiB: {before / 2**20:.0f}, then {after / 2**20:.0f}")
    assert min(counts.values()) > 10
    assert after < 1.03 * before  # a body of 50 MB that stayed would be more
    assert server.process.poll() is None
