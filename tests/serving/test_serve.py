"""The serve command: responses beside local prediction, bad requests, new versions, signals."""

import base64
import concurrent.futures
import contextlib
import gc
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import sys
import threading
import time

import numpy as np
import pytest
import tensorflow as tf

from keras_cifar import serve
from keras_cifar.core import cli
from keras_cifar.core.errors import UserError
from keras_cifar.inference.predictor import Predictor
from keras_cifar.serving import servable
from keras_cifar.serving.servable import Servable, Versions
from keras_cifar.serving.server import _listen
from tests.conftest import colour_images, encoded, equal_but_for_rounding
from tests.serving import tensorflow_serving as tfs
from tests.serving.server import serving

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

PREDICT = "/v1/models/model:predict"
MAX_REQUEST = 2**20  # bytes of a request


@pytest.fixture(scope="module")
def base(trained_run, tmp_path_factory) -> pathlib.Path:
    """A base path that is served and where versions may be added."""
    return shutil.copytree(trained_run.path / "export", tmp_path_factory.mktemp("served") / "m")


@pytest.fixture(scope="module")
def server(base):
    """A server of `base`, whose newest version can be any."""
    flags = [f"--max_request_mb={MAX_REQUEST / 2**20}", "--poll=0.1", "--timeout=0.5"]
    with serving(base, *flags, "--batch_wait=0.05") as server:
        yield server
        assert server.process.poll() is None  # No test has ended it.


@pytest.fixture(scope="module")
def predictor(base):
    return Predictor(str(base))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """uint8 [6, 16, 16, 3]."""
    return colour_images(6, 16, 3, seed=9)[0]


def png(image) -> dict:
    """An image as its bytes in JSON."""
    return {"b64": base64.b64encode(encoded(image)).decode()}


