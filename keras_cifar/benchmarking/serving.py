"""Throughput and latency of `serve` by protocol, beside Model.predict in a handler of FastAPI."""

import base64
import concurrent.futures
import contextlib
import functools
import http.client
import importlib.util
import io
import json
import os
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
import psutil
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
    cpu: Callable[[], float]  # seconds that the server has computed


class Turn(typing.NamedTuple):
    """What one contender did for some seconds."""

    rate: float  # requests a second
    latencies: list[float]  # seconds
    server: float  # seconds that the server computed for a request
    client: float  # and the clients


def measure(options: BenchmarkOptions) -> dict:
    """Measures and prints requests a second, of one image each, and their latency.

    Returns:
        {"clients": {contender: {clients: {rate, p50, p99, requests, share, server, client, work}}},
        "batches": {what: rate}, "computing": {what: seconds}, "image_size": the network's, in pixels,
        "cores": the server's}. Latencies are in seconds; a share is of the rate in batches of 128
        without a server, on the server's cores. Server and client are seconds of a core for each
        request, `computing` those for each image in batches, and `work` is its share of the server's.
    """
    with _core_of_clients() as core:
        measured = _measure(options, core)
    _print(options, measured)
    return measured


@contextlib.contextmanager
def _core_of_clients() -> Iterator[set[int]]:
    """Leaves this process and its servers all cores but the last, and yields that one, for clients.

    Clients of a real server do not compute on its cores. Here they are one process, in which Python
    computes in one thread at a time. A single core is shared. Call it before TensorFlow computes.
    """
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:-1] or cores)
    try:
        yield set(cores[-1:])
    finally:
        os.sched_setaffinity(0, cores)


def _measure(options: BenchmarkOptions, core: set[int]) -> dict:
    size = models.find(options.model).image_size
    dataset = data.load(options.data, val_fraction=0, image_size=size)
    model = models.build(options.model, dataset.image_shape, len(dataset.class_names)).deployable
    images = dataset.test.images[:IMAGES]
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        path = pathlib.Path(scratch)
        export = saved_model.export(model, path / "export", dataset.class_names)
        command = ["keras_cifar.serve", f"--model={export}", "--port=0", "--grpc_port=0"]
        contenders = _ours(*stack.enter_context(_server(command, "try it")), images)
        if importlib.util.find_spec("fastapi"):
            model.save(path / "model.keras")
            command = ["keras_cifar.benchmarking.fastapi_keras", str(path / "model.keras")]
            lines, cpu = stack.enter_context(_server(command, "address"))
            connect = functools.partial(_http, lines["address"])
            contenders[PEER] = contenders["REST files"]._replace(connect=connect, cpu=cpu)
        else:
            show(f"{PEER}: fastapi is not installed\n")
        batches = _batches(Predictor(str(export)), images)
        measured = _take_turns(options, contenders, batches, core)
    return measured | {"image_size": size, "cores": len(os.sched_getaffinity(0))}


def _ours(
    addresses: dict[str, str], cpu: Callable[[], float], images: np.ndarray
) -> dict[str, Contender]:
    """The four ways to ask `serve`."""
    files = [_png(image) for image in images]
    encoded = [{"b64": base64.b64encode(file).decode()} for file in files]
    rest = functools.partial(_http, addresses["address"] + ":predict")
    rpc = functools.partial(_grpc, addresses["grpc"].split("/")[2])
    default, of_files = "serving_default", "serving_bytes"
    bodies = {
        "REST images": (rest, [_json(default, i.tolist()) for i in images], PIXELS),
        "REST files": (rest, [_json(of_files, e) for e in encoded], FILES),
        "gRPC tensors": (rpc, [_proto(default, "images", i) for i in images], PIXELS),
        "gRPC files": (rpc, [_proto(of_files, "image_bytes", f) for f in files], FILES),
    }
    return {name: Contender(*values, cpu) for name, values in bodies.items()}


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
    options: BenchmarkOptions,
    contenders: dict[str, Contender],
    batches: dict[str, Callable],
    core: set[int],
) -> dict:
    turns = {}  # (contender, clients) -> the Turn of each round
    alone = {what: [] for what in batches}  # (images, seconds of a core) a second of each round
    for number in range(options.rounds):
        show(f"round {number + 1} of {options.rounds}: without a server")
        for what, compute in batches.items():
            alone[what].append(_rate(compute, options.seconds))
        for clients in CLIENTS:
            for name, contender in contenders.items():
                show(f"round {number + 1} of {options.rounds}: {name}, {clients} clients")
                _load(contender, clients, WARM_UP, core)
                turn = _load(contender, clients, options.seconds, core)
                turns.setdefault((name, clients), []).append(turn)
    show("")
    rates = {what: statistics.median(rate for rate, _ in values) for what, values in alone.items()}
    computing = {
        what: statistics.median(cores / rate for rate, cores in values)
        for what, values in alone.items()
    }
    rows = {name: {} for name in contenders}
    for (name, clients), rounds in turns.items():
        what, latencies = contenders[name].what, np.concatenate([t.latencies for t in rounds])
        p50, p99 = np.percentile(latencies, (50, 99)).tolist()
        rate, server, client = (
            statistics.median(getattr(turn, field) for turn in rounds)
            for field in ("rate", "server", "client")
        )
        row = {"rate": rate, "p50": p50, "p99": p99, "requests": len(latencies)}
        row |= {"share": rate / rates[what], "server": server, "client": client}
        rows[name][clients] = row | {"work": computing[what] / server}
    return {"clients": rows, "batches": rates, "computing": computing}


