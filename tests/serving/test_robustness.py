"""What could keep the server from answering: dead tasks, large and slow requests, bombs, lost files."""

import asyncio
import concurrent.futures
import contextlib
import gc
import io
import json
import pathlib
import re
import shutil
import socket
import struct
import threading
import time
import types
import zlib

import numpy as np
import psutil
import pytest
from PIL import Image

from keras_cifar.core import environment
from keras_cifar.data.images import MAX_PIXELS, decoding_work
from tests.conftest import ROUNDING, colour_images, encoded

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

from keras_cifar.serving import parsing, rest, servable
from keras_cifar.serving.app import App
from keras_cifar.serving.batching import Batcher
from keras_cifar.serving.servable import Servable, Versions
from keras_cifar.serving.service import MAX_REQUESTS, Service
from tests.serving.server import serving


async def get(app: App, path: str) -> tuple[int, dict]:
    """(status, JSON) of the application's response."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "headers": [], "query_string": b""}
    await app.asgi(scope | {"server": ("x", 1), "scheme": "http", "root_path": ""}, receive, send)
    return sent[0]["status"], json.loads(sent[1]["body"])


def service(current=None) -> Service:
    """A service of one version."""
    versions = types.SimpleNamespace(current=current, get=lambda version: current)
    return Service("model", versions, Batcher(4, 0), 2**20, 1.0)


READY, ALIVE = "/v2/health/ready", "/v2/health/live"


def test_readiness_is_that_of_the_batches_and_of_the_server():
    async def main():
        one, other = service(), service()
        app, stopping = App(one), App(other)
        async with one.running(poll=60), other.running(poll=60):
            assert await get(app, READY) == (200, {"ready": True})
            other.stopping = True
            assert await get(stopping, READY) == (503, {"ready": False})
        assert await get(app, READY) == (503, {"ready": False})
        assert await get(app, ALIVE) == (200, {"live": True})
        with pytest.raises(rest.RequestError, match="restarted") as caught:
            await one.predict(types.SimpleNamespace(run={"s": None}), "s", np.zeros(1))
        assert caught.value.status == 503

    asyncio.run(main())


def test_the_old_versions_memory_is_freed_while_no_batch_is_computed(monkeypatch):
    """A batch would take the cores."""
    started, submitted = threading.Event(), threading.Event()
    events, replaced = [], ["a version that a request still uses"]

    def collect():
        started.set()
        submitted.wait(10)
        time.sleep(0.05)
        events.append("collected")
        if len(events) > 1:  # The request has its answer.
            replaced.clear()

    def compute(inputs):
        events.append("computed")
        return {"y": inputs}

    async def main():
        one = service()
        one.versions.refresh, one.versions.replaced = lambda: None, replaced
        monkeypatch.setattr(gc, "collect", collect)
        async with one.running(poll=0.01):
            while not started.is_set():
                await asyncio.sleep(0.001)
            answer = one.batcher.submit(compute, np.zeros(1))
            submitted.set()
            await answer
            while replaced:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)

    asyncio.run(asyncio.wait_for(main(), 10))
    assert events == ["collected", "computed", "collected"]


def test_a_replaced_version_is_known_until_its_memory_is_freed(trained_run, tmp_path):
    base = shutil.copytree(trained_run.path / "export", tmp_path / "base")
    versions = Versions(str(base), 4)
    old = versions.current
    shutil.copytree(base / "1", base / "2")
    assert versions.refresh() == "version 2 replaces 1"
    assert set(versions.replaced) == {old}
    gc.collect()
    assert len(versions.replaced) == 1  # a request may use it
    del old
    gc.collect()
    assert not versions.replaced


def test_what_computes_gives_way_to_the_event_loop(served_run):
    images = np.full((500, 16, 16, 3), 255).tolist()
    assert served_run.predict({"instances": images})[0] == 200  # large enough for another process
    server = psutil.Process(served_run.process.pid)
    assert {child.nice() - server.nice() for child in server.children()} == {environment.NICE}
    nice = {"tf_Compute": set(), "python": set()}
    for thread in server.threads():
        text = pathlib.Path(f"/proc/{server.pid}/task/{thread.id}/stat").read_text()
        name, rest = re.search(r"\((.*)\) (.*)", text).groups()
        nice.setdefault(name, set()).add(int(rest.split()[16]))  # the field after `priority`
    assert nice["tf_Compute"] == {server.nice() + environment.NICE}
    assert server.nice() in nice["python"]


def test_too_many_requests_are_refused():
    one = service()
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_REQUESTS):
            stack.enter_context(one.place())
        with pytest.raises(rest.RequestError, match="too many") as caught:
            stack.enter_context(one.place())
        assert caught.value.status == 503
    with one.place():
        pass


def test_the_metadata_of_a_version_that_was_deleted(trained_run, tmp_path):
    path = shutil.copytree(trained_run.path / "export" / "1", tmp_path / "1")
    app = App(service(Servable(path, 4)))
    shutil.rmtree(path)
    status, response = asyncio.run(get(app, "/v1/models/model/metadata"))
    assert status == 200
    assert "serving_bytes" in response["metadata"]["signature_def"]["signature_def"]


# ---- Large and slow requests


@pytest.fixture(scope="module")
def server(trained_run):
    with serving(trained_run.path, "--timeout=0.5") as server:
        yield server


def test_other_requests_are_answered_while_a_large_one_is_parsed(served_run):
    pixels = np.full((2000, 16, 16, 3), 255)
    body = json.dumps({"signature_name": "features", "instances": pixels.tolist()}).encode()
    assert len(body) > 7e6
    served_run.predict(body[:-2] + b"}")  # not JSON: starts the process, and computes nothing
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        start, slowest, count = time.monotonic(), 0.0, 0
        large = pool.submit(served_run.predict, body[:-2] + b", 0]}")  # no shape: as above
        while not large.done():
            before = time.monotonic()
            assert served_run.request("GET", READY)[0] == 200
            slowest, count = max(slowest, time.monotonic() - before), count + 1
        whole = time.monotonic() - start
    assert large.result()[0] == 400
    assert "shape" in large.result()[1]["error"]
    assert count > 5
    assert slowest < whole / 3, (slowest, whole)


def test_large_requests_have_the_answers_of_small_ones(monkeypatch):
    inputs = {"s": rest.Input("x", (None, 2), False), "b": rest.Input("x", (None,), True)}
    bodies = (
        b'{"signature_name": "s", "instances": [[1, 2], [3, 4]]}',
        b'{"signature_name": "b", "inputs": [{"b64": "AAAA"}, "y"]}',
        b'{"signature_name": "t", "inputs": [1]}',
        b"{",
    )

    async def decode(parser, body):
        try:
            call, array = await parser.decode(body, inputs)
        except rest.RequestError as error:
            return str(error), error.status
        return call, array.dtype, array.tolist()

    async def main():
        parser = parsing.Parser()
        small = [await decode(parser, body) for body in bodies]
        monkeypatch.setattr(parsing, "SMALL", 0)
        assert [await decode(parser, body) for body in bodies] == small
        (process,) = parser._idle
        process.kill()
        with pytest.raises((EOFError, BrokenPipeError)):
            await parser.decode(bodies[0], inputs)
        assert await decode(parser, bodies[0]) == small[0]  # by another process
        (process,) = parser._idle
        process.communicate(timeout=10)  # closes its input
        assert process.returncode == 0

    asyncio.run(main())


def trickle(connection: socket.socket, data: bytes, seconds: float = 5) -> bytes:
    """Sends a byte every 50 ms, again and again; returns what the server sends until it closes."""
    end = time.monotonic() + seconds
    connection.settimeout(0.05)
    received, position = b"", 0
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            connection.sendall(data[position % len(data) :][:1])
            position += 1
        try:
            chunk = connection.recv(1000)
        except TimeoutError:
            continue
        except ConnectionError:
            return received
        if not chunk:
            return received
        received += chunk
    raise AssertionError(f"the connection is still open; it sent {received!r}")


REQUEST = f"GET {ALIVE} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


@pytest.mark.parametrize("before", [b"", REQUEST])
@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n" + b"X: " + b"x" * 500, b"\r\n", b"G"])
def test_a_head_that_takes_too_long_is_cut_off(server, before, data):
    with socket.create_connection((server.host, server.port), 5) as connection:
        if before:
            connection.sendall(before)
            while b"live" not in connection.recv(1000):
                pass
        found = trickle(connection, data)
    assert found.startswith(b"HTTP/1.1 408 ") or (data == b"G" and b" 400 " in found)


def test_a_head_that_is_too_large_is_cut_off(server):
    with socket.create_connection((server.host, server.port), 5) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000)
        with contextlib.suppress(ConnectionError):
            assert connection.recv(100).startswith(b"HTTP/1.1 431 ")
    assert server.request("GET", READY)[0] == 200


# ---- Images


def png_header(width: int, height: int) -> bytes:
    """A PNG of that size, up to its pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_the_work_of_an_image_is_its_number_of_pixels(kind):
    assert decoding_work(encoded(np.zeros((20, 30, 3), np.uint8), kind)) == 600


