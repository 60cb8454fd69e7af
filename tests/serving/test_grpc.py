"""gRPC: TensorFlow Serving's own stubs, beside the responses over HTTP; errors, health, signals."""

import asyncio
import base64
import concurrent.futures
import contextlib
import json
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import types

import grpc
import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import json_format, struct_pb2
from tensorflow.core.framework import tensor_pb2, types_pb2
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from keras_cifar import serve
from keras_cifar.core import cli
from tests.conftest import colour_images, encoded
from tests.serving.server import Server, serving
from tests.serving.test_robustness import service

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
pytest.importorskip("grpc_health", reason="the extra `serve` is not installed")

from grpc_health.v1 import health_pb2, health_pb2_grpc

from keras_cifar.serving.rest import Input
from keras_cifar.serving.rpc import GrpcServer
from keras_cifar.serving.service import MAX_REQUESTS

PREDICT = "/tensorflow.serving.PredictionService/Predict"
MAX_REQUEST = 2**20  # bytes
Code = grpc.StatusCode


def address(server: Server) -> str:
    return server.grpc_url.split("/")[2]


@pytest.fixture(scope="module")
def server(trained_run):
    flags = ["--grpc_port=0", f"--max_request_mb={MAX_REQUEST / 2**20}", "--timeout=1"]
    with serving(trained_run.path / "export", *flags) as server:
        yield server
        assert server.process.poll() is None


@pytest.fixture(scope="module")
def channel(server):
    with grpc.insecure_channel(address(server)) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel):
    return prediction_service_pb2_grpc.PredictionServiceStub(channel)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """uint8 [6, 16, 16, 3]."""
    return colour_images(6, 16, 3, seed=9)[0]


def request(values, signature="", name="images", model="model", version=None, outputs=()):
    message = predict_pb2.PredictRequest(output_filter=outputs)
    message.model_spec.name, message.model_spec.signature_name = model, signature
    if version is not None:
        message.model_spec.version.value = version
    proto = values if isinstance(values, tensor_pb2.TensorProto) else tf.make_tensor_proto(values)
    message.inputs[name].CopyFrom(proto)
    return message


@pytest.mark.parametrize("signature", ["serving_default", "serving_bytes", "features"])
def test_responses_are_those_over_http(server, stub, images, signature):
    values, listed, name = images, images.tolist(), "images"
    if signature == "serving_bytes":
        values, name = [*map(encoded, images), b"no image"], "image_bytes"
        listed = [{"b64": base64.b64encode(value).decode()} for value in values]
    response = stub.Predict(request(values, signature, name), timeout=30)
    assert response.model_spec.name == "model"
    assert response.model_spec.signature_name == signature
    assert response.model_spec.version.value == 1
    _, expected = server.predict({"signature_name": signature, "inputs": listed})
    expected = expected["outputs"]
    if signature == "features":
        expected = {"features": expected}
    assert response.outputs.keys() == expected.keys()
    for key, tensor in response.outputs.items():
        found = tf.make_ndarray(tensor)
        if key == "label":
            assert [label.decode() for label in found] == expected[key]
        else:
            # A REST client may read float64; each number is that of a float32.
            np.testing.assert_array_equal(found, np.array(expected[key], found.dtype))


def test_a_tensor_may_have_its_values_as_numbers(stub, images):
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_UINT8, int_val=images.ravel().tolist())
    for size in images.shape:
        tensor.tensor_shape.dim.add(size=size)
    found, expected = (stub.Predict(request(v), timeout=30) for v in (tensor, images))
    assert found == expected


def test_only_wanted_outputs_are_sent(stub, images):
    response = stub.Predict(request(images, outputs=["label"]), timeout=30)
    assert list(response.outputs) == ["label"]
    response = stub.Predict(request(images, version=1), timeout=30)
    assert set(response.outputs) == {"label", "label_index", "probabilities"}


