"""Loads the newest version of a model below a base path, as TensorFlow Serving does."""

import concurrent.futures
import functools
import io
import pathlib
import time
import weakref
from collections.abc import Iterator

import numpy as np
import tensorflow as tf
from PIL import Image
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis.get_model_metadata_pb2 import SignatureDefMap

from keras_cifar.core.environment import intra_op_threads
from keras_cifar.core.errors import UserError, reason
from keras_cifar.core.files import versions
from keras_cifar.data.images import MAX_PIXELS, decoding_work
from keras_cifar.inference.predictor import Predictor, find
from keras_cifar.serving import rest

# Pixels a side up to which a core computes images of its own; above, all share the work of each.
# ResNet-32 on 2 cores: one image takes 1.1 instead of 1.7 ms, 16 in two halves 4.9 instead of 7.2
# ms. ResNet-50 at 224 pixels: one image would take 37 instead of 25 ms.
MAX_OWN_CORE = 64
# Each call of a signature holds Python's lock for some 0.1 ms. More than 2 parts were not measured.
MAX_PARTS = 16
RETRY = 60  # seconds until a failed version is tried again, as TensorFlow Serving does


class Servable:
    """A loaded version of a model. Its directory is not read again.

    Attributes:
        version, path, class_names: its number, its directory, and the names of its classes.
        precision: (the type in which it is computed, why).
        inputs: the input of each signature.
        run: the function of each signature, array [N, ...] -> {output: [N, ...]}; always the same
            objects, since the batcher compares them.
        signature_defs: a SignatureDefMap.
    """

    def __init__(
        self, path: pathlib.Path, batch_size: int, dtype_policy: str = "float32", parts: int = 1
    ):
        """Loads the version and runs each signature once, so that no request waits for that.

        Args:
            parts: into which a batch is divided, to be computed at the same time.

        Raises:
            UserError: the version is damaged, or cannot be computed here.
        """
        self._predictor = predictor = Predictor(str(path))  # kept, since it owns the variables
        self.precision = predictor.choose_precision(dtype_policy)
        self._batch_size, self._parts = batch_size, parts
        self._pool = concurrent.futures.ThreadPoolExecutor(parts, "part")
        self.version = int(path.name) if path.name.isdecimal() else 1
        self.path, self.class_names = path, predictor.class_names
        self.inputs = {name: _input(name, f) for name, f in predictor.signatures.items()}
        self.run = {name: functools.partial(self._compute, name) for name in self.inputs}
        black = np.zeros((1, *predictor.size, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(black[0]).save(file, "PNG")
        encoded = np.array([file.getvalue()], object)
        self.signature_defs = signature_defs(path)
        try:
            for name, spec in self.inputs.items():
                self.run[name](encoded if spec.is_string else black)
        except Exception as error:  # TensorFlow reports a missing kernel at the first call.
            raise UserError(f"{path} is not a valid model: {reason(error)}") from None

    def _compute(self, signature: str, inputs: np.ndarray) -> dict[str, np.ndarray]:
        spec, function = self.inputs[signature], self._predictor.signatures[signature]

        def compute(part: np.ndarray) -> dict[str, np.ndarray]:
            outputs = function(**{spec.name: tf.constant(part)})
            return {name: value.numpy() for name, value in outputs.items()}

        found = []
        for batch in _split(inputs, self._batch_size, spec.name == "image_bytes"):
            parts = np.array_split(batch, min(self._parts, len(batch)))
            found += self._pool.map(compute, parts) if len(parts) > 1 else [compute(batch)]
        return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def signature_defs(path: pathlib.Path) -> SignatureDefMap:
    """The signatures of a SavedModel; UserError if it is damaged."""
    try:
        graph = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
        return SignatureDefMap(signature_def=graph.meta_graphs[0].signature_def)
    except Exception as error:  # protobuf's, and what a damaged file raises
        raise UserError(f"{path} is not a valid model: {reason(error)}") from None


def give_cores(model: str) -> int:
    """Lets each core compute images of its own where that is faster, before TensorFlow computes.

    Returns:
        The parts into which batches are to be divided.

    Raises:
        UserError: there is no model, or it is damaged.
    """
    signatures = signature_defs(find(model)).signature_def
    sides = [
        size.size for size in signatures[rest.DEFAULT_SIGNATURE].inputs["images"].tensor_shape.dim
    ]
    if max(sides, default=0) > MAX_OWN_CORE or tf.config.list_physical_devices("GPU"):
        return 1
    try:
        tf.config.threading.set_intra_op_parallelism_threads(1)
    except RuntimeError:  # TensorFlow computes already.
        return 1
    return min(intra_op_threads(), MAX_PARTS)


def _input(name: str, function) -> rest.Input:
    inputs = function.structured_input_signature[1]
    if len(inputs) != 1:
        raise UserError(f"its signature {name} takes {len(inputs)} inputs instead of one")
    ((name, spec),) = inputs.items()
    return rest.Input(name, tuple(spec.shape), spec.dtype == tf.string)


def _split(inputs: np.ndarray, size: int, encoded: bool) -> Iterator[np.ndarray]:
    """The inputs in batches of up to `size`.

    A signature decodes the images of a batch at the same time, on all cores. So a batch of encoded
    images has no more than MAX_PIXELS in sum; an image of more is replaced by an empty file. This holds
    for exports whose graph has no such limit, too.
    """
    if not encoded:
        yield from (inputs[start : start + size] for start in range(0, len(inputs), size))
        return
    start, total, inputs = 0, 0, inputs.copy()
    for row, image in enumerate(inputs):
        pixels = decoding_work(image)
        if pixels > MAX_PIXELS:
            inputs[row], pixels = b"", 0
        if row - start == size or total + pixels > MAX_PIXELS:
            yield inputs[start:row]
            start, total = row, 0
        total += pixels
    yield inputs[start:]


class Versions:
    """The versions of a model: one is served, one may be being loaded, some have failed.

    Attributes:
        current: the version that is served.
        replaced: those that were served and are in memory still, perhaps for a request that goes on.
    """

    def __init__(self, model: str, batch_size: int, dtype_policy: str = "float32", parts: int = 1):
        """Loads the newest version.

        Args:
            model: a run, a base path or a version's directory, as `predictor.find` takes them; new
                versions are loaded except for the last.
            batch_size: rows computed at a time.
            dtype_policy: see `Predictor.choose_precision`.
            parts: see `Servable`.

        Raises:
            UserError: there is none, or it is invalid.
        """
        path = find(model)
        is_base = path != pathlib.Path(model).expanduser() and path.name.isdecimal()
        self._base = path.parent if is_base else None
        self.replaced: weakref.WeakSet[Servable] = weakref.WeakSet()
        self._loading: int | None = None
        self._failed: dict[int, tuple[float, str]] = {}  # version -> (when, why)
        self._load = functools.partial(
            Servable, batch_size=batch_size, dtype_policy=dtype_policy, parts=parts
        )
        self.current = self._load(path)

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
            loaded = self._load(self._base / str(version))
        except UserError as error:
            self._failed[version] = (time.monotonic(), str(error))
            return (
                f"version {version} cannot be served, still serving {self.current.version}: {error}"
            )
        finally:
            self._loading = None
        self._failed.pop(version, None)
        self.replaced.add(self.current)
        before, self.current = self.current.version, loaded
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
