"""The serve command: a served export beside local prediction, bad requests, new versions, signals."""

import base64
import concurrent.futures
import contextlib
import http.client
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from keras_cifar.core import cli
from keras_cifar.inference.predictor import Predictor
from tests.conftest import colour_images
from tests.serving import tensorflow_serving as tfs
from tests.serving.server import serving

for package in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason="the extra `serve` is not installed")

PREDICT = "/v1/models/model:predict"
LARGEST = 2**20  # bytes of a request


@pytest.fixture(scope="module")
def base(trained_run, tmp_path_factory) -> pathlib.Path:
    """A base path that is served and where versions may be added."""
    return shutil.copytree(trained_run.path / "export", tmp_path_factory.mktemp("served") / "m")


@pytest.fixture(scope="module")
def server(base):
    """A server of `base`, whose newest version can be any."""
    flags = [f"--max_request_mb={LARGEST / 2**20}", "--poll=0.1", "--timeout=0.5"]
    with serving(base, *flags, "--batch_wait=0.05") as server:
        yield server
        assert server.process.poll() is None  # nothing that a test did has ended it


@pytest.fixture(scope="module")
def predictor(base):
    return Predictor(str(base))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """uint8 [6, 16, 16, 3]."""
    return colour_images(6, 16, 3, seed=9)[0]


def png(image) -> dict:
    """An image as its bytes in JSON."""
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return {"b64": base64.b64encode(file.getvalue()).decode()}


# ---- What TensorFlow Serving's documentation says


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("signature", ["serving_default", "serving_bytes", "features", None])
def test_requests_and_answers_are_as_documented(
    server, predictor, images, signature, by_rows, named
):
    name, values = "images", images.tolist()
    if signature == "serving_bytes":
        name, values = "image_bytes", [png(image) for image in images]
    if by_rows:
        request = {"instances": [{name: v} for v in values] if named else values}
    else:
        request = {"inputs": {name: values} if named else values}
    if signature:
        request["signature_name"] = signature
    tfs.check(request, tfs.ROW_REQUEST if by_rows else tfs.COLUMN_REQUEST)

    status, answer = server.predict(request)
    assert status == 200, answer
    tfs.check(answer, tfs.ROW_RESPONSE if by_rows else tfs.COLUMN_RESPONSE)
    result = answer["predictions" if by_rows else "outputs"]
    if signature == "features":
        np.testing.assert_allclose(result, predictor.features(images), atol=1e-5)
        return
    if by_rows:
        result = {key: [row[key] for row in result] for key in result[0]}
    expected = predictor.classify(images)
    np.testing.assert_allclose(result["probabilities"], expected, atol=1e-6)
    assert result["label_index"] == expected.argmax(1).tolist()
    assert result["label"] == [predictor.class_names[i] for i in result["label_index"]]


def test_status_and_metadata_are_as_documented(server, predictor):
    version = server.ask("GET", "/v1/models/model")[1]["model_version_status"][0]["version"]
    for suffix in ("", f"/versions/{version}"):
        status, answer = server.ask("GET", f"/v1/models/model{suffix}")
        assert status == 200
        tfs.check(answer, tfs.STATUS)
        (row,) = answer["model_version_status"]
        assert row["state"] == "AVAILABLE"
        status, answer = server.ask("GET", f"/v1/models/model{suffix}/metadata")
        assert status == 200
        tfs.check(answer, tfs.METADATA)
        assert answer["model_spec"]["version"] == version
        signatures = answer["metadata"]["signature_def"]["signature_def"]
        assert {"serving_default", "serving_bytes", "features"} <= set(signatures)
        spec = signatures["serving_default"]["inputs"]["images"]
        assert [d["size"] for d in spec["tensor_shape"]["dim"]] == ["-1", "16", "16", "3"]
        assert answer["metadata"]["class_names"] == list(predictor.class_names)


def test_a_version_can_be_asked_by_its_number(server, images):
    version = server.ask("GET", "/v1/models/model")[1]["model_version_status"][0]["version"]
    path = f"/v1/models/model/versions/{version}:predict"
    status, answer = server.ask("POST", path, {"instances": images[:1].tolist()})
    assert (status, len(answer["predictions"])) == (200, 1)


