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
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from keras_cifar import data, models
from keras_cifar.exporters import saved_model

CLIENTS = (1, 4, 16)  # each sends a request when it has the answer to the one before
PICTURES = 64  # that are sent in turn
WARM_UP = 1.0  # seconds before each turn that are not counted
OURS, PEER = "serve", "FastAPI and Model.predict"


def measure(options, env: dict[str, str], say: Callable[[str], None]) -> dict:
    """{server: {clients: {rate, p50, p99, requests}}}: requests a second of one picture, and seconds.

    Args:
        options: of the command.
        env: of the servers' processes.
        say: shows progress.
    """
    dataset = data.load(options.data, val_fraction=0)
    model = models.build(options.model, dataset.image_shape, len(dataset.class_names)).deployable
    bodies = [_body(image) for image in dataset.test.images[:PICTURES]]
    seconds = {}  # (server, clients) -> (rate, latencies) of each round
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        path = pathlib.Path(scratch)
        export = saved_model.export(model, path / "export", dataset.class_names)
        commands = {OURS: ["keras_cifar.serve", f"--model={export}", "--port=0"]}
        if importlib.util.find_spec("fastapi"):
            model.save(path / "model.keras")
            peer = "keras_cifar.benchmarking.fastapi_keras"
            commands[PEER] = [peer, str(path / "model.keras")]
        else:
            say(f"{PEER}: fastapi is not installed\n")
        urls = {name: stack.enter_context(_server(c, env)) for name, c in commands.items()}
        urls[OURS] += ":predict"
        for number in range(options.rounds):
            for clients in CLIENTS:
                for name, url in urls.items():
                    say(f"round {number + 1} of {options.rounds}: {name}, {clients} clients")
                    _load(url, bodies, clients, WARM_UP)
                    start = time.perf_counter()
                    taken = _load(url, bodies, clients, options.seconds)
                    # With what was asked before the end and answered after it.
                    rate = len(taken) / (time.perf_counter() - start)
                    seconds.setdefault((name, clients), []).append((rate, taken))
    say("")
    figures = {name: {} for name in urls}
    for (name, clients), rounds in seconds.items():
        every = np.concatenate([taken for _, taken in rounds])
        figures[name][clients] = {
            "rate": float(np.median([rate for rate, _ in rounds])),
            "p50": float(np.percentile(every, 50)),
            "p99": float(np.percentile(every, 99)),
            "requests": len(every),
        }
    return figures


def _body(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    instance = {"b64": base64.b64encode(file.getvalue()).decode()}
    return json.dumps({"signature_name": "serving_bytes", "instances": [instance]}).encode()


@contextlib.contextmanager
def _server(command: list[str], env: dict[str, str]) -> Iterator[str]:
    """Starts `python -m COMMAND` and waits for the line in which it prints its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True, env=env
    )
    try:
        for line in process.stdout:
            if found := re.match(r"address +(\S+)", line):
                break
        else:
            raise RuntimeError(f"{command[0]} did not start")
        yield found[1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _load(url: str, bodies: list[bytes], clients: int, seconds: float) -> list[float]:
    """The seconds of each request that so many clients made in this time."""
    parts = urllib.parse.urlsplit(url)
    end = time.perf_counter() + seconds

    def client(number: int) -> list[float]:
        taken = []
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
        with contextlib.closing(connection):
            while (start := time.perf_counter()) < end:
                body = bodies[(number + len(taken)) % len(bodies)]
                connection.request("POST", parts.path, body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                text = answer.read()
                if answer.status != 200:
                    raise RuntimeError(f"{url} answered {answer.status}: {text[:200]!r}")
                taken.append(time.perf_counter() - start)
        return taken

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        return [second for taken in pool.map(client, range(clients)) for second in taken]
