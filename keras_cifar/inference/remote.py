"""Inference through a server: TensorFlow Serving's REST API (standard library and Pillow), or gRPC."""

import base64
import contextlib
import http.client
import io
import json
import pathlib
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable

import numpy as np
from PIL import Image

from keras_cifar.core.config import BATCH_SIZE
from keras_cifar.core.errors import UsageError, UserError, reason
from keras_cifar.core.files import read
from keras_cifar.core.image_size import CROP
from keras_cifar.inference.predictor import CROPPED, MAX_LABELS, rule_of

DELAYS = (0.25, 1.0, 3.0)  # seconds between tries of a request: a server restarts within them
RETRIED = (408, 429, 502, 503, 504)  # statuses of a server or a proxy that is busy or restarting
HOST = r"(\[[\da-fA-F:.]+\]|[^\s/:\[\]]+)"
_MODEL_URL = re.compile(
    rf"https?://{HOST}(:\d{{1,5}})?(/\S*)?"
    r"/v1/models/[^\s/:]+(/versions/\d+|/labels/[^\s/:]+)?"
)
SMALL = 2**20  # bytes of a request, the smallest usual limit of proxies (nginx)
MAX_RESPONSE = 2**28  # bytes; the probabilities of 128 images in 21,841 classes take 60 MB


class TemporaryError(UserError):
    """The next try may succeed."""


class TooLargeError(UserError):
    """The request is too large for the server."""


class RemotePredictor:
    """A model behind a server, with the methods of `predictor.Predictor`; they raise UserError."""

    def __init__(self, url: str, timeout: float, labels: str | None = None):
        """Requests the model's metadata.

        Args:
            url: http://HOST:PORT/v1/models/NAME or grpc://HOST:PORT/NAME, and perhaps /versions/N.
            timeout: seconds that a request may take.
            labels: a file with a class name a line, for servers that do not tell them.

        Raises:
            UserError: the server cannot be reached, or has no such model.
            UsageError: the address is invalid.
        """
        self.url = url.rstrip("/")
        self._client = _client(self.url, timeout)
        try:
            signatures, names = _retried(self._client.metadata)
            shape = signatures["serving_default"]["inputs"]["images"]["tensor_shape"]
            height, width = (int(dimension["size"]) for dimension in shape["dim"][1:3])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{self.url} is not a model that keras_cifar exported") from None
        self.size, self.rule = (height, width), rule_of(signatures)
        if labels:
            path = pathlib.Path(labels).expanduser()
            names = read(path, MAX_LABELS).decode("utf-8", "replace").splitlines()
        if type(names) is not list or not names:
            raise UserError(
                f"{self.url} does not tell the names of its classes; give assets/labels.txt of the "
                "export with --labels=FILE"
            )
        self.class_names = tuple(map(str, names))

    def classify(self, images: np.ndarray) -> np.ndarray:
        """Probabilities float32 [N, K] of uint8 [N, H, W, 3], N of any size."""
        rows = self._in_batches(*self._client.to_classify(images, self.rule), "probabilities")
        return rows.reshape(-1, len(self.class_names))

    def features(self, images: np.ndarray) -> np.ndarray:
        """Feature vectors float32 [N, D] of uint8 [N, H, W, 3]."""
        values = self._client.pixels(images)
        return self._in_batches("features", "images", values, "features")

    def _in_batches(self, signature: str, name: str, values, output: str) -> np.ndarray:
        rows = [
            self._batch(signature, name, values[start : start + BATCH_SIZE], output)
            for start in range(0, len(values), BATCH_SIZE)
        ]
        return np.concatenate(rows) if rows else np.empty((0, 0), np.float32)

    def _batch(self, signature: str, name: str, values, output: str) -> np.ndarray:
        """An output of a signature, float32 [N, ...]; splits a request that is too large."""
        try:
            found = _retried(self._client.predict, signature, name, values, output)
        except TooLargeError:
            if len(values) == 1:
                raise
            half = len(values) // 2
            halves = (values[:half], values[half:])
            return np.concatenate([self._batch(signature, name, each, output) for each in halves])
        try:
            rows = np.array(found, np.float32)
            width = len(self.class_names) if output == "probabilities" else rows.shape[1]
            if rows.shape != (len(values), width):
                raise ValueError
        except (TypeError, ValueError, IndexError):
            raise UserError(
                f"{self.url} did not answer with {output} of {len(values)} images"
                f"{f' in {len(self.class_names)} classes' * (output == 'probabilities')}"
            ) from None
        return rows