def test_health_and_metrics(server, images):
    for path in ("/v2/health/live", "/v2/health/ready", "/v1/models/model"):
        assert server.ask("GET", path)[0] == 200
    before = server.metric("keras_cifar_requests_total")
    server.predict({"instances": images.tolist()})
    server.predict(b"no")
    assert server.metric("keras_cifar_requests_total") == before + 2
    assert server.metric("keras_cifar_batch_rows_sum") >= 6
    assert server.metric("keras_cifar_model_version") >= 1
    assert server.metric("process_resident_memory_bytes") > 1e8
    text = server.ask("GET", "/metrics")[1]
    assert 'keras_cifar_requests_total{code="400",kind="other"}' not in text
    assert 'keras_cifar_requests_total{code="400",kind="predict"}' in text


# ---- Bad requests


def not_an_image(images):
    return {"signature_name": "serving_bytes", "instances": [{"b64": "bm8gaW1hZ2U="}]}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("POST", PREDICT, b"{", 400, "not JSON"),
        ("POST", PREDICT, b"", 400, "not JSON"),
        ("POST", PREDICT, {"instances": [[[1, 2, 3]]]}, 400, "[N, 16, 16, 3]"),
        ("POST", PREDICT, {"inputs": [1], "instances": [1]}, 400, "one of"),
        ("POST", PREDICT, {"signature_name": "x", "inputs": [1]}, 400, "no signature 'x'"),
        ("POST", PREDICT, not_an_image, 400, ""),
        ("POST", PREDICT, bytes(LARGEST + 1), 413, "1,048,576"),
        ("POST", "/v1/models/other:predict", {"inputs": [1]}, 404, "'other'"),
        ("POST", "/v1/models/model/versions/999:predict", {"inputs": [1]}, 404, "999"),
        ("POST", "/v1/models/model:classify", {}, 400, "malformed"),
        ("POST", "/v1/models/model/versions/x:predict", {}, 400, "malformed"),
        ("GET", PREDICT, None, 405, "POST"),
        ("POST", "/v1/models/model", {}, 405, "GET"),
        ("DELETE", "/v1/models/model", None, 405, "GET"),
        ("GET", "/v1/models/other", None, 404, "'other'"),
        ("GET", "/v1/models/model/versions/999", None, 404, "999"),
        ("GET", "/v1/models/model/versions/999/metadata", None, 404, "999"),
        ("GET", "/v1/models/", None, 400, "malformed"),
        ("GET", "/v1/nowhere", None, 404, "/v1/nowhere"),
        ("POST", "/", {}, 405, "POST /"),
    ],
)
def test_each_bad_request_has_its_answer(server, images, method, path, body, status, words):
    found, answer = server.ask(method, path, body(images) if callable(body) else body)
    assert found == status
    tfs.check(answer, tfs.ERROR)
    assert words in answer["error"]
    assert "\n" not in answer["error"]
    assert server.predict({"instances": images.tolist()})[0] == 200


def test_one_bad_image_is_marked_and_the_others_are_answered(server, images):
    good = png(images[0])
    status, answer = server.predict(
        {
            "signature_name": "serving_bytes",
            "instances": [good, {"b64": base64.b64encode(b"no image").decode()}, good],
        }
    )
    assert status == 200
    first, bad, last = answer["predictions"]
    assert first == last
    assert first["label_index"] >= 0
    assert (bad["label"], bad["label_index"]) == ("", -1)
    assert all(np.isnan(bad["probabilities"]))


@pytest.mark.parametrize(
    ("index", "refused"), [([-1, -1], True), ([-1, 2], False), ([0, 2], False)]
)
def test_a_request_is_bad_where_all_of_it_is(index, refused):
    """Rows that are marked as no image are answered, unless there are no others."""
    from keras_cifar.serving import app

    assert app._no_image({"label_index": np.array(index)}) is refused
    assert app._no_image({"features": np.zeros((2, 3))}) is False


def raw(server, data: bytes) -> bytes:
    """What the server answers to these bytes, until it closes or 5 seconds are over."""
    with contextlib.closing(socket.create_connection((server.host, server.port), 5)) as connection:
        connection.sendall(data)
        return connection.makefile("rb").read()