def test_the_work_of_animations_scans_and_other_files():
    frames = [Image.fromarray(np.full((20, 30, 3), i, np.uint8)) for i in (0, 255)]
    for kind, expected in (("GIF", 1200), ("WEBP", MAX_PIXELS + 1)):
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:])
        assert decoding_work(file.getvalue()) == expected
    jpeg = encoded(np.zeros((20, 30, 3), np.uint8), "JPEG")
    assert decoding_work(jpeg + b"\xff\xda" * 39) == 2 * 600
    assert decoding_work(png_header(9_000, 9_000)) == 81 * 10**6
    for file in (b"", b"no image", png_header(20_000, 20_000), b"\x89PNG", b"RIFF"):
        assert decoding_work(file) > MAX_PIXELS


def test_images_that_are_decoded_at_once_are_below_the_limit(trained_run, monkeypatch):
    served = Servable(trained_run.path / "export" / "1", 4)
    small = [encoded(image) for image in colour_images(5, 16, 3)[0]]
    files = np.array([*small, png_header(20_000, 20_000), b"no", small[0]], object)
    sizes = [len(batch) for batch in servable._split(files, 4, True)]
    assert sizes == [4, 4]
    expected = served.run["serving_bytes"](files)
    assert (expected["label_index"] < 0).tolist() == [False] * 5 + [True] * 2 + [False]
    monkeypatch.setattr(servable, "MAX_PIXELS", 2 * 16 * 16)
    batches = list(servable._split(files, 4, True))
    assert [len(batch) for batch in batches] == [2, 2, 4]
    assert batches[2].tolist() == [small[4], b"", b"", small[0]]
    found = served.run["serving_bytes"](files)
    for name, values in expected.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(found[name], values, atol=ROUNDING)
        else:
            np.testing.assert_array_equal(found[name], values)
    assert files[5] == png_header(20_000, 20_000)  # the request is not changed