def _client(url: str, timeout: float):
    if url.startswith("grpc:"):
        from keras_cifar.inference.remote_grpc import GrpcClient

        return GrpcClient(url, timeout)
    return RestClient(url, timeout)


def _retried(function: Callable, *arguments):
    """Calls a function, again after each of DELAYS while it fails for a time."""
    for delay in DELAYS:
        with contextlib.suppress(TemporaryError):
            return function(*arguments)
        time.sleep(delay)
    return function(*arguments)


class RestClient:
    """Requests over HTTP.

    Images are sent as PNG, which is lossless and a fifth of the numbers in JSON. They have the model's
    size already and go to the signature that leaves such images as they are, so the predictions are
    those of the model on the pixels.
    """

    def __init__(self, url: str, timeout: float):
        """Raises UsageError for an invalid address; `timeout` in seconds."""
        self._url, self._timeout = url, timeout
        if not _MODEL_URL.fullmatch(url):
            raise UsageError(
                f"--model={url}: a URL must be http://HOST:PORT/v1/models/NAME[/versions/N]"
            )

    def metadata(self) -> tuple[dict, object]:
        """(the signatures, the class names if the server tells them), as the JSON has them."""
        metadata = self._request("/metadata")["metadata"]
        return metadata["signature_def"]["signature_def"], metadata.get("class_names")

    def to_classify(self, images: np.ndarray, rule: str) -> tuple[str, str, list]:
        """(signature, input, its values) by which uint8 [N, H, W, 3] are classified."""
        encoded = []
        for image in images:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG", compress_level=1)
            encoded.append({"b64": base64.b64encode(file.getvalue()).decode()})
        return CROPPED if rule == CROP else "serving_bytes", "image_bytes", encoded

    def pixels(self, images: np.ndarray) -> list:
        """The values of an input that takes uint8 [N, H, W, 3]."""
        return images.tolist()

    def predict(self, signature: str, name: str, values: list, output: str) -> object:
        """The JSON of an output; None if the response has none."""
        request = {"signature_name": signature, "inputs": {name: values}}
        response = self._request(":predict", json.dumps(request).encode())
        outputs = response.get("outputs") if type(response) is dict else None
        # It is not named where there is only one.
        return outputs.get(output) if type(outputs) is dict else outputs

    def _request(self, suffix: str, body: bytes | None = None) -> object:
        request = urllib.request.Request(self._url + suffix, body)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                text = response.read(MAX_RESPONSE + 1)
        except urllib.error.HTTPError as error:
            with error:
                message = f"{self._url} answered {error.code}: {_message(error)}"
            if error.code == 413:
                raise TooLargeError(message) from None
            raise (TemporaryError if error.code in RETRIED else UserError)(message) from None
        except (OSError, OverflowError, http.client.HTTPException) as error:
            why = error.reason if isinstance(error, urllib.error.URLError) else error
            if (
                isinstance(why, (BrokenPipeError, ConnectionResetError))
                and len(body or b"") > SMALL
            ):
                # A server may refuse a large body, and close before all of it was sent.
                raise TooLargeError(f"{self._url} closed the connection: {reason(why)}") from None
            if isinstance(why, TimeoutError):
                why = f"no response in {self._timeout:g} s"
            elif isinstance(why, BaseException):
                why = reason(why)
            raise TemporaryError(f"{self._url} cannot be reached: {why}") from None
        if len(text) > MAX_RESPONSE:
            raise UserError(f"{self._url} answered more than {MAX_RESPONSE:,} bytes")
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise UserError(f"{self._url} did not answer with JSON") from None


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read(2**16))["error"])
    except (ValueError, KeyError, TypeError, RecursionError, OSError, http.client.HTTPException):
        return str(error.reason)