def test_a_body_of_unknown_length_is_limited_too(server):
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    answer = raw(server, head + chunk * (LARGEST // 0x10000 + 1))
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_slow_client_is_told_so(server):
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n".encode()
    answer = raw(server, head + b'{"instances"')
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"0.5 s" in answer


def test_a_client_that_goes_harms_nobody(server, images):
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n".encode()
    for _ in range(3):
        connection = socket.create_connection((server.host, server.port))
        connection.sendall(head + b'{"instances"')
        connection.close()
    assert server.predict({"instances": images.tolist()})[0] == 200


def test_bad_requests_at_the_same_time_fail_alone(server, predictor, images):
    expected = predictor.classify(images).argmax(1)
    good = {"signature_name": "serving_bytes"}
    requests = []
    for number in range(32):
        i = number % 6
        bad = number % 4 == 0
        requests.append(not_an_image(images) if bad else good | {"instances": [png(images[i])]})
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(server.predict, requests))
    for number, (status, answer) in enumerate(answers):
        if number % 4 == 0:
            assert (status, list(answer)) == (400, ["error"])
        else:
            assert status == 200
            assert answer["predictions"][0]["label_index"] == expected[number % 6]


def test_requests_that_come_together_are_computed_together(server, images):
    names = ("keras_cifar_batch_rows_count", "keras_cifar_batch_rows_sum")
    batches, rows = map(server.metric, names)
    request = {"instances": images[:1].tolist()}
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(server.predict, [request] * 64))
    assert all(status == 200 for status, _ in answers)
    assert server.metric(names[1]) == rows + 64
    assert server.metric(names[0]) - batches < 48


# ---- Versions


def add_version(base: pathlib.Path, source: pathlib.Path, version: int) -> None:
    """Adds a version as export does: complete, by rename."""
    temporary = base / ".writing-test"
    shutil.copytree(source, temporary)
    os.rename(temporary, base / str(version))


def until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def states(server) -> dict:
    answer = server.ask("GET", "/v1/models/model")[1]
    tfs.check(answer, tfs.STATUS)
    return {int(row["version"]): row["state"] for row in answer["model_version_status"]}


def test_a_new_version_takes_over_while_requests_go_on(server, base, images):
    (current,) = states(server)
    stop, answers = [], []

    def ask():
        while not stop:
            answers.append(server.predict({"instances": images.tolist()}))

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        tasks = [pool.submit(ask) for _ in range(2)]
        try:
            add_version(base, base / str(current), current + 1)
            until(lambda: states(server) == {current + 1: "AVAILABLE"})
        finally:
            stop.append(True)
        for task in tasks:
            task.result()
    assert len(answers) > 5
    assert {status for status, _ in answers} == {200}
    first = answers[0][1]["predictions"]
    assert all(answer["predictions"] == first for _, answer in answers)
    assert server.metric("keras_cifar_model_version") == current + 1
    assert server.ask("GET", f"/v1/models/model/versions/{current}")[0] == 404


def test_a_version_that_cannot_be_used_is_not_served(server, base, images):
    (current,) = states(server)
    broken = base / str(current + 1)
    (base / ".writing-x").mkdir()
    (base / ".writing-x" / "saved_model.pb").write_bytes(b"no model")
    os.rename(base / ".writing-x", broken)
    until(lambda: states(server).get(current + 1) == "END")
    assert states(server)[current] == "AVAILABLE"
    rows = server.ask("GET", "/v1/models/model")[1]["model_version_status"]
    assert "not a model that can be used" in rows[0]["status"]["error_message"]
    assert server.predict({"instances": images.tolist()})[0] == 200
    shutil.rmtree(broken)
    until(lambda: list(states(server)) == [current])


def test_where_the_newest_is_removed_the_one_before_is_served(server, base, images):
    (current,) = states(server)
    add_version(base, base / str(current), current + 1)
    until(lambda: states(server) == {current + 1: "AVAILABLE"})
    shutil.rmtree(base / str(current + 1))
    until(lambda: states(server) == {current: "AVAILABLE"})
    assert server.predict({"instances": images.tolist()})[0] == 200


# ---- The command


