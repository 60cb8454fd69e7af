"""Throughput and latency of `serve` by protocol, beside Model.predict in a handler of FastAPI."""

import base64
import concurrent.futures
import contextlib
import functools
import http.client
import importlib.util
import io
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import typing
import urllib.parse
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import tensorflow as tf
from PIL import Image
from tensorflow_serving.apis.predict_pb2 import PredictRequest

from keras_cifar import data, models
from keras_cifar.benchmarking.contest import show
from keras_cifar.benchmarking.options import BenchmarkOptions
from keras_cifar.core.config import BATCH_SIZE
from keras_cifar.core.environment import package_environment
from keras_cifar.exporters import saved_model
from keras_cifar.inference.predictor import Predictor

CLIENTS = (1, 4, 16, 64)  # each sends a request as soon as it has the answer to the last one
IMAGES = 64  # that are sent in turn
WARM_UP = 1.0  # seconds before each turn that are not counted
PIXELS, FILES = "images", "files"  # what a request has, and what the model computes in batches
PEER = "FastAPI and Model.predict"
PREDICT = "/tensorflow.serving.PredictionService/Predict"


class Contender(typing.NamedTuple):
    """Requests of one image each to a server."""

    connect: Callable  # context manager of a function that sends a body and raises if it fails
    bodies: list[bytes]
    what: str  # PIXELS or FILES


def measure(options: BenchmarkOptions) -> dict:
    """Measures and prints requests a second, of one image each, and their latency.

    Returns:
        {"clients": {contender: {clients: {rate, p50, p99, requests, share}}}, "batches": {what: rate}},
        latencies in seconds; a share is of the rate in batches of 128 without a server.
    """
    dataset = data.load(options.data, val_fraction=0)
    model = models.build(options.model, dataset.image_shape, len(dataset.class_names)).deployable
    images = dataset.test.images[:IMAGES]
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        path = pathlib.Path(scratch)
        export = saved_model.export(model, path / "export", dataset.class_names)
        command = ["keras_cifar.serve", f"--model={export}", "--port=0", "--grpc_port=0"]
        contenders = _ours(stack.enter_context(_server(command, "try it")), images)
        if importlib.util.find_spec("fastapi"):
            model.save(path / "model.keras")
            command = ["keras_cifar.benchmarking.fastapi_keras", str(path / "model.keras")]
            url = stack.enter_context(_server(command, "address"))["address"]
            bodies = contenders["REST files"].bodies
            contenders[PEER] = Contender(functools.partial(_http, url), bodies, FILES)
        else:
            show(f"{PEER}: fastapi is not installed\n")
        measured = _take_turns(options, contenders, _batches(Predictor(str(export)), images))
    _print(options, measured)
    return measured


def _ours(addresses: dict[str, str], images: np.ndarray) -> dict[str, Contender]:
    """The four ways to ask `serve`."""
    files = [_png(image) for image in images]
    encoded = [{"b64": base64.b64encode(file).decode()} for file in files]
    rest = functools.partial(_http, addresses["address"] + ":predict")
    rpc = functools.partial(_grpc, addresses["grpc"].split("/")[2])
    default, of_files = "serving_default", "serving_bytes"
    return {
        "REST images": Contender(rest, [_json(default, i.tolist()) for i in images], PIXELS),
        "REST files": Contender(rest, [_json(of_files, e) for e in encoded], FILES),
        "gRPC tensors": Contender(rpc, [_proto(default, "images", i) for i in images], PIXELS),
        "gRPC files": Contender(rpc, [_proto(of_files, "image_bytes", f) for f in files], FILES),
    }


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def _json(signature: str, instance: object) -> bytes:
    return json.dumps({"signature_name": signature, "instances": [instance]}).encode()


def _proto(signature: str, name: str, value: object) -> bytes:
    request = PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "model", signature
    request.inputs[name].CopyFrom(tf.make_tensor_proto(np.array([value])))
    return request.SerializeToString()


def _batches(predictor: Predictor, images: np.ndarray) -> dict[str, Callable]:
    """Functions that compute BATCH_SIZE images, or files of these, without a server."""
    repeated = np.resize(images, (BATCH_SIZE, *images.shape[1:]))
    files = [_png(image) for image in repeated]
    signatures = predictor.signatures
    pixels, encoded = tf.constant(repeated), tf.constant(files)
    return {
        PIXELS: lambda: signatures["serving_default"](images=pixels)["label"].numpy(),
        FILES: lambda: signatures["serving_bytes"](image_bytes=encoded)["label"].numpy(),
    }