def test_a_client_that_does_not_know_this_package(server, images, tmp_path):
    (tmp_path / "x.png").write_bytes(encoded(images[0]))
    script = shutil.copy(pathlib.Path(__file__).parent / "foreign_client.py", tmp_path)
    command = [sys.executable, script, address(server), server.url, tmp_path / "x.png"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found[""] == found["REST"]
    assert np.shape(found["features"]["features"])[0] == 2
    _, expected = server.predict({"inputs": [images[0].tolist()]})
    assert found["serving_bytes"]["label"] == expected["outputs"]["label"]


# ---- Errors


def shaped(*sizes, **values) -> tensor_pb2.TensorProto:
    tensor = tensor_pb2.TensorProto(**{"dtype": types_pb2.DT_UINT8} | values)
    for size in sizes:
        tensor.tensor_shape.dim.add(size=size)
    return tensor


ONE = np.zeros((1, 16, 16, 3), np.uint8)
STRINGS = {"dtype": types_pb2.DT_STRING}
LABELLED = request(ONE)
LABELLED.model_spec.version_label = "stable"
TWO_INPUTS = request(ONE)
TWO_INPUTS.inputs["x"].CopyFrom(tf.make_tensor_proto(1))


@pytest.mark.parametrize(
    ("message", "code", "text"),
    [
        (request(ONE, model="other"), Code.NOT_FOUND, "'other'"),
        (request(ONE, model=""), Code.INVALID_ARGUMENT, "names no model"),
        (request(ONE, version=99), Code.NOT_FOUND, "99"),
        (LABELLED, Code.INVALID_ARGUMENT, "'stable'"),
        (request(ONE, "none"), Code.FAILED_PRECONDITION, "no signature 'none'"),
        (request(ONE, name="x"), Code.INVALID_ARGUMENT, "'images' alone; it is 'x'"),
        (TWO_INPUTS, Code.INVALID_ARGUMENT, "'images', 'x'"),
        (request(ONE, outputs=["x"]), Code.INVALID_ARGUMENT, "no output 'x'"),
        (request(ONE.astype(np.float32)), Code.INVALID_ARGUMENT, "DT_FLOAT; DT_UINT8"),
        (request(ONE[0]), Code.INVALID_ARGUMENT, "[16, 16, 3]; [N, 16, 16, 3]"),
        (request(ONE[:0]), Code.INVALID_ARGUMENT, "[0, 16, 16, 3]"),
        (request(shaped()), Code.INVALID_ARGUMENT, "[]"),
        (request(shaped(-1, 16, 16, 3)), Code.INVALID_ARGUMENT, "[-1, 16, 16, 3]"),
        (request(shaped(2**40, 16, 16, 3, int_val=[1])), Code.INVALID_ARGUMENT, "has 1 values"),
        (request(shaped(1, 16, 16, 3)), Code.INVALID_ARGUMENT, "has 0 values"),
        (request(shaped(1, 16, 16, 3, tensor_content=b"x")), Code.INVALID_ARGUMENT, "1 values"),
        (request(shaped(1, 16, 16, 3, int_val=[256] * 768)), Code.INVALID_ARGUMENT, "255"),
        (
            request(shaped(2**40, **STRINGS, string_val=[b"x"]), "serving_bytes", "image_bytes"),
            Code.INVALID_ARGUMENT,
            "has 1 values",
        ),
        (request([b"no"], "serving_bytes", "image_bytes"), Code.INVALID_ARGUMENT, "no image"),
        (request(np.zeros((2000, 16, 16, 3), np.uint8)), Code.RESOURCE_EXHAUSTED, "larger than"),
    ],
)
def test_each_bad_request_has_its_code(stub, images, message, code, text):
    with pytest.raises(grpc.RpcError) as caught:
        stub.Predict(message, timeout=30)
    assert (caught.value.code(), text in caught.value.details()) == (code, True), caught.value
    assert len(stub.Predict(request(images), timeout=30).outputs) == 3


def test_what_is_no_message_is_refused(channel):
    with pytest.raises(grpc.RpcError, match="no PredictRequest") as caught:
        channel.unary_unary(PREDICT)(b"\xff\xff", timeout=30)
    assert caught.value.code() is Code.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError, match="no message") as caught:
        channel.stream_unary(PREDICT)(iter(()), timeout=30)
    assert caught.value.code() is Code.INVALID_ARGUMENT


def test_a_message_that_does_not_arrive_ends_the_call(channel, stub, images):
    go = threading.Event()

    def late():
        go.wait(20)
        yield b""

    with pytest.raises(grpc.RpcError, match="more than 1 s") as caught:
        channel.stream_unary(PREDICT)(late(), timeout=15)
    go.set()
    assert caught.value.code() is Code.DEADLINE_EXCEEDED
    assert stub.Predict(request(images), timeout=30).outputs


def test_what_needs_other_signatures_is_not_implemented(stub):
    message = classification_pb2.ClassificationRequest()
    message.model_spec.name = "model"
    with pytest.raises(grpc.RpcError, match="only Predict") as caught:
        stub.Classify(message, timeout=30)
    assert caught.value.code() is Code.UNIMPLEMENTED


def test_both_protocols_share_batches(server, stub, images):
    names = ("keras_cifar_batch_rows_count", "keras_cifar_batch_rows_sum")
    batches, rows = map(server.metric, names)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        grpcs = [pool.submit(stub.Predict, request(images[:1]), timeout=30) for _ in range(32)]
        rests = [pool.submit(server.predict, {"inputs": images[:1].tolist()}) for _ in range(32)]
        labels = {tf.make_ndarray(g.result().outputs["label"])[0].decode() for g in grpcs}
        assert labels == {r.result()[1]["outputs"]["label"][0] for r in rests}
    assert server.metric(names[1]) == rows + 64
    assert server.metric(names[0]) - batches < 60
    text = server.request("GET", "/metrics")[1]
    assert 'keras_cifar_requests_total{code="OK",kind="grpc_Predict"}' in text
    assert 'code="NOT_FOUND",kind="grpc_Predict"' in text


