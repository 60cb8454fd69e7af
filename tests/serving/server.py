"""A server in a process of its own, and requests to it."""

import contextlib
import http.client
import json
import pathlib
import re
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator


class Server:
    """A started `python -m keras_cifar.serve`.

    Attributes:
        process: the server's.
        url, grpc_url: the model's; the second is None without --grpc_port.
        host, port: where it listens.
    """

    def __init__(self, model, *flags):
        command = [sys.executable, "-m", "keras_cifar.serve", f"--model={model}", "--port=0"]
        self.process = subprocess.Popen(
            [*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        lines = []
        while not lines or not lines[-1].startswith("try it"):
            lines.append(self.process.stdout.readline())
            if not lines[-1]:
                raise AssertionError(self.process.communicate()[1])
        self.url = re.search(r"http\S+", lines[1])[0]
        grpc = re.search(r"grpc://\S+", "".join(lines))
        self.grpc_url = grpc and grpc[0]
        parts = urllib.parse.urlsplit(self.url)
        self.host, self.port = parts.hostname, parts.port

    def request(self, method: str, path: str, body=None) -> tuple[int, object]:
        """(status, the JSON or text of the response); a body other than bytes is sent as JSON."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        with contextlib.closing(connection):
            if body is not None and not isinstance(body, bytes):
                body = json.dumps(body).encode()
            connection.request(method, path, body)
            response = connection.getresponse()
            text = response.read()
            if response.headers.get_content_type() == "application/json":
                return response.status, json.loads(text)
            return response.status, text.decode()

    def predict(self, body) -> tuple[int, object]:
        return self.request("POST", "/v1/models/model:predict", body)

    def metric(self, name: str) -> float:
        """The sum of a Prometheus metric over its labels."""
        text = self.request("GET", "/metrics")[1]
        found = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.M)
        assert found, name
        return sum(map(float, found))

    def memory(self) -> int:
        """Bytes of its resident memory."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024


@contextlib.contextmanager
def serving(model, *flags) -> Iterator[Server]:
    """A server that is killed at the end."""
    server = Server(model, *flags)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()