def _take_turns(
    options: BenchmarkOptions, contenders: dict[str, Contender], batches: dict[str, Callable]
) -> dict:
    turns = {}  # (contender, clients) -> (rate, latencies) of each round
    alone = {what: [] for what in batches}  # images a second of each round
    for number in range(options.rounds):
        show(f"round {number + 1} of {options.rounds}: without a server")
        for what, compute in batches.items():
            alone[what].append(_rate(compute, options.seconds))
        for clients in CLIENTS:
            for name, contender in contenders.items():
                show(f"round {number + 1} of {options.rounds}: {name}, {clients} clients")
                _load(contender, clients, WARM_UP)
                start = time.perf_counter()
                latencies = _load(contender, clients, options.seconds)
                # Requests that were sent before the end and answered after it count too.
                rate = len(latencies) / (time.perf_counter() - start)
                turns.setdefault((name, clients), []).append((rate, latencies))
    show("")
    rates = {what: statistics.median(values) for what, values in alone.items()}
    rows = {name: {} for name in contenders}
    for (name, clients), rounds in turns.items():
        found, latencies = zip(*rounds, strict=True)
        latencies = np.concatenate(latencies)
        p50, p99 = np.percentile(latencies, (50, 99)).tolist()
        rate = statistics.median(found)
        row = {"rate": rate, "p50": p50, "p99": p99, "requests": len(latencies)}
        rows[name][clients] = row | {"share": rate / rates[contenders[name].what]}
    return {"clients": rows, "batches": rates}


def _rate(compute: Callable, seconds: float) -> float:
    compute()
    start, batches = time.perf_counter(), 0
    while time.perf_counter() < start + seconds:
        compute()
        batches += 1
    return batches * BATCH_SIZE / (time.perf_counter() - start)


def _print(options: BenchmarkOptions, measured: dict) -> None:
    print(f"{options.model}, one image a request, {options.data}; without a server, in batches:")
    for what, rate in measured["batches"].items():
        print(f"{what:<28}{rate:>20,.0f} a second")
    heads = f"{'clients':>8}{'requests/s':>12}{'p50, ms':>10}{'p99, ms':>10}{'of batches':>12}"
    print(f"\n{'':<28}{heads}")
    for name, rows in measured["clients"].items():
        for clients, row in rows.items():
            latencies = f"{1e3 * row['p50']:>10.1f}{1e3 * row['p99']:>10.1f}"
            print(f"{name:<28}{clients:>8}{row['rate']:>12,.0f}{latencies}{row['share']:>12.2f}")


@contextlib.contextmanager
def _server(command: list[str], last: str) -> Iterator[dict[str, str]]:
    """Starts `python -m COMMAND`, waits until it prints the line `last`, and stops it at the end.

    Yields the lines that it printed, {name: value}.
    """
    argv, env = [sys.executable, "-m", *command], package_environment()
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            lines = {}
            while last not in lines:
                if not (line := process.stdout.readline()):
                    raise RuntimeError(f"{command[0]} did not start")
                lines[line[:10].strip()] = line[10:].strip()
            yield lines
        finally:
            process.kill()


@contextlib.contextmanager
def _http(url: str) -> Iterator[Callable[[bytes], None]]:
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)

    def send(body: bytes) -> None:
        connection.request("POST", parts.path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        if response.status != 200:
            raise RuntimeError(f"{url} responded {response.status}: {text[:200]!r}")

    with contextlib.closing(connection):
        yield send


@contextlib.contextmanager
def _grpc(address: str) -> Iterator[Callable[[bytes], None]]:
    # Channels of one process share a connection otherwise.
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, options) as channel:
        # Of bytes, since clients share the processors with the server.
        call = channel.unary_unary(PREDICT)
        yield lambda body: call(body, timeout=60)


def _load(contender: Contender, clients: int, seconds: float) -> list[float]:
    """Sends requests from so many clients for so long; returns the seconds that each took."""
    end = time.perf_counter() + seconds

    def client(number: int) -> list[float]:
        latencies, bodies = [], contender.bodies
        with contender.connect() as send:
            while (start := time.perf_counter()) < end:
                send(bodies[(number + len(latencies)) % len(bodies)])
                latencies.append(time.perf_counter() - start)
        return latencies

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        return [second for taken in pool.map(client, range(clients)) for second in taken]