def test_a_connection_without_a_request_is_cut_off(server):
    host, port = address(server).split(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        while connection.recv(1000):  # the server's settings, and then the end
            pass


def test_without_batches_or_places_calls_are_unavailable():
    message = request(ONE).SerializeToString()

    async def main():
        one = service(types.SimpleNamespace(inputs={}))
        with socket.create_server(("127.0.0.1", 0)) as free:
            where = f"127.0.0.1:{free.getsockname()[1]}"
        server = GrpcServer(one, where)
        await server.start()
        async with grpc.aio.insecure_channel(where) as channel:
            predict, health = channel.unary_unary(PREDICT), health_pb2_grpc.HealthStub(channel)
            async with one.running(poll=60):
                assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1
                with contextlib.ExitStack() as stack:
                    for _ in range(MAX_REQUESTS):
                        stack.enter_context(one.place())
                    with pytest.raises(grpc.RpcError, match="too many") as caught:
                        await predict(message)
                    assert caught.value.code() is Code.UNAVAILABLE
                with pytest.raises(grpc.RpcError) as caught:
                    await predict(message)
                assert caught.value.code() is Code.FAILED_PRECONDITION  # no signatures
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == 2
            one.versions.current.inputs["serving_default"] = Input(
                "images", (None, 16, 16, 3), False
            )
            one.versions.current.run = {"serving_default": None}
            with pytest.raises(grpc.RpcError, match="must be restarted") as caught:
                await predict(message)
            assert caught.value.code() is Code.UNAVAILABLE
        await server.stop(0)

    asyncio.run(asyncio.wait_for(main(), 30))


# ---- Metadata, status, health, signals


def test_metadata_and_status_are_those_over_http(server, channel, stub):
    message = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    message.model_spec.name = "model"
    response = stub.GetModelMetadata(message, timeout=30)
    _, expected = server.request("GET", "/v1/models/model/metadata")
    signatures, names = get_model_metadata_pb2.SignatureDefMap(), struct_pb2.ListValue()
    assert response.metadata["signature_def"].Unpack(signatures)
    assert set(signatures.signature_def) == set(
        expected["metadata"]["signature_def"]["signature_def"]
    )
    assert response.metadata["class_names"].Unpack(names)
    assert list(names) == expected["metadata"]["class_names"]
    assert response.model_spec.version.value == 1
    message.metadata_field[0] = "x"
    with pytest.raises(grpc.RpcError, match="metadata_field"):
        stub.GetModelMetadata(message, timeout=30)

    models = model_service_pb2_grpc.ModelServiceStub(channel)
    message = get_model_status_pb2.GetModelStatusRequest()
    message.model_spec.name = "model"
    response = models.GetModelStatus(message, timeout=30)
    _, expected = server.request("GET", "/v1/models/model")
    style = {"preserving_proto_field_name": True, "always_print_fields_with_no_presence": True}
    assert json_format.MessageToDict(response, **style) == expected
    message.model_spec.version.value = 99
    with pytest.raises(grpc.RpcError, match="99") as caught:
        models.GetModelStatus(message, timeout=30)
    assert caught.value.code() is Code.NOT_FOUND


def test_calls_in_flight_are_answered_after_a_signal(trained_run, images):
    with serving(trained_run.path, "--grpc_port=0") as server:
        with grpc.insecure_channel(address(server)) as channel:
            health, go = health_pb2_grpc.HealthStub(channel), threading.Event()
            for name in ("", "tensorflow.serving.PredictionService"):
                asked = health_pb2.HealthCheckRequest(service=name)
                assert health.Check(asked, timeout=30).status == 1  # SERVING
            watch = health.Watch(asked)
            assert next(watch).status == 1

            def late():
                go.wait(20)
                yield request(images).SerializeToString()

            call = channel.stream_unary(PREDICT).future(late(), timeout=20)
            asked = health_pb2.HealthCheckRequest(service="unknown")
            with pytest.raises(grpc.RpcError):
                health.Check(asked, timeout=30)
            server.process.send_signal(signal.SIGTERM)
            assert next(watch).status == 2  # NOT_SERVING
            with pytest.raises(grpc.RpcError):
                next(watch)
            assert server.process.poll() is None
            go.set()
            response = predict_pb2.PredictResponse.FromString(call.result())
            assert len(tf.make_ndarray(response.outputs["label"])) == 6
            _, error = server.process.communicate(timeout=10)
        assert server.process.returncode == 143
        assert error == "serve: error: stopped by SIGTERM; requests in flight were answered\n"


def test_a_port_that_is_taken_is_one_line(trained_run, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        flags = [f"--model={trained_run.path}", "--port=0", f"--grpc_port={port}"]
        assert cli._execute("serve", serve.main, serve.ServeOptions, "", flags) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"127.0.0.1 port {port}: Address already in use" in line


def test_without_the_package_the_error_names_it(trained_run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "grpc_health.v1", None)
    monkeypatch.delitem(sys.modules, "keras_cifar.serving.rpc")
    monkeypatch.delattr("keras_cifar.serving.rpc")
    flags = [f"--model={trained_run.path}", "--grpc_port=0"]
    assert cli._execute("serve", serve.main, serve.ServeOptions, "", flags) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'keras_cifar[serve]'" in line
