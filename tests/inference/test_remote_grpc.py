"""`predict` with a grpc:// URL: the same output as local prediction, and servers that fail."""

import concurrent.futures
import socket
import time

import grpc
import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import json_format, struct_pb2
from tensorflow.core.framework import tensor_pb2, types_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from keras_cifar.inference import remote
from tests.conftest import colour_images, equal_but_for_rounding
from tests.inference.test_predict import command
from tests.inference.test_remote import check_features
from tests.serving.server import serving

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
pytest.importorskip("grpc_health", reason="the extra `serve` is not installed")


@pytest.fixture(scope="module")
def server(trained_run):
    """Its largest request has 64 of the images of 16 x 16."""
    with serving(trained_run.path, "--grpc_port=0", f"--max_request_mb={50_000 / 2**20}") as server:
        yield server


@pytest.mark.parametrize("form", ["text", "csv", "json"])
def test_the_output_is_that_of_local_prediction(server, trained_run, image_folder, capsys, form):
    (image_folder / "train" / "no.png").write_bytes(b"no image")
    found = []
    try:
        for model in (trained_run.path, server.grpc_url, f"{server.grpc_url}/versions/1"):
            assert command(f"--model={model}", f"--format={form}", image_folder / "train") == 1
            found.append(capsys.readouterr())
    finally:
        (image_folder / "train" / "no.png").unlink()
    assert found[0].out.count("class_") >= 96
    assert equal_but_for_rounding(*(each.out for each in found))
    assert found[0].err == found[1].err == found[2].err


def test_the_features_are_those_of_local_prediction(server, trained_run, image_folder, tmp_path):
    check_features((trained_run.path, server.grpc_url), image_folder / "train", tmp_path)


@pytest.fixture
def failure(failure, image_folder, monkeypatch):
    """The same for a folder of ten images, without waiting between tries."""
    monkeypatch.setattr(remote, "DELAYS", (0.0, 0.0))
    return lambda *argv, **status: failure(*argv, image_folder / "test" / "class_0", **status)


@pytest.mark.parametrize("suffix", ["x", "/versions/99"])
def test_an_unknown_model_of_a_server_is_one_line(server, failure, suffix):
    url = f"{server.grpc_url}{suffix}"
    assert failure(f"--model={url}").startswith(f"predict: error: {url} answered NOT_FOUND: ")


def test_a_server_that_is_not_running_is_one_line(failure):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert "cannot be reached: " in failure(f"--model=grpc://127.0.0.1:{port}/model")


@pytest.mark.parametrize("model", ["grpc://", "grpc://x", "grpc://x/model", "grpc://x:1/a/b"])
def test_an_invalid_url_is_one_line(failure, model):
    assert "grpc://HOST:PORT/NAME[/versions/N]" in failure(f"--model={model}", status=2)


def test_the_explanation_needs_gradients(failure):
    assert "--explain" in failure("--model=grpc://x:1/a", "--explain=x", status=2)


class Fake(prediction_service_pb2_grpc.PredictionServiceServicer):
    """TensorFlow Serving, with the responses of a test.

    Attributes:
        tensor: the probabilities of each response.
        failures: codes and details with which calls to predict fail at first.
        metadata: of the model.
        calls: how many calls to predict there were.
    """

    def __init__(self):
        self.tensor, self.failures, self.calls, self.delay = None, [], 0, 0
        shape = {"dim": [{"size": size} for size in (-1, 16, 16, 3)]}
        signature = {"inputs": {"images": {"dtype": "DT_UINT8", "tensor_shape": shape}}}
        signatures = get_model_metadata_pb2.SignatureDefMap()
        json_format.ParseDict({"signature_def": {"serving_default": signature}}, signatures)
        self.metadata = get_model_metadata_pb2.GetModelMetadataResponse()
        self.metadata.metadata["signature_def"].Pack(signatures)

    def GetModelMetadata(self, request, context):  # noqa: N802
        return self.metadata

    def Predict(self, request, context):  # noqa: N802
        self.calls += 1
        time.sleep(self.delay)
        if self.failures:
            context.abort(*self.failures.pop(0))
        response = predict_pb2.PredictResponse()
        if self.tensor is not None:
            response.outputs["probabilities"].CopyFrom(self.tensor)
        return response


@pytest.fixture
def fake():
    pool = concurrent.futures.ThreadPoolExecutor(4)
    server, fake = grpc.server(pool), Fake()
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(fake, server)
    fake.url = f"grpc://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}/model"
    server.start()
    yield fake
    server.stop(0).wait()
    pool.shutdown()


IMAGES = colour_images(2, 16, 3)[0]
RIGHT = np.full((2, 3), 0.25, np.float32)


def test_busy_servers_are_asked_again(fake, labels, monkeypatch):
    monkeypatch.setattr(remote, "DELAYS", (0.0, 0.0))
    predictor = remote.RemotePredictor(fake.url, 10, str(labels))
    fake.tensor = tf.make_tensor_proto(RIGHT)
    fake.failures = [(grpc.StatusCode.UNAVAILABLE, "x"), (grpc.StatusCode.RESOURCE_EXHAUSTED, "x")]
    np.testing.assert_array_equal(predictor.classify(IMAGES), RIGHT)
    assert fake.calls == 3
    assert predictor.classify(IMAGES[:0]).shape == (0, 3)


def test_tensorflow_serving_needs_labels(fake, failure):
    assert "--labels=FILE" in failure(f"--model={fake.url}")


HUGE = tensor_pb2.TensorProto(dtype=types_pb2.DT_FLOAT, float_val=[1])
HUGE.tensor_shape.dim.add(size=2**40)


@pytest.mark.parametrize(
    "tensor", [None, HUGE, tf.make_tensor_proto(RIGHT[:, :2]), tf.make_tensor_proto(["a"])]
)
def test_another_response_is_one_line(fake, labels, failure, tensor):
    fake.tensor = tensor
    line = failure(f"--model={fake.url}", f"--labels={labels}")
    assert "did not answer with probabilities of 10 images in 3 classes" in line


@pytest.mark.parametrize("metadata", ["of another type", "damaged"])
def test_metadata_of_another_model_is_one_line(fake, labels, failure, metadata):
    if metadata == "damaged":
        fake.metadata.metadata["signature_def"].value = b"\xff\xff"
    else:
        fake.metadata.metadata["signature_def"].Pack(struct_pb2.ListValue())
    line = failure(f"--model={fake.url}", f"--labels={labels}")
    assert "is not a model that keras_cifar exported" in line


def test_a_server_that_takes_too_long(fake, labels, failure):
    fake.delay = 0.3
    line = failure(f"--model={fake.url}", f"--labels={labels}", "--timeout=0.1")
    assert "no response in 0.1 s" in line
