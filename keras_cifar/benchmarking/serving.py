"""Throughput and latency of `serve` beside Model.predict in a handler of FastAPI."""

import base64
import concurrent.futures
import contextlib
import http.client
import importlib.util
import io
import json
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator

import numpy as np
from PIL import Image

from keras_cifar import data, models
from keras_cifar.benchmarking.contest import show
from keras_cifar.benchmarking.options import BenchmarkOptions
from keras_cifar.core.environment import package_environment
from keras_cifar.exporters import saved_model

CLIENTS = (1, 4, 16)  # each sends a request as soon as it has the answer to the last one
IMAGES = 64  # that are sent in turn
WARM_UP = 1.0  # seconds before each turn that are not counted
OURS, PEER = "serve", "FastAPI and Model.predict"


def measure(options: BenchmarkOptions) -> dict:
    """Measures and prints requests a second, of one image each, and their latency.

    Returns:
        {server: {clients: {rate, p50, p99, requests}}}, latencies in seconds.
    """
    dataset = data.load(options.data, val_fraction=0)
    model = models.build(options.model, dataset.image_shape, len(dataset.class_names)).deployable
    bodies = [_body(image) for image in dataset.test.images[:IMAGES]]
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        path = pathlib.Path(scratch)
        export = saved_model.export(model, path / "export", dataset.class_names)
        commands = {OURS: ["keras_cifar.serve", f"--model={export}", "--port=0"]}
        if importlib.util.find_spec("fastapi"):
            model.save(path / "model.keras")
            peer = "keras_cifar.benchmarking.fastapi_keras"
            commands[PEER] = [peer, str(path / "model.keras")]
        else:
            show(f"{PEER}: fastapi is not installed\n")
        urls = {name: stack.enter_context(_server(command)) for name, command in commands.items()}
        urls[OURS] += ":predict"
        measured = _take_turns(options, urls, bodies)
    print(f"{options.model}, one image a request, {options.data}")
    print(f"\n{'':<28}{'clients':>8}{'requests/s':>12}{'p50, ms':>10}{'p99, ms':>10}")
    for name, rows in measured.items():
        for clients, row in rows.items():
            latencies = f"{1e3 * row['p50']:>10.1f}{1e3 * row['p99']:>10.1f}"
            print(f"{name:<28}{clients:>8}{row['rate']:>12,.0f}{latencies}")
    return measured


def _take_turns(options: BenchmarkOptions, urls: dict[str, str], bodies: list[bytes]) -> dict:
    turns = {}  # (server, clients) -> (rate, latencies) of each round
    for number in range(options.rounds):
        for clients in CLIENTS:
            for name, url in urls.items():
                show(f"round {number + 1} of {options.rounds}: {name}, {clients} clients")
                _load(url, bodies, clients, WARM_UP)
                start = time.perf_counter()
                latencies = _load(url, bodies, clients, options.seconds)
                # Requests that were sent before the end and answered after it count too.
                rate = len(latencies) / (time.perf_counter() - start)
                turns.setdefault((name, clients), []).append((rate, latencies))
    show("")
    measured = {name: {} for name in urls}
    for (name, clients), rounds in turns.items():
        rates, latencies = zip(*rounds, strict=True)
        latencies = np.concatenate(latencies)
        p50, p99 = np.percentile(latencies, (50, 99)).tolist()
        rate, requests = statistics.median(rates), len(latencies)
        measured[name][clients] = {"rate": rate, "p50": p50, "p99": p99, "requests": requests}
    return measured


def _body(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    instance = {"b64": base64.b64encode(file.getvalue()).decode()}
    return json.dumps({"signature_name": "serving_bytes", "instances": [instance]}).encode()


@contextlib.contextmanager
def _server(command: list[str]) -> Iterator[str]:
    """Starts `python -m COMMAND`, waits until it prints its address, and stops it at the end."""
    argv, env = [sys.executable, "-m", *command], package_environment()
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            for line in process.stdout:
                if found := re.match(r"address +(\S+)", line):
                    break
            else:
                raise RuntimeError(f"{command[0]} did not start")
            yield found[1]
        finally:
            process.kill()


def _load(url: str, bodies: list[bytes], clients: int, seconds: float) -> list[float]:
    """Sends requests from so many clients for so long; returns the seconds that each took."""
    parts = urllib.parse.urlsplit(url)
    end = time.perf_counter() + seconds

    def client(number: int) -> list[float]:
        latencies = []
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
        with contextlib.closing(connection):
            while (start := time.perf_counter()) < end:
                body = bodies[(number + len(latencies)) % len(bodies)]
                connection.request("POST", parts.path, body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                text = response.read()
                if response.status != 200:
                    raise RuntimeError(f"{url} responded {response.status}: {text[:200]!r}")
                latencies.append(time.perf_counter() - start)
        return latencies

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        return [second for taken in pool.map(client, range(clients)) for second in taken]
