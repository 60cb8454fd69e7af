"""A thousand real images over both protocols; needs CIFAR-10's images."""

import base64
import concurrent.futures
import functools
import os
import pathlib
import shutil

import grpc
import pytest
from tensorflow_serving.apis import prediction_service_pb2_grpc

from keras_cifar.core.config import TrainConfig
from keras_cifar.core.run_directory import Run
from keras_cifar.inference.predictions import classify_files
from keras_cifar.inference.predictor import Predictor
from keras_cifar.training import trainer
from tests.serving.server import serving
from tests.serving.test_grpc import address, request

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

CLIENTS = 16


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
    with serving(run.path, "--grpc_port=0") as server:
        yield server


def rest_label(server, path) -> str:
    """The predicted label of an image file, which is sent unchanged."""
    encoded = {"b64": base64.b64encode(path.read_bytes()).decode()}
    request = {"signature_name": "serving_bytes", "instances": [encoded]}
    status, response = server.predict(request)
    assert status == 200, response
    return response["predictions"][0]["label"]


def grpc_label(stub, path) -> str:
    response = stub.Predict(request([path.read_bytes()], "serving_bytes", "image_bytes"))
    return response.outputs["label"].string_val[0].decode()


@pytest.mark.cifar
def test_a_thousand_real_images_have_the_labels_of_local_prediction(server, images, expected):
    with (
        grpc.insecure_channel(address(server)) as channel,
        concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool,
    ):
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        for label, where in ((rest_label, server), (grpc_label, stub)):
            found = list(pool.map(functools.partial(label, where), images))
            assert len(found) == 1000
            assert len(set(found)) > 3
            assert found == expected
    batches = server.metric("keras_cifar_batch_rows_count")
    assert server.metric("keras_cifar_batch_rows_sum") / batches > 2  # an image each would be 1