def _rate(compute: Callable, seconds: float) -> tuple[float, float]:
    """(images a second, seconds of a core a second)."""
    compute()
    start, cpu, batches = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() < start + seconds:
        compute()
        batches += 1
    took = time.perf_counter() - start
    return batches * BATCH_SIZE / took, (time.process_time() - cpu) / took


def _print(options: BenchmarkOptions, measured: dict) -> None:
    size = "{image_size} x {image_size}".format_map(measured)
    cores = f"{measured['cores']} core{'s' if measured['cores'] > 1 else ''}"
    print(f"{options.model}, one image of {size} a request, {options.data}, servers on {cores}")
    print("in batches, without a server:")
    for what, rate in measured["batches"].items():
        milliseconds = 1e3 * measured["computing"][what]
        print(f"{what:<28}{rate:>20,.0f} a second, {milliseconds:.2f} ms of a core each")
    heads = f"{'clients':>8}{'requests/s':>12}{'p50, ms':>10}{'p99, ms':>10}{'of batches':>12}"
    heads += f"{'client, ms':>12}{'server, ms':>12}{'computing':>11}"
    print(f"\n{'':<28}{heads}")
    for name, rows in measured["clients"].items():
        for clients, row in rows.items():
            latencies = f"{1e3 * row['p50']:>10.1f}{1e3 * row['p99']:>10.1f}"
            cores = f"{1e3 * row['client']:>12.2f}{1e3 * row['server']:>12.2f}{row['work']:>11.0%}"
            rate = f"{row['rate']:>12,.0f}{latencies}{row['share']:>12.2f}"
            print(f"{name:<28}{clients:>8}{rate}{cores}")


@contextlib.contextmanager
def _server(command: list[str], last: str) -> Iterator[tuple[dict[str, str], Callable]]:
    """Starts `python -m COMMAND`, waits until it prints the line `last`, and stops it at the end.

    Yields the lines that it printed, {name: value}, and a function: the seconds it has computed.
    """
    argv, env = [sys.executable, "-m", *command], package_environment()
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            lines = {}
            while last not in lines:
                if not (line := process.stdout.readline()):
                    raise RuntimeError(f"{command[0]} did not start")
                lines[line[:10].strip()] = line[10:].strip()
            yield lines, functools.partial(_cpu_seconds, psutil.Process(process.pid))
        finally:
            process.kill()


def _cpu_seconds(server: psutil.Process) -> float:
    times = [process.cpu_times() for process in (server, *server.children(recursive=True))]
    return sum(one.user + one.system for one in times)


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


def _load(contender: Contender, clients: int, seconds: float, core: set[int]) -> Turn:
    """Sends requests from so many clients for so long; they compute on `core`."""
    start, server, own = time.perf_counter(), contender.cpu(), time.process_time()
    end = start + seconds

    def client(number: int) -> list[float]:
        os.sched_setaffinity(0, core)  # of this thread alone, and of those that it starts
        latencies, bodies = [], contender.bodies
        with contender.connect() as send:
            while (start := time.perf_counter()) < end:
                send(bodies[(number + len(latencies)) % len(bodies)])
                latencies.append(time.perf_counter() - start)
        return latencies

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        found = [second for taken in pool.map(client, range(clients)) for second in taken]
    # Requests that were sent before the end and answered after it count too.
    rate = len(found) / (time.perf_counter() - start)
    server, own = contender.cpu() - server, time.process_time() - own
    return Turn(rate, found, server / len(found), own / len(found))
