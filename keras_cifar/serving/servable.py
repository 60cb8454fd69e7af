"""Loads the newest version of a model below a base path, as TensorFlow Serving does."""

import functools
import gc
import io
import pathlib
import time

import numpy as np
import tensorflow as tf
from google.protobuf import json_format
from PIL import Image
from tensorflow.core.protobuf import saved_model_pb2

from keras_cifar.core.errors import UserError, reason
from keras_cifar.core.files import versions
from keras_cifar.inference.predictor import Predictor, find
from keras_cifar.serving import rest

RETRY = 60  # seconds until a failed version is tried again, as TensorFlow Serving does


class Servable:
    """A loaded version, with its number, its directory and its class names."""

    def __init__(self, path: pathlib.Path, batch_size: int):
        """Loads the version and runs each signature once, so that no request waits for that.

        Raises:
            UserError: the version is damaged, or cannot be computed here.
        """
        self._predictor = predictor = Predictor(str(path))  # kept, since it owns the variables
        self._batch_size = batch_size
        self.version = int(path.name) if path.name.isdecimal() else 1
        self.path, self.class_names = path, predictor.class_names
        self._signatures = {
            name: _Signature(name, signature) for name, signature in predictor.signatures.items()
        }
        # One object per signature, since the batcher compares them.
        self._run = {n: functools.partial(self._compute, s) for n, s in self._signatures.items()}
        black = np.zeros((1, *predictor.size, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(black[0]).save(file, "PNG")
        encoded = np.array([file.getvalue()], object)
        try:
            for name, signature in self._signatures.items():
                self._run[name](encoded if signature.is_string else black)
        except Exception as error:  # TensorFlow reports a missing kernel at the first call.
            raise UserError(f"{path} is not a valid model: {reason(error)}") from None

    def prepare(self, call: rest.Call) -> tuple:
        """The arguments of `Batcher.submit` for a call; raises RequestError if it fits no signature."""
        signature = self._signatures.get(call.signature)
        if signature is None:
            names = ", ".join(sorted(self._signatures))
            message = f"there is no signature {call.signature!r}; the model has: {names}"
            raise rest.RequestError(message)
        inputs = rest.tensor(call, signature.input, signature.shape, signature.is_string)
        return self._run[call.signature], inputs

    def _compute(self, signature: "_Signature", inputs: np.ndarray) -> dict[str, np.ndarray]:
        batches = []
        for start in range(0, len(inputs), self._batch_size):
            batch = tf.constant(inputs[start : start + self._batch_size], signature.dtype)
            outputs = signature.function(**{signature.input: batch})
            batches.append({name: value.numpy() for name, value in outputs.items()})
        return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}

    @functools.cached_property
    def signature_def(self) -> dict:
        """The signatures in the JSON of TensorFlow Serving's metadata."""
        model = saved_model_pb2.SavedModel.FromString((self.path / "saved_model.pb").read_bytes())
        style = {"preserving_proto_field_name": True, "always_print_fields_with_no_presence": True}
        signatures = model.meta_graphs[0].signature_def
        return {name: json_format.MessageToDict(s, **style) for name, s in signatures.items()}


class _Signature:
    """A function of a SavedModel and its single input."""

    def __init__(self, name: str, function):
        inputs = function.structured_input_signature[1]
        if len(inputs) != 1:
            raise UserError(f"its signature {name} takes {len(inputs)} inputs instead of one")
        ((self.input, spec),) = inputs.items()
        self.function, self.dtype = function, spec.dtype
        self.shape, self.is_string = tuple(spec.shape), spec.dtype == tf.string


class Versions:
    """The versions of a model: `current` answers, one may be being loaded, some have failed."""

    def __init__(self, model: str, batch_size: int):
        """Loads the newest version.

        Args:
            model: a run, a base path or a version's directory, as `predictor.find` takes them; new
                versions are loaded except for the last.
            batch_size: rows computed at a time.

        Raises:
            UserError: there is none, or it is invalid.
        """
        path = find(model)
        is_base = path != pathlib.Path(model).expanduser() and path.name.isdecimal()
        self._base = path.parent if is_base else None
        self._batch_size = batch_size
        self._loading: int | None = None
        self._failed: dict[int, tuple[float, str]] = {}  # version -> (when, why)
        self.current = Servable(path, batch_size)

    def refresh(self) -> str | None:
        """Loads the newest version on disk unless it is being served; `current` answers meanwhile.

        Returns a message about what changed, None where nothing did.
        """
        found = versions(self._base) if self._base else []
        self._failed = {v: failure for v, failure in self._failed.items() if v in found}
        if not found or found[-1] == self.current.version:
            return None
        version = found[-1]
        if version in self._failed and time.monotonic() < self._failed[version][0] + RETRY:
            return None
        self._loading = version
        try:
            loaded = Servable(self._base / str(version), self._batch_size)
        except UserError as error:
            self._failed[version] = (time.monotonic(), str(error))
            return (
                f"version {version} cannot be served, still serving {self.current.version}: {error}"
            )
        finally:
            self._loading = None
        self._failed.pop(version, None)
        before, self.current = self.current.version, loaded
        gc.collect()  # TensorFlow's functions are in cycles; this frees the old version's memory.
        return f"version {version} replaces {before}"

    def get(self, version: int | None) -> Servable:
        """The version being served; raises RequestError if `version` is another."""
        current = self.current
        if version not in (None, current.version):
            raise rest.RequestError(f"version {version} is not served; {current.version} is", 404)
        return current

    def status(self, version: int | None) -> dict:
        """TensorFlow Serving's GetModelStatusResponse of a version; None is all."""
        states = [_status(self.current.version, "AVAILABLE")]
        if (loading := self._loading) is not None:
            states.append(_status(loading, "LOADING"))
        failed = sorted(self._failed.items())
        states += [_status(v, "END", "UNKNOWN", why) for v, (_, why) in failed if v != loading]
        if version is not None:
            states = [state for state in states if state["version"] == str(version)]
            if not states:
                raise rest.RequestError(f"there is no version {version}", 404)
        return {"model_version_status": states[::-1]}


def _status(version: int, state: str, code: str = "OK", message: str = "") -> dict:
    status = {"error_code": code, "error_message": message}
    return {"version": str(version), "state": state, "status": status}
