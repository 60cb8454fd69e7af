"""Inference through a server with TensorFlow Serving's REST API; standard library and Pillow."""

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

import numpy as np
from PIL import Image

from keras_cifar.core.config import BATCH_SIZE
from keras_cifar.core.errors import UsageError, UserError, reason
from keras_cifar.core.files import read
from keras_cifar.core.image_size import CROP
from keras_cifar.inference.predictor import CROPPED, MAX_LABELS, rule_of

DELAYS = (0.25, 1.0, 3.0)  # seconds between tries of a request: a server restarts within them
RETRIED = (408, 429, 502, 503, 504)  # statuses of a server or a proxy that is busy or restarting
_MODEL_URL = re.compile(
    r"https?://(\[[\da-fA-F:.]+\]|[^\s/:\[\]]+)(:\d{1,5})?(/\S*)?"
    r"/v1/models/[^\s/:]+(/versions/\d+|/labels/[^\s/:]+)?"
)
MAX_RESPONSE = 2**28  # bytes; the probabilities of 128 images in 21,841 classes take 60 MB


class RemotePredictor:
    """A model behind a server, with the methods of `predictor.Predictor`; they raise UserError.

    Images are sent as PNG, which is lossless and a fifth of the numbers in JSON. They have the model's
    size already and go to the signature that leaves such images as they are, so the predictions are
    those of the model on the pixels.
    """

    def __init__(self, url: str, timeout: float, labels: str | None = None):
        """Requests the model's metadata.

        Args:
            timeout: seconds that a request may take.
            labels: a file with a class name a line, for servers that do not tell them.

        Raises:
            UserError: the server cannot be reached, or has no such model.
            UsageError: the address is invalid.
        """
        self.url = url.rstrip("/")
        self._timeout = timeout
        if not _MODEL_URL.fullmatch(self.url):
            raise UsageError(
                f"--model={url}: a URL must be http://HOST:PORT/v1/models/NAME[/versions/N]"
            )
        response = self._request("/metadata")
        try:
            signatures = response["metadata"]["signature_def"]["signature_def"]
            shape = signatures["serving_default"]["inputs"]["images"]["tensor_shape"]
            height, width = (int(dimension["size"]) for dimension in shape["dim"][1:3])
            names = response["metadata"].get("class_names")
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{self.url} is not a model that keras_cifar exported") from None
        self.size, self.rule = (height, width), rule_of(signatures)
        self._of_files = CROPPED if self.rule == CROP else "serving_bytes"
        if labels:
            names = read(pathlib.Path(labels), MAX_LABELS).decode("utf-8", "replace").splitlines()
        if type(names) is not list or not names:
            raise UserError(
                f"{self.url} does not tell the names of its classes; give assets/labels.txt of the "
                "export with --labels=FILE"
            )
        self.class_names = tuple(map(str, names))

    def classify(self, images: np.ndarray) -> np.ndarray:
        """Probabilities float32 [N, K] of uint8 [N, H, W, 3], N of any size."""
        encoded = []
        for image in images:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG", compress_level=1)
            encoded.append({"b64": base64.b64encode(file.getvalue()).decode()})
        rows = self._in_batches(self._of_files, "image_bytes", "probabilities", encoded)
        return rows.reshape(-1, len(self.class_names))

    def features(self, images: np.ndarray) -> np.ndarray:
        """Feature vectors float32 [N, D] of uint8 [N, H, W, 3]."""
        return self._in_batches("features", "images", "features", images.tolist())

    def _in_batches(self, signature: str, name: str, output: str, values: list) -> np.ndarray:
        rows = [
            self._batch(signature, name, output, values[start : start + BATCH_SIZE])
            for start in range(0, len(values), BATCH_SIZE)
        ]
        return np.concatenate(rows) if rows else np.empty((0, 0), np.float32)

    def _batch(self, signature: str, name: str, output: str, values: list) -> np.ndarray:
        """An output of a signature, float32 [N, ...]; splits a request that is too large."""
        request = {"signature_name": signature, "inputs": {name: values}}
        try:
            response = self._request(":predict", json.dumps(request).encode())
        except _TooLargeError:
            if len(values) == 1:
                raise
            half = len(values) // 2
            halves = (values[:half], values[half:])
            return np.concatenate([self._batch(signature, name, output, each) for each in halves])
        try:
            outputs = response["outputs"]  # not named where there is only one
            rows = np.array(outputs[output] if type(outputs) is dict else outputs, np.float32)
            width = len(self.class_names) if output == "probabilities" else rows.shape[1]
            if rows.shape != (len(values), width):
                raise ValueError
        except (KeyError, TypeError, ValueError, IndexError):
            raise UserError(
                f"{self.url} did not answer with {output} of {len(values)} images"
                f"{f' in {len(self.class_names)} classes' * (output == 'probabilities')}"
            ) from None
        return rows

    def _request(self, suffix: str, body: bytes | None = None) -> object:
        """Sends a request, repeatedly if necessary, and returns the JSON of the response."""
        for delay in DELAYS:
            with contextlib.suppress(_TemporaryError):
                return self._request_once(suffix, body)
            time.sleep(delay)
        return self._request_once(suffix, body)

    def _request_once(self, suffix: str, body: bytes | None) -> object:
        request = urllib.request.Request(self.url + suffix, body)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                text = response.read(MAX_RESPONSE + 1)
        except urllib.error.HTTPError as error:
            with error:
                message = f"{self.url} answered {error.code}: {_message(error)}"
            if error.code == 413:
                raise _TooLargeError(message) from None
            raise (_TemporaryError if error.code in RETRIED else UserError)(message) from None
        except (OSError, OverflowError, http.client.HTTPException) as error:
            why = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(why, TimeoutError):
                why = f"no response in {self._timeout:g} s"
            elif isinstance(why, BaseException):
                why = reason(why)
            raise _TemporaryError(f"{self.url} cannot be reached: {why}") from None
        if len(text) > MAX_RESPONSE:
            raise UserError(f"{self.url} answered more than {MAX_RESPONSE:,} bytes")
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise UserError(f"{self.url} did not answer with JSON") from None


class _TemporaryError(UserError):
    """The next try may succeed."""


class _TooLargeError(UserError):
    """The request is too large for the server."""


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read(2**16))["error"])
    except (ValueError, KeyError, TypeError, RecursionError, OSError, http.client.HTTPException):
        return str(error.reason)