# ---- TensorFlow Serving's documentation


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("signature", ["serving_default", "serving_bytes", "features", None])
def test_requests_and_responses_are_as_documented(
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

    status, response = server.predict(request)
    assert status == 200, response
    tfs.check(response, tfs.ROW_RESPONSE if by_rows else tfs.COLUMN_RESPONSE)
    result = response["predictions" if by_rows else "outputs"]
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
    version = server.request("GET", "/v1/models/model")[1]["model_version_status"][0]["version"]
    for suffix in ("", f"/versions/{version}"):
        _, response = server.request("GET", f"/v1/models/model{suffix}")
        tfs.check(response, tfs.STATUS)
        assert [row["state"] for row in response["model_version_status"]] == ["AVAILABLE"]
        _, response = server.request("GET", f"/v1/models/model{suffix}/metadata")
        tfs.check(response, tfs.METADATA)
        assert response["model_spec"]["version"] == version
        signatures = response["metadata"]["signature_def"]["signature_def"]
        assert {"serving_default", "serving_bytes", "features"} <= set(signatures)
        spec = signatures["serving_default"]["inputs"]["images"]
        assert [d["size"] for d in spec["tensor_shape"]["dim"]] == ["-1", "16", "16", "3"]
        assert response["metadata"]["class_names"] == list(predictor.class_names)


def test_health_and_metrics(server, images):
    for path in ("/v2/health/live", "/v2/health/ready", "/v1/models/model"):
        assert server.request("GET", path)[0] == 200
    before = server.metric("keras_cifar_requests_total")
    server.predict({"instances": images.tolist()})
    server.predict(b"no")
    assert server.metric("keras_cifar_requests_total") == before + 2
    assert server.metric("keras_cifar_batch_rows_sum") >= 6
    assert server.metric("keras_cifar_model_version") >= 1
    assert server.metric("process_resident_memory_bytes") > 1e8
    text = server.request("GET", "/metrics")[1]
    assert 'keras_cifar_requests_total{code="400",kind="predict"}' in text


# ---- Bad requests


NOT_AN_IMAGE = {"signature_name": "serving_bytes", "instances": [{"b64": "bm8gaW1hZ2U="}]}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", PREDICT, b"{", 400, "not JSON"),
        ("POST", PREDICT, b"", 400, "not JSON"),
        ("POST", PREDICT, {"instances": [[[1, 2, 3]]]}, 400, "[N, 16, 16, 3]"),
        ("POST", PREDICT, {"inputs": [1], "instances": [1]}, 400, "one of"),
        ("POST", PREDICT, {"signature_name": "x", "inputs": [1]}, 400, "no signature 'x'"),
        ("POST", PREDICT, NOT_AN_IMAGE, 400, "no image in the request"),
        ("POST", PREDICT, bytes(MAX_REQUEST + 1), 413, "1,048,576"),
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
def test_each_bad_request_has_its_error(server, images, method, path, body, status, message):
    found, response = server.request(method, path, body)
    assert found == status
    tfs.check(response, tfs.ERROR)
    assert message in response["error"]
    assert "\n" not in response["error"]
    assert server.predict({"instances": images.tolist()})[0] == 200


def test_one_invalid_image_is_marked_and_the_others_are_predicted(server, images):
    good = png(images[0])
    instances = [good, *NOT_AN_IMAGE["instances"], good]
    status, response = server.predict(NOT_AN_IMAGE | {"instances": instances})
    assert status == 200
    first, bad, last = response["predictions"]
    assert equal_but_for_rounding(json.dumps(first), json.dumps(last))
    assert first["label_index"] >= 0
    assert (bad["label"], bad["label_index"]) == ("", -1)
    assert all(np.isnan(bad["probabilities"]))


def raw(server, data: bytes) -> bytes:
    """Sends bytes and returns the response, until the server closes or 5 seconds are over."""
    with contextlib.closing(socket.create_connection((server.host, server.port), 5)) as connection:
        connection.sendall(data)
        return connection.makefile("rb").read()


def test_a_body_of_unknown_length_is_limited_too(server):
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    response = raw(server, head + chunk * (MAX_REQUEST // 0x10000 + 1))
    assert response.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/models/other:predict", 404),
        ("POST", "/v1/models/model/versions/9:predict", 404),
        ("POST", "/nowhere", 404),
        ("PUT", PREDICT, 405),
    ],
)
def test_the_body_of_a_refused_request_is_received(server, method, path, status):
    size, slice_ = MAX_REQUEST // 2, MAX_REQUEST // 8
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode()
    with contextlib.closing(socket.create_connection((server.host, server.port), 5)) as connection:
        connection.sendall(head + bytes(slice_))
        for _ in range(size // slice_ - 1):
            time.sleep(0.05)  # An answer that waits for no body is sent meanwhile.
            connection.sendall(bytes(slice_))
        end = b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        connection.sendall(end)
        statuses = re.findall(rb"HTTP/1\.1 (\d+)", connection.makefile("rb").read())
    assert statuses == [b"%d" % status, b"200"]


INCOMPLETE = f'POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{"ins'.encode()


def test_a_slow_client_gets_status_408(server):
    response = raw(server, INCOMPLETE)
    assert response.startswith(b"HTTP/1.1 408 ")
    assert b"0.5 s" in response


def test_a_client_that_disconnects_harms_no_other(server, images):
    for _ in range(3):
        with socket.create_connection((server.host, server.port)) as connection:
            connection.sendall(INCOMPLETE)
    assert server.predict({"instances": images.tolist()})[0] == 200


def test_requests_that_arrive_together_share_batches_and_bad_ones_fail_alone(
    server, predictor, images
):
    names = ("keras_cifar_batch_rows_count", "keras_cifar_batch_rows_sum")
    batches, rows = map(server.metric, names)
    good = [{"signature_name": "serving_bytes", "instances": [png(image)]} for image in images[:3]]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        responses = list(pool.map(server.predict, [NOT_AN_IMAGE, *good] * 16))
    for status, response in responses[::4]:
        assert (status, list(response)) == (400, ["error"])
    for i, label in enumerate(predictor.classify(images[:3]).argmax(1), start=1):
        for status, response in responses[i::4]:
            assert status == 200
            assert response["predictions"][0]["label_index"] == label
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
    response = server.request("GET", "/v1/models/model")[1]
    tfs.check(response, tfs.STATUS)
    return {int(row["version"]): row["state"] for row in response["model_version_status"]}


def test_a_new_version_takes_over_between_requests(server, base, images):
    (current,) = states(server)
    stop, responses = [], []

    def client():
        while not stop:
            responses.append(server.predict({"instances": images.tolist()}))

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        tasks = [pool.submit(client) for _ in range(2)]
        try:
            add_version(base, base / str(current), current + 1)
            until(lambda: states(server) == {current + 1: "AVAILABLE"})
        finally:
            stop.append(True)
        for task in tasks:
            task.result()
    assert len(responses) > 5
    assert responses[0][0] == 200
    assert equal_but_for_rounding(*map(json.dumps, responses))
    assert server.metric("keras_cifar_model_version") == current + 1
    until(lambda: server.metric("keras_cifar_versions_in_memory") == 1)
    assert server.request("GET", f"/v1/models/model/versions/{current}")[0] == 404


def test_an_invalid_version_is_not_served(server, base, images, tmp_path):
    (current,) = states(server)
    broken = base / str(current + 1)
    (tmp_path / "saved_model.pb").write_bytes(b"no model")
    add_version(base, tmp_path, current + 1)
    until(lambda: states(server).get(current + 1) == "END")
    assert states(server)[current] == "AVAILABLE"
    rows = server.request("GET", "/v1/models/model")[1]["model_version_status"]
    assert "not a valid model" in rows[0]["status"]["error_message"]
    assert server.predict({"instances": images.tolist()})[0] == 200
    shutil.rmtree(broken)
    until(lambda: list(states(server)) == [current])


def test_when_the_newest_version_is_removed_the_previous_one_is_served(server, base, images):
    (current,) = states(server)
    assert server.predict({"instances": images.tolist()})[0] == 200
    add_version(base, base / str(current), current + 1)
    until(lambda: states(server) == {current + 1: "AVAILABLE"})
    until(lambda: server.metric("keras_cifar_versions_in_memory") == 1)
    shutil.rmtree(base / str(current + 1))
    until(lambda: states(server) == {current: "AVAILABLE"})
    assert server.predict({"instances": images.tolist()})[0] == 200


# ---- The command


def test_requests_in_flight_are_answered_after_a_signal(trained_run, images):
    with serving(trained_run.path, "--batch_wait=0") as server:
        body = str({"instances": images.tolist()}).replace("'", '"').encode()
        head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection = socket.create_connection((server.host, server.port), 10)
        connection.sendall(head.encode() + body[:100])
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert server.process.poll() is None
        with pytest.raises(OSError):  # noqa: PT011  refused: no new connections
            socket.create_connection((server.host, server.port), 1).close()
        connection.sendall(body[100:])
        response = connection.makefile("rb").read()
        connection.close()
        assert response.startswith(b"HTTP/1.1 200 ")
        assert response.count(b'"label"') == 6
        _, error = server.process.communicate(timeout=10)
        assert server.process.returncode == 143
        assert error == "serve: error: stopped by SIGTERM; requests in flight were answered\n"


@pytest.fixture
def failure(capsys):
    """Runs the command in this process, which must fail: (exit status, the line on stderr)."""

    def run(*argv):
        status = cli._execute("serve", serve.main, serve.ServeOptions, "", list(argv))
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("serve: error: ")
        return status, line

    usual = gc.get_threshold()
    yield run
    gc.unfreeze()
    gc.set_threshold(*usual)


WRONG = "grpc_port=-1 port=70000 port=-1 name=a/b name= poll=0 poll=nan timeout=inf model="
WRONG += " max_request_mb=-1 max_batch_size=0 batch_wait=-1"


@pytest.mark.parametrize("flag", WRONG.split())
def test_wrong_usage(failure, flag):
    status, line = failure("--model=x", f"--{flag}")
    assert status == 2
    assert f"--{flag.partition('=')[0]}=" in line


def test_a_failure_to_start_is_one_line(failure, trained_run, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for model, flags, message in (
            (tmp_path / "none", ["--port=0"], "does not exist"),
            (tmp_path, ["--port=0"], "holds no SavedModel"),
            (trained_run.path, [f"--port={port}"], "Address already in use"),
            (trained_run.path, ["--port=0", "--host=no.invalid"], "cannot listen at no.invalid"),
        ):
            status, line = failure(f"--model={model}", *flags)
            assert status == 1
            assert message in line


def test_a_signature_that_fails_is_found_at_the_start(trained_run, tmp_path):
    """A model that loads and cannot be computed is not served."""
    export = trained_run.path / "export" / "1"
    loaded = tf.saved_model.load(str(export))

    @tf.function(input_signature=[tf.TensorSpec((None,), tf.string, name="image_bytes")])
    def broken(image_bytes):
        with tf.control_dependencies([tf.debugging.Assert(False, ["no"])]):
            return {"label": tf.identity(image_bytes)}

    signatures = dict(loaded.signatures) | {"broken": broken}
    tf.saved_model.save(loaded, str(tmp_path / "1"), signatures=signatures)
    shutil.copytree(export / "assets", tmp_path / "1" / "assets", dirs_exist_ok=True)
    with pytest.raises(UserError, match="not a valid model"):
        Servable(tmp_path / "1", 128)


@pytest.mark.parametrize("policy", ["float32", "auto"])
def test_versions_are_computed_in_bfloat16_where_it_is_wanted(trained_run, rewriting, policy):
    versions = Versions(str(trained_run.path), 4, policy)
    assert versions.current.precision[0] == ("float32" if policy == "float32" else "bfloat16")
    assert bool(rewriting) == (policy == "auto")


def test_a_batch_is_computed_in_parts_at_the_same_time(trained_run, monkeypatch):
    path = trained_run.path / "export" / "1"
    whole, divided = Servable(path, 128), Servable(path, 128, parts=2)
    shape = (5, *whole.inputs["serving_default"].shape[1:])
    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    both, sizes = threading.Barrier(2, timeout=20), []
    constant = tf.constant

    def meeting(part):
        sizes.append(len(part))
        both.wait()  # breaks if one part waits for the other
        return constant(part)

    expected = whole.run["serving_default"](images)
    monkeypatch.setattr(tf, "constant", meeting)
    found = divided.run["serving_default"](images)
    assert sorted(sizes) == [2, 3]
    for name, values in expected.items():
        assert found[name].shape == values.shape
    np.testing.assert_allclose(found["probabilities"], expected["probabilities"], atol=1e-6)
    np.testing.assert_array_equal(found["label"], expected["label"])


@pytest.mark.parametrize(("larger", "threads"), [(0, [1]), (1, [])])
def test_each_core_computes_images_of_its_own_where_they_are_small(
    trained_run, monkeypatch, larger, threads
):
    side = max(Predictor(str(trained_run.path)).size)
    monkeypatch.setattr(servable, "MAX_OWN_CORE", side - larger)
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "3")
    given = []
    monkeypatch.setattr(
        tf.config.threading, "set_intra_op_parallelism_threads", lambda number: given.append(number)
    )
    assert servable.give_cores(str(trained_run.path)) == (3 if threads else 1)
    assert given == threads
    for value in ("0", "many"):
        monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", value)
        assert servable.give_cores(str(trained_run.path)) >= 1


def test_cores_are_shared_where_tensorflow_computes_already(trained_run):
    tf.constant(1)
    assert servable.give_cores(str(trained_run.path)) == 1


def test_what_lives_long_is_rarely_looked_through_while_requests_wait(failure, tmp_path):
    before = gc.get_freeze_count()
    gc.set_threshold(600, 9, 10)
    assert failure(f"--model={tmp_path}", "--port=0")[0] == 1
    assert gc.get_freeze_count() > before + 100_000
    assert gc.get_threshold() == (600, 9, 1000)


def test_small_responses_are_sent_at_once():
    """asyncio sets TCP_NODELAY only where TCP is named; without it a response waits for 40 ms."""
    with _listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_without_the_extra_the_error_names_it(failure, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "keras_cifar.serving.server", raising=False)
    monkeypatch.delattr("keras_cifar.serving.server", raising=False)
    status, line = failure("--model=x")
    assert status == 1
    assert "pip install 'keras_cifar[serve]'" in line