def test_signals_let_requests_in_flight_be_answered(trained_run, images):
    with serving(trained_run.path, "--batch_wait=0") as server:
        body = str({"instances": images.tolist()}).replace("'", '"').encode()
        head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection = socket.create_connection((server.host, server.port), 10)
        connection.sendall(head.encode() + body[:100])
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert server.process.poll() is None
        with pytest.raises(OSError):  # noqa: PT011  refused: nothing new is taken
            socket.create_connection((server.host, server.port), 1).close()
        connection.sendall(body[100:])
        answer = connection.makefile("rb").read()
        connection.close()
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.count(b'"label"') == 6
        _, error = server.process.communicate(timeout=10)
        assert server.process.returncode == 143
        assert error == "serve: error: stopped by SIGTERM; what was in flight was answered\n"


@pytest.fixture
def failure(capsys):
    """Runs the command in this process, which must fail: (exit status, the line on stderr)."""
    from keras_cifar import serve

    def run(*argv):
        status = cli._execute("serve", serve.main, serve.ServeOptions, "", list(argv))
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("serve: error: ")
        return status, line

    return run


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--model=x", "--port=70000"],
        ["--model=x", "--port=-1"],
        ["--model=x", "--name=a/b"],
        ["--model=x", "--name="],
        ["--model=x", "--poll=0"],
        ["--model=x", "--poll=nan"],
        ["--model=x", "--timeout=inf"],
        ["--model=x", "--max_request_mb=-1"],
        ["--model=x", "--max_batch_size=0"],
        ["--model=x", "--batch_wait=-1"],
        ["--model=x", "stray"],
    ],
)
def test_wrong_usage(failure, flags):
    assert failure(*flags)[0] == 2


def test_what_cannot_be_served_is_one_line(failure, trained_run, tmp_path):
    status, line = failure(f"--model={tmp_path}/none", "--port=0")
    assert (status, "does not exist" in line) == (1, True)
    status, line = failure(f"--model={tmp_path}", "--port=0")
    assert (status, "holds no SavedModel" in line) == (1, True)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        status, line = failure(f"--model={trained_run.path}", f"--port={port}")
        assert (status, "Address already in use" in line) == (1, True)
    status, line = failure(f"--model={trained_run.path}", "--port=0", "--host=no.such.host.invalid")
    assert (status, "cannot listen at no.such.host.invalid" in line) == (1, True)


def test_a_signature_that_fails_is_found_at_the_start(trained_run, tmp_path):
    """What loads and cannot compute is not served."""
    import tensorflow as tf

    from keras_cifar.core.errors import UserError
    from keras_cifar.serving.servable import Servable

    export = trained_run.path / "export" / "1"
    loaded = tf.saved_model.load(str(export))

    @tf.function(input_signature=[tf.TensorSpec((None,), tf.string, name="image_bytes")])
    def broken(image_bytes):
        with tf.control_dependencies([tf.debugging.Assert(False, ["no"])]):
            return {"label": tf.identity(image_bytes)}

    signatures = dict(loaded.signatures) | {"broken": broken}
    tf.saved_model.save(loaded, str(tmp_path / "1"), signatures=signatures)
    shutil.copytree(export / "assets", tmp_path / "1" / "assets", dirs_exist_ok=True)
    with pytest.raises(UserError, match="not a model that can be used"):
        Servable(tmp_path / "1", 128)


def test_small_answers_are_sent_at_once(server):
    """Not with 40 ms between their two parts, as TCP does unless told otherwise."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
    seconds = []
    with contextlib.closing(connection):
        for _ in range(20):
            start = time.perf_counter()
            connection.request("GET", "/v1/models/model")
            connection.getresponse().read()
            seconds.append(time.perf_counter() - start)
    assert min(seconds[1:]) < 0.03


def test_without_the_extra_it_says_what_to_install(trained_run):
    code = (
        "import sys; sys.modules['uvicorn'] = None\n"
        "from keras_cifar import serve; from keras_cifar.core import cli\n"
        f"sys.argv = ['x', '--model={trained_run.path}', '--port=0']\n"
        "cli.run('serve', serve.main, serve.ServeOptions, '', tensorflow=False)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'keras_cifar[serve]'" in done.stderr
    assert done.stderr.count("\n") == 1
