"""Inference by a server that speaks TensorFlow Serving's REST format; standard library and Pillow."""

import base64
import http.client
import io
import json
import pathlib
import re
import time
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
from PIL import Image

from keras_cifar.core.config import BATCH_SIZE
from keras_cifar.core.errors import UsageError, UserError, reason
from keras_cifar.core.files import read
from keras_cifar.inference.predictor import MAX_LABELS

# Seconds between tries of a request: a server that is started again is there within them.
DELAYS = (0.25, 1.0, 3.0)
# Of a server or a proxy that is busy or just away.
TRY_AGAIN = (408, 429, 502, 503, 504)
MAX_ANSWER = 2**28  # bytes; the probabilities of 128 images in 21,841 classes take 60 MB


class RemotePredictor:
    """A model behind a server, to be used as `predictor.Predictor` is.

    Images go as PNG to `serving_bytes`, since PNG loses nothing and is a fifth of the numbers in
    JSON; they have the model's size already, so the server has nothing to resize and the answers
    are those of the model on the pixels.

    Attributes:
        url: the model's, .../v1/models/NAME.
        size: (height, width) of the images it takes, in pixels.
        class_names: in the order of the probabilities.
    """

    def __init__(self, url: str, timeout: float, labels: str | None = None):
        """Asks the server about the model.

        Args:
            url: http://HOST:PORT/v1/models/NAME, perhaps with /versions/N.
            timeout: seconds that a request may take.
            labels: a file with a class name a line, for servers that do not tell them.

        Raises:
            UserError: the server cannot be reached, or has no such model.
            UsageError: the address is none.
        """
        self.url = url.rstrip("/")
        self._timeout = timeout
        if not _is_address(self.url):
            raise UsageError(
                f"--model={url}: an address is http://HOST:PORT/v1/models/NAME[/versions/N]"
            )
        metadata = self._ask("/metadata")
        try:
            metadata = metadata["metadata"]
            images = metadata["signature_def"]["signature_def"]["serving_default"]["inputs"][
                "images"
            ]
            height, width = (int(d["size"]) for d in images["tensor_shape"]["dim"][1:3])
            names = metadata.get("class_names")
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{self.url} is not one of our models") from None
        self.size = (height, width)
        if labels:
            names = read(pathlib.Path(labels), MAX_LABELS).decode("utf-8", "replace").splitlines()
        if type(names) is not list or not names:
            raise UserError(
                f"{self.url} does not tell the names of its classes; --labels=FILE does, which is "
                "assets/labels.txt of the export"
            )
        self.class_names = tuple(map(str, names))

    def classify(self, images: np.ndarray) -> np.ndarray:
        """Probabilities float32 [N, K] of uint8 [N, H, W, 3], N of any size.

        Raises:
            UserError: the server fails.
        """
        encoded = [_png(image) for image in images]
        rows = self._in_batches("serving_bytes", "image_bytes", "probabilities", encoded)
        return rows.reshape(-1, len(self.class_names))

    def features(self, images: np.ndarray) -> np.ndarray:
        """Feature vectors float32 [N, D] of uint8 [N, H, W, 3].

        Raises:
            UserError: the server fails.
        """
        return self._in_batches("features", "images", "features", images.tolist())

    def _in_batches(self, signature: str, name: str, output: str, values: list) -> np.ndarray:
        parts = [np.empty((0, 0), np.float32)]
        for start in range(0, len(values), BATCH_SIZE):
            parts.append(self._batch(signature, name, output, values[start : start + BATCH_SIZE]))
        return np.concatenate(parts[1:] or parts)

    def _batch(self, signature: str, name: str, output: str, values: list) -> np.ndarray:
        """One output of a signature, float32 [N, ...]."""
        request = {"signature_name": signature, "inputs": {name: values}}
        try:
            answer = self._ask(":predict", json.dumps(request).encode())
        except _TooLargeError:
            if len(values) == 1:
                raise
            half = len(values) // 2
            parts = (values[:half], values[half:])
            return np.concatenate([self._batch(signature, name, output, part) for part in parts])
        try:
            outputs = answer["outputs"]  # without its name where there is one alone
            rows = np.array(outputs[output] if type(outputs) is dict else outputs, np.float32)
            width = len(self.class_names) if output == "probabilities" else rows.shape[1]
            if rows.shape != (len(values), width):
                raise ValueError
        except (KeyError, TypeError, ValueError, IndexError):
            raise UserError(
                f"{self.url} answered something else than {output} of {len(values)} images"
                f"{f' in {len(self.class_names)} classes' * (output == 'probabilities')}"
            ) from None
        return rows

    def _ask(self, suffix: str, body: bytes | None = None) -> object:
        """The JSON that the server answers, after some tries.

        Raises:
            UserError: there is none.
        """
        for delay in (*DELAYS, None):
            try:
                return self._ask_once(suffix, body)
            except _AwayError:
                if delay is None:
                    raise
                time.sleep(delay)
        raise AssertionError

    def _ask_once(self, suffix: str, body: bytes | None) -> object:
        request = urllib.request.Request(self.url + suffix, body)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                text = answer.read(MAX_ANSWER + 1)
        except urllib.error.HTTPError as error:
            with error:
                message = f"{self.url} answered {error.code}: {_message(error)}"
            if error.code == 413:
                raise _TooLargeError(message) from None
            raise (_AwayError if error.code in TRY_AGAIN else UserError)(message) from None
        except (OSError, http.client.HTTPException) as error:
            why = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(why, TimeoutError):
                why = f"no answer in {self._timeout:g} s"
            elif isinstance(why, BaseException):
                why = reason(why)
            raise _AwayError(f"{self.url} cannot be reached: {why}") from None
        if len(text) > MAX_ANSWER:
            raise UserError(f"{self.url} answered more than {MAX_ANSWER:,} bytes")
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise UserError(f"{self.url} answered something that is not JSON") from None


class _AwayError(UserError):
    """The server may be there the next time."""


class _TooLargeError(UserError):
    """The server takes smaller requests alone."""


def _is_address(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        parts.port  # noqa: B018  raises where it is no number
    except ValueError:
        return False
    path = re.fullmatch(r"(/\S*)?/v1/models/[^/:\s]+(/versions/\d+|/labels/[^/:\s]+)?", parts.path)
    return bool(path and parts.hostname and not re.search(r"\s", url))


def _png(image: np.ndarray) -> dict[str, str]:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1)
    return {"b64": base64.b64encode(file.getvalue()).decode()}


def _message(error: urllib.error.HTTPError) -> str:
    """What an answer that is an error says."""
    try:
        return str(json.loads(error.read(2**16))["error"])
    except (ValueError, KeyError, TypeError, RecursionError, OSError, http.client.HTTPException):
        return str(error.reason)
